"""Every world that the two sides of a transfer can get into: no order of messages, crashes and outcomes is left out.

The world is both journals, both processes of the guest, libvirt's migration between them, what was ever said (anything
that was said may arrive late, twice, in any order or never), and what an operator promised. Transitions are whatever
hosts, libvirt, network and operator may do; the machine under test decides the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from swtpm_prop.transfer import machine
from swtpm_prop.transfer.machine import Action, Event, Gate, Presence, Side, State

S, E = State, Event
SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION

# How far libvirt is.
IDLE, ASKING, STREAMING, SWITCHED, OVER = "idle", "asking", "streaming", "switched", "over"
# A guest's process. HALTED: paused by libvirt to switch over, or by us.
NONE, WAITS, RUNS, HALTED, GONE = "none", "waits", "runs", "halted", "gone"


class World(NamedTuple):
    source: State | None = None
    destination: State | None = None
    source_due: bool = False  # the actions of the state are journalled, not done
    destination_due: bool = False
    source_key: bool = True
    destination_key: bool = False
    phase: str = IDLE
    here: str = RUNS  # the guest's process at the source
    there: str = NONE
    ran_there: bool = False
    split: bool = False  # libvirt lost the answer of the last phase and made both run
    migrated: bool = False  # the source's host can see that its process ended by a migration
    never_ran: bool = False  # the destination's host can see that its process ended before the guest ran
    said_here: frozenset[State] = frozenset()
    said_there: frozenset[State] = frozenset()
    spoken: bool = False  # an operator said where the guest is
    promised: Side | None = None  # the side on which an operator promised to start nothing before it has heard


DECIDING = {
    side: frozenset(word for word in State if machine.heard(side, word) or word is S.LEFT)
    for side in Side
}  # fmt: skip


def moved_on(world: World, side: Side, event: Event) -> World:
    """The world after the side has journalled what the event leads to; its actions are due."""
    state = world.source if side is SOURCE else world.destination
    if state is None:
        return world
    step = machine.step(side, state, event)
    if step.state is state and not step.actions:
        return world
    if step.state is state:
        assert step.actions == (Action.HALT,)
        return world._replace(here=HALTED) if side is SOURCE else world._replace(there=HALTED)
    if side is SOURCE:
        said = world.said_here | {step.state} & DECIDING[DESTINATION]
        return world._replace(source=step.state, source_due=bool(step.actions), said_here=said)
    said = world.said_there | {step.state} & DECIDING[SOURCE]
    return world._replace(destination=step.state, destination_due=bool(step.actions), said_there=said)


def offers(side: Side, state: State | None, event: Event) -> bool:
    return state is not None and event in machine.TABLE[side][state]


def libvirt(world: World) -> Iterator[World]:
    """What libvirt and the guest may do."""
    if world.phase == STREAMING:
        yield world._replace(phase=OVER)  # it failed; the destination's process ends later
        if world.here == RUNS and world.there == WAITS:
            yield world._replace(phase=SWITCHED, here=HALTED)
    if world.phase == SWITCHED:
        if world.there == WAITS:
            yield world._replace(there=RUNS, ran_there=True)
        if world.there == RUNS and world.here != GONE:
            yield world._replace(phase=OVER, here=GONE, migrated=True)
            yield world._replace(phase=OVER, here=GONE)  # seen by nobody
            yield world._replace(phase=OVER, here=RUNS, split=True)
        if world.there == WAITS and world.here == HALTED:
            yield world._replace(phase=OVER, here=RUNS, split=True, there=RUNS, ran_there=True)
        if world.there == GONE and world.here == HALTED:
            # It ran there and ended before the source was told: libvirt may report either.
            yield world._replace(phase=OVER, here=RUNS, split=world.ran_there)
            if world.ran_there:
                yield world._replace(phase=OVER, here=GONE, migrated=True)
        if world.here == GONE and world.there != WAITS:
            yield world._replace(phase=OVER)
    if world.there in (WAITS, RUNS, HALTED):
        yield world._replace(there=GONE, never_ran=not world.ran_there)
        yield world._replace(there=GONE)  # the host crashed, or nobody looked
    if world.here in (RUNS, HALTED):
        phase = world.phase if world.phase == SWITCHED else OVER
        yield world._replace(here=GONE, phase=phase if world.phase != IDLE else IDLE)


def hooks(world: World) -> Iterator[World]:
    """The steps that a migration takes at both hosts; each may be the last."""
    if world.phase == IDLE and world.here == RUNS:
        yield world._replace(phase=ASKING, destination=S.ASKED)
    if world.phase == ASKING and world.source is None and world.here == RUNS:
        yield world._replace(source=S.OFFERED, said_here=frozenset({S.OFFERED}) & DECIDING[DESTINATION])
    if world.phase == ASKING:
        yield world._replace(phase=OVER)
        if world.source is not None and world.destination is S.ASKED:
            yield moved_on(world, DESTINATION, E.IMPORT)._replace(destination_key=True)
        if world.destination is S.IMPORTED:
            yield moved_on(world, DESTINATION, E.ARRIVE)._replace(phase=STREAMING, there=WAITS)
            yield moved_on(world, DESTINATION, E.ARRIVE)._replace(phase=OVER, there=GONE, never_ran=True)
            yield moved_on(world, DESTINATION, E.ARRIVE)._replace(phase=OVER, there=GONE)
    if world.destination in (S.ASKED, S.IMPORTED):
        yield moved_on(world, DESTINATION, E.ABANDON)  # by the hook, or because it takes too long
    given_up = world.destination in (S.CANCELLED, S.CLOSED)
    if given_up and world.here == RUNS and world.phase == OVER and offers(SOURCE, world.source, E.SUPERSEDE):
        yield moved_on(world, SOURCE, E.SUPERSEDE)


def deeds(world: World) -> Iterator[World]:
    """Actions are done some time after they are journalled, or after the crash that came between, or twice."""
    for side, state, due in (
        (SOURCE, world.source, world.source_due),
        (DESTINATION, world.destination, world.destination_due),
    ):
        if not due or state is None:
            continue
        done = world._replace(source_due=False) if side is SOURCE else world._replace(destination_due=False)
        for action in machine.actions(side, state):
            if action is Action.DESTROY_KEY:
                done = done._replace(source_key=False)
            elif action is Action.FORGET_KEY:
                done = done._replace(destination_key=False)
            elif action is Action.HALT and side is DESTINATION and done.there == RUNS:
                done = done._replace(there=HALTED)
            elif action is Action.HALT and side is DESTINATION and done.there == WAITS:
                done = done._replace(there=GONE, never_ran=True)
        yield done


def presence_here(world: World) -> Presence:
    """A guest counts as running until the last moment of its migration: no event tells that one has begun."""
    return {GONE: Presence.GONE, RUNS: Presence.RUNS}.get(world.here, Presence.PRESENT)


def presence_there(world: World) -> Presence:
    return {GONE: Presence.GONE, RUNS: Presence.RUNS}.get(world.there, Presence.PRESENT)


def sights(world: World) -> Iterator[World]:
    """What each host may see of its own; it may also never see it."""
    for event in machine.seen(presence_here(world)):
        yield moved_on(world, SOURCE, event)
    for event in machine.seen(presence_there(world)):
        yield moved_on(world, DESTINATION, event)
    if world.migrated:
        yield moved_on(world, SOURCE, E.MIGRATED)
    if world.never_ran:
        yield moved_on(world, DESTINATION, E.NEVER_RAN)


def learned(world: World, side: Side, word: State | None) -> Iterator[World]:
    """A side hears a word, and looks at the guest as it does; or nobody there can look."""
    for presence in (presence_here(world) if side is SOURCE else presence_there(world), Presence.UNSEEN):
        after = world
        for event in machine.learn(side, word, presence):
            after = moved_on(after, side, event)
        yield after


def network(world: World) -> Iterator[World]:
    """Any word ever said may arrive at any time. That a host has no such transfer it says only when asked, of now."""
    for word in world.said_here:
        yield from learned(world, DESTINATION, word)
    for word in world.said_there:
        yield from learned(world, SOURCE, word)
    if world.source in (None, S.CLOSED, S.SETTLED):  # there is none, or it is pruned
        yield from learned(world, DESTINATION, None)
    if world.destination in (S.CLOSED, S.SETTLED):
        yield from learned(world, SOURCE, None)


def operators(world: World) -> Iterator[World]:
    """An operator speaks only where the machine takes it, tells the truth, and does not contradict an earlier word."""
    said = world._replace(spoken=True)
    if world.phase in (ASKING, STREAMING, SWITCHED):
        return
    if world.there in (NONE, GONE) and world.promised is not SOURCE:
        if offers(SOURCE, world.source, E.HERE):
            yield moved_on(said, SOURCE, E.HERE)._replace(promised=DESTINATION)
        if offers(DESTINATION, world.destination, E.THERE):
            yield moved_on(said, DESTINATION, E.THERE)
    if world.here == GONE and world.promised is not DESTINATION:
        if offers(DESTINATION, world.destination, E.HERE):
            yield moved_on(said, DESTINATION, E.HERE)._replace(promised=SOURCE)
        if offers(SOURCE, world.source, E.THERE):
            yield moved_on(said, SOURCE, E.THERE)


def start(world: World) -> Iterator[World]:
    """Whoever may start the guest does."""
    if world.phase in (IDLE, OVER):
        if world.here == GONE and starts(world, SOURCE):
            yield world._replace(here=RUNS)
        if world.there in (NONE, GONE) and starts(world, DESTINATION):
            yield world._replace(there=RUNS, ran_there=True)


def successors(world: World) -> Iterator[World]:
    for part in (libvirt, hooks, deeds, sights, network, operators, start):
        for after in part(world):
            if after != world:
                yield after


def starts(world: World, side: Side) -> bool:
    """Whether the side starts the guest without an answer of its peer and without an operator's word."""
    state = world.source if side is SOURCE else world.destination
    if state is None:
        return side is SOURCE
    if world.promised is side:
        return False
    return machine.GATES[side][state] in (Gate.START, Gate.ASK_THEN_START)


@cache
def explored() -> dict[World, World | None]:
    """Every world that can come about, and one that it comes from."""
    first = World()
    found: dict[World, World | None] = {first: None}
    todo = deque([first])
    while todo:
        world = todo.popleft()
        for after in successors(world):
            if after not in found:
                found[after] = world
                todo.append(after)
    return found


def story(world: World) -> str:
    """How the world came about, one changed field a line."""
    lines = []
    at: World | None = world
    while at is not None:
        before = explored()[at]
        changed = {k: v for k, v in at._asdict().items() if before is None or v != getattr(before, k)}
        lines.append(str(changed))
        at = before
    return "\n".join(reversed(lines))


def refute(worlds: list[World]) -> None:
    assert not worlds, f"{len(worlds)} worlds, one of them:\n{story(worlds[0])}"


def test_all_of_it_is_explored() -> None:
    assert len(explored()) > 1000
    for side in Side:
        reached = {world.source if side is SOURCE else world.destination for world in explored()}
        # What comes back without custody is no transfer's business.
        assert reached - {None} == machine.TABLE[side].keys() - {S.RETURNING}


def test_never_may_both_start() -> None:
    refute([world for world in explored() if starts(world, SOURCE) and starts(world, DESTINATION)])


def test_nobody_starts_while_the_other_runs_or_may_come_to_run() -> None:
    """But for a guest that libvirt itself made run twice, and there no third process is added."""
    refute(
        [
            world
            for world in explored()
            if not world.split
            and (
                (starts(world, SOURCE) and world.here == GONE and (world.there == RUNS))
                or (starts(world, DESTINATION) and world.there in (NONE, GONE) and world.here == RUNS)
            )
        ]
    )


def test_the_source_never_starts_what_has_run_elsewhere() -> None:
    """Its TPM state would be an older one. An operator may want that; nobody else decides it."""
    refute(
        [
            world
            for world in explored()
            if world.ran_there and not world.split and not world.spoken and starts(world, SOURCE)
        ]
    )


def test_the_key_is_destroyed_at_the_source_only_when_the_destination_has_it_for_good() -> None:
    good = (S.ACTIVATED, S.CLAIMED, S.SETTLED)
    refute([world for world in explored() if world.source is S.RELEASED and world.destination not in good])
    refute([world for world in explored() if not world.source_key and not world.destination_key])
    refute([world for world in explored() if not world.source_key and world.destination not in good])


def test_the_key_is_destroyed_only_when_no_process_of_the_guest_is_left() -> None:
    refute([world for world in explored() if world.source is S.RELEASED and world.here != GONE])


def decided(world: World) -> bool:
    """Exactly one side starts the guest, and has its key; unless an operator lifted a release, to begin anew."""
    sides = [side for side in Side if starts(world, side)]
    has_key = {SOURCE: world.source_key or world.source is S.SETTLED, DESTINATION: world.destination_key}
    return len(sides) == 1 and has_key[sides[0]]


def reaches(goal: set[World], steps: tuple[object, ...]) -> set[World]:
    """All worlds from which these steps alone can lead to the goal."""
    before: dict[World, list[World]] = {}
    for world in explored():
        for part in steps:
            for after in part(world):  # type: ignore[operator]
                before.setdefault(after, []).append(world)
    reached, todo = set(goal), list(goal)
    while todo:
        for world in before.get(todo.pop(), ()):
            if world not in reached:
                reached.add(world)
                todo.append(world)
    return reached


def test_there_is_always_a_way_to_one_side() -> None:
    """With an operator where nobody can know."""
    good = {world for world in explored() if decided(world)}
    reached = reaches(good, (libvirt, hooks, deeds, sights, network, operators))
    refute([world for world in explored() if world not in reached])


def test_an_operator_is_asked_only_where_nobody_can_know() -> None:
    """Both hosts talk again and every process has ended or runs on: the journals resolve by themselves, but for one
    case: the source's process ended unseen, and so did the destination's."""
    good = {world for world in explored() if decided(world)}
    reached = reaches(good, (hooks, deeds, sights, network))
    quiet = [world for world in explored() if world.phase == OVER and world.there not in (WAITS, HALTED)]
    stuck = [world for world in quiet if world not in reached and not world.spoken]
    assert stuck
    refute([world for world in stuck if not nobody_knows(world)])


def at_rest(world: World) -> bool:
    """Nothing is left to learn, to tell or to do, and one host has the key."""
    source = (None, S.CLOSED, S.RELEASED, S.SETTLED)
    return (
        world.source in source
        and world.destination in (None, S.CLOSED, S.SETTLED)
        and not (world.source_due or world.destination_due)
        and world.source_key is not world.destination_key
    )


def test_both_sides_come_to_rest() -> None:
    """Once nothing happens any more but that they look, talk and do what they have to; else an operator says a word."""
    quiet = {world for world in explored() if world.phase in (IDLE, OVER) and world.there not in (WAITS, HALTED)}
    good = {world for world in explored() if at_rest(world)}
    alone = reaches(good, (hooks, deeds, sights, network))
    stuck = [world for world in quiet if world not in alone]
    # A guest that libvirt runs twice has to be ended where it is paused.
    # An operator who keeps at the source what ran at the destination has to say so there, too.
    spoken = [w for w in stuck if w.source in (S.KEPT, S.SETTLED) or w.destination is S.OVERRULED]
    assert all(world.spoken for world in spoken)
    # A guest that libvirt runs twice has to be ended where it is paused.
    rest = [world for world in stuck if world not in spoken and not twice(world)]
    refute([world for world in rest if not nobody_knows(world)])
    asked = reaches(good, (hooks, deeds, sights, network, operators))
    refute([world for world in rest if world not in asked and world.promised is None])
    refute([world for world in spoken if world not in asked and world.there == GONE and world.source is S.KEPT])


def test_the_source_alone_neither_ends_nor_loses_what_ran_at_the_destination() -> None:
    """Whatever it says, and says again: it may be the host that was fled from."""
    for state in (S.ACTIVATED, S.CLAIMED, S.OVERRULED, S.SETTLED):
        for event in Event:
            if event in machine.DESTINATION[state] and event not in machine.COMMANDS:
                after = machine.DESTINATION[state][event]
                assert set(after.actions) <= {Action.ADOPT_KEY}
                assert after.state in (S.ACTIVATED, S.CLAIMED, S.OVERRULED, S.SETTLED)


def twice(world: World) -> bool:
    """libvirt made the guest run twice, and the process at the source is still there."""
    return world.split and world.here != GONE


def nobody_knows(world: World) -> bool:
    """The source's process ended unseen, and so did the destination's."""
    return (
        world.source is S.OFFERED
        and world.destination in (S.ARRIVING, S.LEFT)
        and (world.here, world.there) == (GONE, GONE)
        and not world.migrated
        and not world.never_ran
    )


def test_a_guest_that_runs_twice_is_paused_at_one() -> None:
    both = [world for world in explored() if (world.here, world.there) == (RUNS, RUNS) and world.phase == OVER]
    paused = {world for world in explored() if HALTED in (world.here, world.there)}
    reached = reaches(paused, (deeds, sights, network))
    assert both
    refute([world for world in both if world not in reached])


def test_where_a_start_waits_for_a_peer_that_is_lost_an_operator_can_speak() -> None:
    for side, gates in machine.GATES.items():
        for state, gate in gates.items():
            if gate is Gate.ASK_THEN_REFUSE and state is not S.ARRIVING:  # that ends by itself
                assert Event.HERE in machine.TABLE[side][state]
    assert Event.HERE in machine.TABLE[SOURCE][S.RELEASED]


def test_an_answer_of_a_lost_peer_is_needed_only_where_it_could_matter() -> None:
    """A source that is known to have the guest starts it at once, and so does a settled destination."""
    for state in (S.CANCELLED, S.KEPT, S.CLOSED, S.SETTLED):
        assert machine.GATES[SOURCE][state] is Gate.START
    assert machine.GATES[DESTINATION][S.SETTLED] is Gate.START
    assert machine.GATES[DESTINATION][S.ACTIVATED] is Gate.ASK_THEN_START


@pytest.mark.parametrize("side", Side)
def test_every_state_and_event_has_an_answer(side: Side) -> None:
    assert machine.TABLE[side].keys() == machine.GATES[side].keys()
    for state, row in machine.TABLE[side].items():
        for event in Event:
            if event in row or event not in machine.COMMANDS:
                after = machine.step(side, state, event)
                assert after.state in machine.TABLE[side]
