"""Floors: the lowest version of a component that counts, for one property or for all.

They come from the trust file of a host and from the store it follows; of two for the same, the higher one holds. What
is below a floor has none of the properties it is for, whoever certifies it: see `trust.index` for how that is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import ANNOTATION_CHARS, FLOORS
from swtpm_prop.trust.uri import check_property
from swtpm_prop.trust.version import sort_key

ALL = ""
"""Stands for every property."""

Floors = Mapping[str, Mapping[str, str]]
"""Component to property URI (or ALL) to the lowest version that counts."""

NONE: Floors = {}

_MEND = "write a component, a version like 1:6.1.153-1, and property URIs in normal form"


def checked(value: object) -> Floors:
    """Floors as they were read from somewhere.

    Raises:
        TrustError: ``trust.floor``.
    """
    if not isinstance(value, dict) or not all(isinstance(limits, dict) for limits in value.values()):
        raise TrustError("trust.floor", "floors are no table of tables", _MEND)
    if sum(map(len, value.values())) > FLOORS:
        raise TrustError("trust.floor", f"there are more than {FLOORS} floors", "take out those nobody needs")
    for component, limits in value.items():
        if not isinstance(component, str) or not 0 < len(component) <= ANNOTATION_CHARS:
            raise TrustError("trust.floor", f"'{str(component)[:80]}' is no name of a component", _MEND)
        for uri, below in limits.items():
            _check(component, uri, below)
    return value


def _check(component: str, uri: str, below: object) -> None:
    try:
        if uri != ALL:
            check_property(uri)
        sort_key(below if isinstance(below, str) else "")
    except TrustError as error:
        raise TrustError("trust.floor", f"the floor of {component} is none: {error.what}", error.mend) from error


def one(component: object, below: object, properties: Sequence[str]) -> Floors:
    """The floor of a component for these properties, or for all if none is named.

    Raises:
        TrustError: ``trust.floor``.
    """
    return checked({component: dict.fromkeys(properties or (ALL,), below)})


def joined(*several: Floors) -> Floors:
    """All of them, the highest of each."""
    together: dict[str, dict[str, str]] = {}
    for floors in several:
        for component, limits in floors.items():
            own = together.setdefault(component, {})
            for uri, below in limits.items():
                own[uri] = below if reaches(below, own.get(uri, below)) else own[uri]
    return together


def below(floors: Floors, component: str, version: str, properties: Sequence[str]) -> dict[str, str]:
    """Those of the properties that this version of the component is too old for, each with the version it needs."""
    limits = floors.get(component, {})
    low = {}
    for uri in properties:
        missed = [limits[each] for each in (ALL, uri) if each in limits and not reaches(version, limits[each])]
        if missed:
            low[uri] = missed[0] if reaches(missed[0], missed[-1]) else missed[-1]
    return low


@lru_cache(maxsize=4096)  # Thousands of subjects have the same few versions.
def reaches(version: str, least: str) -> bool:
    """Whether it is this version or a later one; what is no version at all is below every one."""
    try:
        return sort_key(version) >= sort_key(least)
    except TrustError:
        return False


def to_text(floors: Floors) -> str:
    """The same text for the same floors; empty for none."""
    kept = {component: limits for component, limits in floors.items() if limits}
    return json.dumps(kept, sort_keys=True) if kept else ""


def from_text(text: str) -> Floors:
    """What `to_text` wrote."""
    return checked(json.loads(text)) if text else NONE
