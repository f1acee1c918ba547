"""What two certificates speak of differently: two releases compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def compare(before: Sequence[Subject], after: Sequence[Subject]) -> Iterator[Change]:
    """Every difference, in the order of component and name; several subjects of one identity are compared together."""
    old, new = _grouped(before), _grouped(after)
    for identity in sorted(old.keys() | new.keys()):
        was, now = old.get(identity, []), new.get(identity, [])
        kind = _kind(was, now)
        if kind:
            yield Change(kind, *identity, _versions(was), _versions(now))


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
    return " ".join(sorted({subject.annotations.get(VERSION, "") for subject in subjects}))
