"""What a store must never take in again: certificates, versions of components, and digests of what they covered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from swtpm_prop.errors import StoreError, TrustError
from swtpm_prop.limits import REVOKED_BYTES
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.files import read_file, write_file
from swtpm_prop.trust.floors import ALL, Floors, below, checked, joined, reaches
from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject
from swtpm_prop.trust.version import sort_key

_MARK = 32
"""Hex digits that are remembered of a revoked digest. Other digests that begin so would be refused, no more."""

Marks = dict[str, dict[str, set[str]]]
"""Component to version or property to how digests begin."""


class Low(NamedTuple):
    """A subject that is below a floor, and the properties for which it is."""

    subject: Subject
    properties: Mapping[str, str]


class Revoked:
    """The record.

    Attributes:
        certificates: files and their certificates' ids.
        floors: the lowest versions that count; hosts get them too.
        digests: by component and version of what was revoked, each "" if it had none. A newer version of the component
            may have them still, nothing else.
        lowered: by component and property of a floor (or ALL) what was below it. Only the component may have them
            still: of that the floor says which versions count.
    """

    def __init__(self, certificates: dict[str, str], floors: Floors, digests: Marks, lowered: Marks) -> None:
        self.certificates = certificates
        self.floors = floors
        self.digests = digests
        self.lowered = lowered

    @classmethod
    def load(cls, path: Path) -> Revoked:
        """The record at ``path``, empty if there is none.

        Raises:
            StoreError: ``store.revoked-unreadable``.
        """
        if not path.exists():
            return cls({}, {}, {}, {})
        try:
            value = json.loads(read_file(path, REVOKED_BYTES))
            marks = (_marks_in(value[name]) for name in ("digests", "lowered"))
            return cls(dict(value["certificates"]), checked(value["floors"]), *marks)
        except (ValueError, TypeError, KeyError, AttributeError, TrustError) as error:
            raise StoreError("store.revoked-unreadable", f"'{path}' makes no sense: {error}", "restore it") from error

    def save(self, path: Path) -> None:
        """Write it whole.

        Raises:
            StoreError: ``store.revoked-full``.
        """
        data = json.dumps(vars(self), indent=1, sort_keys=True, default=sorted).encode() + b"\n"
        if len(data) > REVOKED_BYTES:
            what = f"'{path}' would have more than {REVOKED_BYTES} bytes"
            raise StoreError("store.revoked-full", what, "make a new store, with what is good")
        write_file(path, data)

    def condemn(self, bad: Iterable[Subject]) -> None:
        """Remember the digests of what is bad."""
        for subject in bad:
            component, version = (subject.annotations.get(name, "") for name in (COMPONENT, VERSION))
            self.digests.setdefault(component, {}).setdefault(version, set()).update(_marks(subject))

    def lower(self, floors: Floors, low: Iterable[Low]) -> None:
        """Take in floors, and remember the digests of what is below them."""
        self.floors = joined(self.floors, floors)
        for subject, properties in low:
            component = subject.annotations[COMPONENT]
            for scope in [ALL] if ALL in floors[component] else properties:
                self.lowered.setdefault(component, {}).setdefault(scope, set()).update(_marks(subject))

    def forgive(self, staying: Iterable[Subject]) -> None:
        """Forget the digests that a newer version which stays has, too."""
        for subject in staying:
            component = subject.annotations.get(COMPONENT, "")
            for version, marks in self.digests.get(component, {}).items():
                if _newer(subject, component, version):
                    marks -= _marks(subject)
            for scope, marks in self.lowered.get(component, {}).items():
                if reaches(subject.annotations.get(VERSION, ""), self.floors[component][scope]):
                    marks -= _marks(subject)

    def low(self, one: Certificate, floors: Floors) -> list[Low]:
        """Those of its subjects that are below a floor for some of its properties."""
        found = ((subject, _below(subject, floors, one)) for subject in one.subjects)
        return [Low(subject, missed) for subject, missed in found if missed]

    def dead(self, one: Certificate) -> list[Subject]:
        """Those of its subjects that are below the floors for all of its properties."""
        return [low.subject for low in self.low(one, self.floors) if len(low.properties) == len(one.properties)]

    def condemned(self, one: Certificate) -> Subject | None:
        """The first of its subjects that has a digest which was revoked, and is no newer version."""
        named = [(name, *group) for name, versions in self.digests.items() for group in versions.items()]
        lowered = [
            (component, marks)
            for component, scopes in self.lowered.items()
            for scope, marks in scopes.items()
            if scope in (ALL, *one.properties)
        ]
        for subject in one.subjects:
            own, component = _marks(subject), subject.annotations.get(COMPONENT)
            if any(marks & own and not _newer(subject, name, version) for name, version, marks in named):
                return subject
            if any(marks & own and component != name for name, marks in lowered):
                return subject
        return None

    def refuse(self, one: Certificate, file: Path) -> None:
        """Raise ``store.revoked`` if it was revoked, or speaks of a version or of a digest that was."""
        if one.id in self.certificates.values():
            raise StoreError("store.revoked", f"'{file}' was revoked", "certify what replaces the things in it")
        for subject in self.dead(one):
            component, version = subject.annotations[COMPONENT], subject.annotations.get(VERSION, "of no version")
            what = f"'{file}' has {component} {version} and certifies nothing of it: that was revoked"
            raise StoreError("store.revoked", what, "issue one without it")
        if subject_ := self.condemned(one):
            what = f"'{file}' covers '{subject_.name}', and one of its digests was revoked"
            raise StoreError("store.revoked", what, "issue one without it")


def _below(subject: Subject, floors: Floors, one: Certificate) -> dict[str, str]:
    said = subject.annotations
    return below(floors, said.get(COMPONENT, ""), said.get(VERSION, ""), one.properties)


def _newer(subject: Subject, component: str, version: str) -> bool:
    """Whether it is of this component, and newer; no version is older than any, and none is newer than what is none."""
    own = subject.annotations.get(VERSION)
    if not component or own is None or subject.annotations.get(COMPONENT) != component:
        return False
    return not version or _exceeds(own, version)


@lru_cache(maxsize=1024)  # Thousands of subjects have the same few versions.
def _exceeds(one: str, other: str) -> bool:
    try:
        return sort_key(one) > sort_key(other)
    except TrustError:
        return False


def _marks(subject: Subject) -> set[str]:
    return {digest.hex()[:_MARK] for digest in subject.digests.values()}


def _marks_in(value: Any) -> Marks:
    return {name: {under: set(marks) for under, marks in groups.items()} for name, groups in value.items()}
