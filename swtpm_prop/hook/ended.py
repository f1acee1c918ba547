"""Why a guest ended on this host, by libvirt's own note in QEMU's log: the hook itself is told nothing."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from swtpm_prop.domain.identity import Identity
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import QEMU_LOG_BYTES

if TYPE_CHECKING:
    from swtpm_prop.transfer.journal import Transfer
    from swtpm_prop.transfer.messages import Report

MIGRATED = "migrated"
"""libvirt's word for a guest that runs on another host now (src/conf/domain_conf.c, virDomainShutoffReason)."""

_NOTE = re.compile(
    rb"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+0000: (?:shutting down, reason=([a-z ]+)|(starting up .*))$"
)


def tell_transfers(identity: Identity, layout: Layout) -> None:
    """Write down for the guest's transfers that no process of it is here any more, and whether it has moved.

    Raises:
        TransferError: the journal cannot be used.
    """
    # Imported here: the end of a guest that never moved costs nothing of this.
    from swtpm_prop.hook.door import knock
    from swtpm_prop.transfer.journal import Journal
    from swtpm_prop.transfer.machine import Event
    from swtpm_prop.transfer.settle import HOOK, Settler

    moved = reason(identity.name, layout) == MIGRATED
    settler = Settler(layout, Journal(layout), HOOK, _ask_nobody)
    settler.observe(identity.uuid, *([Event.MIGRATED] if moved else []), Event.GONE)
    if any(known.unfinished for known in settler.journal.of(identity.uuid)):
        # Of a process that comes to nothing before the guest arrives libvirt tells hooks, but no events.
        knock(layout)


def _ask_nobody(transfer: Transfer, _: Report) -> Report:
    """libvirt waits for this hook; peers are for the agent to ask, or the next start."""
    raise TransferError("transfer.unreachable", f"'{transfer.peer}' is not asked", "see that swtpm-prop's agent runs")


def reason(name: str, layout: Layout) -> str:
    """The reason in the note about the latest end of the guest called ``name``; empty if there is none.

    QEMU writes to the same file. A guest that has taken its QEMU over can so pretend to have moved, which harms itself
    alone: it then counts as gone here until the other host says otherwise. Notes of one run that differ count as none.
    """
    if "/" in name or "\0" in name:
        return ""
    try:
        with open(layout.qemu_log(name), "rb", opener=_careful) as log:
            if not stat.S_ISREG(os.fstat(log.fileno()).st_mode):
                return ""
            log.seek(max(0, log.seek(0, os.SEEK_END) - QEMU_LOG_BYTES))
            return _latest(log.read(QEMU_LOG_BYTES))
    except OSError:
        return ""


def _careful(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _latest(log: bytes) -> str:
    found: set[str] = set()
    for line in log.split(b"\n"):
        note = _NOTE.match(line)
        if note and note[2]:
            found = set()
        elif note:
            found.add(note[1].decode("ascii"))
    return found.pop() if len(found) == 1 else ""
