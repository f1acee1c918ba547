"""The hook's operations on a host below a temporary directory."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import syslog
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import swtpm_prop
from swtpm_prop.account import swtpm_account
from swtpm_prop.errors import HostError
from swtpm_prop.hook import activate
from swtpm_prop.hook.operations import OPERATIONS, run
from swtpm_prop.layout import Layout
from swtpm_prop.limits import ACTIVATION_LOG_BYTES
from swtpm_prop.trust.build import build
from swtpm_prop.trust.index import Index, validity, validity_line

UUID = "aaaaaaaa-0000-4000-8000-000000000001"
BOOT = "https://example.org/properties/boot"
VTPM = (
    "<p:vtpm xmlns:p='urn:swtpm-prop:domain:1'><p:bank algorithm='sha384' pcrs='0-1,4' visible='no'>"
    f"<p:property uri='{BOOT}'/></p:bank></p:vtpm>"
)
FAILURE = {"recnum": 0, "pcr": None, "content": {"event": "failure", "reason": "layer.bank-inactive", "detail": ""}}


def domain(metadata: str = VTPM, backend: str = "") -> bytes:
    return (
        f"<domain><name>g</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata><devices><tpm>"
        f"<backend type='emulator' version='2.0'>{backend}</backend></tpm></devices></domain>"
    ).encode()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A host with an index; swtpm runs as whoever runs the test.

    Our own programs, first in PATH, only fail: nothing here may call them.
    """
    layout = Layout(tmp_path)
    layout.libexec.mkdir(parents=True)
    for name in ("swtpm", "swtpm_setup"):
        (layout.libexec / name).write_text("#!/bin/sh\nexit 7\n")
        (layout.libexec / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{layout.libexec}/:{os.environ['PATH']}")
    layout.index.parent.mkdir(parents=True)
    build(layout.index, (), 4_000_000_000, lambda *_: None)
    layout.qemu_conf.parent.mkdir(parents=True)
    layout.qemu_conf.write_text(f'#swtpm_user = "nobody"\nswtpm_user = "{getpass.getuser()}"\n')
    return layout


def prepare(host: Layout, xml: bytes, name: str = "g") -> int:
    return run([name, "prepare", "begin", "-"], xml, host)


def release(host: Layout, xml: bytes) -> int:
    return run(["g", "release", "end", "-"], xml, host)


def left(host: Layout) -> set[str]:
    """Everything of guests on the host."""
    places = (host.run, host.guests, host.logs)
    return {str(f.relative_to(host.root)) for place in places for f in place.rglob("*")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_prepare_lays_out_what_the_layer_reads(host: Layout) -> None:
    assert prepare(host, domain()) == 0
    run_directory = host.guest_run(UUID)
    assert json.loads((run_directory / "layer.json").read_text()) == {
        "version": 1,
        "uuid": UUID,
        "index": str(host.index),
        "log": str(host.guest_log(UUID)),
        "banks": [{"algorithm": "sha384", "pcrs": [0, 1, 4], "visible": False, "properties": [BOOT]}],
    }
    assert (run_directory / "pcr-banks").read_text() == "sha256,sha384\n"
    assert host.guest_marker(UUID).read_text() == "sha256,sha384\n"
    assert host.guest_log(UUID).read_bytes() == b""
    names = {"layer.json", "pcr-banks"}
    assert {f.name for f in run_directory.iterdir()} == names
    assert [mode(run_directory), *(mode(run_directory / n) for n in names)] == [0o750, 0o640, 0o640]
    assert [mode(host.run), mode(host.logs), mode(host.guests)] == [0o755, 0o755, 0o711]
    assert [mode(host.guest_log(UUID)), mode(host.guest_marker(UUID))] == [0o640, 0o644]


def test_release_takes_the_run_directory_and_leaves_marker_and_log(host: Layout) -> None:
    prepare(host, domain())
    assert release(host, domain()) == 0
    assert left(host) == {f"var/lib/swtpm-prop/guests/{UUID}", f"var/log/swtpm-prop/{UUID}.jsonl"}
    assert release(host, domain()) == 0


def test_each_start_begins_a_log_and_keeps_the_one_before(host: Layout) -> None:
    for line in ("first", "second", "third"):
        prepare(host, domain())
        host.guest_log(UUID).write_text(line)
    assert (host.logs / f"{UUID}.jsonl.1").read_text() == "second"
    assert prepare(host, domain()) == 0
    assert (host.logs / f"{UUID}.jsonl.1").read_text() == "third"


def test_a_guest_that_is_no_longer_opted_in_starts_as_a_plain_one(host: Layout) -> None:
    prepare(host, domain())
    assert prepare(host, domain(metadata="")) == 0
    assert left(host) == {f"var/log/swtpm-prop/{UUID}.jsonl"}


def test_banks_of_libvirt_count_as_raw(host: Layout) -> None:
    assert prepare(host, domain(backend="<active_pcr_banks><sha1/><sha512/></active_pcr_banks>")) == 0
    assert (host.guest_run(UUID) / "pcr-banks").read_text() == "sha1,sha384,sha512\n"


@pytest.mark.parametrize(
    ("xml", "id"),
    [
        (domain().replace(b"0-1,4", b"24"), "domain.pcr-not-translatable"),
        (domain(VTPM * 2), "domain.doubled"),
        (domain().replace(b"domain:1", b"domain:2"), "domain.namespace"),
        (b"<!DOCTYPE d [<!ENTITY a 'b'>]>" + domain(), "domain.xml-doctype"),
        (domain().replace(UUID.encode(), b"../../../etc"), "domain.uuid"),
        (
            domain().replace(b"</p:vtpm>", b"<p:migration allow='attested'/></p:vtpm>"),
            "domain.migration-without-custody",
        ),
        (b"", "domain.xml-malformed"),
    ],
)
def test_a_refused_start_says_why_in_one_line_and_leaves_nothing(
    host: Layout, capsys: pytest.CaptureFixture[str], xml: bytes, id: str
) -> None:
    assert prepare(host, xml) == 1
    said = capsys.readouterr().err
    assert said.startswith("swtpm-prop: ")
    assert said.count("\n") == 1
    assert f"[{id}]" in said
    assert left(host) == set()


def test_an_unusable_index_refuses_the_start(host: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    whole = host.index.read_bytes()
    for content, id in ((whole[:-1], "corrupt"), (b"x" * 9000, "format"), (None, "missing")):
        host.index.unlink()
        if content is not None:
            host.index.write_bytes(content)
        assert prepare(host, domain()) == 1
        assert f"[store.index-{id}]" in capsys.readouterr().err
    assert left(host) == set()


def test_a_libvirt_that_would_start_another_swtpm_refuses_the_start(
    host: Layout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours_first = os.environ["PATH"]
    for path in (os.defpath, f"{os.defpath}:{host.libexec}", "", str(host.root)):
        monkeypatch.setenv("PATH", path)
        assert prepare(host, domain()) == 1
        assert "[host.swtpm-path]" in capsys.readouterr().err
        assert prepare(host, domain(metadata="")) == 0
    monkeypatch.setenv("PATH", ours_first)
    (host.libexec / "swtpm_setup").chmod(0o644)
    assert prepare(host, domain()) == 1
    assert left(host) == set()


def test_an_expired_index_only_warns(
    host: Layout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda priority, line: logged.append((priority, line)))
    assert prepare(host, domain()) == 0
    assert logged == []
    build(host.index, (), 1, lambda *_: None)
    assert prepare(host, domain()) == 0
    assert "nothing will be certified [store.stale]" in capsys.readouterr().err
    ((priority, line),) = logged
    assert priority == syslog.LOG_WARNING
    assert "nothing will be certified [store.stale]" in line


def test_an_index_that_had_expired_has_expired_whatever_the_clock_says(
    host: Layout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syslog, "syslog", lambda *_: None)
    index, now = Index.open(str(host.index)), int(time.time())
    Path(validity(str(host.index))).write_text(validity_line(index.id, now + 50, now + 100))
    assert prepare(host, domain()) == 0
    assert "nothing will be certified [store.stale]" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "id"), [('"refuse"', "store.stale"), ('"refuze"', "host.config")])
def test_an_expired_index_refuses_the_start_where_the_operator_wants_it(
    host: Layout, capsys: pytest.CaptureFixture[str], config: str, id: str
) -> None:
    host.etc.mkdir(parents=True)
    host.host.write_text(f"[store]\nstale = {config}\n")
    assert prepare(host, domain()) == 0
    build(host.index, (), 1, lambda *_: None)
    assert prepare(host, domain(metadata="")) == 0
    assert prepare(host, domain()) == 1
    assert f"[{id}]" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_log_that_is_no_file_is_refused(host: Layout, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    host.logs.mkdir(parents=True)
    target = host.root / "target"
    target.write_text("kept")
    if kind == "link":
        host.guest_log(UUID).symlink_to(target)
    else:
        host.guest_log(UUID).mkdir()
    assert prepare(host, domain()) == 1
    assert "[host.log-foreign]" in capsys.readouterr().err
    assert not host.guest_run(UUID).exists()
    assert not host.guest_marker(UUID).exists()
    assert target.read_text() == "kept"


def test_leftovers_of_a_killed_hook_are_no_obstacle(host: Layout) -> None:
    (host.run / f".{UUID}.new").mkdir(parents=True)
    (host.run / f".{UUID}.new/layer.json").touch()
    host.guest_run(UUID).mkdir()
    (host.guest_run(UUID) / "old").touch()
    host.guests.mkdir(parents=True)
    (host.guests / f".{UUID}.new").touch()
    assert prepare(host, domain()) == 0
    assert {f.name for f in host.run.iterdir()} == {UUID}
    assert {f.name for f in host.guests.iterdir()} == {UUID}
    assert not (host.guest_run(UUID) / "old").exists()


@pytest.mark.parametrize("operation", [*sorted(set(OPERATIONS) - {"prepare", "migrate"}), "a-new-one"])
def test_only_starts_and_arrivals_can_be_refused(host: Layout, operation: str) -> None:
    for xml in (domain(), domain(""), b"", b"\xff", b"<!DOCTYPE d>" + domain(), domain().replace(UUID.encode(), b"..")):
        assert run(["g", operation, "begin", "-"], xml, host) == 0
    host.run.mkdir(parents=True)
    host.guest_run(UUID).write_text("no directory")
    assert run(["g", operation, "begin", "-"], domain(), host) == 0
    assert left(host) == {f"run/swtpm-prop/{UUID}"}


def test_an_unexpected_failure_is_one_line_too(host: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    host.run.parent.mkdir(parents=True)
    host.run.write_text("no directory")
    assert prepare(host, domain(), "\x1b[2J") == 1
    said = capsys.readouterr().err
    assert said.startswith("swtpm-prop: ")
    assert said.endswith("[hook.failed]\n")
    assert said.count("\n") == 1


def test_encrypted_state_that_needs_activation_is_refused(host: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "<encryption secret='x'/>"
    assert prepare(host, domain(backend=secret)) == 0
    state = host.guest_tpm(UUID)
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").touch()
    assert prepare(host, domain(backend=secret)) == 0
    host.guest_marker(UUID).write_text("sha256\n")
    assert prepare(host, domain(backend=secret)) == 1
    assert "[domain.encrypted-state]" in capsys.readouterr().err
    named = "<active_pcr_banks><sha256/></active_pcr_banks>" + secret
    assert prepare(host, domain(backend=named)) == 0


def test_the_swtpm_user_is_the_one_of_qemu_conf(host: Layout) -> None:
    me = pwd.getpwuid(os.geteuid())
    assert swtpm_account(host) == (me.pw_uid, me.pw_gid)
    host.qemu_conf.write_text(f' swtpm_user="+{me.pw_uid}"\nswtpm_group = "+7"\n')
    assert swtpm_account(host) == (me.pw_uid, 7)
    host.qemu_conf.write_text('swtpm_user = "no such user"\n')
    with pytest.raises(HostError) as refused:
        swtpm_account(host)
    assert refused.value.id == "host.swtpm-user"
    host.qemu_conf.unlink()
    assert swtpm_account(host).uid == pwd.getpwnam("tss").pw_uid


def test_the_program_ends_quietly_for_other_operations() -> None:
    entry = "from swtpm_prop.hook.entry import main; main()"
    argv = [sys.executable, "-c", entry, "g", "reconnect", "begin", "-"]
    environment = {"PYTHONPATH": str(Path(swtpm_prop.__file__).parents[1])}
    done = subprocess.run(argv, input=domain(), capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -- a TPM state that exists ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A state made without us, SHA-256 only, of the real swtpm user."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.chown(directory, "tss", "tss")
        argv = ["swtpm_setup", "--tpm2", "--tpm-state", directory, "--pcr-banks", "sha256"]
        as_tss = {"user": "tss", "group": "tss", "extra_groups": ()}
        subprocess.run(argv, check=True, capture_output=True, cwd="/", env={"PATH": os.defpath}, **as_tss)
        yield Path(directory) / "tpm2-00.permall"


@pytest.fixture
def tpm(host: Layout, tmp_path: Path, made: Path) -> Path:
    """That state as a guest's."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    host.qemu_conf.write_text('swtpm_user = "tss"\n')
    state = host.guest_tpm(UUID)
    state.mkdir(parents=True)
    for path in (state, Path(shutil.copy(made, state))):
        shutil.chown(path, "tss", "tss")
    return state / made.name


@pytest.mark.root
def test_a_bank_is_activated_once_in_a_state_that_exists(host: Layout, tpm: Path) -> None:
    before = tpm.read_bytes()
    assert prepare(host, domain()) == 0
    activated = tpm.read_bytes()
    assert activated != before
    assert tpm.stat().st_uid == pwd.getpwnam("tss").pw_uid
    assert host.guest_log(UUID).stat().st_uid == pwd.getpwnam("tss").pw_uid
    assert host.guest_run(UUID).stat().st_gid == pwd.getpwnam("tss").pw_gid
    assert prepare(host, domain()) == 0
    assert tpm.read_bytes() == activated


@pytest.mark.root
def test_a_bank_that_was_found_inactive_is_activated_again(host: Layout, tpm: Path) -> None:
    plain = tpm.read_bytes()
    prepare(host, domain())
    tpm.write_bytes(plain)
    assert prepare(host, domain()) == 0
    assert tpm.read_bytes() == plain
    host.guest_log(UUID).write_text(json.dumps(FAILURE) + "\n")
    assert prepare(host, domain()) == 0
    assert tpm.read_bytes() != plain


@pytest.mark.root
def test_a_state_that_cannot_be_activated_refuses_the_start(
    host: Layout, tpm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm.write_bytes(b"no TPM state")
    monkeypatch.setattr(activate, "ACTIVATION_SECONDS", 2)
    assert prepare(host, domain()) == 1
    said = capsys.readouterr().err
    assert "[host.swtpm-setup]" in said
    assert "Could not initialize libtpms" in said
    assert said.count("\n") == 1
    assert left(host) == set()


@pytest.mark.root
def test_of_what_swtpm_setup_says_only_the_end_is_read(
    host: Layout, tpm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user owns the log, and must not be able to fill root's memory with it."""
    setup = tpm.parents[3] / "swtpm_setup"
    setup.write_text('#!/bin/sh\nfor log; do :; done\ntruncate -s 100G "$log"; echo "the reason" >> "$log"; exit 1\n')
    setup.chmod(0o755)
    monkeypatch.setenv("PATH", f"{host.libexec}:{setup.parent}:{os.defpath}")
    assert prepare(host, domain()) == 1
    said = capsys.readouterr().err
    assert "the reason" in said
    assert len(said) < 5 * ACTIVATION_LOG_BYTES
