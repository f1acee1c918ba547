"""The journal of transfers: what is written stays written, one process at a time, and what is old goes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from transfers import UUID, Clock

from swtpm_prop import durable
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import JOURNAL_DAYS
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Gate, Side, State

OTHER = UUID.replace("6", "7", 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Journal:
    return Journal(Layout(tmp_path), clock)


def transfer(number: int, side: Side = Side.SOURCE, state: State = State.OFFERED, uuid: str = UUID) -> Transfer:
    return Transfer(f"{number:032x}", side, state, uuid, 0, "b", "b:1")


def test_what_is_begun_is_there(journal: Journal, tmp_path: Path) -> None:
    one = journal.begin(transfer(1))
    two = journal.begin(transfer(2, Side.DESTINATION, State.ASKED))
    other = journal.begin(transfer(3, uuid=OTHER))
    again = Journal(Layout(tmp_path))
    assert again.of(UUID) == [two, one]
    assert (one.order, two.order, other.order) == (1, 2, 1)
    assert again.guests() == [UUID, OTHER]
    assert again.find(two.id) == two
    assert again.find("0" * 32) is None
    assert again.find("../../etc/passwd") is None


def test_who_looks_does_not_stumble_over_what_is_being_removed(journal: Journal, tmp_path: Path) -> None:
    """A listed name without a file is what is left for a moment; a link to nothing shows the same, and stays."""
    kept = journal.begin(transfer(1))
    (Layout(tmp_path).transfers / UUID / f"{2:032x}.json").symlink_to(tmp_path / "gone")
    assert journal.of(UUID) == [kept]
    assert journal.find(f"{2:032x}") is None


def test_only_root_reads_it(journal: Journal, tmp_path: Path) -> None:
    journal.begin(transfer(1))
    directory = Layout(tmp_path).transfers / UUID
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / f"{1:032x}.json").stat().st_mode & 0o777 == 0o600


def test_an_id_is_good_once(journal: Journal) -> None:
    journal.begin(transfer(1))
    with pytest.raises(TransferError) as caught:
        journal.begin(transfer(1, uuid=OTHER))
    assert caught.value.id == "transfer.repeated"


def test_no_path_of_a_peers_making(journal: Journal) -> None:
    with pytest.raises(TransferError) as caught:
        journal.begin(transfer(1, uuid="../../../tmp/x"))
    assert caught.value.id == "transfer.uuid"


def test_a_write_that_fails_changes_nothing(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    before = journal.begin(transfer(1))

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TransferError) as caught:
        journal.enter(before, State.MOVED, due=False)
    assert caught.value.id == "transfer.journal-unwritable"
    assert journal.of(UUID) == [before]


def test_it_is_on_the_disk_before_anybody_acts(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", note)  # type: ignore[attr-defined]
    journal.begin(transfer(1))
    assert synced == [f".{1:032x}.json.new", UUID]


def test_what_a_killed_writer_left_is_no_transfer(journal: Journal, tmp_path: Path) -> None:
    kept = journal.begin(transfer(1))
    (Layout(tmp_path).transfers / UUID / f".{2:032x}.json.new").write_bytes(b'{"half')
    assert journal.of(UUID) == [kept]
    assert journal.find(f"{2:032x}") is None


def test_one_at_a_time(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swtpm_prop.transfer.journal.JOURNAL_LOCK_SECONDS", 0.05)
    with journal.locked(UUID):
        caught: list[TransferError] = []

        def try_it() -> None:
            try:
                with journal.locked(UUID):
                    pass
            except TransferError as error:
                caught.append(error)

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert [error.id for error in caught] == ["transfer.busy"]
        with journal.locked(OTHER):
            pass
    with journal.locked(UUID):
        pass


@pytest.mark.parametrize(
    ("history", "gate"),
    [
        ([], Gate.START),
        ([(Side.SOURCE, State.RELEASED)], Gate.REFUSE),
        ([(Side.SOURCE, State.RELEASED), (Side.DESTINATION, State.CLOSED)], Gate.REFUSE),
        ([(Side.SOURCE, State.RELEASED), (Side.DESTINATION, State.SETTLED)], Gate.START),
        ([(Side.DESTINATION, State.ACTIVATED), (Side.SOURCE, State.OFFERED)], Gate.ASK_THEN_REFUSE),
        ([(Side.SOURCE, State.CANCELLED), (Side.SOURCE, State.RELEASED)], Gate.REFUSE),
        ([(Side.SOURCE, State.CLOSED), (Side.DESTINATION, State.CANCELLED)], Gate.START),
        ([(Side.DESTINATION, State.CLOSED)], Gate.START),
    ],
)
def test_the_newest_that_says_something_counts(journal: Journal, history: list[tuple[Side, State]], gate: Gate) -> None:
    for number, (side, state) in enumerate(history):
        journal.begin(transfer(number, side, state))
    assert journal.gate(UUID) is gate


def test_finished_ones_are_forgotten_but_not_where_the_guest_went(journal: Journal, clock: Clock) -> None:
    for number, (side, state) in enumerate(
        [
            (Side.SOURCE, State.RELEASED),
            (Side.DESTINATION, State.SETTLED),
            (Side.SOURCE, State.CLOSED),
            (Side.SOURCE, State.RELEASED),
        ]
    ):
        journal.begin(transfer(number, side, state))
    journal.prune(UUID)
    assert len(journal.of(UUID)) == 4
    clock.now += (JOURNAL_DAYS + 1) * 86400
    journal.prune(UUID)
    assert [known.state for known in journal.of(UUID)] == [State.RELEASED]
    journal.prune(UUID)
    assert journal.gate(UUID) is Gate.REFUSE


def test_none_is_forgotten_before_an_older_one_that_would_speak(journal: Journal, clock: Clock) -> None:
    open_one = journal.begin(transfer(1, state=State.CANCELLED))
    journal.begin(transfer(2, state=State.RELEASED))
    journal.begin(transfer(3, Side.DESTINATION, State.SETTLED))
    clock.now += (JOURNAL_DAYS + 1) * 86400
    journal.prune(UUID)
    assert len(journal.of(UUID)) == 3
    journal.enter(open_one, State.CLOSED, due=False)
    clock.now += (JOURNAL_DAYS + 1) * 86400
    journal.prune(UUID)
    assert journal.of(UUID) == []
