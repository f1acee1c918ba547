"""The agent's port under peers that are too many, too slow, or never finish; and its page for Prometheus."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from waiting import eventually

from swtpm_prop.agent import metrics, server
from swtpm_prop.agent.metrics import Counts, Family, render
from swtpm_prop.agent.server import Server
from swtpm_prop.limits import AGENT_TALK_SECONDS


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        yield listener


@pytest.fixture
def stopped() -> threading.Event:
    return threading.Event()


@contextmanager
def running(body: Callable[..., None], *args: object, stopped: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=body, args=(*args, stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def echo(peer: socket.socket) -> None:
    with peer, suppress(OSError):
        peer.sendall(peer.recv(100))


def connect(listener: socket.socket, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout=30, source_address=(source, 0))


def said(peer: socket.socket, text: bytes = b"x") -> bytes:
    try:
        peer.sendall(text)
        return peer.recv(100)
    except ConnectionError:
        return b""


@pytest.fixture
def outcomes() -> list[str]:
    """What became of connections, as the server tells."""
    return []


@pytest.fixture
def served(listener: socket.socket, stopped: threading.Event, outcomes: list[str]) -> Iterator[Server]:
    served = Server(listener, echo, AGENT_TALK_SECONDS, outcomes.append)
    with running(served.run, stopped=stopped):
        yield served
    served.finish(0)


def wait_until_served(served: Server, talks: int) -> None:
    assert eventually(lambda: served.talks == talks)


def test_peers_are_served_beside_each_other(served: Server, listener: socket.socket) -> None:
    peers = [connect(listener) for _ in range(5)]
    assert [said(peer) for peer in reversed(peers)] == [b"x"] * 5
    wait_until_served(served, 0)


def test_no_address_has_more_than_its_share(
    served: Server, listener: socket.socket, outcomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "AGENT_PEERS_EACH", 3)
    monkeypatch.setattr(server, "AGENT_PEERS", 5)
    first = [connect(listener) for _ in range(3)]
    wait_until_served(served, 3)
    assert said(connect(listener)) == b""
    others = [connect(listener, "127.0.0.2") for _ in range(2)]
    wait_until_served(served, 5)
    assert said(connect(listener, "127.0.0.3")) == b""
    assert said(first.pop()) == b"x"
    wait_until_served(served, 4)
    assert said(connect(listener, "127.0.0.3")) == b"x"
    assert [said(peer) for peer in first + others] == [b"x"] * 4
    assert eventually(lambda: sorted(outcomes) == ["admitted"] * 6 + ["turned away"] * 2)


@contextmanager
def descriptors(left: int) -> Iterator[None]:
    """This process gets no more than so many files and sockets."""
    free = [os.dup(0) for _ in range(left + 1)]
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), most))
    for descriptor in free:
        os.close(descriptor)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


class Watched:
    """A listening socket that tells whether it had no descriptor for a peer."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.failed = threading.Event()

    def accept(self) -> tuple[socket.socket, object]:
        try:
            return self.listener.accept()
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.failed.set()
            raise


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A socket that has its descriptor before there are none."""
    with socket.socket() as peer:
        peer.settimeout(30)
        yield peer


@pytest.mark.parametrize("body", ["peers", "metrics"])
def test_out_of_descriptors_peers_wait(
    listener: socket.socket, stopped: threading.Event, peer: socket.socket, body: str
) -> None:
    watched = Watched(listener)
    peers = Server(watched, echo, AGENT_TALK_SECONDS, lambda _: None)  # type: ignore[arg-type]
    bodies = {"peers": (peers.run,), "metrics": (metrics.serve, watched, {"/": lambda: (200, "x")})}
    with running(*bodies[body], stopped=stopped):
        with descriptors(0):
            peer.connect(listener.getsockname())
            assert watched.failed.wait(30)
        assert b"x" in said(peer, b"GET / HTTP/1.1\r\n\r\nx")


def test_without_a_descriptor_to_watch_it_by_a_peer_is_turned_away(
    served: Server, listener: socket.socket, peer: socket.socket
) -> None:
    with descriptors(1):
        peer.connect(listener.getsockname())
        assert peer.recv(1) == b""
    wait_until_served(served, 0)
    assert said(connect(listener)) == b"x"


@pytest.mark.parametrize("lacking", [threading.Timer, threading.Thread])
def test_without_a_thread_a_peer_is_turned_away(
    served: Server,
    listener: socket.socket,
    outcomes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    lacking: type[threading.Thread],
) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if type(thread) is lacking:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert said(connect(listener)) == b""
    monkeypatch.undo()
    wait_until_served(served, 0)
    assert said(connect(listener)) == b"x"
    assert outcomes.count("turned away") == 1


def test_a_peer_that_never_ends_is_cut_off(
    listener: socket.socket, stopped: threading.Event, outcomes: list[str]
) -> None:
    served = Server(listener, echo, 0.2, outcomes.append)
    with running(served.run, stopped=stopped):
        assert connect(listener).recv(1) == b""
        wait_until_served(served, 0)
    assert outcomes == ["admitted", "too slow"]


def test_talks_in_hand_are_finished_and_then_cut_off(
    served: Server, listener: socket.socket, stopped: threading.Event
) -> None:
    quick, slow = connect(listener), connect(listener)
    wait_until_served(served, 2)
    stopped.set()
    finishing = threading.Thread(target=served.finish, args=(3600,), daemon=True)
    finishing.start()
    assert said(quick) == b"x"
    wait_until_served(served, 1)
    assert finishing.is_alive()
    served.finish(0)
    assert slow.recv(1) == b""
    finishing.join(30)
    assert not finishing.is_alive()


def test_metrics_are_as_prometheus_reads_them() -> None:
    counts = Counts()
    for word in ("b", "a", 'with "quotes"\\\n', "b"):
        counts.count("transfers", outcome=word, side="source")
    families = [
        Family("swtpm_prop_transfers_total", "Transfers.", "counter", counts.samples("transfers")),
        Family("swtpm_prop_up", "Up.", "gauge", [((), 1)]),
    ]
    assert render(families) == (
        "# HELP swtpm_prop_transfers_total Transfers.\n"
        "# TYPE swtpm_prop_transfers_total counter\n"
        'swtpm_prop_transfers_total{outcome="a",side="source"} 1\n'
        'swtpm_prop_transfers_total{outcome="b",side="source"} 2\n'
        'swtpm_prop_transfers_total{outcome="with \\"quotes\\"\\\\\\n",side="source"} 1\n'
        "# HELP swtpm_prop_up Up.\n"
        "# TYPE swtpm_prop_up gauge\n"
        "swtpm_prop_up 1\n"
    )


@pytest.fixture
def page(listener: socket.socket, stopped: threading.Event) -> Iterator[str]:
    pages = {"/metrics": lambda: (200, "up 1\n"), "/health": lambda: (503, "no libvirt\n")}
    with running(metrics.serve, listener, pages, stopped=stopped):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_pages(page: str) -> None:
    assert urllib.request.urlopen(f"{page}/metrics").read() == b"up 1\n"
    for path, status in (("/health", 503), ("/none", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(page + path)
        assert refused.value.code == status
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}/metrics", data=b"x")
    assert refused.value.code == 400


@pytest.mark.parametrize("request_", [b"", b"\r\n", b"GET", b"\xff" * 5000, b"GET \xff HTTP/1.1\r\n\r\n"])
def test_odd_and_silent_requests_keep_nobody_waiting(
    page: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, request_: bytes
) -> None:
    with monkeypatch.context() as short, connect(listener) as odd:
        short.setattr(metrics, "METRICS_SECONDS", 0.2)
        odd.sendall(request_)
        with suppress(ConnectionError):
            while odd.recv(4096):
                pass
    assert urllib.request.urlopen(f"{page}/metrics", timeout=30).read() == b"up 1\n"
