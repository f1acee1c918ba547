"""Transfers between hosts with real journals: what goes well, what is lost, who is asked, what is destroyed when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from custodian import memory_directory
from transfers import BLOB, UUID, Clock, Network, SimulatedHost, arrival, hand_over, key_record, migrate, switch_over

from swtpm_prop.custody import keys, mounts
from swtpm_prop.errors import TransferError
from swtpm_prop.transfer.handover import Arrival
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.machine import Event, Presence, Side, State
from swtpm_prop.transfer.messages import Report

ONE, TWO, THREE = ("1" * 32, "2" * 32, "3" * 32)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


@pytest.fixture
def a(memory: Path, network: Network, clock: Clock) -> SimulatedHost:
    host = SimulatedHost("a", memory, network, clock)
    host.create()
    return host


@pytest.fixture
def b(memory: Path, network: Network, clock: Clock) -> SimulatedHost:
    return SimulatedHost("b", memory, network, clock)


@pytest.fixture
def c(memory: Path, network: Network, clock: Clock) -> SimulatedHost:
    return SimulatedHost("c", memory, network, clock)


def refused(host: SimulatedHost) -> TransferError:
    with pytest.raises(TransferError) as caught:
        host.hook.gate(UUID)
    return caught.value


def test_a_migration_that_goes_well(a: SimulatedHost, b: SimulatedHost) -> None:
    migrate(a, b, ONE)
    assert (a.states(), b.states()) == (["released"], ["settled"])
    assert not a.opens
    assert not a.has_state
    assert b.key == key_record("b", 1)
    assert b.start()
    assert refused(a).id == "transfer.elsewhere"
    assert f"transfer resolve {UUID} --here" in refused(a).mend


def test_before_activated_the_source_opens_its_key(a: SimulatedHost, b: SimulatedHost) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    assert a.key == key_record("a", 0)
    assert a.has_state


def test_to_and_fro(a: SimulatedHost, b: SimulatedHost) -> None:
    for here, there, id in ((a, b, ONE), (b, a, TWO), (a, b, THREE)):
        migrate(here, there, id)
        assert not here.opens
        assert not here.has_state
        assert there.start()
        assert not here.start()
    assert b.key is not None
    assert b.key.epoch == 3


def test_back_although_the_source_never_heard_that_it_was_activated(
    a: SimulatedHost, b: SimulatedHost, network: Network
) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    a.agent.observe(UUID, Event.MIGRATED)
    network.down.add("a")
    b.agent.observe(UUID, Event.RUNS)
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["moved"], ["activated"])
    network.down.clear()
    migrate(b, a, TWO)
    assert a.states() == ["settled", "released"]
    assert a.key is not None
    assert a.key.epoch == 2
    assert a.has_state
    assert not b.opens
    # What is left of the first hop does no harm now, however late it is told.
    b.agent.settle(UUID)
    a.agent.settle(UUID)
    assert b.states() == ["released", "settled"]
    assert a.start()
    assert not b.start()


def test_on_to_a_third_host_while_the_first_is_dead(
    a: SimulatedHost, b: SimulatedHost, c: SimulatedHost, network: Network
) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    network.down.add("a")
    b.agent.observe(UUID, Event.RUNS)
    migrate(b, c, TWO)
    assert not b.opens
    assert c.start()
    network.down.clear()
    assert refused(a).id == "transfer.elsewhere"
    b.agent.settle(UUID)
    assert a.states() == ["released"]
    assert b.states() == ["released", "settled"]
    assert not a.opens


def test_a_third_host_is_refused_while_one_is_open(
    a: SimulatedHost, b: SimulatedHost, c: SimulatedHost, network: Network
) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    b.seen = Presence.PRESENT
    for down in (set(), {"b"}):
        network.down = down
        with pytest.raises(TransferError) as caught:
            hand_over(a, c, TWO)
        assert caught.value.id == "transfer.undecided"
        assert c.states() == []
        assert a.states() == ["offered"]


def test_a_third_host_gets_the_key_once_the_other_has_given_up(
    a: SimulatedHost, b: SimulatedHost, c: SimulatedHost, network: Network
) -> None:
    hand_over(a, b, ONE)
    network.down.add("a")
    b.asker.give_up(ONE, offered=True)
    network.down.clear()
    hand_over(a, c, TWO)
    assert a.states() == ["offered", "closed"]
    assert b.states() == ["closed"] or b.states() == ["cancelled"]


def test_the_same_host_asks_anew(a: SimulatedHost, b: SimulatedHost, network: Network) -> None:
    """Its hook was killed right after it had written down that it asks."""
    network.lose_answers = True
    b.asker.ask(Transfer(ONE, Side.DESTINATION, State.ASKED, UUID, 0, "a", "a:1"))
    a.agent.offer(Transfer(ONE, Side.SOURCE, State.OFFERED, UUID, 0, "b", "b:1"), lambda: BLOB)
    network.lose_answers = False
    migrate(a, b, TWO)
    assert a.states() == ["released", "closed"]
    assert b.states() == ["settled", "cancelled"] or b.states() == ["settled", "closed"]
    assert not a.opens


def test_a_refused_request_leaves_nothing(a: SimulatedHost, b: SimulatedHost) -> None:
    def fail() -> None:
        raise TransferError("tpm.state-not-approved", "no")

    b.asker.ask(Transfer(ONE, Side.DESTINATION, State.ASKED, UUID, 0, "a", "a:1"))
    with pytest.raises(TransferError, match="no"):
        a.agent.offer(Transfer(ONE, Side.SOURCE, State.OFFERED, UUID, 0, "b", "b:1"), fail)  # type: ignore[arg-type]
    b.asker.give_up(ONE, offered=False)
    assert a.states() == b.states() == []
    assert a.start()


def test_the_guest_stayed(a: SimulatedHost, b: SimulatedHost) -> None:
    """The destination's process ended, and nobody knows how."""
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    b.hook.observe(UUID, Event.GONE)
    assert b.states() == ["left"]
    b.agent.settle(UUID)
    assert b.states() == ["closed"]
    assert not b.opens
    a.agent.settle(UUID)
    assert a.states() == ["closed"]
    assert a.start()


def test_nobody_knows(a: SimulatedHost, b: SimulatedHost) -> None:
    """Both processes ended unseen, as when both hosts lose power."""
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    a.seen = b.seen = Presence.GONE
    for host in (a, b):
        assert refused(host).id == "transfer.undecided"
        mend = refused(host).mend
        assert f"swtpm-prop transfer resolve {UUID} --here" in mend
        assert ("--there" in mend) == (host is b)
    assert (a.states(), b.states()) == (["offered"], ["left"])


@pytest.mark.parametrize("at", ["a", "b"])
@pytest.mark.parametrize("here", [True, False])
def test_an_operator_decides(a: SimulatedHost, b: SimulatedHost, at: str, here: bool) -> None:
    test_nobody_knows(a, b)
    {"a": a, "b": b}[at].agent.resolve(UUID, here)
    stays, goes = (a, b) if (at == "a") is here else (b, a)
    for host in (a, b):
        host.agent.settle(UUID)
    assert stays.start()
    assert not goes.opens
    assert not goes.start()


def test_an_operator_at_a_host_whose_peer_is_dead(a: SimulatedHost, b: SimulatedHost, network: Network) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    b.agent.observe(UUID, Event.RUNS)
    a.agent.observe(UUID, Event.MIGRATED)
    network.down.add("b")
    assert refused(a).id == "transfer.undecided"
    a.agent.resolve(UUID, here=True)
    assert a.start()
    # The dead comes back, not having run since.
    b.seen = Presence.GONE
    network.down.clear()
    assert not b.start()
    assert (a.states(), b.states()) == (["kept"], ["overruled"])
    assert "--there" in refused(b).mend
    # It keeps its key until somebody says so there.
    assert b.opens
    with pytest.raises(TransferError) as caught:
        b.agent.resolve(UUID, here=True)
    assert caught.value.id == "transfer.runs-there"
    b.agent.resolve(UUID, here=False)
    assert not b.opens
    assert (a.states(), b.states()) == (["closed"], ["closed"])


def test_an_operator_can_take_it_back(a: SimulatedHost, b: SimulatedHost, network: Network) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    b.agent.observe(UUID, Event.RUNS)
    network.down.add("b")
    a.agent.resolve(UUID, here=True)
    network.down.clear()
    b.agent.settle(UUID)
    # It was a mistake: the guest ran there all the time, and runs on.
    assert (a.states(), b.states()) == (["kept"], ["overruled"])
    assert b.halted == 0
    a.agent.resolve(UUID, here=False)
    b.agent.resolve(UUID, here=True)
    a.agent.settle(UUID)
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["released"], ["settled"])
    assert b.opens
    assert not a.opens


def test_a_guest_that_still_arrives_where_it_may_not_is_ended(a: SimulatedHost, b: SimulatedHost) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    b.seen = Presence.PRESENT
    a.agent.observe(UUID, Event.STAYED)
    a.agent.settle(UUID)
    assert b.halted
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["closed"], ["closed"]) or a.states() == ["cancelled"]
    assert not b.opens
    a.agent.settle(UUID)
    assert a.states() == ["closed"]


def test_a_guest_that_libvirt_runs_twice_is_paused_where_it_left(a: SimulatedHost, b: SimulatedHost) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    b.seen = a.seen = Presence.RUNS
    b.agent.observe(UUID, Event.RUNS)
    b.agent.settle(UUID)
    assert a.states() == ["yielded"]
    assert a.halted
    assert a.opens
    a.seen = Presence.GONE
    a.agent.settle(UUID)
    assert not a.opens
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["released"], ["settled"])


def test_an_operator_is_not_believed_against_the_peers_word(a: SimulatedHost, b: SimulatedHost) -> None:
    migrate(a, b, ONE)
    with pytest.raises(TransferError) as caught:
        a.agent.resolve(UUID, here=True)
    # It is settled, so it is not even asked: this lifts a release, which only an unreachable peer may need.
    assert caught.value.id == "transfer.runs-there"


def test_a_release_is_lifted_when_the_peer_is_lost(a: SimulatedHost, b: SimulatedHost, network: Network) -> None:
    migrate(a, b, ONE)
    network.down.add("b")
    a.agent.resolve(UUID, here=True)
    a.hook.gate(UUID)


@pytest.mark.parametrize(
    ("seen", "id"), [(Presence.RUNS, "transfer.runs-here"), (Presence.UNSEEN, "transfer.unseen")], ids=str
)
def test_an_operator_cannot_send_away_what_may_run_here(
    a: SimulatedHost, b: SimulatedHost, network: Network, seen: Presence, id: str
) -> None:
    hand_over(a, b, ONE)
    network.down.add("b")
    a.seen = seen
    with pytest.raises(TransferError) as caught:
        a.agent.resolve(UUID, here=False)
    assert caught.value.id == id


def test_nothing_to_resolve(a: SimulatedHost) -> None:
    with pytest.raises(TransferError) as caught:
        a.agent.resolve(UUID, here=True)
    assert caught.value.id == "transfer.none"


def test_a_guest_that_is_here_already_is_not_gone_because_it_is_to_come_once_more(
    a: SimulatedHost, b: SimulatedHost, network: Network
) -> None:
    """libvirt made it run twice; its next try meets the hook while the destination's agent has not looked yet."""
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    b.seen, a.seen = Presence.RUNS, Presence.PRESENT
    with pytest.raises(TransferError) as caught:
        hand_over(a, b, TWO)
    assert caught.value.id == "transfer.open"
    assert b.states() == ["arriving"]
    a.seen = Presence.RUNS
    a.agent.settle(UUID)
    b.agent.observe(UUID, Event.RUNS)
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["yielded"], ["activated"])
    assert a.halted
    assert b.opens


def test_a_guest_that_was_forgotten_where_it_went_may_be_begun_anew_where_it_was(
    a: SimulatedHost, b: SimulatedHost
) -> None:
    migrate(a, b, ONE)
    b.seen = Presence.GONE
    with pytest.raises(TransferError) as caught:
        a.agent.resolve(UUID, here=True)
    assert (caught.value.id, "key forget" in caught.value.mend) == ("transfer.runs-there", True)
    keys.destroy(UUID, b.layout)
    b.journal.forget(UUID)
    a.agent.resolve(UUID, here=True)
    assert (a.states(), b.states()) == (["settled"], [])
    a.hook.gate(UUID)


def test_the_sign_of_where_a_guest_went_is_not_forgotten(a: SimulatedHost, b: SimulatedHost) -> None:
    migrate(a, b, ONE)
    a.journal.forget(UUID)
    assert a.states() == ["released"]


def test_a_guest_comes_back_without_custody_over_nothing_that_is_still_to_be_done(
    a: SimulatedHost, b: SimulatedHost
) -> None:
    """The host lost its power when the release was written down, and not yet done."""
    migrate(a, b, ONE)
    (released,) = a.journal.of(UUID)
    a.journal.save(released._replace(due=True))
    a.write_state()
    a.hook.come_back(UUID)
    assert not a.has_state
    a.write_state()
    a.agent.settle(UUID)
    a.agent.observe(UUID, Event.RUNS)
    a.agent.settle(UUID)
    assert a.has_state
    assert a.states() == ["settled"]
    a.hook.gate(UUID)


def test_only_a_guest_that_comes_back_lifts_a_release(a: SimulatedHost, b: SimulatedHost) -> None:
    migrate(a, b, ONE)
    a.agent.observe(UUID, Event.RUNS)
    assert a.states() == ["released"]
    a.hook.come_back(UUID)
    assert refused(a).id == "transfer.elsewhere"
    a.hook.observe(UUID, Event.GONE)
    assert a.states() == ["returning"]
    a.hook.come_back(UUID)
    hand_over(b, a, TWO)
    assert a.states() == ["imported", "returning"]


def test_a_key_arrives_once(a: SimulatedHost, b: SimulatedHost) -> None:
    hand_over(a, b, ONE)
    assert [path.stat().st_mode & 0o7777 for path in b.left] == [0o600]
    assert b.hook.arrive(UUID) == arrival("b", 1)
    assert not b.left
    assert b.hook.arrive(UUID) is None


def test_a_key_is_left_open_in_memory_only(tmp_path: Path, network: Network, clock: Clock, a: SimulatedHost) -> None:
    on_disk = SimulatedHost("c", tmp_path, network, clock)
    hand_over(a, on_disk, ONE)
    assert not on_disk.left
    assert on_disk.hook.arrive(UUID) == Arrival(key_record("c", 1), None)


@pytest.mark.parametrize("wrong", [b"", bytes(31), bytes(33)])
def test_a_key_that_was_not_left_whole_is_opened_anew(a: SimulatedHost, b: SimulatedHost, wrong: bytes) -> None:
    hand_over(a, b, ONE)
    b.left[0].write_bytes(wrong)
    assert b.hook.arrive(UUID) == Arrival(key_record("b", 1), None)
    assert not b.left


def test_a_key_that_waits_too_long_does_not_arrive(a: SimulatedHost, b: SimulatedHost, clock: Clock) -> None:
    """libvirtd was killed between its two hooks; what is started later is no arrival."""
    hand_over(a, b, ONE)
    clock.now += 120
    assert b.hook.arrive(UUID) is None
    assert b.left
    assert refused(b).id == "transfer.too-late"
    assert not b.left
    assert not b.opens
    a.agent.settle(UUID)
    assert a.states() == ["closed"]


def test_asking_takes_too_long(a: SimulatedHost, b: SimulatedHost, clock: Clock) -> None:
    b.asker.ask(Transfer(ONE, Side.DESTINATION, State.ASKED, UUID, 0, "a", "a:1"))
    clock.now += 120
    b.agent.settle(UUID)
    with pytest.raises(TransferError) as caught:
        b.asker.imported(ONE, arrival("b", 1))
    assert caught.value.id == "transfer.not-now"
    assert not b.opens


def test_what_was_seen_earlier_says_nothing_of_a_later_transfer(
    a: SimulatedHost, b: SimulatedHost, clock: Clock
) -> None:
    """The agent is slow, and hears of the end of the first attempt when the second one arrives already."""
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    seen = clock()
    b.hook.observe(UUID, Event.NEVER_RAN)
    hand_over(a, b, TWO)
    b.hook.arrive(UUID)
    b.agent.observe(UUID, Event.NEVER_RAN, at=seen)
    assert b.states()[0] == "arriving"
    assert b.opens


def test_a_stranger_learns_nothing_and_decides_nothing(a: SimulatedHost, b: SimulatedHost) -> None:
    hand_over(a, b, ONE)
    assert a.agent.hear("c", Report(ONE, State.CANCELLED)) == Report(ONE, None)
    assert a.agent.hear("b", Report(TWO, State.CANCELLED)) == Report(TWO, None)
    assert a.agent.hear("b", Report(ONE, None)) == Report(ONE, State.OFFERED)
    assert a.states() == ["offered"]


def test_a_key_made_anew_is_not_destroyed_by_an_old_transfer(
    a: SimulatedHost, b: SimulatedHost, network: Network
) -> None:
    """A release is carried out after the guest has been recovered here under a later epoch."""
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    keys.store(key_record("a", 7), a.layout)
    b.agent.observe(UUID, Event.RUNS)
    b.agent.settle(UUID)
    assert a.states() == ["released"]
    assert a.key == key_record("a", 7)


def test_actions_are_done_again_after_a_crash(
    a: SimulatedHost, b: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(a, b, ONE)
    b.hook.arrive(UUID)
    switch_over(a, b)
    b.agent.observe(UUID, Event.RUNS)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(keys, "destroy", fail)
        b.agent.settle(UUID)
        assert a.states() == ["released"]
        assert a.opens
        assert a.journal.of(UUID)[0].due
        with pytest.raises(TransferError) as caught:
            a.hook.gate(UUID)
        assert caught.value.id == "transfer.action"
    a.agent.settle(UUID)
    assert not a.opens
    assert not a.has_state


def test_a_state_on_shared_storage_is_the_destinations(
    a: SimulatedHost, b: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "kind", lambda place: "nfs4")
    migrate(a, b, ONE)
    assert a.states() == ["released"]
    assert (a.opens, a.has_state) == (False, True)


def test_a_key_that_could_not_be_adopted_before_the_source_let_go_is_adopted_later(
    a: SimulatedHost, b: SimulatedHost
) -> None:
    hand_over(a, b, ONE)
    assert b.hook.arrive(UUID) is not None
    switch_over(a, b)
    b.layout.keys.write_text("in the way")
    b.agent.observe(UUID, Event.RUNS)
    a.agent.observe(UUID, Event.MIGRATED)
    a.agent.settle(UUID)
    with pytest.raises(TransferError):
        b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["released"], ["settled"])
    assert b.journal.of(UUID)[0].unfinished
    b.layout.keys.unlink()
    b.agent.settle(UUID)
    assert b.key == key_record("b", 1)
