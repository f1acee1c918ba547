"""Hosts that hand guests' keys to each other, for tests: real journals and key records, a network that can fail."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swtpm_prop.custody import keys
from swtpm_prop.custody.keys import KEY_BYTES, KeyRecord
from swtpm_prop.custody.objects import ImportBlob, Sealed
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.handover import Arrival
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Event, Presence, Side, State
from swtpm_prop.transfer.messages import Report
from swtpm_prop.transfer.settle import HOOK, Eyes, Settler

UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
PROPERTY = "https://example.org/properties/approved-host"
BLOB = ImportBlob(b"", b"", b"")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Network:
    """Hosts by name, and which of them cannot be reached."""

    def __init__(self) -> None:
        self.hosts: dict[str, SimulatedHost] = {}
        self.down: set[str] = set()
        self.lose_answers = False

    def report(self, sender: str, transfer: Transfer, report: Report) -> Report:
        if {sender, transfer.peer} & self.down:
            raise TransferError("transfer.unreachable", "down")
        answer = self.hosts[transfer.peer].agent.hear(sender, report)
        if self.lose_answers:
            raise TransferError("transfer.timeout", "lost")
        return answer


class SimulatedHost:
    """A host with a real journal and real key records, and keys that no TPM knows.

    Where ``directory`` is not in memory, opened keys are not left between hooks.
    """

    def __init__(self, name: str, directory: Path, network: Network, clock: Clock) -> None:
        self.name = name
        self.layout = Layout(directory / name)
        self.network = network
        self.journal = Journal(self.layout, clock)
        self.seen = Presence.GONE
        self.halted = 0
        self.agent = self.settler(Eyes(lambda uuid: self.seen, self._halt))
        self.hook = self.settler(HOOK)  # prepare's and release's
        self.asker = self.settler(Eyes(self._present, lambda uuid: None))  # the hook that lets guests in
        network.hosts[name] = self

    def settler(self, eyes: Eyes) -> Settler:
        return Settler(
            self.layout, self.journal, eyes, lambda transfer, word: self.network.report(self.name, transfer, word)
        )

    def _present(self, uuid: str) -> Presence:
        return Presence.GONE if self.seen is Presence.GONE else Presence.PRESENT

    def _halt(self, uuid: str) -> None:
        self.halted += 1
        if self.seen is Presence.PRESENT:
            self.seen = Presence.GONE

    # -- the guest ------------------------------------------------------------------------------

    def create(self) -> None:
        """Make a guest with a key and a TPM state, and start it."""
        keys.store(key_record(self.name, 0), self.layout)
        self.write_state()
        self.seen = Presence.RUNS

    def write_state(self) -> None:
        self.layout.guest_tpm(UUID).mkdir(parents=True, exist_ok=True)
        (self.layout.guest_tpm(UUID) / "tpm2-00.permall").write_bytes(b"state")

    @property
    def key(self) -> KeyRecord | None:
        return keys.load(UUID, self.layout)

    @property
    def opens(self) -> bool:
        """Whether anything on this host opens the guest's key."""
        return self.key is not None or any(known.key for known in self.journal.of(UUID)) or bool(self.left)

    @property
    def left(self) -> list[Path]:
        """Keys that lie open between two hooks."""
        return list(self.layout.arriving.glob("*"))

    @property
    def has_state(self) -> bool:
        return self.layout.guest_tpm(UUID).exists()

    def states(self) -> list[str]:
        return [known.state.value for known in self.journal.of(UUID)]

    def start(self) -> bool:
        """libvirt starts the guest, if the gate lets it."""
        try:
            self.hook.gate(UUID)
        except TransferError as error:
            assert error.id in ("transfer.elsewhere", "transfer.undecided", "transfer.too-late"), error
            assert error.mend
            return False
        if self.key is None:
            return False
        self.seen = Presence.RUNS
        self.agent.observe(UUID, Event.RUNS)
        return True

    def may_start(self) -> bool:
        try:
            self.hook.gate(UUID)
        except TransferError:
            return False
        return self.key is not None


def key_record(host: str, epoch: int) -> KeyRecord:
    sealed = Sealed(hashlib.sha256(host.encode()).digest(), bytes([epoch]))
    return KeyRecord(UUID, epoch, PROPERTY, "an authority", sealed, (), encrypted=True)


def arrival(host: str, epoch: int) -> Arrival:
    """A key that came, opened."""
    return Arrival(key_record(host, epoch), bytes([epoch]) * KEY_BYTES)


def hand_over(source: SimulatedHost, destination: SimulatedHost, id: str) -> Transfer:
    """The key changes hosts as in the conversation, without evidence."""
    destination.asker.ask(Transfer(id, Side.DESTINATION, State.ASKED, UUID, 0, source.name, "source:1"))
    try:
        if {source.name, destination.name} & source.network.down:
            raise TransferError("transfer.unreachable", "down")
        source.agent.make_room(UUID, destination.name)
        record = source.key
        if record is None or source.seen is not Presence.RUNS:
            raise TransferError("transfer.not-running", "not here")
        offered = Transfer(id, Side.SOURCE, State.OFFERED, UUID, record.epoch, destination.name, "destination:1")
        source.agent.offer(offered, lambda: BLOB)
    except BaseException:
        destination.asker.give_up(id, offered=False)
        raise
    return destination.asker.imported(id, arrival(destination.name, record.epoch + 1))


def switch_over(source: SimulatedHost, destination: SimulatedHost) -> None:
    """libvirt moves the guest; neither host is told anything."""
    destination.write_state()
    destination.seen = Presence.RUNS
    source.seen = Presence.GONE


def migrate(source: SimulatedHost, destination: SimulatedHost, id: str) -> None:
    """A migration in which everything goes well."""
    hand_over(source, destination, id)
    assert destination.hook.arrive(UUID) is not None
    switch_over(source, destination)
    destination.agent.observe(UUID, Event.RUNS)
    source.agent.observe(UUID, Event.MIGRATED)
    destination.agent.settle(UUID)
    source.agent.settle(UUID)
