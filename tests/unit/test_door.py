"""The hook's way to the agent: what goes through comes out the same, and a door that is not answered stops nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from waiting import eventually

from swtpm_prop import __version__
from swtpm_prop.agent import door as agent
from swtpm_prop.agent.metrics import Counts
from swtpm_prop.agent.server import Server
from swtpm_prop.errors import Error, HostError, TransferError
from swtpm_prop.hook import door as hook
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOMAIN_XML_BYTES
from swtpm_prop.transfer.speaker import Speaker

XML = '<domain><name>"quoted" ü \U0001f512</name></domain>\n'.encode()
NOTED = XML.replace(b"<name>", b"<metadata/><name>")
REFUSED = TransferError("transfer.no-source", 'nothing "says" so\0\n', "start \u200b it")

Work = Callable[[bytes, Layout, Speaker], bytes]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """With a path that no socket's address would hold."""
    layout = Layout(tmp_path / ("x" * 100))
    layout.run.mkdir(parents=True)
    return layout


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be at work on the machine."""
    monkeypatch.setattr(hook, "GREETING_SECONDS", 30)


@contextmanager
def answering(layout: Layout, talk: Callable[[socket.socket], None]) -> Iterator[list[str]]:
    """Somebody in the agent's place; what became of the hooks that came."""
    outcomes: list[str] = []
    stopped = threading.Event()
    with agent.listening(layout) as listener:
        listener.settimeout(0.05)
        server = Server(listener, talk, 30, outcomes.append)
        thread = threading.Thread(target=server.run, args=(stopped,))
        thread.start()
        try:
            yield outcomes
        finally:
            stopped.set()
            thread.join()
            server.finish(0)


@contextmanager
def agent_that(layout: Layout, work: Work, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """The agent, and what it has to do for hooks."""
    counts = Counts()
    monkeypatch.setattr(agent, "let_in", work)
    with answering(layout, agent.Door(layout, Speaker(layout), counts, lambda: counts.count("looks")).talk):
        yield counts


def test_what_goes_in_comes_out(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    large = b"<domain>" + b"\\\"'" * (DOMAIN_XML_BYTES // 3 - 10) + b"</domain>"
    known = {XML: NOTED, NOTED: b"", large: large}
    with agent_that(layout, lambda xml, *_: known[xml], monkeypatch) as counts:
        for xml, noted in known.items():
            assert hook.have_let_in(xml, layout) == noted
        assert counts.samples("arrivals") == [((("outcome", "let in"),), 3)]


def test_many_hooks_at_a_time(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(10)

    def work(xml: bytes, *_: object) -> bytes:
        together.wait(30)
        return xml * 2

    noted: dict[bytes, bytes | None] = {}

    def come(xml: bytes) -> None:
        noted[xml] = hook.have_let_in(xml, layout)

    with agent_that(layout, work, monkeypatch):
        threads = [threading.Thread(target=come, args=(b"%d" % number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert noted == {b"%d" % number: b"%d%d" % (number, number) for number in range(10)}


def test_a_refusal_is_the_same_on_both_sides(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise REFUSED

    with agent_that(layout, refuse, monkeypatch) as counts, pytest.raises(Error) as refused:
        hook.have_let_in(XML, layout)
    assert refused.value.line() == REFUSED.line()
    assert refused.value.args == REFUSED.args
    assert counts.samples("arrivals") == [((("outcome", REFUSED.id),), 1)]


def test_a_mistake_in_the_agent_lets_nobody_in(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise ZeroDivisionError("a mistake")

    with agent_that(layout, fail, monkeypatch), pytest.raises(Error) as refused:
        hook.have_let_in(XML, layout)
    assert refused.value.id == "agent.failed"


def test_a_hook_that_says_nothing_has_the_journal_looked_at(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.knock(layout)
    with agent_that(layout, lambda *_: b"", monkeypatch) as counts:
        for number in (1, 2):
            hook.knock(layout)
            assert eventually(lambda number=number: counts.samples("looks") == [((), number)])  # type: ignore[misc]
        assert counts.samples("arrivals") == []


# -- nobody answers -----------------------------------------------------------------------------


def test_without_an_agent_the_hook_does_it_itself(layout: Layout) -> None:
    assert hook.have_let_in(XML, layout) is None
    layout.run.rmdir()
    assert hook.have_let_in(XML, layout) is None


def test_a_killed_agent_leaves_a_socket_that_is_nobodys_and_the_next_takes_its_place(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as left, hook.address(layout) as place:
        left.bind(place)
    assert layout.agent_socket.exists()
    assert hook.have_let_in(XML, layout) is None
    with agent_that(layout, lambda xml, *_: xml, monkeypatch):
        assert hook.have_let_in(XML, layout) == XML
    assert not layout.agent_socket.exists()


def test_an_agent_that_hangs_is_sent_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens, and the kernel connects; should it go on after all, nobody is there any more."""
    monkeypatch.setattr(hook, "GREETING_SECONDS", 0.1)
    with agent.listening(layout) as listener:
        assert hook.have_let_in(XML, layout) is None
        line, _ = listener.accept()
        with line:
            assert hook.hear(line) == b""


@pytest.mark.parametrize("greeting", [b"", b"swtpm-prop 0.0.1\n", f"swtpm-prop {__version__}".encode()])
def test_an_agent_of_another_release_is_sent_nothing(layout: Layout, greeting: bytes) -> None:
    heard: list[bytes] = []

    def talk(line: socket.socket) -> None:
        with line:
            line.sendall(greeting)
            line.shutdown(socket.SHUT_WR)
            heard.append(line.recv(100))

    with answering(layout, talk):
        assert hook.have_let_in(XML, layout) is None
        assert eventually(lambda: heard == [b""])


def test_one_that_turns_hooks_away_stops_nobody(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swtpm_prop.agent.server.AGENT_PEERS", 0)
    with answering(layout, lambda line: line.close()) as outcomes:
        assert hook.have_let_in(XML, layout) is None
        assert outcomes == ["turned away"]


# -- cut off in the middle ----------------------------------------------------------------------


@pytest.mark.parametrize("part", [b"", b'{"xml": "<domain>', b"\xff", b"{}}"])
def test_an_agent_that_ends_over_it_lets_nobody_in(layout: Layout, part: bytes) -> None:
    def talk(line: socket.socket) -> None:
        with line:
            assert hook.hear(line) == XML
            line.sendall(part)

    with answering(layout, talk), pytest.raises(TransferError) as refused:
        hook.have_let_in(XML, layout)
    assert refused.value.id == "transfer.agent-lost"


def test_an_agent_that_never_ends_lets_nobody_in(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "LET_IN_SECONDS", 0.2)
    over = threading.Event()
    with agent_that(layout, lambda *_: b"x" * over.wait(30), monkeypatch):
        with pytest.raises(TransferError) as refused:
            hook.have_let_in(XML, layout)
        over.set()
    assert refused.value.id == "transfer.agent-lost"


def test_a_hook_that_is_killed_takes_nothing_with_it(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gone = threading.Event(), threading.Event()

    def work(xml: bytes, *_: object) -> bytes:
        begun.set()
        gone.wait(30)
        return xml

    with agent_that(layout, work, monkeypatch) as counts:
        child = os.fork()
        if not child:
            hook.have_let_in(XML, layout)
            os._exit(0)
        assert begun.wait(30)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        gone.set()
        assert eventually(lambda: counts.samples("arrivals") != [])
        assert hook.have_let_in(XML, layout) == XML


# -- who may --------------------------------------------------------------------------------------


@pytest.mark.root
def test_only_root_may_knock() -> None:
    """In a directory that everybody may look into, as /run/swtpm-prop is."""
    script = "import os, socket, sys; os.chdir(sys.argv[1]); socket.socket(socket.AF_UNIX).connect(sys.argv[2])"
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        layout = Layout(Path(directory))
        with agent.listening(layout):
            knock = ["/usr/bin/python3", "-c", script, layout.run, layout.agent_socket.name]
            for user, error in ((0, b""), ("tss", b"PermissionError")):
                done = subprocess.run(knock, user=user, capture_output=True, check=False)
                assert error in done.stderr
                assert bool(done.returncode) is bool(error)


def test_where_it_cannot_listen_the_agent_says_so(layout: Layout) -> None:
    layout.agent_socket.mkdir()
    with ExitStack() as stack, pytest.raises(HostError) as refused:
        stack.enter_context(agent.listening(layout))
    assert refused.value.id == "agent.listen"
