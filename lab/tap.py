"""Tap the cables of a laboratory host: everything that goes over them, put together as TCP streams.

Runs alone in the host too (``python -I tap.py FILE``): writes each frame, behind its length in four bytes, to FILE,
until its standard input ends and nothing is on the way any more.
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.host import Host

ETH_P_ALL, ETH_P_IP = 3, 0x0800
SO_RCVBUFFORCE = 33
BUFFER = 64 << 20  # bytes; a migration comes in bursts
LARGEST = 1 << 17  # bytes; a virtual cable carries what a real one would cut into pieces
QUIET = 0.2  # seconds without a frame: nothing is on the way any more

Connection = tuple[bytes, bytes]
"""The sender's address and port, the receiver's."""


class Tap:
    """A ``with`` listens on every cable of ``host``, into ``file``; afterwards ``streams`` has what was said."""

    def __init__(self, host: Host, file: Path) -> None:
        self._host = host
        self._file = file
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tap:
        command = self._host.inside([sys.executable, "-I", Path(__file__), self._file])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.communicate(timeout=30)

    def streams(self) -> list[bytes]:
        """What each side of each connection sent, from the first byte seen on."""
        pieces: dict[Connection, dict[int, bytes]] = defaultdict(dict)
        for frame in _frames(self._file.read_bytes()):
            found = _tcp(frame)
            if found and found[2]:
                connection, sequence, data = found
                pieces[connection][sequence] = max(data, pieces[connection].get(sequence, b""), key=len)
        return [_joined(parts) for parts in pieces.values()]


def _frames(recorded: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(recorded):
        (size,) = struct.unpack_from(">I", recorded, at)
        found.append(recorded[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def _tcp(frame: bytes) -> tuple[Connection, int, bytes] | None:
    """Connection, sequence number and data of a TCP segment in an Ethernet frame (RFC 791, RFC 9293)."""
    packet = frame[14:]
    if int.from_bytes(frame[12:14], "big") != ETH_P_IP or packet[9] != socket.IPPROTO_TCP:
        return None
    segment = packet[4 * (packet[0] & 15) : int.from_bytes(packet[2:4], "big")]
    connection = (packet[12:16] + segment[0:2], packet[16:20] + segment[2:4])
    return connection, int.from_bytes(segment[4:8], "big"), segment[4 * (segment[12] >> 4) :]


def _joined(parts: dict[int, bytes]) -> bytes:
    """The segments in order; what was sent again counts once. Sequence numbers wrap, streams here are shorter."""
    first = next(iter(parts))
    placed = sorted(((at - first + (1 << 31)) % (1 << 32), data) for at, data in parts.items())
    begin, stream = placed[0][0], bytearray()
    for at, data in placed:
        stream[at - begin : at - begin + len(data)] = data
    return bytes(stream)


def main() -> None:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with tap, Path(sys.argv[1]).open("wb") as file:
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        print("ready", flush=True)
        ends = [tap, sys.stdin]
        while readable := select.select(ends, [], [], None if sys.stdin in ends else QUIET)[0]:
            if tap in readable:
                frame = tap.recv(LARGEST)
                file.write(struct.pack(">I", len(frame)) + frame)
            elif sys.stdin in readable:
                ends.remove(sys.stdin)


if __name__ == "__main__":
    main()
