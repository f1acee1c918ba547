"""The end of a guest: why, from QEMU's log as libvirt writes it, with guests called as badly as libvirt allows; and who
hears of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swtpm_prop.agent import door
from swtpm_prop.domain.identity import Identity
from swtpm_prop.hook.ended import reason, tell_transfers
from swtpm_prop.layout import Layout
from swtpm_prop.limits import QEMU_LOG_BYTES
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Side, State

STARTING = "2026-11-23 21:42:16.123+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22, hostname: alpha\n"
ENDING = "2026-11-23 21:42:50.632+0000: shutting down, reason={}\n"
SIGNAL = "2026-11-23T21:42:50.632881Z qemu-system-x86_64: terminating on signal 15 from pid 8 (libvirtd)\n"
MIGRATED, CRASHED = ENDING.format("migrated"), ENDING.format("crashed")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "var/log/libvirt/qemu").mkdir(parents=True)
    return Layout(tmp_path)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (STARTING + MIGRATED + SIGNAL, "migrated"),
        (STARTING + CRASHED + STARTING + MIGRATED, "migrated"),
        (STARTING + MIGRATED + STARTING + CRASHED, "crashed"),
        (STARTING + MIGRATED + STARTING, ""),
        (STARTING + SIGNAL, ""),
        (STARTING + MIGRATED + CRASHED, ""),  # QEMU wrote one of them
        (STARTING + "x" + MIGRATED, ""),
        (STARTING + MIGRATED.strip() + "!\n", ""),
        ("x" * 2 * QEMU_LOG_BYTES + "\n" + MIGRATED, "migrated"),
        ("\n" * QEMU_LOG_BYTES, ""),
        ("", ""),
    ],
)
def test_the_latest_note_counts(layout: Layout, log: str, expected: str) -> None:
    layout.qemu_log("guest").write_text(log)
    assert reason("guest", layout) == expected


@pytest.mark.parametrize("name", ["..", ".", "-rf", "a\tb", "\x1b[31m", "a b", "ü", "*", "n" * 251])
def test_any_name_that_libvirt_allows(layout: Layout, name: str) -> None:
    (layout.root / "var/log/libvirt/qemu" / f"{name}.log").write_text(MIGRATED)
    assert reason(name, layout) == "migrated"


@pytest.mark.parametrize("name", ["", "none", "../secret", "/etc/passwd", "a\0b", "n" * 300])
def test_no_other_file_is_read(layout: Layout, name: str) -> None:
    (layout.root / "var/log/libvirt/secret.log").write_text(MIGRATED)
    assert reason(name, layout) == ""


def test_only_a_file_is_read(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(MIGRATED)
    layout.qemu_log("link").symlink_to(tmp_path / "secret")
    os.mkfifo(layout.qemu_log("pipe"))
    layout.qemu_log("directory").mkdir()
    assert [reason(name, layout) for name in ("link", "pipe", "directory")] == ["", "", ""]


@pytest.mark.parametrize(
    ("state", "after", "knocks"),
    [
        (State.ARRIVING, State.LEFT, True),
        (State.ACTIVATED, State.ACTIVATED, True),
        (State.SETTLED, State.SETTLED, False),
    ],
)
def test_the_agent_hears_of_what_is_not_finished(layout: Layout, state: State, after: State, knocks: bool) -> None:
    guest = Identity("0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d", True, name="guest")
    journal = Journal(layout)
    journal.begin(Transfer("a" * 32, Side.DESTINATION, state, guest.uuid, 0, "beta", "beta:4879"))
    with door.listening(layout) as listener:
        listener.setblocking(False)
        tell_transfers(guest, layout)
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            assert not knocks
        else:
            assert knocks
    assert [known.state for known in journal.of(guest.uuid)] == [after]
    tell_transfers(guest, layout)  # nor is an agent needed
