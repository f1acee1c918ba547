"""This host's voice: who it is to others, with the key that only its TPM opens, and reports to the hosts it knows."""

from __future__ import annotations

import threading

from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop.attest import membership
from swtpm_prop.custody import opening
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import REPORT_SECONDS
from swtpm_prop.transfer.channel import Identity, connect
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.messages import Refused, Report


class Speaker:
    """Speaks for the host; any thread may use it.

    Certificates and what is revoked are read anew each time. The TLS key is opened once, and again when its file is
    another one: the host was enrolled again.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._file: tuple[int, int] | None = None

    def identity(self) -> Identity:
        """Who this host is now.

        Raises:
            Error: as `membership.load` and `membership.tls_key`.
        """
        files = membership.load(self._layout)
        with self._lock:
            file = self._stat()
            if self._key is None or file != self._file:
                with opening.hardware(self._layout) as hardware:
                    self._key, self._file = membership.tls_key(hardware, self._layout.host_keys), file
            return Identity(files, self._key)

    def report(self, transfer: Transfer, report: Report) -> Report:
        """Report to a transfer's peer, and learn how far the transfer is there.

        Raises:
            Error: it cannot be reached, or another host answers in its place.
        """
        with connect(transfer.endpoint, self.identity(), REPORT_SECONDS, REPORT_SECONDS) as channel:
            if channel.peer != transfer.peer:
                raise TransferError(
                    "transfer.other-peer",
                    f"at '{transfer.endpoint}' answers '{channel.peer}' in place of '{transfer.peer}'",
                    f"see why, or decide with 'swtpm-prop transfer resolve {transfer.uuid}'",
                )
            channel.send(report)
            answer = channel.receive()
        if isinstance(answer, Refused):
            raise TransferError(answer.id, f"'{transfer.peer}' answers: {answer.what}", answer.mend)
        if not isinstance(answer, Report) or answer.id != report.id:
            raise TransferError("transfer.message", f"'{transfer.peer}' answers something else", "see its agent's log")
        return answer

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = (self._layout.host_keys / "tls.key").stat()
        except OSError:
            return None  # opening it says what is wrong
        return found.st_ino, found.st_mtime_ns
