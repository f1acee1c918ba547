"""What each side of a transfer may do: states, events and actions as one table; pure.

A transfer is one attempt to hand one guest's key from a source host to a destination host; each keeps its own state in
its journal. docs/decisions/0042 argues why this is safe; tests/property/test_transfer_model.py explores all of it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from swtpm_prop.errors import TransferError


class Side(StrEnum):
    """Which end of the transfer this host is."""

    SOURCE = "source"
    DESTINATION = "destination"


class State(StrEnum):
    """How far the transfer is here. The words also travel: they are what one host tells the other."""

    # The source's.
    OFFERED = "offered"  # the key may be with the destination; where the guest will run is open
    MOVED = "moved"  # the guest was seen to leave for the destination
    YIELDED = "yielded"  # the destination says that it runs the guest; its process here is not seen to be gone yet
    RELEASED = "released"  # it has gone: key and TPM state are destroyed here; stays as the sign of where it went
    RETURNING = "returning"  # as released; it may be coming back without custody, hence without a transfer
    KEPT = "kept"  # as cancelled, by an operator's word
    # The destination's.
    ASKED = "asked"  # the key is asked for, not here
    IMPORTED = "imported"  # the key is here, in this journal; nothing was started with it
    ARRIVING = "arriving"  # a process was started to receive the guest
    LEFT = "left"  # that process is gone, and nobody saw whether the guest had run in it
    ACTIVATED = "activated"  # the guest ran here: this host has it
    CLAIMED = "claimed"  # as activated, by an operator's word
    REJECTED = "rejected"  # the source has the guest; the process that should receive it here must go
    OVERRULED = "overruled"  # the guest ran here, and an operator at the source says that it is there
    # Either's.
    CANCELLED = "cancelled"  # the guest stays with the source; the peer is not known to know
    CLOSED = "closed"  # the same, and the peer knows
    # The destination's: the guest is its own, and the source knows. The source's: the release is lifted, by an operator
    # or because the guest is back.
    SETTLED = "settled"


class Event(StrEnum):
    """What a side learns."""

    # Facts of this host.
    RUNS = "runs"  # the guest is here: running, or paused by somebody's wish; not held by a migration
    GONE = "gone"  # no process of the guest is here
    MIGRATED = "migrated"  # the guest's process ended here because its migration succeeded
    STAYED = "stayed"  # the guest is here, and what was started of it at the destination cannot come to run any more
    NEVER_RAN = "never-ran"  # the process that should receive the guest is gone and is known not to have run it
    # Steps of this host's hooks.
    IMPORT = "import"  # the key is in this host's TPM
    ARRIVE = "arrive"  # libvirt starts the process that receives the guest
    ABANDON = "abandon"  # the migration ended before that
    RETURN = "return"  # libvirt starts the process that receives the guest which left in custody and is not any more
    SUPERSEDE = "supersede"  # the same destination asks anew; it does so only when it has given up what it had
    # The operator's word: where the guest is. Nothing of it runs or will be started on the other side.
    HERE = "here"
    THERE = "there"
    # What the peer said.
    PEER_MOVED = "peer-moved"
    PEER_RELEASED = "peer-released"
    PEER_ACTIVATED = "peer-activated"
    PEER_CLAIMED = "peer-claimed"
    PEER_CANCELLED = "peer-cancelled"
    PEER_KEPT = "peer-kept"
    PEER_UNKNOWN = "peer-unknown"  # it has no such transfer


class Action(StrEnum):
    """What a side does when it enters a state; each may be done twice."""

    ADOPT_KEY = "adopt-key"  # the key of the transfer becomes the guest's key record
    FORGET_KEY = "forget-key"  # the key of the transfer is destroyed here
    DESTROY_KEY = "destroy-key"  # the guest's key record, if it is still the one that was handed on
    REMOVE_STATE = "remove-state"  # the guest's TPM state, which runs on elsewhere
    HALT = "halt"  # pause the guest's process here, end it if it is still receiving; say so loudly


class Presence(StrEnum):
    """What can be seen of the guest on this host."""

    RUNS = "runs"  # as Event.RUNS
    PRESENT = "present"  # its process is here, and a migration holds the guest: it comes, or goes
    GONE = "gone"  # no process
    UNSEEN = "unseen"  # nobody could look


class Gate(StrEnum):
    """Whether a guest may be started here, from the mildest to the strictest."""

    START = "start"
    ASK_THEN_START = "ask-then-start"  # ask the peer; without an answer start
    ASK_THEN_REFUSE = "ask-then-refuse"  # ask the peer; without an answer that decides, ask the operator
    REFUSE = "refuse"


class Step(NamedTuple):
    """Where an event leads: the state to write into the journal, then what to do."""

    state: State
    actions: tuple[Action, ...] = ()


S, E, A = State, Event, Action

SOURCE: dict[State, dict[Event, Step]] = {
    S.OFFERED: {
        E.MIGRATED: Step(S.MOVED),
        E.STAYED: Step(S.CANCELLED),
        E.SUPERSEDE: Step(S.CLOSED),
        E.PEER_ACTIVATED: Step(S.YIELDED),
        E.PEER_CLAIMED: Step(S.YIELDED),
        E.PEER_CANCELLED: Step(S.CLOSED),
        E.HERE: Step(S.KEPT),
        E.THERE: Step(S.MOVED),
    },
    S.MOVED: {
        E.PEER_ACTIVATED: Step(S.YIELDED),
        E.PEER_CLAIMED: Step(S.YIELDED),
        E.PEER_CANCELLED: Step(S.CLOSED),
        E.HERE: Step(S.KEPT),
    },
    S.YIELDED: {
        E.GONE: Step(S.RELEASED, (A.DESTROY_KEY, A.REMOVE_STATE)),
        E.MIGRATED: Step(S.RELEASED, (A.DESTROY_KEY, A.REMOVE_STATE)),
        E.RUNS: Step(S.YIELDED, (A.HALT,)),
    },
    S.RELEASED: {
        E.HERE: Step(S.SETTLED),
        E.RETURN: Step(S.RETURNING),
    },
    S.RETURNING: {
        E.HERE: Step(S.SETTLED),
        E.RUNS: Step(S.SETTLED),
    },
    S.CANCELLED: {
        E.SUPERSEDE: Step(S.CLOSED),
        E.PEER_CLAIMED: Step(S.YIELDED),
        E.PEER_CANCELLED: Step(S.CLOSED),
        E.PEER_UNKNOWN: Step(S.CLOSED),
    },
    S.KEPT: {
        E.THERE: Step(S.MOVED),
        E.SUPERSEDE: Step(S.CLOSED),
        E.PEER_CANCELLED: Step(S.CLOSED),
        E.PEER_UNKNOWN: Step(S.CLOSED),
    },
    S.CLOSED: {},
    S.SETTLED: {},
}

DESTINATION: dict[State, dict[Event, Step]] = {
    S.ASKED: {
        E.IMPORT: Step(S.IMPORTED),
        E.ABANDON: Step(S.CANCELLED, (A.FORGET_KEY,)),
    },
    S.IMPORTED: {
        E.ARRIVE: Step(S.ARRIVING),
        E.ABANDON: Step(S.CANCELLED, (A.FORGET_KEY,)),
        E.PEER_CANCELLED: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.PEER_KEPT: Step(S.CLOSED, (A.FORGET_KEY,)),
    },
    S.ARRIVING: {
        E.RUNS: Step(S.ACTIVATED, (A.ADOPT_KEY,)),
        E.GONE: Step(S.LEFT),
        E.NEVER_RAN: Step(S.CANCELLED, (A.FORGET_KEY,)),
        E.PEER_MOVED: Step(S.ACTIVATED, (A.ADOPT_KEY,)),
        E.PEER_RELEASED: Step(S.ACTIVATED, (A.ADOPT_KEY,)),
        E.PEER_CANCELLED: Step(S.REJECTED, (A.HALT,)),
        E.PEER_KEPT: Step(S.REJECTED, (A.HALT,)),
    },
    S.LEFT: {
        E.NEVER_RAN: Step(S.CANCELLED, (A.FORGET_KEY,)),
        E.PEER_MOVED: Step(S.ACTIVATED, (A.ADOPT_KEY,)),
        E.PEER_RELEASED: Step(S.ACTIVATED, (A.ADOPT_KEY,)),
        E.PEER_CANCELLED: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.PEER_KEPT: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.HERE: Step(S.CLAIMED, (A.ADOPT_KEY,)),
        E.THERE: Step(S.CANCELLED, (A.FORGET_KEY,)),
    },
    S.REJECTED: {
        E.RUNS: Step(S.REJECTED, (A.HALT,)),
        E.GONE: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.NEVER_RAN: Step(S.CLOSED, (A.FORGET_KEY,)),
    },
    # From here on nothing the source says ends the guest or destroys its key: it may be the host that was fled from.
    S.ACTIVATED: {
        E.PEER_RELEASED: Step(S.SETTLED, (A.ADOPT_KEY,)),
        E.PEER_UNKNOWN: Step(S.SETTLED, (A.ADOPT_KEY,)),
        E.PEER_CANCELLED: Step(S.OVERRULED),
        E.PEER_KEPT: Step(S.OVERRULED),
    },
    S.CLAIMED: {
        E.PEER_RELEASED: Step(S.SETTLED, (A.ADOPT_KEY,)),
        E.PEER_UNKNOWN: Step(S.SETTLED, (A.ADOPT_KEY,)),
        E.PEER_KEPT: Step(S.OVERRULED),
    },
    S.OVERRULED: {
        E.HERE: Step(S.CLAIMED, (A.ADOPT_KEY,)),
        E.THERE: Step(S.CANCELLED, (A.FORGET_KEY,)),
    },
    S.CANCELLED: {
        E.PEER_CANCELLED: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.PEER_KEPT: Step(S.CLOSED, (A.FORGET_KEY,)),
        E.PEER_UNKNOWN: Step(S.CLOSED, (A.FORGET_KEY,)),
    },
    S.CLOSED: {},
    S.SETTLED: {},
}

TABLE = {Side.SOURCE: SOURCE, Side.DESTINATION: DESTINATION}
"""Everything else is no transition: a fact or a peer's word that says nothing new, or a step that is refused."""

COMMANDS = frozenset({E.IMPORT, E.ARRIVE, E.HERE, E.THERE})
"""Events that somebody wants to come true; where the table has no place for them they are refused, not ignored."""

GATES: dict[Side, dict[State, Gate]] = {
    Side.SOURCE: {
        S.OFFERED: Gate.ASK_THEN_REFUSE,
        S.MOVED: Gate.ASK_THEN_REFUSE,
        S.YIELDED: Gate.REFUSE,
        S.RELEASED: Gate.REFUSE,
        S.RETURNING: Gate.REFUSE,
        S.CANCELLED: Gate.START,
        S.KEPT: Gate.START,
        S.CLOSED: Gate.START,
        S.SETTLED: Gate.START,
    },
    Side.DESTINATION: {
        S.ASKED: Gate.REFUSE,
        S.IMPORTED: Gate.REFUSE,
        S.ARRIVING: Gate.ASK_THEN_REFUSE,
        S.LEFT: Gate.ASK_THEN_REFUSE,
        S.ACTIVATED: Gate.ASK_THEN_START,
        S.CLAIMED: Gate.ASK_THEN_START,
        S.REJECTED: Gate.REFUSE,
        S.OVERRULED: Gate.REFUSE,
        S.CANCELLED: Gate.REFUSE,
        S.CLOSED: Gate.REFUSE,
        S.SETTLED: Gate.START,
    },
}
"""For an ordinary start. The start that receives a guest needs `State.IMPORTED` and is the event `Event.ARRIVE`."""

UNFINISHED = {
    Side.SOURCE: frozenset({S.OFFERED, S.MOVED, S.YIELDED, S.CANCELLED, S.KEPT}),
    Side.DESTINATION: frozenset(
        {S.ASKED, S.IMPORTED, S.ARRIVING, S.LEFT, S.ACTIVATED, S.CLAIMED, S.REJECTED, S.OVERRULED, S.CANCELLED}
    ),
}
"""States in which this side still has something to learn or to tell."""


def step(side: Side, state: State, event: Event) -> Step:
    """What the event makes of the state.

    Raises:
        TransferError: ``transfer.not-now``: a step or an operator's word that has no place in this state.
    """
    found = TABLE[side][state].get(event)
    if found is not None:
        return found
    if event in COMMANDS:
        raise TransferError(
            "transfer.not-now",
            f"'{event}' has no place where this host is the {side} and the transfer is {state}",
            "see swtpm-prop transfer show",
        )
    return Step(state)


def actions(side: Side, state: State) -> tuple[Action, ...]:
    """What entering the state obliges to; done again after a crash, since nobody knows how far it came."""
    into = (step for row in TABLE[side].values() for step in row.values() if step.state is state)
    return next((step.actions for step in into), ())


def heard(side: Side, word: State | None) -> Event | None:
    """The event that the peer's word is for this side; None for a word that decides nothing.

    Args:
        side: of this host; the word is the other side's.
        word: the peer's state; None where it has no such transfer.
    """
    return E.PEER_UNKNOWN if word is None else _HEARD[side].get(word)


_HEARD: dict[Side, dict[State, Event]] = {
    Side.SOURCE: {
        S.ACTIVATED: E.PEER_ACTIVATED,
        S.CLAIMED: E.PEER_CLAIMED,
        S.SETTLED: E.PEER_ACTIVATED,
        S.CANCELLED: E.PEER_CANCELLED,
        S.CLOSED: E.PEER_CANCELLED,
    },
    Side.DESTINATION: {
        S.MOVED: E.PEER_MOVED,
        S.RELEASED: E.PEER_RELEASED,
        S.RETURNING: E.PEER_RELEASED,
        S.SETTLED: E.PEER_RELEASED,
        S.KEPT: E.PEER_KEPT,
        S.CANCELLED: E.PEER_CANCELLED,
        S.CLOSED: E.PEER_CANCELLED,
    },
}


def learn(side: Side, word: State | None, presence: Presence) -> tuple[Event, ...]:
    """The events of one exchange with the peer: its word, and what can be seen here at that time.

    A source hears first: a guest that it has yielded may be gone. A destination sees first: a guest that runs is its
    own, whatever the source says. A guest that is here while the peer's process is gone for good has stayed, however
    its migration went.
    """
    said = [event for event in (heard(side, word),) if event]
    if side is Side.DESTINATION:
        return (*seen(presence), *said)
    if presence is Presence.RUNS and word in (None, S.LEFT):
        said.append(E.STAYED)
    return (*said, *seen(presence))


def seen(presence: Presence) -> tuple[Event, ...]:
    """The event of what can be seen of the guest here."""
    return {Presence.RUNS: (E.RUNS,), Presence.GONE: (E.GONE,)}.get(presence, ())


def speaks(side: Side, state: State) -> bool:
    """Whether a transfer says where the guest is; an attempt to fetch it that came to nothing does not.

    Of a guest's transfers on a host the newest one that speaks counts.
    """
    return not (side is Side.DESTINATION and state in (S.CANCELLED, S.CLOSED))


def may_offer(gate: Gate) -> bool:
    """Whether the guest's key may be handed on from here: the guest is here, as far as this host knows."""
    return gate in (Gate.START, Gate.ASK_THEN_START)


def may_ask(side: Side, state: State) -> bool:
    """Whether the guest may be fetched while this transfer of it is the one that counts."""
    return may_offer(GATES[side][state]) or left(state)


def left(state: State) -> bool:
    """Whether the transfer is the sign of where the guest went from here."""
    return state in (S.RELEASED, S.RETURNING)
