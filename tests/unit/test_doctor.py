"""Every check of the doctor, made to fail by the real thing it looks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from waiting import eventually

from swtpm_prop.cli.doctor import command
from swtpm_prop.doctor import access, confinement, daemon, guests, index, installation, swtpm
from swtpm_prop.doctor.checks import examine
from swtpm_prop.doctor.finding import Finding, Patient, State
from swtpm_prop.errors import StoreError
from swtpm_prop.install import manifest, steps
from swtpm_prop.install.plan import Host
from swtpm_prop.install.survey import survey
from swtpm_prop.layout import Layout
from swtpm_prop.trust.build import build
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.index import Index, validity, validity_line
from swtpm_prop.trust.sources import Subject

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
DAY = 86400


@pytest.fixture
def root() -> Iterator[Path]:
    """A host with the product in it, where swtpm's user can look at it (pytest's own directories are root's)."""
    path = Path(tempfile.mkdtemp(prefix="swtpm-prop-"))
    try:
        path.chmod(0o755)
        (path / "etc/libvirt").mkdir(parents=True)
        profiles = path / "etc/apparmor.d/abstractions"
        profiles.mkdir(parents=True)
        (profiles / "libvirt-qemu").write_text("#include <local/abstractions/libvirt-qemu>\n")
        steps.install(Layout(path), survey(Layout(path)))
        build_index(Layout(path), 365 * DAY)
        yield path
    finally:
        shutil.rmtree(path)


def build_index(layout: Layout, lasts: int, certificate_lasts: int = 365 * DAY) -> None:
    now = int(time.time())
    certificate = Certificate(
        id="sha256:" + "11" * 32,
        issuer="https://example.org/issuer",
        created=now - 90 * DAY,
        properties=("https://example.org/p",),
        not_before=now - 90 * DAY,
        not_after=now + certificate_lasts,
        serial="01",
        subjects=(Subject("kernel", {"sha256": b"\x01" * 32}),),
    )
    build(layout.index, [certificate], now + lasts, lambda what, done: None)


def patient(root: Path, *, live: bool = False) -> Patient:
    return Patient(Layout(root), live=live)


def found(findings: Iterator[Finding]) -> dict[str, State]:
    return {finding.id: finding.state for finding in findings}


# -- the installation ---------------------------------------------------------------------------
def test_a_whole_installation_is_ok(root: Path) -> None:
    assert found(installation.installed(patient(root))) == {"install.whole": State.OK}
    assert found(installation.programs(patient(root))) == {"hook.executable": State.OK}


def test_nothing_installed(tmp_path: Path) -> None:
    assert found(installation.installed(patient(tmp_path))) == {"install.absent": State.PROBLEM}
    assert found(installation.programs(patient(tmp_path))) == {"hook.directory-missing": State.PROBLEM}


def test_missing_and_changed_files_are_named(root: Path) -> None:
    layout = Layout(root)
    layout.hook.unlink()
    (layout.libexec / "swtpm").write_text("#!/bin/sh\n")
    (root / "etc/apparmor.d/local/abstractions/libvirt-qemu").write_text("")
    findings = list(installation.installed(patient(root)))
    assert {(f.id, f.what.split()[0]) for f in findings} == {
        ("install.file-missing", "/etc/libvirt/hooks/qemu.d/swtpm-prop"),
        ("install.file-missing", "/etc/apparmor.d/local/abstractions/libvirt-qemu"),
        ("install.file-changed", "/usr/libexec/swtpm-prop/swtpm"),
    }
    assert all(f.state is State.PROBLEM and f.mend for f in findings)


def test_interrupted_and_older_installations(root: Path) -> None:
    listed = manifest.load(Layout(root))
    assert listed is not None
    listed.complete, listed.release = False, "0.0.1"
    listed.save(Layout(root))
    assert found(installation.installed(patient(root))) == {
        "install.interrupted": State.PROBLEM,
        "install.other-release": State.WARNING,
    }


def test_hook_without_run_bit(root: Path) -> None:
    Layout(root).hook.chmod(0o644)
    assert found(installation.programs(patient(root))) == {"hook.not-executable": State.PROBLEM}


@pytest.mark.root
def test_hook_of_another_user(root: Path) -> None:
    os.chown(Layout(root).hook, 65534, 65534)
    assert found(installation.programs(patient(root))) == {"hook.not-roots": State.PROBLEM}


def test_start_script_writable_for_others(root: Path) -> None:
    (Layout(root).libexec / "swtpm_setup").chmod(0o777)
    assert found(installation.programs(patient(root))) == {"hook.not-roots": State.PROBLEM}


def rewrite(root: Path, **values: object) -> Patient:
    """The patient whose record names another interpreter, object or package."""
    path = manifest.path_of(Layout(root))
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return patient(root, live=True)


def test_interpreter_missing(root: Path) -> None:
    assert found(installation.interpreter(rewrite(root, python="/nonexistent/python"))) == {
        "hook.interpreter-missing": State.PROBLEM
    }


def test_interpreter_without_the_package(root: Path) -> None:
    bare = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    [finding] = installation.interpreter(rewrite(root, python="/venv/bin/python"))
    assert (finding.id, finding.state) == ("hook.package-missing", State.PROBLEM)
    assert "swtpm_prop" in finding.what


def test_interpreter_with_the_package(root: Path) -> None:
    bare = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    [packages] = bare.glob("lib/python3*/site-packages")
    (packages / "all.pth").write_text("\n".join(path for path in sys.path if path))
    [finding] = installation.interpreter(rewrite(root, python="/venv/bin/python"))
    assert (finding.id, finding.state) == ("hook.package", State.OK)


# -- swtpm --------------------------------------------------------------------------------------
def test_swtpm_of_this_system() -> None:
    here = Patient(Layout(), live=True)
    assert found(swtpm.programs(here)) == {"swtpm.version": State.OK, "swtpm.dynamic": State.OK}


def test_swtpm_and_swtpm_setup_missing(root: Path) -> None:
    assert found(swtpm.programs(patient(root))) == {
        "swtpm.swtpm-missing": State.PROBLEM,
        "swtpm.swtpm-setup-missing": State.PROBLEM,
    }


def put_program(root: Path, name: str, text: str) -> Path:
    path = root / "usr/bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "finding"),
    [("TPM emulator version 0.6.4, Copyright", "swtpm.too-old"), ("hello", "swtpm.version-unknown")],
)
def test_swtpm_too_old_or_strange(root: Path, text: str, finding: str) -> None:
    put_program(root, "swtpm_setup", "")
    put_program(root, "swtpm", f"#!/bin/sh\necho '{text}'\n")
    assert found(swtpm.programs(patient(root, live=True)))[finding] is State.PROBLEM


def test_swtpm_that_is_statically_linked(root: Path) -> None:
    put_program(root, "swtpm_setup", "")
    shutil.copy("/bin/busybox", put_program(root, "swtpm", ""))
    assert found(swtpm.programs(patient(root, live=True)))["swtpm.not-dynamic"] is State.PROBLEM


def test_object_missing(root: Path) -> None:
    assert found(swtpm.preload(patient(root))) == {"preload.missing": State.PROBLEM}


def test_object_for_a_python_that_is_not_there(root: Path) -> None:
    built = survey(Layout()).preload.read_bytes()
    known = f"libpython{sys.version_info.major}.{sys.version_info.minor}".encode()
    assert known in built
    strange = root / "layer.so"
    strange.write_bytes(built.replace(known, known[:-2] + b"99"))
    strange.chmod(0o755)
    [finding] = swtpm.preload(rewrite(root, preload="/layer.so"))
    assert (finding.id, finding.state) == ("preload.libraries", State.PROBLEM)
    assert "libpython" in finding.what


def test_object_of_this_system() -> None:
    assert [library for library in swtpm.needed(survey(Layout()).preload) if library.path is None] == []


@pytest.mark.root
def test_certificate_authority_left_to_root(root: Path) -> None:
    directory = root / "var/lib/swtpm-localca"
    directory.mkdir()
    assert found(swtpm.local_ca(patient(root))) == {"swtpm.local-ca-owner": State.PROBLEM}
    shutil.chown(directory, "tss")
    assert found(swtpm.local_ca(patient(root))) == {"swtpm.local-ca": State.OK}
    (directory / "signkey.pem").write_text("")
    assert found(swtpm.local_ca(patient(root))) == {"swtpm.local-ca-owner": State.PROBLEM}


# -- what swtpm's user can read -----------------------------------------------------------------
@contextmanager
def furnished(root: Path) -> Iterator[Patient]:
    """The root holds interpreter, object and package themselves, as a host does."""
    package = root / "opt/x/swtpm_prop"
    package.mkdir(parents=True)
    for name in ("python", "layer.so", "swtpm_prop/layer.py"):
        (root / "opt/x" / name).write_text("")
    steps.uninstall(Layout(root), purge=False)
    where = Path("/opt/x")
    host = Host(where / "python", where / "layer.so", where, where / "swtpm_prop")
    steps.install(Layout(root), host)
    yield patient(root)


@pytest.mark.root
@pytest.mark.parametrize(
    ("path", "mode", "named"),
    [
        ("opt/x", 0o750, "/opt/x"),
        ("opt/x/python", 0o700, "/opt/x/python"),
        ("opt/x/layer.so", 0o600, "/opt/x/layer.so"),
        ("opt/x/swtpm_prop/layer.py", 0o640, "/opt/x/swtpm_prop/layer.py"),
        ("opt/x/swtpm_prop", 0o700, "/opt/x/swtpm_prop"),
        ("var/lib", 0o700, "/var/lib"),
        ("var/lib/swtpm-prop", 0o700, "/var/lib/swtpm-prop"),
        ("var/lib/swtpm-prop/index/index.sqlite", 0o600, "/var/lib/swtpm-prop/index/index.sqlite"),
        ("usr/libexec/swtpm-prop", 0o700, "/usr/libexec/swtpm-prop"),
    ],
)
def test_what_cannot_be_read_is_named(root: Path, path: str, mode: int, named: str) -> None:
    with furnished(root) as host:
        assert found(access.readable(host)) == {"access.readable": State.OK}
        (root / path).chmod(mode)
        findings = list(access.readable(host))
    assert [(f.id, f.state) for f in findings] == [("access.unreadable", State.PROBLEM)]
    assert f"cannot read {named}:" in findings[0].what


@pytest.mark.root
def test_a_link_into_a_closed_directory_names_that_directory(root: Path) -> None:
    with furnished(root) as host:
        (root / "home").mkdir(mode=0o700)
        (root / "opt/x/python").rename(root / "home/python")
        (root / "opt/x/python").symlink_to("/home/python")
        assert "cannot read /home:" in " ".join(f.what for f in access.readable(host))


@pytest.mark.root
def test_a_swtpm_user_that_does_not_exist(root: Path) -> None:
    (root / "etc/libvirt/qemu.conf").write_text('swtpm_user = "nobody-of-this-name"\n')
    assert {f.id for f in examine(patient(root)) if "nobody-of-this-name" in f.what} == {"host.swtpm-user"}


# -- index --------------------------------------------------------------------------------------
def test_index_good_expiring_expired(root: Path) -> None:
    assert found(index.index(patient(root))) == {"index.usable": State.OK}
    build_index(Layout(root), 6 * DAY)
    assert found(index.index(patient(root))) == {"index.expires-soon": State.WARNING}
    build_index(Layout(root), -DAY)
    assert found(index.index(patient(root))) == {"index.expired": State.PROBLEM}
    build_index(Layout(root), 100 * DAY, certificate_lasts=2 * DAY)
    (soon,) = (each for each in index.index(patient(root)) if each.id == "index.certificates-expire")
    ((certificate, _),) = Index.open(str(Layout(root).index)).ends()
    assert soon.state is State.WARNING
    assert soon.what == f"1 of 1 certificates have expired or expire within a week, first {certificate}"


def test_a_clock_that_is_behind_the_latest_time_seen(root: Path) -> None:
    path, now = Layout(root).index, int(time.time())
    opened = Index.open(str(path))
    for ahead, expected in ((60, set()), (DAY, {"index.clock-behind"})):
        Path(validity(str(path))).write_text(validity_line(opened.id, now + 100 * DAY, now + ahead))
        assert found(index.index(patient(root))).keys() == {"index.usable", *expected}
    Path(validity(str(path))).write_text(validity_line(opened.id, now + DAY, now + 2 * DAY))
    assert found(index.index(patient(root)))["index.expired"] is State.PROBLEM


def test_index_missing_or_corrupt_is_the_stores_own_finding(root: Path) -> None:
    Layout(root).index.write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(StoreError):
        list(index.index(patient(root)))
    assert {f.id for f in examine(patient(root)) if f.id.startswith("store.")} == {"store.index-format"}
    Layout(root).index.unlink()
    assert {f.id for f in examine(patient(root)) if f.id.startswith("store.")} == {"store.index-missing"}


def test_a_followed_index_is_renewed_daily(root: Path) -> None:
    layout = Layout(root)
    assert found(index.store(patient(root))) == {}
    layout.host.write_text('[store]\nurl = "https://example.org/store"\n')
    build_index(layout, 1 * DAY)
    assert found(index.index(patient(root))) == {"index.usable": State.OK}
    build_index(layout, DAY // 3)
    assert found(index.index(patient(root))) == {"index.expires-soon": State.WARNING}
    assert found(index.store(patient(root))) == {"store.root-missing": State.PROBLEM}
    layout.store_root.write_text("{}")
    assert found(index.store(patient(root))) == {"store.not-followed": State.WARNING}
    timer = root / index.TIMER.lstrip("/")
    timer.parent.mkdir()
    timer.symlink_to("/etc/systemd/system/swtpm-prop-sync.timer")
    assert found(index.store(patient(root))) == {"store.followed": State.OK}
    layout.host.write_text("[store]\nurl = 1\n")
    assert "host.config" in {finding.id for finding in examine(patient(root))}
    assert found(index.index(patient(root))) == {"index.expires-soon": State.WARNING}


# -- the daemon ---------------------------------------------------------------------------------
@contextmanager
def process(program: Path, path: str) -> Iterator[int]:
    """A process with a program's name, started with a PATH; it does nothing."""
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"], env={"PATH": path}) as running:
        try:
            name = Path(f"/proc/{running.pid}/comm")
            assert eventually(lambda: name.read_text().strip() == program.name)
            yield running.pid
        finally:
            running.kill()


def test_daemon_without_our_directory_with_it_and_with_it_too_late(root: Path, tmp_path: Path) -> None:
    libexec = Layout(root).libexec

    def judged(path: str) -> Finding:
        with process(tmp_path / "virtqemud", path) as pid:
            [finding] = [f for f in daemon.daemons(patient(root, live=True)) if f"process {pid}" in f.what]
            return finding

    assert judged("/usr/bin:/bin")[:2] == ("daemon.path", State.PROBLEM)
    assert "systemctl restart virtqemud" in judged("/usr/bin").mend
    assert judged(f"/usr/local/bin:{libexec}")[:2] == ("daemon.path-order", State.PROBLEM)
    assert judged(f"{libexec}:/usr/bin")[:2] == ("daemon.path", State.OK)
    rewrite(root, since=int(time.time()) + 60)
    assert judged(f"{libexec}:/usr/bin")[:2] == ("daemon.started-before", State.WARNING)


# -- AppArmor, SELinux --------------------------------------------------------------------------
def test_apparmor_addition_missing_matters_when_the_profile_is_loaded(root: Path) -> None:
    assert found(confinement.apparmor(patient(root))) == {"apparmor.added": State.OK}
    (root / "etc/apparmor.d/local/abstractions/libvirt-qemu").write_text("# nothing of ours\n")
    assert found(confinement.apparmor(patient(root, live=True))) == {"apparmor.missing": State.WARNING}
    profiles = root / "sys/kernel/security/apparmor/profiles"
    profiles.parent.mkdir(parents=True)
    profiles.write_text("libvirtd (enforce)\n")
    assert found(confinement.apparmor(patient(root, live=True))) == {"apparmor.missing": State.PROBLEM}


@pytest.mark.root
def test_selinux_label(root: Path) -> None:
    assert found(confinement.selinux(patient(root))) == {}
    enforce = root / "sys/fs/selinux/enforce"
    enforce.parent.mkdir(parents=True)
    enforce.write_text("1")
    assert found(confinement.selinux(patient(root))) == {"selinux.label": State.PROBLEM}
    os.setxattr(Layout(root).libexec / "swtpm", "security.selinux", b"system_u:object_r:swtpm_exec_t:s0\0")
    assert found(confinement.selinux(patient(root))) == {"selinux.label": State.OK}


# -- guests -------------------------------------------------------------------------------------
@contextmanager
def running_swtpm(directory: Path, log: Path) -> Iterator[None]:
    """A real swtpm for the guest, as libvirt runs it, in a state directory of its own; it has ``log`` open."""
    state, control = directory / UUID / "tpm2", directory / "control"
    state.mkdir(parents=True)
    arguments = ["--tpm2", "--tpmstate", f"dir={state},mode=0600", "--ctrl", f"type=unixio,path={control},mode=0600"]
    with log.open("a") as file, subprocess.Popen(["swtpm", "socket", *arguments], pass_fds=[file.fileno()]) as running:
        try:
            assert eventually(lambda: control.exists() or running.poll() is not None)
            assert running.poll() is None
            yield
        finally:
            running.kill()


def test_guests_that_run_without_the_layer_or_were_not_cleaned_up(root: Path, tmp_path: Path) -> None:
    layout = Layout(root)
    assert found(guests.guests(patient(root, live=True))) == {}
    layout.guest_marker(UUID).write_text("sha256,sha384\n")
    assert found(guests.guests(patient(root, live=True))) == {"guests.layer": State.OK}
    layout.guest_run(UUID).mkdir()
    assert found(guests.guests(patient(root, live=True)))["guests.left-over"] is State.WARNING
    layout.logs.mkdir(parents=True, exist_ok=True)
    with running_swtpm(tmp_path, layout.guest_log(UUID)):
        assert found(guests.guests(patient(root, live=True))) == {"guests.layer": State.OK}
        layout.guest_log(UUID).rename(tmp_path / "of another start")
        assert found(guests.guests(patient(root, live=True))) == {"guests.without-layer": State.PROBLEM}
        (tmp_path / "of another start").rename(layout.guest_log(UUID))
        layout.guest_run(UUID).rmdir()
        assert found(guests.guests(patient(root, live=True))) == {"guests.without-layer": State.PROBLEM}


# -- all together -------------------------------------------------------------------------------
def test_a_damaged_record_is_one_finding_and_stops_nothing(root: Path) -> None:
    manifest.path_of(Layout(root)).write_text("{")
    findings = examine(patient(root))
    assert [f.id for f in findings].count("install.manifest-unreadable") == 1
    assert "index.usable" in {f.id for f in findings}


def test_for_people_the_words_come_with_the_mend_and_the_exit_status(root: Path) -> None:
    assert findings_exit_status(root) == 1
    layout = Layout(root)
    layout.hook.chmod(0o644)
    said = CliRunner().invoke(command, ["--root", str(root)])
    assert said.exit_code == 1
    assert "problem  hook.not-executable" in said.output
    assert f"hook.not-executable: chmod 0755 {layout.hook}" in said.output


def findings_exit_status(root: Path) -> int:
    """The status of ``doctor --json``, which must agree with the findings it prints."""
    said = CliRunner().invoke(command, ["--root", str(root), "--json"])
    states = {finding["state"] for finding in json.loads(said.output)}
    assert said.exit_code == int("problem" in states)
    return said.exit_code


@pytest.mark.root
def test_what_only_root_can_tell_is_a_warning_to_others(root: Path) -> None:
    conf = root / "etc/libvirt/qemu.conf"
    conf.write_text("")
    conf.chmod(0o600)
    (root / "var/lib/swtpm-localca").mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        findings = {f.id: f.state for f in examine(patient(root))}
    finally:
        os.seteuid(0)
    assert findings["doctor.not-checked"] is State.WARNING
