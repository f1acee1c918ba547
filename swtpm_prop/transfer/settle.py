"""What hooks, agent and operators do with transfers: tell the machine what they see, do what it says, ask the peer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, NamedTuple

from swtpm_prop.custody import keys, mounts
from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.errors import Error, TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import ARRIVAL_SECONDS, SETTLE_ROUNDS
from swtpm_prop.transfer import handover, machine
from swtpm_prop.transfer.handover import Arrival
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Action, Event, Gate, Presence, Side, State
from swtpm_prop.transfer.messages import Report

Reach = Callable[[Transfer, Report], Report]
"""Reports to the transfer's peer and returns its report; raises an Error if it cannot be reached."""


class Eyes(NamedTuple):
    """What can be seen of guests here, and the one thing that is done to them.

    Attributes:
        presence: of the guest with this UUID.
        halt: pauses the guest if it runs and ends it if it still arrives; nothing if it is not here. It is never called
            for a guest that is where it should be.
    """

    presence: Callable[[str], Presence]
    halt: Callable[[str], None]


HOOK = Eyes(lambda uuid: Presence.GONE, lambda uuid: None)
"""Of libvirt's hooks prepare and release: then no process of the guest is on this host."""


class Settler:
    """Moves this host's transfers on. Several processes may do so at once; each step is one under the guest's lock.

    Args:
        layout: of this host.
        journal: of this host.
        eyes: see `Eyes`.
        reach: see `Reach`.
    """

    def __init__(self, layout: Layout, journal: Journal, eyes: Eyes, reach: Reach) -> None:
        self._layout = layout
        self.journal = journal
        self._eyes = eyes
        self._reach = reach

    # -- what happens here ----------------------------------------------------------------------

    def observe(self, uuid: str, *events: Event, at: float | None = None) -> None:
        """Tell all transfers of the guest what was seen of it.

        Args:
            uuid: of the guest.
            events: facts of this host, see `machine.Event`.
            at: when it was seen, seconds since the epoch; None: now. It says nothing about what began later.

        Raises:
            TransferError: the journal cannot be used; then nothing is done that was not written down.
        """
        if not self.journal.of(uuid):
            return
        with self.journal.locked(uuid):
            for transfer in self.journal.of(uuid):
                if at is None or transfer.since < at:
                    self._learn(transfer, events)

    def arrive(self, uuid: str) -> Arrival | None:
        """The key for a guest whose receiving process libvirt is about to start; None: it is an ordinary start.

        Each transfer gives its key once: what is started of the guest next is no arrival.

        Raises:
            TransferError: the journal cannot be used.
        """
        if not self.journal.of(uuid):
            return None
        with self.journal.locked(uuid):
            newest = self.journal.of(uuid)[0]
            if newest.state is not State.IMPORTED or self._stale(newest):
                return None
            arrival = Arrival(keys.parse(newest.key.encode(), uuid), handover.take(newest.id, self._layout))
            self._step(newest, Event.ARRIVE)
            return arrival

    def gate(self, uuid: str) -> None:
        """Let an ordinary start of the guest pass, or not; libvirt is about to do it, so no process of it is here.

        Raises:
            TransferError: ``transfer.undecided``, ``transfer.elsewhere``; ``transfer.too-late``: a key waited here that
                this start was perhaps meant for; it is given up now. The journal cannot be used.
        """
        waited = [known for known in self.journal.of(uuid) if known.state is State.IMPORTED]
        self.observe(uuid, Event.ABANDON, Event.GONE)
        if waited:
            raise _too_late(waited[0])
        if self.journal.gate(uuid) in (Gate.ASK_THEN_START, Gate.ASK_THEN_REFUSE):
            self.settle(uuid)
        self._check_place(uuid)

    def come_back(self, uuid: str) -> None:
        """Let the start pass that receives a guest which left here in custody and is not in custody any more.

        Raises:
            TransferError: the journal cannot be used; ``transfer.action``: what its leaving obliged to cannot be done.
        """
        with self.journal.locked(uuid):
            # Done later it would destroy what the guest brings.
            self._do_all_due(uuid)
            self._step(self._counting(uuid), Event.RETURN)

    # -- the key changes hosts ------------------------------------------------------------------

    def make_room(self, uuid: str, peer: str) -> None:
        """See that the guest is here as far as this host knows, before the peer is given its key.

        Whoever asks has given up what it had: see `messages.Ask`. Another host that was given the key before is asked.

        Raises:
            TransferError: ``transfer.undecided``, ``transfer.elsewhere``; the journal cannot be used.
        """
        self._supersede(uuid, peer)
        if not machine.may_offer(self.journal.gate(uuid)):
            self.settle(uuid)
        self._check_place(uuid)

    def offer(self, offered: Transfer, wrap: Callable[[], ImportBlob]) -> ImportBlob:
        """Encrypt the guest's key to the peer and write down that it may have it; who gets the result may send it.

        Raises:
            TransferError: as `make_room`; ``transfer.repeated``; Error: whatever ``wrap`` raises, then nothing is left.
        """
        with self.journal.locked(offered.uuid):
            if not machine.may_offer(self.journal.gate(offered.uuid)):
                raise elsewhere(self._counting(offered.uuid))
            blob = wrap()
            self.journal.begin(offered)
        return blob

    def ask(self, asked: Transfer) -> None:
        """Write down that this host asks for the key; earlier attempts of it are given up, or settled.

        Raises:
            TransferError: ``transfer.open``; the journal cannot be used.
        """
        if any(known.unfinished for known in self.journal.of(asked.uuid)):
            self.observe(asked.uuid, Event.ABANDON, *machine.seen(self._eyes.presence(asked.uuid)))
        counting = self.journal.counting(asked.uuid)
        if counting is not None and counting.unfinished:
            self.settle(asked.uuid)
        with self.journal.locked(asked.uuid):
            for known in self.journal.of(asked.uuid):
                self._do_due(known)
                if machine.speaks(known.side, known.state) and not machine.may_ask(known.side, known.state):
                    raise _open(known)
            self.journal.begin(asked)

    def imported(self, id: str, arrival: Arrival) -> Transfer:
        """Write down that the key is here, and leave it for the start that receives the guest.

        Raises:
            TransferError: ``transfer.not-now``: this took so long that the transfer was given up.
        """
        known = self._known(id)
        with self.journal.locked(known.uuid):
            known = self._known(id)
            step = machine.step(known.side, known.state, Event.IMPORT)
            record, key = arrival
            known = known._replace(epoch=record.epoch - 1, key=keys.serialise(record).decode())
            known = self.journal.enter(known, step.state, due=False)
            if key is not None:
                handover.leave(id, key, self._layout)
            return known

    def give_up(self, id: str, offered: bool) -> None:
        """The key did not come.

        Args:
            id: of the transfer.
            offered: whether the peer may have written it down; else it is forgotten here too.
        """
        known = self.journal.find(id)
        if known is None:
            return
        with self.journal.locked(known.uuid):
            known = self._step(self._known(id), Event.ABANDON)
            if not offered:
                self.journal.remove(known)

    # -- with the peer --------------------------------------------------------------------------

    def settle(self, uuid: str) -> dict[str, Report | None]:
        """Bring the guest's transfers as far as this host and their peers can.

        Returns:
            By transfer, what its peer said last; None: it did not answer. Transfers that need no peer are not there.

        Raises:
            TransferError: the journal cannot be used; ``transfer.action``: something could not be done, and stays due.
        """
        answers: dict[str, Report | None] = {}
        transfers = self.journal.of(uuid)
        for transfer in transfers:
            if transfer.unfinished:
                answers |= self._settle(transfer)
        if transfers:
            with self.journal.locked(uuid):
                self._do_all_due(uuid)
                self.journal.prune(uuid)
        return answers

    def hear(self, peer: str, report: Report) -> Report:
        """Learn how far a transfer is at the peer, and say how far it is here.

        Args:
            peer: name of the host that says so, as its certificate proves it.
            report: what it says.

        Raises:
            TransferError: the journal cannot be used.
        """
        transfer = self.journal.find(report.id)
        if transfer is None or transfer.peer != peer:
            return Report(report.id, None)
        # That it has no such transfer counts as an answer only: who says so unasked has one.
        found = self._told(transfer, report.state) if report.state is not None else transfer
        return Report(report.id, found.state if found else None)

    # -- the operator ---------------------------------------------------------------------------

    def resolve(self, uuid: str, here: bool) -> Transfer:
        """Take the operator's word for where the guest is, where no host can know.

        Args:
            uuid: of the guest.
            here: it is on this host, and nothing of it runs or will be started on the other before that has heard of
                this; or the other way round.

        Raises:
            TransferError: ``transfer.decided``, ``transfer.none``, ``transfer.runs-there``, ``transfer.runs-here``,
                ``transfer.unseen``; the journal cannot be used.
        """
        self.observe(uuid, *machine.seen(self._eyes.presence(uuid)))
        answers = self.settle(uuid)
        transfer = self._counting(uuid)
        if transfer.id not in answers:
            answers[transfer.id] = self._ask_peer(transfer)
        self._check_word(transfer, here, answers[transfer.id])
        with self.journal.locked(uuid):
            transfer = self._step(self._known(transfer.id), Event.HERE if here else Event.THERE)
        self.settle(uuid)
        return self.journal.find(transfer.id) or transfer

    def _check_word(self, transfer: Transfer, here: bool, answer: Report | None) -> None:
        event = Event.HERE if here else Event.THERE
        if event not in machine.TABLE[transfer.side][transfer.state]:
            raise TransferError(
                "transfer.decided",
                f"nothing is to be said: this host is the {transfer.side}, the transfer is {transfer.state}",
                f"'swtpm-prop transfer show {transfer.uuid}' tells where the guest is",
            )
        if here and answer is not None and answer.state in _THERE[transfer.side]:
            raise TransferError(
                "transfer.runs-there",
                f"host '{transfer.peer}' answers that the guest is there ({answer.state})",
                f"migrate it back; if it is gone there for good, there 'swtpm-prop key forget {transfer.uuid}'",
            )
        presence = self._eyes.presence(transfer.uuid)
        if not here and presence is Presence.UNSEEN:
            # QEMU runs on while its libvirt is down.
            raise TransferError(
                "transfer.unseen", "nobody can see whether the guest is on this host", "start libvirt here first"
            )
        if not here and presence is not Presence.GONE:
            raise TransferError(
                "transfer.runs-here", "the guest is on this host", "destroy it first, if it must not be"
            )

    # -- steps ----------------------------------------------------------------------------------

    def _settle(self, transfer: Transfer) -> dict[str, Report | None]:
        answers: dict[str, Report | None] = {}
        for _ in range(SETTLE_ROUNDS):
            known = self._look(transfer)
            if known is None or known.state not in _TELLING[known.side]:
                break
            answer = answers[known.id] = self._ask_peer(known)
            after = answer and self._told(known, answer.state)
            if after is None or after.state is known.state:
                break
        return answers

    def _look(self, transfer: Transfer) -> Transfer | None:
        """The transfer after what can be seen and done here without the peer."""
        presence = self._presence(transfer)
        with self.journal.locked(transfer.uuid):
            known = self.journal.find(transfer.id)
            if known is None:
                return None
            with suppress(Error):
                known = self._do_due(known)
            given_up = (Event.ABANDON,) if self._stale(known) else ()
            return self._learn(known, (*given_up, *machine.seen(presence)))

    def _ask_peer(self, transfer: Transfer) -> Report | None:
        try:
            return self._reach(transfer, Report(transfer.id, transfer.state))
        except Error:
            return None

    def _told(self, transfer: Transfer, word: State | None) -> Transfer | None:
        """The transfer after its peer's word."""
        presence = self._presence(transfer)
        with self.journal.locked(transfer.uuid):
            known = self.journal.find(transfer.id)
            return known and self._learn(known, machine.learn(known.side, word, presence))

    def _presence(self, transfer: Transfer) -> Presence:
        presence = self._eyes.presence(transfer.uuid)
        # A process that is being started is not there yet.
        starting = transfer.state in (State.IMPORTED, State.ARRIVING) and not self._stale(transfer)
        return Presence.UNSEEN if starting and presence is Presence.GONE else presence

    def _learn(self, transfer: Transfer, events: tuple[Event, ...]) -> Transfer:
        for event in events:
            transfer = self._step(transfer, event)
        return transfer

    def _supersede(self, uuid: str, peer: str) -> None:
        if not self.journal.of(uuid):
            return
        with self.journal.locked(uuid):
            for known in self.journal.of(uuid):
                if known.side is Side.SOURCE and known.peer == peer:
                    self._step(known, Event.SUPERSEDE)

    def _check_place(self, uuid: str) -> None:
        """The guest's place is here, and everything is done that this takes."""
        if not self.journal.of(uuid):
            return
        with self.journal.locked(uuid):
            self._do_all_due(uuid)
            if not machine.may_offer(self.journal.gate(uuid)):
                raise elsewhere(self._counting(uuid))

    def _step(self, transfer: Transfer, event: Event) -> Transfer:
        """Write down what the event leads to, then do it; what fails of that stays due."""
        step = machine.step(transfer.side, transfer.state, event)
        if step.state is not transfer.state:
            transfer = self.journal.enter(transfer, step.state, due=bool(step.actions))
            with suppress(Error):
                transfer = self._do_due(transfer)
        elif step.actions:
            with suppress(Error):
                self._do(transfer, step.actions)
        return transfer

    def _do_all_due(self, uuid: str) -> None:
        for transfer in self.journal.of(uuid):
            self._do_due(transfer)

    def _do_due(self, transfer: Transfer) -> Transfer:
        if not transfer.due:
            return transfer
        done = self._do(transfer, machine.actions(transfer.side, transfer.state))
        return self.journal.save(done._replace(due=False))

    def _do(self, transfer: Transfer, actions: tuple[Action, ...]) -> Transfer:
        """What the actions make of the transfer; each may be done again after a crash in its middle.

        Raises:
            TransferError: ``transfer.action``; HostError: as `custody.keys`.
        """
        try:
            for action in actions:
                transfer = self._ACTIONS[action](self, transfer)
        except OSError as error:
            raise TransferError(
                "transfer.action",
                f"'{action}' cannot be done for guest {transfer.uuid}: {error}",
                "mend that; it is tried again by itself",
            ) from error
        return transfer

    def _adopt(self, transfer: Transfer) -> Transfer:
        if not transfer.key:
            return transfer
        keys.store(keys.parse(transfer.key.encode(), transfer.uuid), self._layout)
        # The one copy of it from here on: when the guest goes on, all that opens here goes with the record.
        return self.journal.save(transfer._replace(key="", adopted=True))

    def _forget(self, transfer: Transfer) -> Transfer:
        handover.discard(transfer.id, self._layout)
        record = keys.load(transfer.uuid, self._layout)
        if record is not None and (
            (transfer.adopted and record.epoch == transfer.epoch + 1)
            or (transfer.key and record == keys.parse(transfer.key.encode(), transfer.uuid))
        ):
            keys.destroy(transfer.uuid, self._layout)
        return transfer._replace(key="", adopted=False)

    def _destroy(self, transfer: Transfer) -> Transfer:
        """The key that was handed on; one that came later is not this transfer's business."""
        record = keys.load(transfer.uuid, self._layout)
        if record is not None and record.epoch == transfer.epoch:
            keys.destroy(transfer.uuid, self._layout)
        return transfer

    def _remove_state(self, transfer: Transfer) -> Transfer:
        place = self._layout.guest_tpm(transfer.uuid).parent
        # On shared storage it is the destination's by now, and the guest's only one. What stays opens here no more.
        if mounts.kind(place) in mounts.OWN:
            with suppress(FileNotFoundError):
                shutil.rmtree(place)
        return transfer

    def _halt(self, transfer: Transfer) -> Transfer:
        self._eyes.halt(transfer.uuid)
        return transfer

    _ACTIONS: ClassVar[dict[Action, Callable[[Settler, Transfer], Transfer]]] = {
        Action.ADOPT_KEY: _adopt,
        Action.FORGET_KEY: _forget,
        Action.DESTROY_KEY: _destroy,
        Action.REMOVE_STATE: _remove_state,
        Action.HALT: _halt,
    }

    # -- small parts ----------------------------------------------------------------------------

    def _stale(self, transfer: Transfer) -> bool:
        return self.journal.now() - transfer.since > ARRIVAL_SECONDS

    def _known(self, id: str) -> Transfer:
        known = self.journal.find(id)
        if known is None:
            raise TransferError("transfer.none", f"there is no transfer {id}", "see transfer list")
        return known

    def _counting(self, uuid: str) -> Transfer:
        counting = self.journal.counting(uuid)
        if counting is None:
            raise TransferError("transfer.none", f"this host knows of no transfer of guest {uuid}", "see transfer list")
        return counting


def elsewhere(transfer: Transfer) -> TransferError:
    """Why the guest may not be started here, and the one thing to do."""
    uuid, peer = transfer.uuid, transfer.peer
    command = f"swtpm-prop transfer resolve {uuid}"
    if machine.GATES[transfer.side][transfer.state] is Gate.ASK_THEN_REFUSE:
        or_there = "" if transfer.side is Side.SOURCE else f"; if it is there: '{command} --there'"
        return TransferError(
            "transfer.undecided",
            f"the guest was migrating, and whether host '{peer}' has it only that host can tell",
            f"bring the agent of '{peer}' back; if the guest never will run there: '{command} --here'{or_there}",
        )
    if transfer.state is State.OVERRULED:
        return TransferError(
            "transfer.elsewhere",
            f"an operator at host '{peer}' has said that the guest is there",
            f"'{command} --there' here if so; if not, '{command} --there' on '{peer}' and '{command} --here' here",
        )
    return TransferError(
        "transfer.elsewhere",
        f"the guest is on host '{peer}' ({transfer.state})",
        f"migrate it back; or, if it is lost there for good: '{command} --here'",
    )


def _too_late(transfer: Transfer) -> TransferError:
    return TransferError(
        "transfer.too-late",
        f"the guest was to come from host '{transfer.peer}', and did not within {ARRIVAL_SECONDS} seconds",
        "migrate again",
    )


def _open(transfer: Transfer) -> TransferError:
    return TransferError(
        "transfer.open",
        f"an earlier migration of the guest with host '{transfer.peer}' is not decided ({transfer.state})",
        f"see 'swtpm-prop transfer show {transfer.uuid}'",
    )


_THERE = {
    Side.SOURCE: (State.ARRIVING, State.ACTIVATED, State.CLAIMED, State.SETTLED),
    Side.DESTINATION: (State.CANCELLED, State.KEPT, State.CLOSED),
}
"""What a peer says of a guest that is there; by the side of this host."""

_TELLING = {
    Side.SOURCE: (State.OFFERED, State.MOVED, State.CANCELLED, State.KEPT),
    Side.DESTINATION: (State.ARRIVING, State.LEFT, State.ACTIVATED, State.CLAIMED, State.CANCELLED),
}
"""States in which the peer may know what this side needs, or the other way round."""
