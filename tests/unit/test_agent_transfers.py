"""The agent moves transfers on: at once, again after a while, for each guest by one thread, whatever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import eventually

from swtpm_prop.agent import transfers
from swtpm_prop.agent.guests import Happening
from swtpm_prop.agent.metrics import Counts
from swtpm_prop.agent.transfers import Transfers
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Event, Presence, Side, State
from swtpm_prop.transfer.messages import Report
from swtpm_prop.transfer.settle import Eyes, Settler

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
OTHER = "1b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
OFFERED = Transfer("a" * 32, Side.SOURCE, State.OFFERED, UUID, 0, "beta", "beta:4879")


class Peer:
    """Answers reports with ``words`` in turn, the last one again and again; None: it cannot be reached."""

    def __init__(self) -> None:
        self.words: list[State | None] = [State.CLOSED]
        self.asked: list[str] = []
        self.meet: Callable[[str], None] = lambda uuid: None
        self.broken = False

    def report(self, transfer: Transfer, report: Report) -> Report:
        self.asked.append(transfer.uuid)
        self.meet(transfer.uuid)
        if self.broken:
            raise ZeroDivisionError
        word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        if word is None:
            raise TransferError("transfer.unreachable", "it is not there", "wait")
        return Report(report.id, word)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Layout(tmp_path))


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def agent(
    tmp_path: Path, journal: Journal, peer: Peer, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Transfers]:
    monkeypatch.setattr(transfers, "SETTLE_SECONDS", 3)
    eyes = Eyes(lambda uuid: Presence.PRESENT, lambda uuid: None)
    made = Transfers(Settler(Layout(tmp_path), journal, eyes, peer.report), counts)
    yield made
    made.finish()


def state(journal: Journal, uuid: str = UUID) -> State:
    return journal.of(uuid)[0].state


def note(agent: Transfers, event: Event, uuid: str = UUID) -> None:
    agent.note(Happening(uuid, event, time.time() + 1))


def test_what_happens_is_written_down_and_settled_at_once(agent: Transfers, journal: Journal, peer: Peer) -> None:
    journal.begin(OFFERED)
    peer.words = [State.ACTIVATED]
    note(agent, Event.MIGRATED)
    assert state(journal) in (State.MOVED, State.YIELDED, State.RELEASED)
    assert eventually(lambda: state(journal) is State.YIELDED)


def test_a_guest_without_transfers_costs_nothing(agent: Transfers, journal: Journal, peer: Peer) -> None:
    note(agent, Event.RUNS)
    note(agent, Event.GONE)
    assert journal.guests() == []
    assert peer.asked == []


def test_what_others_have_written_down_is_settled_when_somebody_knocks(
    agent: Transfers, journal: Journal, peer: Peer
) -> None:
    journal.begin(OFFERED)
    journal.begin(OFFERED._replace(id="b" * 32, uuid=OTHER, state=State.RELEASED))
    agent.look()
    assert eventually(lambda: state(journal) is State.CLOSED)
    assert peer.asked == [UUID]


def test_what_is_open_is_tried_again_soon(agent: Transfers, journal: Journal, peer: Peer) -> None:
    journal.begin(OFFERED)
    peer.words = [None, None, State.CLOSED]
    agent.wake(UUID)
    assert eventually(lambda: state(journal) is State.CLOSED)
    assert len(peer.asked) == 3


def test_what_is_open_for_hours_is_tried_on(agent: Transfers, journal: Journal) -> None:
    journal.begin(OFFERED)
    for _ in range(1100):
        agent._retry(UUID)
    agent.wake(UUID)
    assert eventually(lambda: state(journal) is State.CLOSED)
    assert eventually(lambda: agent._delays == {})


def test_what_was_finished_long_ago_is_forgotten_in_some_rounds(
    agent: Transfers, journal: Journal, tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(transfers, "PRUNE_ROUNDS", 3)
    finished = OFFERED._replace(state=State.CLOSED)
    long_ago = Journal(Layout(tmp_path), lambda: 0.0)
    rounds: list[str] = []
    guests = journal.guests
    monkeypatch.setattr(journal, "guests", lambda: rounds.append("round") or guests())
    settle = agent._settler.settle
    monkeypatch.setattr(agent._settler, "settle", lambda uuid: rounds.append("settle") or settle(uuid))
    journal.begin(finished)
    long_ago.begin(finished._replace(id="b" * 32, uuid=OTHER))
    stopped = threading.Event()
    running = threading.Thread(target=agent.run, args=(stopped,), daemon=True)
    running.start()
    assert eventually(lambda: journal.of(OTHER) == [])
    long_ago.begin(finished._replace(id="c" * 32, uuid=OTHER))
    assert eventually(lambda: journal.of(OTHER) == [])
    stopped.set()
    running.join()
    assert state(journal) is State.CLOSED
    assert peer.asked == []
    assert rounds.count("settle") <= 2 * (rounds.count("round") // 3 + 1)


def test_what_is_open_at_the_start_is_settled(agent: Transfers, journal: Journal) -> None:
    journal.begin(OFFERED)
    journal.begin(OFFERED._replace(id="b" * 32, uuid=OTHER))
    stopped = threading.Event()
    running = threading.Thread(target=agent.run, args=(stopped,), daemon=True)
    running.start()
    assert eventually(lambda: {state(journal), state(journal, OTHER)} == {State.CLOSED})
    stopped.set()
    running.join()


def test_each_guest_is_settled_by_one_thread_and_several_guests_at_once(
    agent: Transfers, journal: Journal, peer: Peer, counts: Counts
) -> None:
    uuids = [UUID[:-1] + digit for digit in "123456"]
    all_there, alone = threading.Barrier(len(uuids)), {uuid: threading.Lock() for uuid in uuids}
    met: list[str] = []

    def meet(uuid: str) -> None:
        assert alone[uuid].acquire(blocking=False)
        # Nobody gets on before the others are here too.
        all_there.wait(30)
        met.append(uuid)
        alone[uuid].release()

    peer.meet, peer.words = meet, [None]
    for number, uuid in enumerate(uuids):
        journal.begin(OFFERED._replace(id=f"{number:032x}", uuid=uuid))
        for _ in range(5):
            agent.wake(uuid)
    assert eventually(lambda: len(met) >= 2 * len(uuids))
    assert counts.samples("failures") == []


def test_a_damaged_journal_is_counted_and_stops_nobody_else(
    agent: Transfers, journal: Journal, tmp_path: Path, counts: Counts
) -> None:
    journal.begin(OFFERED)
    journal.begin(OFFERED._replace(id="b" * 32, uuid=OTHER))
    (Layout(tmp_path).transfers / OTHER / f"{'b' * 32}.json").write_text("{")
    note(agent, Event.RUNS, OTHER)
    note(agent, Event.MIGRATED)
    assert eventually(lambda: state(journal) is State.CLOSED)
    assert dict(counts.samples("failures"))[("id", "transfer.journal-damaged"),] >= 1


def test_a_mistake_leaves_no_guest_to_nobody(agent: Transfers, journal: Journal, peer: Peer, counts: Counts) -> None:
    journal.begin(OFFERED)
    peer.broken = True
    agent.wake(UUID)
    assert eventually(lambda: bool(counts.samples("failures")))
    assert counts.samples("failures")[0][0] == (("id", "agent.failed"),)
    peer.broken = False
    assert eventually(lambda: state(journal) is State.CLOSED)
