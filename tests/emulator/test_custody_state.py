"""TPM states at rest with the real swtpm: told apart, made one under another key, and never lost on the way."""

from __future__ import annotations

import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swtpm_prop.account import Account
from swtpm_prop.custody import state
from swtpm_prop.custody.form import PERMANENT, Form, form
from swtpm_prop.custody.state import Place, convert, opens
from swtpm_prop.errors import HostError
from swtpm_prop.limits import STATE_BYTES
from tests.swtpm import PATH, UUID, Tpm, TpmError, owned_directory
from tests.waiting import eventually

pytestmark = pytest.mark.root

KEY, OTHER = bytes(range(32)), bytes(32)
READ_BANKS = bytes.fromhex("8001000000160000017a000000050000000000000001")


def tss() -> Account:
    entry = pwd.getpwnam("tss")
    return Account(entry.pw_uid, entry.pw_gid)


@pytest.fixture
def where(directory: Path, new_base: Callable[[str], Path]) -> Place:
    """The state of a TPM that has been used, plain."""
    base = new_base("guest")
    with Tpm(base) as tpm:
        tpm.up()
        tpm.shutdown()
    return Place(base / UUID / "tpm2", owned_directory(directory / "run") / "work", tss(), PATH)


def started(where: Place, key: bytes | None) -> bytes:
    """Start the TPM as libvirt would; what it says of its PCR banks."""
    tpm = Tpm(where.directory.parents[1], options=key_option(where, key))
    with tpm:
        tpm.up()
        return tpm.send(READ_BANKS)


def key_option(where: Place, key: bytes | None) -> list[str]:
    if key is None:
        return []
    path = where.workspace.parent / "key"
    path.write_text(key.hex())
    path.chmod(0o644)
    return ["--key", f"file={path},mode=aes-256-cbc,format=hex"]


def content(where: Place) -> bytes:
    return (where.directory / PERMANENT).read_bytes()


def test_a_state_goes_to_a_key_to_another_and_back(where: Place) -> None:
    banks = started(where, None)
    assert form(where.directory) is Form.PLAIN
    for old, new in ((None, KEY), (KEY, OTHER), (OTHER, KEY), (KEY, None)):
        assert opens(where, old)
        convert(where, old, new)
        assert form(where.directory) is (Form.ENCRYPTED if new else Form.PLAIN)
        assert opens(where, new)
        assert [key for key in (None, KEY, OTHER) if opens(where, key)] == [new]
        assert started(where, new) == banks
        with pytest.raises(TpmError):
            started(where, OTHER if new != OTHER else KEY)


def test_an_encrypted_state_shares_nothing_with_the_plain_one(where: Place) -> None:
    def pieces() -> set[bytes]:
        whole = content(where)
        return {whole[at : at + 8] for at in range(10, len(whole) - 8)}

    plain = pieces()
    convert(where, None, KEY)
    assert not plain & pieces()
    convert(where, KEY, None)
    assert len(plain & pieces()) > 0.9 * len(plain)


def test_the_file_is_swtpms_and_nothing_else_stays(where: Place, directory: Path) -> None:
    for name in ("tpm2-00.volatilestate", "tpm2-00.savestate"):
        (where.directory / name).write_text("of a TPM that ran under the old key")
    convert(where, None, KEY)
    found = (where.directory / PERMANENT).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*where.account, 0o600)
    assert {file.name for file in where.directory.iterdir()} == {PERMANENT, ".lock"}
    assert list((directory / "run").iterdir()) == []


def test_without_a_state_there_is_none(directory: Path) -> None:
    assert form(directory) is Form.NONE
    assert form(directory / "missing") is Form.NONE


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\0" + whole[1:],
        lambda whole: whole[:3] + b"\x0b" + whole[4:],
        lambda whole: b"no TPM state",
        lambda whole: bytes(STATE_BYTES + 1),
    ],
)
def test_what_is_no_state_is_not_taken_for_one(where: Place, damage: Callable[[bytes], bytes]) -> None:
    (where.directory / PERMANENT).write_bytes(damage(content(where)))
    assert form(where.directory) is Form.UNREADABLE


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_swtpms_user_may_put_there_does_not_lead_root_astray(where: Place, kind: str) -> None:
    path = where.directory / PERMANENT
    path.rename(where.directory / "elsewhere")
    if kind == "link":
        path.symlink_to("elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert form(where.directory) is Form.UNREADABLE
    with pytest.raises(HostError) as refused:
        convert(where, None, KEY)
    assert refused.value.id == "custody.state-unreadable"


def test_a_lock_that_is_another_files_name_gives_that_file_to_nobody(where: Place, directory: Path) -> None:
    """As swtpm's user could make one where the kernel does not protect hard links (sysctl fs.protected_hardlinks)."""
    precious = directory / "precious"
    precious.write_bytes(b"root's")
    (where.directory / ".lock").unlink(missing_ok=True)
    (where.directory / ".lock").hardlink_to(precious)
    with pytest.raises(HostError) as refused:
        opens(where, None)
    assert refused.value.id == "custody.state-unreadable"
    assert precious.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("flip", [20, 400, -1])
def test_an_encrypted_state_that_was_changed_does_not_open(where: Place, flip: int) -> None:
    convert(where, None, KEY)
    changed = bytearray(content(where))
    changed[flip] ^= 1
    (where.directory / PERMANENT).write_bytes(changed)
    assert not opens(where, KEY)


def test_a_state_is_not_converted_by_a_key_that_does_not_open_it(where: Place) -> None:
    convert(where, None, KEY)
    before = content(where)
    for wrong in (OTHER, None):
        with pytest.raises(HostError) as refused:
            convert(where, wrong, KEY)
        assert refused.value.id == "custody.state-unreadable"
        assert refused.value.line().isprintable()
    assert content(where) == before


def test_a_state_in_use_is_left_alone(where: Place) -> None:
    with Tpm(where.directory.parents[1]) as running:
        running.up()
        with pytest.raises(HostError) as refused:
            convert(where, None, KEY)
        assert refused.value.id == "custody.state-busy"
    convert(where, None, KEY)


def test_what_a_killed_conversion_left_is_cleared(where: Place) -> None:
    owned_directory(where.workspace.with_name(f"{where.workspace.name}.xyz")).joinpath(PERMANENT).touch()
    convert(where, None, KEY)
    assert list(where.workspace.parent.iterdir()) == []


def test_a_swtpm_does_not_start_while_its_state_is_converted(where: Place) -> None:
    with state._alone(where), pytest.raises(TpmError):
        started(where, None)


def test_a_swtpm_that_fails_leaves_the_state(where: Place, directory: Path) -> None:
    before = content(where)
    stub = owned_directory(directory / "bin") / "swtpm"
    for text in ("exit 1", "kill -9 $$", "exec sleep 60"):
        stub.write_text(f"#!/bin/sh\n{text}\n")
        stub.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "CONVERSION_SECONDS", 0.2)
            with pytest.raises(HostError):
                convert(where._replace(path=f"{stub.parent}:{PATH}"), None, KEY)
        assert content(where) == before
    assert subprocess.run(["pgrep", "-f", str(directory)], capture_output=True).stdout == b""


def test_a_full_disk_leaves_the_state(where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(where)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename", "fchown"):
        with monkeypatch.context() as patch:
            patch.setattr(state.os, name, full)
            with pytest.raises(OSError, match="No space"):
                convert(where, None, KEY)
        assert content(where) == before
        assert opens(where, None)


SYSTEM = {"posix", "_posixsubprocess", "_socket", "socket", "_io", "fcntl"}
"""Modules whose functions call into the system."""


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Run the action in a child that is killed before its ``number``-th call into the system; whether it came to it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    seen = 0

    def watch(_frame: object, event: str, called: Any) -> None:
        nonlocal seen
        module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
        # Waiting for a process to end polls, more often on a busy machine, and changes nothing.
        if event == "c_call" and module in SYSTEM and called is not os.waitpid:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    action()
    os._exit(0)


def at_work(where: Place) -> list[str]:
    """The processes that work on a copy of the state."""
    commands = (file.read_bytes().decode() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists())
    return [command for command in commands if f"dir={where.workspace}." in command]


@pytest.mark.fault
@pytest.mark.parametrize(("old", "new"), [(None, KEY), (KEY, None)], ids=["on", "off"])
def test_killed_at_any_call_it_leaves_one_whole_state(where: Place, old: bytes | None, new: bytes | None) -> None:
    if old is not None:
        convert(where, None, old)
    before, outcomes = content(where), []
    number = 0
    while killed_at(number := number + 1, lambda: convert(where, old, new)):
        survived = content(where)
        outcomes.append(survived == before)
        assert opens(where, old if survived == before else new)
        (where.directory / PERMANENT).write_bytes(before)
    assert number > 100
    assert set(outcomes) == {True, False}  # the old one up to the rename, the new one from there on
    assert opens(where, new)
    assert {file.name for file in where.directory.iterdir()} == {PERMANENT, ".lock"}
    assert list(where.workspace.parent.iterdir()) == []
    # Those that were killed at their work take their swtpm along, which has the key.
    assert eventually(lambda: at_work(where) == [])
