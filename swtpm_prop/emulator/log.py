"""The property log as the layer writes it: JSON lines, appended, bounded, and never in the TPM's way."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable

from swtpm_prop.errors import LayerError
from swtpm_prop.limits import LOG_BYTES
from swtpm_prop.translate.record import Record, failure


class Log:
    """One guest's property log, open for appending."""

    def __init__(self, path: str) -> None:
        """Open the file that the hook created, and lock it: that is how the hook sees that the layer is there.

        Raises:
            LayerError: ``layer.log-unwritable``.
        """
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = os.fstat(self._file).st_size
        except OSError as error:
            mend = "shut the guest down and start it again; the hook makes this file for the swtpm user"
            what = f"the property log '{path}' cannot be written: {error.strerror}"
            raise LayerError("layer.log-unwritable", what, mend) from None
        self._number = 0
        self._torn = False
        self._full = False
        self._now = (0, "")

    def write(self, records: Iterable[Record]) -> None:
        """Append records, each with one write; what cannot be written is lost, and the TPM goes on."""
        for record in records:
            if self._full:
                return
            line = self._line(record)
            if self._size + len(line) > LOG_BYTES:
                self._full = True
                line = self._line(failure("layer.log-full", f"the log of this start has reached {LOG_BYTES} bytes"))
            self._append(line)

    def _line(self, record: Record) -> bytes:
        return (record.to_line(self._number, self._time()) + "\n").encode()

    def _time(self) -> str:
        """The time of day, formatted once in a second."""
        second = int(time.time())
        if second != self._now[0]:
            self._now = second, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
        return self._now[1]

    def _append(self, line: bytes) -> None:
        """After a torn write (a full disk) the next record begins on a line of its own."""
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._file, data)
        except OSError:
            return
        self._size += written
        self._torn = written < len(data)
        self._number += 1
