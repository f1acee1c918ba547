"""Talk to a guest over its serial console: wait for what it says, run shell lines in it.

Commands and answers travel as base64 with a checksum in frames with an id (``guest-init.sh`` is the other end). The
kernel may write into the middle of a frame, and a migration or restore may lose one: then it is asked for again, and
the guest, which remembers its last answer, never runs a command twice.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import re
import shlex
import socket
import struct
import termios
import time
from typing import TYPE_CHECKING

from lab.process import LabError

if TYPE_CHECKING:
    from lab.domain import Domain
    from lab.host import Host

CHUNK = 1024  # characters; a terminal line holds 4095
PIECE = 12 * 1024  # bytes; the guest's serial driver drops what exceeds 64 KiB unread
LOOK = 0.005  # seconds between looks at the transcript
TAKING = 5.0  # seconds for a guest to take a command; a paused one never does
PATIENCE = 2.0  # seconds of silence after which an answer is asked for again
READY = r"\[lab ready (\S+) (\S+)\]"  # kernel release, seconds since the kernel started

_ids = itertools.count(1)


class Console:
    """The console of ``domain`` on ``host``; reads from the transcript QEMU keeps, so nothing said is missed."""

    def __init__(self, host: Host, domain: Domain) -> None:
        self._domain = domain
        self.attach(host)

    def attach(self, host: Host, position: int | None = None) -> None:
        """Go on with the guest on ``host``, at ``position`` of the transcript there (default: its present end)."""
        self._transcript = host.root / self._domain.transcript.lstrip("/")
        self._path = str(host.root / self._domain.socket.lstrip("/"))
        self.position = self.size(host) if position is None else position

    def size(self, host: Host) -> int:
        """Bytes of the transcript on ``host`` so far."""
        transcript = host.root / self._domain.transcript.lstrip("/")
        return transcript.stat().st_size if transcript.exists() else 0

    def wait(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait until the guest says ``pattern``, from the end of the last match on.

        Raises:
            LabError: not within ``timeout`` seconds; the text ends with what the guest said instead.
        """
        found = self._search(pattern, time.monotonic() + timeout)
        if found is None:
            raise LabError(f"the guest did not say {pattern!r} in {timeout:g} s; it said:\n{self._said()[-2000:]}")
        self.position += len(found.string[: found.end()].encode("latin-1"))
        return found

    def wait_ready(self, timeout: float = 120) -> re.Match[str]:
        """Wait for the guest's shell; groups: kernel release, seconds since the kernel started."""
        return self.wait(READY, timeout)

    def run(self, line: str, timeout: float = 30) -> tuple[int, str]:
        """Run a shell line in a subshell of the guest: its status, and both outputs as one text.

        Raises:
            LabError: no answer within ``timeout`` seconds.
        """
        status, output = self.run_bytes(line, timeout)
        return status, output.decode(errors="replace")

    def run_bytes(self, line: str, timeout: float = 30) -> tuple[int, bytes]:
        """As ``run``, with the output's bytes."""
        number = _number()
        deadline = time.monotonic() + timeout
        self._ask(line, number)
        frame = rf"\[lab {number} (?:(\d+) ([0-9a-f]{{32}}) ([A-Za-z0-9+/=]*)|\?) lab\]"
        while time.monotonic() < deadline:
            start = self.position
            found = self._search(frame, min(deadline, time.monotonic() + PATIENCE))
            if found is None:
                self._send(f"\nsay {number}\n")
                continue
            self.position = start + len(found.string[: found.end()].encode("latin-1"))
            if found[1] is None:
                self._ask(line, number)
                continue
            output = _decoded(found[3])
            if _checksum(output) == found[2]:
                return int(found[1]), output
            self._send(f"\nsay {number}\n")
        raise LabError(f"no answer in {timeout:g} s to {line!r}; the guest said:\n{self._said()[-2000:]}")

    def check(self, line: str, timeout: float = 30) -> str:
        """As ``run``, for a line that must succeed: its output."""
        status, output = self.run(line, timeout)
        if status:
            raise LabError(f"in the guest: {line}: status {status}\n{output}")
        return output

    def begin(self, line: str) -> None:
        """Start a shell line without waiting for its answer (a reboot gives none)."""
        self._ask(line, _number())

    def put(self, path: str, content: bytes) -> None:
        """Write a file of the guest."""
        target = shlex.quote(path)
        self.check(f": > {target}")
        for start in range(0, len(content), PIECE):
            text = base64.b64encode(content[start : start + PIECE]).decode()
            self.check(f"echo {text} | base64 -d >> {target}")

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        status, content = self.run_bytes(f"cat {shlex.quote(path)}")
        if status:
            raise LabError(content.decode(errors="replace"))
        return content

    def _ask(self, line: str, number: str) -> None:
        text = base64.b64encode(line.encode())
        parts = [text[start : start + CHUNK].decode() for start in range(0, len(text), CHUNK)]
        adds = "".join(f"add {number} {part}\n" for part in parts)
        self._send(f"\nnew {number}\n{adds}run {number} {_checksum(text)}\n")

    def _said(self) -> str:
        """The transcript from the current position on; latin-1, so that characters count bytes."""
        try:
            with self._transcript.open("rb") as transcript:
                transcript.seek(self.position)
                return transcript.read().decode("latin-1")
        except FileNotFoundError:
            return ""

    def _search(self, pattern: str, deadline: float) -> re.Match[str] | None:
        compiled = re.compile(pattern)
        while True:
            found = compiled.search(self._said())
            if found or time.monotonic() > deadline:
                return found
            time.sleep(LOOK)

    def _send(self, text: str) -> None:
        """Send if the guest can be reached; what is lost is asked for again.

        The connection ends when QEMU has taken the last byte. While one is open, QEMU drops what the guest says faster
        than it is read; without one everything goes to the transcript.
        """
        deadline = time.monotonic() + TAKING
        with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):
            line.settimeout(TAKING)
            line.connect(self._path)
            line.sendall(text.encode())
            while _unsent(line) and time.monotonic() < deadline:
                time.sleep(0.001)


def _number() -> str:
    """An id no other command of this process has."""
    return f"{next(_ids):06d}"


def _checksum(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _unsent(line: socket.socket) -> int:
    """Bytes the other side has not read yet (unix(7), SIOCOUTQ)."""
    (count,) = struct.unpack("i", fcntl.ioctl(line, termios.TIOCOUTQ, bytes(4)))
    return int(count)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:
        return b""  # a kernel message fell into the frame: the checksum will tell
