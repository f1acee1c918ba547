"""Reaching other hosts: bounded in time, whatever their names lead to; a dead one takes nothing from a living one."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from swtpm_prop.errors import Error, TransferError
from swtpm_prop.hook import migrate
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.machine import Side, State
from swtpm_prop.transfer.reach import reach

FETCHED = Transfer("a" * 32, Side.DESTINATION, State.IMPORTED, "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d", 1, "b", "b:1")


LONG = 30
"""Seconds; what has no end of ours takes more: the kernel tries for two minutes."""


@pytest.fixture
def living() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def dead() -> Iterator[str]:
    """Where packets get no answer: the kernel drops them while the queue of who should accept is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def unreachable(endpoint: str, seconds: float) -> float:
    """How many seconds that took."""
    began = time.monotonic()
    with pytest.raises(TransferError) as refused:
        reach(endpoint, seconds)
    assert refused.value.id == "transfer.unreachable"
    assert refused.value.line().isprintable()
    return time.monotonic() - began


def test_a_living_host(living: str) -> None:
    for endpoint in (living, living.replace("127.0.0.1", "localhost")):
        with reach(endpoint, 5) as connection:
            assert connection.getpeername() == ("127.0.0.1", int(living.partition(":")[2]))


def test_a_dead_host_takes_the_time_it_is_given(dead: str) -> None:
    assert 0.2 < unreachable(dead, 0.3) < LONG


def test_no_time_is_no_time(dead: str) -> None:
    for seconds in (0, -1):
        assert unreachable(dead, seconds) < LONG


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1", "127.0.0.1:", ":1", "127.0.0.1:99999", "a..b:1", "\ud800:1", "a" * 64 + ":1"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    assert unreachable(endpoint, LONG) < LONG


def test_a_resolver_that_does_not_answer(living: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2 * LONG))
    assert unreachable(living, 0.3) < LONG


def test_the_addresses_of_one_name_share_its_time(dead: str, living: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        socket.getaddrinfo("127.0.0.1", int(end.partition(":")[2]), type=socket.SOCK_STREAM)[0]
        for end in (dead, living)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found[0]] * 2 + [found[1]])
    began = time.monotonic()
    reach("somewhere.example:1", 1.5).close()
    assert time.monotonic() - began > 0.9


# -- several hosts ----------------------------------------------------------------------------------


def fetch(there: str, seconds: float, reaching: float) -> Transfer:
    """Connect; whoever can be reached has the guest."""
    assert 0 < reaching <= seconds
    reach(there, reaching).close()
    return FETCHED


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second for a second."""
    for name, seconds in (("FETCH_SECONDS", 3), ("AGENT_TALK_SECONDS", 2), ("REACH_SECONDS", 0.15)):
        monkeypatch.setattr(migrate, name, seconds)


@pytest.mark.usefixtures("quick")
def test_however_many_are_dead_the_living_one_has_time_to_talk(dead: str, living: str) -> None:
    left: list[float] = []

    def timed(there: str, seconds: float, reaching: float) -> Transfer:
        left.append(seconds)
        return fetch(there, seconds, reaching)

    assert migrate.ask_in_turn([dead] * 4 + [living], timed) == FETCHED
    assert len(left) == 5
    assert left[-1] > 2
    began = time.monotonic()
    with pytest.raises(TransferError) as refused:
        migrate.ask_in_turn([dead] * 4, fetch)
    assert refused.value.id == "transfer.unreachable"
    assert time.monotonic() - began < LONG


@pytest.mark.usefixtures("quick")
def test_all_together_take_no_longer_than_one_may(dead: str) -> None:
    asked: list[str] = []

    def slow(there: str, seconds: float, reaching: float) -> Transfer:
        asked.append(there)
        time.sleep(min(seconds, 1.2))
        raise TransferError("transfer.no-key", there)

    with pytest.raises(Error) as refused:
        migrate.ask_in_turn(["a:1", "b:1", "c:1", "d:1"], slow)
    assert asked == ["a:1", "b:1", "c:1"]
    assert refused.value.what == "a:1"


@pytest.mark.parametrize("id", ["transfer.tls", "transfer.connection"])
def test_one_that_turns_us_away_does_not_end_the_search(id: str) -> None:
    def fetching(there: str, seconds: float, reaching: float) -> Transfer:
        if there == "a:1":
            raise TransferError(id, there)
        return FETCHED

    assert migrate.ask_in_turn(["a:1", "b:1"], fetching) == FETCHED


def test_an_address_of_a_kind_that_this_host_lacks_is_no_end(living: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = socket.getaddrinfo("127.0.0.1", int(living.partition(":")[2]), type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(99, *found[1:]), found])
    reach("somewhere.example:1", LONG).close()


def test_a_refusal_that_is_one_ends_the_search() -> None:
    def refuse(there: str, seconds: float, reaching: float) -> Transfer:
        raise TransferError("transfer.state-not-approved", there)

    with pytest.raises(TransferError) as refused:
        migrate.ask_in_turn(["a:1", "b:1"], refuse)
    assert refused.value.what == "a:1"


def test_nobody_is_named() -> None:
    with pytest.raises(TransferError) as refused:
        migrate.ask_in_turn([], fetch)
    assert refused.value.id == "transfer.no-source"
