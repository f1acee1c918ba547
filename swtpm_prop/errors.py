"""The one error hierarchy: every failure has a stable id, says what happened and how to mend it."""

from __future__ import annotations


class Error(Exception):
    """A failure that a person or a program can act on.

    Args:
        id: stable dotted id, for example ``store.index-missing``; never changes between releases.
        what: what happened, one sentence without the final full stop.
        mend: what to do about it, one sentence; empty where nothing can be done.
    """

    def __init__(self, id: str, what: str, mend: str = "") -> None:
        super().__init__(id, what, mend)
        self.id = id
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return self.line()

    def line(self) -> str:
        """The error as one printable line: control characters in hostile input stay visible, not active."""
        text = f"{self.what} [{self.id}]"
        if self.mend:
            text += f": {self.mend}"
        return printable(text)


class WireError(Error):
    """Bytes that are not the TPM structure, event log or PE image they should be."""


class LayerError(Error):
    """The translation layer cannot start or cannot go on; the TPM must not come up without it."""


class TrustError(Error):
    """A certificate or an issuer is not acceptable."""


class StoreError(Error):
    """The certificate index is missing, damaged, foreign or stale."""


class DomainError(Error):
    """Domain metadata is malformed, or libvirt does not have the domain."""


class HostError(Error):
    """The host is not set up as this software needs it."""


class AttestError(Error):
    """Evidence, an enrolment or a certificate of the fleet is not acceptable."""


class TransferError(Error):
    """A guest's key cannot change hosts, or it is not known which host has the guest."""


class UsageError(Error):
    """The command line makes no sense; exit status 2."""


def printable(text: str) -> str:
    """Escape everything that could act on a terminal or break a line (hostile names, XML, certificates)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
