"""Reach another host: its name looked up and a connection made, within a time."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from swtpm_prop.errors import TransferError

Place = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
"""As `socket.getaddrinfo` has it."""


def reach(endpoint: str, seconds: float) -> socket.socket:
    """Connect to a host.

    Args:
        endpoint: ``host:port``.
        seconds: that all of it may take, whatever the host's name leads to.

    Raises:
        TransferError: ``transfer.unreachable``.
    """
    ends = time.monotonic() + seconds
    host, _, port = endpoint.rpartition(":")
    try:
        return _connect(_look_up(host.strip("[]"), int(port), ends), ends)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(
            "transfer.unreachable",
            f"the agent at '{endpoint}' cannot be reached: {error}",
            "see that swtpm-prop's agent runs there and this port is open",
        ) from error


def _look_up(host: str, port: int, ends: float) -> Sequence[Place]:
    """Where the host is; the resolver knows no limit of ours, so that a thread is left behind with it."""
    answer: SimpleQueue[Sequence[Place] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=max(0.0, ends - time.monotonic()))
    except Empty:
        raise TimeoutError("its name is not found in time") from None
    if isinstance(found, Exception):
        raise found
    return found


def _connect(places: Sequence[Place], ends: float) -> socket.socket:
    """Try one after the other; each leaves the later ones their share of the time."""
    failed = OSError("its name leads nowhere")
    for number, (family, kind, protocol, _, address) in enumerate(places):
        share = max(0.0, ends - time.monotonic()) / (len(places) - number)
        try:
            return _connected(socket.socket(family, kind, protocol), address, share)
        except OSError as error:
            failed = error
    raise failed


def _connected(connection: socket.socket, address: tuple[Any, ...], seconds: float) -> socket.socket:
    try:
        connection.settimeout(seconds)
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection
