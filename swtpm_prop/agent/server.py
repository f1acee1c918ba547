"""A port that others connect to: a thread for each peer, few of them, none for long."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from swtpm_prop.limits import AGENT_PEERS, AGENT_PEERS_EACH

Talk = Callable[[socket.socket], None]
"""Says all that is to be said to one connected peer, and closes it; raises nothing."""


class Server:
    """Accepts peers until it is stopped.

    An unknown peer gets a thread before it has shown who it is: so there are few, they end in time whatever the peer
    does, and no address has more than its share.

    Args:
        listener: a listening socket with a time-out, which is how soon it sees that it is stopped.
        talk: see `Talk`.
        seconds: longest that a talk may take.
        tell: is told what became of a connection: ``admitted``, ``turned away``, and then perhaps ``too slow``.
    """

    def __init__(self, listener: socket.socket, talk: Talk, seconds: float, tell: Callable[[str], None]) -> None:
        self._listener = listener
        self._talk = talk
        self._seconds = seconds
        self._tell = tell
        self._lock = threading.Lock()
        self._talks: dict[threading.Thread, tuple[socket.socket, str]] = {}

    def run(self, stopped: threading.Event) -> None:
        """Accept until stopped; talks that go on then are left to `finish`."""
        while not stopped.is_set():
            try:
                peer, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # Out of descriptors or memory: the ones in hand end soon.
                stopped.wait(0.1)
                continue
            # One on this host, by a socket in its files, has none.
            self._admit(peer, str(address[0]) if address else "")

    def finish(self, seconds: float) -> None:
        """Wait for the talks in hand, then cut off what is left."""
        deadline = time.monotonic() + seconds
        while self.talks and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            for handle, _ in self._talks.values():
                _cut(handle)

    @property
    def talks(self) -> int:
        """How many peers are being talked with."""
        with self._lock:
            return len(self._talks)

    def _admit(self, peer: socket.socket, address: str) -> None:
        with self._lock:
            share = Counter(address for _, address in self._talks.values())
            room = len(self._talks) < AGENT_PEERS and share[address] < AGENT_PEERS_EACH
        try:
            admitted = room and self._begin(peer, address)
        except (OSError, RuntimeError):
            # Out of descriptors or threads: as where there is no room.
            admitted = False
        self._tell("admitted" if admitted else "turned away")
        if not admitted:
            peer.close()

    def _begin(self, peer: socket.socket, address: str) -> bool:
        # A second handle on the connection, to end it by: TLS takes the first one over.
        handle = peer.dup()
        watch = threading.Timer(self._seconds, self._late, (handle,))
        watch.daemon = True
        thread = threading.Thread(target=self._serve, args=(peer, watch), name=f"peer {address}", daemon=True)
        with self._lock:
            self._talks[thread] = handle, address
        try:
            watch.start()
            thread.start()
        except RuntimeError:
            self._end(thread, watch)
            raise
        return True

    def _serve(self, peer: socket.socket, watch: threading.Timer) -> None:
        try:
            self._talk(peer)
        finally:
            self._end(threading.current_thread(), watch)

    def _end(self, thread: threading.Thread, watch: threading.Timer) -> None:
        watch.cancel()
        with self._lock:
            handle, _ = self._talks.pop(thread)
            handle.close()

    def _late(self, handle: socket.socket) -> None:
        self._tell("too slow")
        _cut(handle)


def _cut(handle: socket.socket) -> None:
    """End a connection that another thread waits on: whatever it does with it fails at once."""
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself
