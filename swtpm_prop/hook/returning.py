"""A guest that left this host in custody comes back without: its arrival is told from a start of what it left here."""

from __future__ import annotations

from swtpm_prop.domain import arrival
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal
from swtpm_prop.transfer.machine import left

_BACK = "back-{}"


def let_back(xml: bytes, uuid: str, layout: Layout) -> bytes:
    """The XML that libvirt shall go on with for a guest that comes without custody; empty: with the one it has.

    It brings its TPM. That a transfer is released here, which forbids to start the definition that was left behind with
    a new TPM, is no reason to refuse it.

    Raises:
        TransferError: the journal cannot be used; DomainError: as `arrival.note`.
    """
    back = _back(uuid, Journal(layout))
    return arrival.note(xml, back) if back else b""


def comes_back(uuid: str, note: str, journal: Journal) -> bool:
    """Whether this start receives the guest that `let_back` has let in, by what it noted in the XML.

    Raises:
        TransferError: the journal cannot be used.
    """
    return bool(note) and note == _back(uuid, journal)


def _back(uuid: str, journal: Journal) -> str:
    gone = journal.counting(uuid)
    return _BACK.format(gone.id) if gone and left(gone.state) else ""
