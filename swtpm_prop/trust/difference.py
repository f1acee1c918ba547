"""What two certificates, or two sets of them, speak of differently: two releases compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject

Identity = tuple[str, str]
"""Component and name: by these, subjects of two certificates are the same thing."""


class Change(NamedTuple):
    """One thing that differs.

    Attributes:
        kind: ``added``, ``removed``, ``changed`` (its digests), ``version`` (the same digests in another version).
        component, name: what it is.
        before, after: the versions; empty where it is not there or has none.
    """

    kind: str
    component: str
    name: str
    before: str
    after: str


class Component(NamedTuple):
    """What differs of one component.

    Attributes:
        component: its name; empty for all that is of none.
        before, after: its versions, of all its subjects; empty where it is not there or has none.
        added, removed, changed: how many subjects; one that only got another version is none of them.
    """

    component: str
    before: str
    after: str
    added: int
    removed: int
    changed: int


def compare(before: Sequence[Subject], after: Sequence[Subject]) -> Iterator[Change]:
    """Every difference, in the order of component and name; several subjects of one identity are compared together."""
    old, new = _grouped(before), _grouped(after)
    for identity in sorted(old.keys() | new.keys()):
        was, now = old.get(identity, []), new.get(identity, [])
        kind = _kind(was, now)
        if kind:
            yield Change(kind, *identity, _versions(was), _versions(now))


def components(before: Sequence[Subject], after: Sequence[Subject], changes: Iterable[Change]) -> list[Component]:
    """What `compare` found between the two, by component, in the order of their names."""
    kinds = Counter((change.component, change.kind) for change in changes)
    old, new = _by_component(before), _by_component(after)

    def row(name: str) -> Component:
        counts = (kinds[name, kind] for kind in ("added", "removed", "changed"))
        return Component(name, _versions(old.get(name, [])), _versions(new.get(name, [])), *counts)

    return [row(name) for name in sorted({name for name, _ in kinds})]


def _by_component(subjects: Sequence[Subject]) -> Mapping[str, list[Subject]]:
    grouped: dict[str, list[Subject]] = {}
    for subject in subjects:
        grouped.setdefault(subject.annotations.get(COMPONENT, ""), []).append(subject)
    return grouped


def _grouped(subjects: Sequence[Subject]) -> Mapping[Identity, list[Subject]]:
    grouped: dict[Identity, list[Subject]] = {}
    for subject in subjects:
        grouped.setdefault((subject.annotations.get(COMPONENT, ""), subject.name), []).append(subject)
    return grouped


def _kind(was: Sequence[Subject], now: Sequence[Subject]) -> str:
    if not was or not now:
        return "removed" if was else "added"
    if _digests(was) != _digests(now):
        return "changed"
    return "version" if _versions(was) != _versions(now) else ""


def _digests(subjects: Sequence[Subject]) -> set[frozenset[tuple[str, bytes]]]:
    return {frozenset(subject.digests.items()) for subject in subjects}


def _versions(subjects: Sequence[Subject]) -> str:
    return " ".join(sorted({subject.annotations.get(VERSION, "") for subject in subjects} - {""}))
