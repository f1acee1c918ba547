"""Installing into a directory, repeating, upgrading, being killed or failing anywhere, and taking it all out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from swtpm_prop.cli.install import earlier_agents
from swtpm_prop.cli.main import cli
from swtpm_prop.custody.form import PERMANENT
from swtpm_prop.errors import HostError
from swtpm_prop.install import manifest, steps
from swtpm_prop.install.plan import Block, Directory, File, Host, plan
from swtpm_prop.layout import Layout

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
ABSTRACTION_12 = "  #include <local/abstractions/libvirt-qemu>\n"
ABSTRACTION_13 = "  include if exists <abstractions/libvirt-qemu.d>\n"
HOST = Host(
    python=Path("/opt/x/bin/python"),
    preload=Path("/opt/x/layer.so"),
    prefix=Path("/opt/x"),
    package=Path("/opt/x/lib/swtpm_prop"),
    guest_profile=ABSTRACTION_12,
    daemon_profiles=("usr.sbin.libvirtd",),
)
GUEST_RULES = "etc/apparmor.d/local/abstractions/libvirt-qemu"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host as Debian 12 leaves it, with an operator's own AppArmor lines."""
    (tmp_path / "etc/libvirt/hooks").mkdir(parents=True)
    (tmp_path / "etc/apparmor.d/local/abstractions").mkdir(parents=True)
    for directory in ("var/lib", "var/log", "usr/libexec", "etc/systemd/system", "run", "etc/tmpfiles.d"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / GUEST_RULES).write_text("# mine, without an end of line")
    (tmp_path / "etc/apparmor.d/local/usr.sbin.libvirtd").write_text("")
    return tmp_path


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below root with its mode and content."""
    return {
        str(path.relative_to(root)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(root.rglob("*"))
    }


def test_uninstall_leaves_what_was_there_before(root: Path) -> None:
    before = snapshot(root)
    done = steps.install(Layout(root), HOST)
    assert ("wrote", "/etc/libvirt/hooks/qemu.d/swtpm-prop") in done
    hook = Layout(root).hook
    assert hook.stat().st_mode & 0o7777 == 0o755
    assert "/opt/x/bin/python" in hook.read_text()
    assert str(root) not in hook.read_text()
    steps.uninstall(Layout(root), purge=False)
    assert snapshot(root) == before


def test_directories_have_the_modes_that_swtpm_needs_whatever_the_umask(root: Path) -> None:
    before = os.umask(0o077)
    try:
        steps.install(Layout(root), HOST)
    finally:
        os.umask(before)
    layout = Layout(root)
    modes = {path: path.stat().st_mode & 0o7777 for path in (layout.state, layout.index.parent, layout.guests)}
    assert list(modes.values()) == [0o711, 0o755, 0o711]
    assert (root / "etc/systemd/system/libvirtd.service.d").stat().st_mode & 0o7777 == 0o755
    assert layout.libexec.stat().st_mode & 0o7777 == 0o755


def test_a_second_install_changes_nothing(root: Path) -> None:
    steps.install(Layout(root), HOST)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert steps.install(Layout(root), HOST) == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_what_was_lost_is_put_back(root: Path) -> None:
    steps.install(Layout(root), HOST)
    whole = snapshot(root)
    Layout(root).hook.unlink()
    (Layout(root).libexec / "swtpm").chmod(0o600)
    (root / GUEST_RULES).write_text("# mine, without an end of line")
    Layout(root).run.rmdir()
    steps.install(Layout(root), HOST)
    assert snapshot(root) == whole


def test_upgrade_replaces_what_is_ours_and_takes_out_what_is_no_longer_wanted(root: Path) -> None:
    before = snapshot(root)
    steps.install(Layout(root), HOST)
    since = manifest.load(Layout(root)).since  # type: ignore[union-attr]
    newer = replace(HOST, python=Path("/opt/y/bin/python"), guest_profile=ABSTRACTION_13)
    (root / "etc/apparmor.d/abstractions/libvirt-qemu.d").mkdir(parents=True)
    done = dict(map(reversed, steps.install(Layout(root), newer)))
    assert done["/etc/libvirt/hooks/qemu.d/swtpm-prop"] == "replaced"
    assert "/opt/y/bin/python" in Layout(root).hook.read_text()
    assert (root / GUEST_RULES).read_text() == "# mine, without an end of line"
    assert (root / "etc/apparmor.d/abstractions/libvirt-qemu.d/swtpm-prop").exists()
    listed = manifest.load(Layout(root))
    assert listed is not None
    assert (listed.since, listed.complete, listed.python) == (since, True, "/opt/y/bin/python")
    assert all(len(hashes) == 1 for hashes in (*listed.files.values(), *listed.blocks.values()))
    steps.uninstall(Layout(root), purge=False)
    (root / "etc/apparmor.d/abstractions/libvirt-qemu.d").rmdir()
    (root / "etc/apparmor.d/abstractions").rmdir()
    assert snapshot(root) == before


def write_script(path: Path) -> None:
    path.write_text("#!/bin/sh\n")


def link(path: Path) -> None:
    path.symlink_to("/bin/true")


@pytest.mark.parametrize("make", [write_script, link, Path.mkdir])
def test_a_foreign_hook_is_refused_and_nothing_changes(root: Path, make: object) -> None:
    hook = Layout(root).hook
    hook.parent.mkdir()
    make(hook)  # type: ignore[operator]
    before = snapshot(root)
    with pytest.raises(HostError) as refused:
        steps.install(Layout(root), HOST)
    assert refused.value.id == "install.foreign-file"
    assert str(hook) in refused.value.what
    assert snapshot(root) == before


def test_a_block_that_is_not_ours_is_refused(root: Path) -> None:
    (root / GUEST_RULES).write_text("# BEGIN swtpm-prop\n/** rwx,\n# END swtpm-prop\n")
    with pytest.raises(HostError) as refused:
        steps.install(Layout(root), HOST)
    assert refused.value.id == "install.foreign-block"
    assert not Layout(root).state.exists()


def test_what_the_operator_changed_is_refused_by_install_and_kept_by_uninstall(root: Path) -> None:
    steps.install(Layout(root), HOST)
    script = Layout(root).libexec / "swtpm"
    script.write_text("#!/bin/sh\nexit 1\n")
    rules = root / GUEST_RULES
    rules.write_text(rules.read_text().replace("PUx", "ix").replace("rwk,", "rw,"))
    with pytest.raises(HostError) as refused:
        steps.install(Layout(root), HOST)
    assert refused.value.id == "install.changed-file"
    done = steps.uninstall(Layout(root), purge=False)
    assert {path for action, path in done if action.startswith("kept")} == {
        "/usr/libexec/swtpm-prop/swtpm",
        "/" + GUEST_RULES,
    }
    assert script.read_text() == "#!/bin/sh\nexit 1\n"
    assert not (Layout(root).libexec / "swtpm_setup").exists()


def test_data_stays_unless_purged(root: Path) -> None:
    before = snapshot(root)
    layout = Layout(root)
    steps.install(layout, HOST)
    for path in (layout.index, layout.guest_log(UUID), layout.guest_marker(UUID), layout.trust):
        path.write_text("data")
    steps.uninstall(layout, purge=False)
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "swtpm-prop" in str(p)} == {
        f"var/lib/swtpm-prop/guests/{UUID}",
        "var/lib/swtpm-prop/index/index.sqlite",
        f"var/log/swtpm-prop/{UUID}.jsonl",
        "etc/swtpm-prop/trust.toml",
    }
    steps.uninstall(layout, purge=True)
    assert snapshot(root) == before


def test_uninstall_refuses_while_an_opted_in_guest_runs(root: Path) -> None:
    layout = Layout(root)
    steps.install(layout, HOST)
    layout.guest_run(UUID).mkdir()
    before = snapshot(root)
    with pytest.raises(HostError) as refused:
        steps.uninstall(layout, purge=True)
    assert refused.value.id == "uninstall.guests-running"
    assert UUID in refused.value.what
    assert snapshot(root) == before


def test_uninstall_says_when_there_is_nothing(root: Path) -> None:
    with pytest.raises(HostError) as refused:
        steps.uninstall(Layout(root), purge=False)
    assert refused.value.id == "uninstall.not-installed"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "files": 3}'])
def test_a_damaged_record_stops_both(root: Path, text: str) -> None:
    steps.install(Layout(root), HOST)
    manifest.path_of(Layout(root)).write_text(text)
    before = snapshot(root)
    for attempt in (lambda: steps.install(Layout(root), HOST), lambda: steps.uninstall(Layout(root), purge=False)):
        with pytest.raises(HostError) as refused:
            attempt()
        assert refused.value.id == "install.manifest-unreadable"
    assert snapshot(root) == before


def test_an_installation_whose_record_was_lost_is_taken_over(root: Path) -> None:
    steps.install(Layout(root), HOST)
    manifest.path_of(Layout(root)).unlink()
    assert steps.install(Layout(root), HOST) == []
    steps.uninstall(Layout(root), purge=False)
    assert not Layout(root).hook.exists()


def test_a_block_file_that_we_made_goes_again(root: Path) -> None:
    (root / GUEST_RULES).unlink()
    before = snapshot(root)
    steps.install(Layout(root), HOST)
    assert (root / GUEST_RULES).read_text().startswith("# BEGIN swtpm-prop\n")
    steps.uninstall(Layout(root), purge=False)
    assert snapshot(root) == before


UNITS = {"swtpm-prop-sync.service", "swtpm-prop-sync.timer", "swtpm-prop-agent.service"}


def test_units_are_whole_and_not_enabled(root: Path) -> None:
    layout = Layout(root)
    (root / "usr/bin").mkdir()
    (root / "usr/bin/swtpm-prop").symlink_to("/bin/true")
    steps.install(layout, replace(HOST, prefix=Path("/usr")))
    units = root / "etc/systemd/system"
    assert {path.name for path in units.glob("swtpm-prop-*")} == UNITS
    assert not list(units.glob("*.wants"))
    service = (units / "swtpm-prop-sync.service").read_text()
    assert "ExecStart=/usr/bin/swtpm-prop store sync\n" in service
    assert "ReadWritePaths=/var/lib/swtpm-prop /run/swtpm-prop\n" in service
    # Without it root may not open /dev/tpmrm0, which udev gives to user and group tss alone.
    assert "CapabilityBoundingSet=CAP_DAC_OVERRIDE\n" in service
    assert "ExecStart=/usr/bin/swtpm-prop agent\n" in (units / "swtpm-prop-agent.service").read_text()
    for unit in UNITS:
        text = (units / unit).read_text()
        (units / unit).write_text(text.replace("/usr/bin/swtpm-prop", "/bin/true"))
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(units / unit)], check=False, capture_output=True, text=True
        )
        assert "swtpm-prop-" not in checked.stderr, checked.stderr


def test_plan_without_apparmor_writes_nothing_there() -> None:
    steps_without = plan(replace(HOST, guest_profile=None, daemon_profiles=()))
    assert not [step for step in steps_without if "apparmor" in str(step.path)]


def test_plan_makes_every_directory_before_what_lies_in_it() -> None:
    made = set()
    for step in plan(replace(HOST, swtpm_profile=True)):
        if isinstance(step, Directory):
            made.add(step.path)
        else:
            assert isinstance(step, File | Block)
            assert step.path.parent in made


@pytest.mark.parametrize("words", [["install"], ["uninstall", "--purge"]])
def test_the_command_line_says_what_it_did_and_what_is_left(root: Path, words: list[str]) -> None:
    runner = CliRunner()
    runner.invoke(cli, ["install", "--root", str(root)], catch_exceptions=False)
    Layout(root).guest_marker(UUID).write_text("sha256,sha384\n")
    Layout(root).hook.unlink()
    said = runner.invoke(cli, [*words, "--root", str(root)], catch_exceptions=False)
    assert said.exit_code == 0
    if words == ["install"]:
        assert "wrote  /etc/libvirt/hooks/qemu.d/swtpm-prop" in said.output
    else:
        assert f"now start with an ordinary TPM: {UUID}" in said.output
        assert not Layout(root).state.exists()
    assert "Left to you:" in said.output


@pytest.mark.root
@pytest.mark.parametrize("within", [[], ["unshare", "--mount"]], ids=["by hand", "in the namespace of its unit"])
def test_an_agent_that_runs_from_an_earlier_release_is_named(tmp_path: Path, within: list[str]) -> None:
    program, package = tmp_path / "swtpm-prop", tmp_path / "package/within"
    program.write_text(f"#!{sys.executable}\nimport time; print(flush=True); time.sleep(60)\n")
    program.chmod(0o755)
    package.mkdir(parents=True)
    (package / "there.py").touch()
    time.sleep(0.1)  # processes start at ticks of 10 ms
    with subprocess.Popen([*within, program, "agent"], stdout=subprocess.PIPE) as agent:
        assert agent.stdout
        agent.stdout.readline()
        named = f": process {agent.pid} is of an earlier release"
        assert not [line for line in earlier_agents(package.parent) if line.endswith(named)]
        time.sleep(0.1)
        (package / "new.py").touch()
        (line,) = [line for line in earlier_agents(package.parent) if line.endswith(named)]
        assert line.startswith(("systemctl restart swtpm-prop-agent.service", "restart swtpm-prop agent"))
        agent.kill()
    assert not [line for line in earlier_agents(package.parent) if line.endswith(named)]


def test_guests_in_custody_are_not_purged_away(root: Path) -> None:
    runner, layout = CliRunner(), Layout(root)
    steps.install(layout, HOST)
    layout.guest_marker(UUID).write_text("sha256,sha384\n")
    layout.keys.mkdir(mode=0o700)
    layout.guest_key(UUID).write_text("a record")
    layout.guest_tpm(UUID).mkdir(parents=True)
    # the header of an encrypted state, and nothing behind it
    (layout.guest_tpm(UUID) / PERMANENT).write_bytes(bytes.fromhex("0201 000a 0001 0000000a"))
    before = snapshot(root)
    refused = runner.invoke(cli, ["uninstall", "--purge", "--root", str(root)]).exception
    assert isinstance(refused, HostError)
    assert (refused.id, snapshot(root)) == ("uninstall.guests-in-custody", before)
    said = runner.invoke(cli, ["uninstall", "--root", str(root)], catch_exceptions=False).output
    assert f"do not start until swtpm-prop is installed again: {UUID}" in said
    assert "ordinary TPM" not in said
    assert layout.guest_key(UUID).exists()


def test_hidden_directories_of_a_start_are_no_guests(root: Path) -> None:
    steps.install(Layout(root), HOST)
    (Layout(root).run / f".{UUID}.new").mkdir()
    assert steps.running_guests(Layout(root)) == []


# -- killed, or failing, anywhere ---------------------------------------------------------------
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"}


def interrupt(action: object, number: int, how: object) -> int:
    """Run ``action`` in a child process in which the ``number``-th change to the file system does ``how`` instead.

    Returns the exit status: 0 when there were fewer changes.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in CHANGES or (event == "open" and str(args[0]).endswith(".new")):
            seen += 1
            if seen == number:
                how()  # type: ignore[operator]

    sys.addaudithook(watch)
    try:
        action()  # type: ignore[operator]
    except OSError:
        os._exit(7)
    except BaseException:
        os._exit(8)
    os._exit(0)


def numbers_until(finished: list[bool]) -> Iterator[int]:
    number = 1
    while not finished[0]:
        assert number < 500
        yield number
        number += 1


def kill() -> None:
    os._exit(9)


def fail() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.fault
@pytest.mark.parametrize("mend", ["repeat", "take out"])
def test_killed_between_any_two_changes_it_can_be_repeated_and_taken_out(root: Path, mend: str) -> None:
    layout = Layout(root)
    before = snapshot(root)
    finished = [False]
    for number in numbers_until(finished):
        finished[0] = interrupt(lambda: steps.install(layout, HOST), number, kill) == 0
        if mend == "repeat":
            steps.install(layout, HOST)
            assert not list(root.rglob("*.new"))
            steps.uninstall(layout, purge=False)
        elif layout.state.exists():
            steps.uninstall(layout, purge=False)
        assert snapshot(root) == before, number
    assert number > 30


@pytest.mark.fault
def test_a_killed_upgrade_can_be_repeated_and_taken_out(root: Path) -> None:
    layout = Layout(root)
    before = snapshot(root)
    newer = replace(HOST, python=Path("/opt/y/bin/python"), preload=Path("/opt/y/layer.so"))
    finished = [False]
    for number in numbers_until(finished):
        steps.install(layout, HOST)
        finished[0] = interrupt(lambda: steps.install(layout, newer), number, kill) == 0
        if number % 2:
            steps.install(layout, newer)
        steps.uninstall(layout, purge=False)
        assert snapshot(root) == before, number


@pytest.mark.fault
def test_a_killed_uninstall_can_be_repeated(root: Path) -> None:
    layout = Layout(root)
    before = snapshot(root)
    finished = [False]
    for number in numbers_until(finished):
        steps.install(layout, HOST)
        finished[0] = interrupt(lambda: steps.uninstall(layout, purge=False), number, kill) == 0
        if layout.state.exists():
            steps.uninstall(layout, purge=False)
        assert snapshot(root) == before, number


@pytest.mark.fault
def test_an_error_anywhere_undoes_everything(root: Path) -> None:
    layout = Layout(root)
    before = snapshot(root)
    finished = [False]
    for number in numbers_until(finished):
        status = interrupt(lambda: steps.install(layout, HOST), number, fail)
        assert status in (0, 7), number
        finished[0] = status == 0
        assert finished[0] or snapshot(root) == before, number


def test_an_error_in_an_upgrade_leaves_the_older_release_whole(root: Path) -> None:
    layout = Layout(root)
    steps.install(layout, HOST)
    before = snapshot(root)
    newer = replace(HOST, python=Path("/opt/y/bin/python"), guest_profile=None)
    finished = [False]
    for number in numbers_until(finished):
        finished[0] = interrupt(lambda: steps.install(layout, newer), number, fail) == 0
        assert finished[0] or snapshot(root) == before, number


def test_record_is_plain_json_for_other_tools(root: Path) -> None:
    steps.install(Layout(root), HOST)
    record = json.loads(manifest.path_of(Layout(root)).read_text())
    assert record["version"] == 1
    assert record["complete"] is True
    assert set(record["files"]) >= {"/etc/libvirt/hooks/qemu.d/swtpm-prop", "/usr/libexec/swtpm-prop/swtpm"}
