"""Three hosts, one guest, and everything that can go wrong for as long as it likes: kills at every write, lost words.

The model test explores one transfer wholly; this one lets transfers follow and overlap each other, with real journals,
key records and files, through the code that hooks and agent run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transfers import BLOB, UUID, Clock, Network, SimulatedHost, arrival

from swtpm_prop import durable
from swtpm_prop.errors import TransferError
from swtpm_prop.transfer import machine
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.machine import Event, Presence, Side, State

NAMES = ("a", "b", "c")
HOSTS = st.sampled_from(NAMES)
KILLS = st.sampled_from([None] * 6 + [0, 1, 2, 3, 4])
"""Before which of the next writes the process is killed."""
SELDOM = st.sampled_from([False] * 4 + [True])


class Killed(BaseException):
    """kill -9: nothing catches it."""


class Migration(NamedTuple):
    """What libvirt is doing. Arrived: the process that receives is there; switched: the guest runs in it."""

    source: SimulatedHost
    destination: SimulatedHost
    arrived: bool = False
    switched: bool = False


class Hosts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.network = Network()
        self.clock = Clock()
        self.hosts = {name: SimulatedHost(name, self.directory, self.network, self.clock) for name in NAMES}
        self.migration: Migration | None = None
        self.ids = 0

    @initialize()
    def begin(self) -> None:
        self.hosts["a"].create()
        self.last = self.hosts["a"]

    def teardown(self) -> None:
        try:
            self.come_to_rest()
        finally:
            shutil.rmtree(self.directory)

    # -- what happens ---------------------------------------------------------------------------

    @rule(name=HOSTS, kill=KILLS, lost=SELDOM)
    def ask(self, name: str, kill: int | None, lost: bool) -> None:
        """libvirt begins to migrate the guest to a host, whose hook asks for the key."""
        source, destination = self.last, self.hosts[name]
        if self.migration or source is destination or source.seen is not Presence.RUNS:
            return
        self.ids += 1
        id = f"{self.ids:032x}"
        with killed(kill):
            if self._hand_over(source, destination, id, lost):
                self.migration = Migration(source, destination)

    def _hand_over(self, source: SimulatedHost, destination: SimulatedHost, id: str, lost: bool) -> bool:
        """Whether libvirt goes on with it."""
        try:
            destination.asker.ask(Transfer(id, Side.DESTINATION, State.ASKED, UUID, 0, source.name, "s:1"))
        except TransferError:
            return False
        offered = False
        try:
            if {source.name, destination.name} & self.network.down:
                raise TransferError("transfer.unreachable", "down")
            source.agent.make_room(UUID, destination.name)
            record = source.key
            if record is None:
                raise TransferError("transfer.no-key", "none")
            word = Transfer(id, Side.SOURCE, State.OFFERED, UUID, record.epoch, destination.name, "d:1")
            source.agent.offer(word, lambda: BLOB)
            offered = True
            if lost:
                raise TransferError("transfer.connection", "lost")
            destination.asker.imported(id, arrival(destination.name, record.epoch + 1))
        except TransferError:
            destination.asker.give_up(id, offered)
            return False
        return True

    @precondition(lambda self: self.migration is not None and not self.migration.arrived)
    @rule(kill=KILLS)
    def arrive(self, kill: int | None) -> None:
        assert self.migration is not None
        host, migration = self.migration.destination, self.migration
        self.migration = None
        with killed(kill):
            if host.hook.arrive(UUID) is not None:
                host.seen = Presence.PRESENT
                host.write_state()
                self.migration = migration._replace(arrived=True)

    @precondition(lambda self: self.migration is not None and self.migration.arrived)
    @rule()
    def switch_over(self) -> None:
        assert self.migration is not None
        source, destination = self.migration[:2]
        # A process that was ended meanwhile ends the migration.
        if not self.migration.switched and (source.seen, destination.seen) == (Presence.RUNS, Presence.PRESENT):
            source.seen, destination.seen = Presence.PRESENT, Presence.RUNS
            self.last = destination
            self.migration = self.migration._replace(switched=True)

    @precondition(lambda self: self.migration is not None)
    @rule(noticed=st.booleans(), kill=KILLS)
    def end(self, noticed: bool, kill: int | None) -> None:
        """libvirt is done: the guest has moved, or it has not."""
        assert self.migration is not None
        migration, self.migration = self.migration, None
        source, destination = migration[:2]
        if migration.switched:
            if source.seen is Presence.PRESENT:
                source.seen = Presence.GONE
                self._notice(noticed, kill, source, Event.MIGRATED)
        else:
            destination.seen = Presence.GONE
            self._notice(noticed and migration.arrived, kill, destination, Event.NEVER_RAN)

    def _notice(self, noticed: bool, kill: int | None, host: SimulatedHost, event: Event) -> None:
        with killed(kill):
            if noticed:
                host.agent.observe(UUID, event)

    @rule(name=HOSTS, noticed=st.booleans())
    def migrate(self, name: str, noticed: bool) -> None:
        """All of a migration, whatever is left of earlier ones."""
        self.ask(name, None, False)
        if self.migration is not None and not self.migration.arrived:
            self.arrive(None)
        if self.migration is not None:
            self.switch_over()
            self.end(noticed, None)

    @rule(name=HOSTS)
    def power_off(self, name: str) -> None:
        """The host loses everything but its disk, and libvirt what it was doing there."""
        host = self.hosts[name]
        host.seen = Presence.GONE
        if self.migration and host in self.migration[:2]:
            migration, self.migration = self.migration, None
            if not migration.switched:
                migration.destination.seen = Presence.GONE
            elif migration.source.seen is Presence.PRESENT:
                migration.source.seen = Presence.GONE

    @rule(name=HOSTS, kill=KILLS)
    def look(self, name: str, kill: int | None) -> None:
        """The agent is told what is to be seen of the guest."""
        host = self.hosts[name]
        with killed(kill):
            if not self._about_to_arrive(host):
                host.agent.observe(UUID, *machine.seen(host.seen))

    @rule(name=HOSTS, kill=KILLS)
    def settle(self, name: str, kill: int | None) -> None:
        with killed(kill):
            self.hosts[name].agent.settle(UUID)

    @rule(names=st.sampled_from([set(), set(), {"a"}, {"b"}, {"c"}, {"a", "b"}]), lose=SELDOM)
    def change_network(self, names: set[str], lose: bool) -> None:
        self.network.down = names
        self.network.lose_answers = lose

    @rule(seconds=st.sampled_from([1, 100]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(name=HOSTS, kill=KILLS)
    def start(self, name: str, kill: int | None) -> None:
        """Somebody starts the guest wherever its definition lies."""
        host = self.hosts[name]
        if host.seen is not Presence.GONE or self._about_to_arrive(host):
            return
        with killed(kill):
            if host.hook.arrive(UUID) is not None:
                # It was laid out to receive the guest, and is none that receives: the hook after it refuses that.
                host.hook.observe(UUID, Event.GONE)
            elif host.start():
                assert host is self.last, "it started with an older TPM state"
                assert host.has_state

    def _about_to_arrive(self, host: SimulatedHost) -> bool:
        """libvirt holds the guest for a migration that comes."""
        return self.migration is not None and host is self.migration.destination and not self.migration.switched

    # -- what must hold -------------------------------------------------------------------------

    @invariant()
    def one_runs(self) -> None:
        assert sum(host.seen is Presence.RUNS for host in self.hosts.values()) <= 1

    @invariant()
    def at_most_one_may_start(self) -> None:
        able = [host.name for host in self.hosts.values() if starts_alone(host)]
        assert len(able) <= 1, able
        running = [host.name for host in self.hosts.values() if host.seen is Presence.RUNS]
        assert not running or not able or able == running, (running, able)

    @invariant()
    def the_key_is_never_lost(self) -> None:
        if hasattr(self, "last"):
            assert self.last.opens
            assert self.last.has_state

    @invariant()
    def a_key_lies_open_only_while_it_is_awaited(self) -> None:
        for host in self.hosts.values():
            awaited = {known.id for known in host.journal.of(UUID) if known.state is State.IMPORTED}
            assert {path.name for path in host.left} <= awaited

    def come_to_rest(self) -> None:
        """Everything answers again and time passes: the journals agree, or the operator says one word."""
        if not hasattr(self, "last"):
            return
        if self.migration:
            self.end(noticed=True, kill=None)
        self.network.down, self.network.lose_answers = set(), False
        self._settle_all()
        startable = [host for host in self.hosts.values() if host.may_start() or host.seen is Presence.RUNS]
        if not startable:
            self.last.agent.resolve(UUID, here=True)
            self._settle_all()
            startable = [host for host in self.hosts.values() if host.may_start()]
        assert startable == [self.last]
        assert [host for host in self.hosts.values() if host.opens] == [self.last]

    def _settle_all(self) -> None:
        for _ in range(3):
            self.clock.now += 100
            for host in self.hosts.values():
                host.agent.settle(UUID)


def starts_alone(host: SimulatedHost) -> bool:
    """Whether the host would start the guest without any answer."""
    return host.key is not None and machine.may_offer(host.journal.gate(UUID))


@contextmanager
def killed(before: int | None) -> Iterator[None]:
    """The process is killed before one of its next writes, if it comes so far."""
    write, remove = durable.write, durable.remove
    left = [before]

    def counting(act: Callable[..., None]) -> Callable[..., None]:
        def acting(*given: object) -> None:
            if left[0] is not None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            act(*given)

        return acting

    durable.write, durable.remove = counting(write), counting(remove)
    try:
        yield
    except Killed:
        pass
    finally:
        durable.write, durable.remove = write, remove


TestHosts = Hosts.TestCase
TestHosts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
