"""JSON that means one thing only: UTF-8, no duplicate names, no NaN, bounded size and depth."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import CERTIFICATE_BYTES, JSON_DEPTH, JSON_VALUES

T = TypeVar("T")
Object = dict[str, Any]

ANEW = "fetch it again; if it stays so, leave it out and ask its issuer for a new one"
"""What to do about a certificate that is malformed."""


def parse(data: bytes) -> Object:
    """The JSON object (RFC 8259) in ``data``.

    Two parsers that disagree on a duplicate name would see two certificates under one signature, so there is none.

    Raises:
        TrustError: ``trust.too-large``, ``trust.json``.
    """
    if len(data) > CERTIFICATE_BYTES:
        raise TrustError("trust.too-large", f"it has {len(data)} bytes, allowed are {CERTIFICATE_BYTES}", ANEW)
    # Before it is parsed: each value takes up to a hundred times its bytes in memory. Commas in strings count too.
    if sum(map(data.count, (b"{", b"[", b","))) > JSON_VALUES:
        raise TrustError("trust.too-large", f"it has more than {JSON_VALUES} values", ANEW)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise _refused("it is nested too deeply") from None
    except ValueError as error:
        raise _refused(f"it is no JSON in UTF-8, {error}") from None
    if not isinstance(value, dict):
        raise _refused("it is no JSON object")
    _check_depth(value)
    return value


def member(of: Object, name: str, kind: type[T]) -> T:
    """The member ``name``, which must be there and be of the given kind.

    Raises:
        TrustError: ``trust.field``.
    """
    value = of.get(name)
    if not isinstance(value, kind):
        found = "is missing" if name not in of else f"is no {_KINDS[kind]}"
        raise TrustError("trust.field", f"its field '{name}' {found}", ANEW)
    return value


def strings(of: Object, name: str) -> list[str]:
    """The member ``name``, a list of strings.

    Raises:
        TrustError: ``trust.field``.
    """
    values = member(of, name, list)
    if not all(isinstance(value, str) for value in values):
        raise TrustError("trust.field", f"its field '{name}' holds something else than strings", ANEW)
    return values


_KINDS: dict[type, str] = {str: "string", list: "list", dict: "object"}


def _object(pairs: list[tuple[str, Any]]) -> Object:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _refused("an object has the same name twice")
    return members


def _constant(word: str) -> Any:
    raise _refused(f"{word} is no JSON number")


def _check_depth(root: Object) -> None:
    """Level by level, so that the nesting of hostile input costs no stack."""
    level: list[Any] = [root]
    for _ in range(JSON_DEPTH):
        inside = (value for item in level for value in (item.values() if isinstance(item, dict) else item))
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return
    raise _refused(f"it is nested deeper than {JSON_DEPTH} levels")


def _refused(why: str) -> TrustError:
    return TrustError("trust.json", why, ANEW)
