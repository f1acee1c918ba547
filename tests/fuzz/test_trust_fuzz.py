"""Certificates and trust files: any bytes are read or refused by TrustError, and nothing unsigned is accepted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from certifier import ED25519, NOW, P256, issue, signed, statement, trust, trust_text
from hypothesis import given, settings
from hypothesis import strategies as st

from swtpm_prop.errors import TrustError
from swtpm_prop.trust import certificate, floors, issuers

GOOD = issue()
STATEMENT = statement(GOOD)
FLOOR = '[[floor]]\ncomponent = "linux"\nbelow = "6.1.153-1"\nproperties = ["https://example.org/p"]\n'
TRUST = (trust_text(ED25519, P256, threshold=2) + FLOOR).encode()
BELIEVED = trust()

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["sha256", "ab" * 32, "2026-01-01T00:00:00Z", "https://example.org/properties/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(begin + 8, len(data))))
        data[begin:end] = draw(st.binary(max_size=8))
    return bytes(data)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inside for path in paths(part, (*at, key)))]


PATHS = [path for path in paths(STATEMENT) if path]


def put(where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(STATEMENT))
    at: Any = changed
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    return changed


def read_or_refused(data: bytes) -> None:
    for check in (lambda: certificate.read(data), lambda: certificate.verify(data, BELIEVED, NOW)):
        try:
            check()
        except TrustError as error:
            assert error.id.startswith("trust.")
            assert error.line().isprintable()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | mutated(GOOD))
def test_any_bytes_as_a_certificate(data: bytes) -> None:
    read_or_refused(data)


@settings(max_examples=300, deadline=None)
@given(mutated(json.dumps(STATEMENT).encode()))
def test_any_signed_bytes_as_a_statement(payload: bytes) -> None:
    read_or_refused(signed(payload))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_in_any_place_of_a_signed_statement(where: tuple[Any, ...], value: Any) -> None:
    read_or_refused(signed(put(where, value)))


@settings(max_examples=200, deadline=None)
@given(mutated(GOOD))
def test_a_changed_certificate_is_the_same_or_refused(data: bytes) -> None:
    with contextlib.suppress(TrustError):
        assert certificate.verify(data, BELIEVED, NOW) == certificate.read(GOOD)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | mutated(TRUST) | st.text(max_size=100).map(str.encode))
def test_any_bytes_as_a_trust_file(data: bytes) -> None:
    try:
        known = issuers.parse(data, Path("/nonexistent"))
    except TrustError as error:
        assert error.line().isprintable()
        return
    for issuer in known.values():
        assert 1 <= issuer.threshold <= len(issuer.keys)


@settings(max_examples=300, deadline=None)
@given(VALUES | st.dictionaries(st.text(max_size=8), st.dictionaries(st.just("") | st.text(), SCALARS, max_size=3)))
def test_any_value_as_floors(value: Any) -> None:
    """They come from a store, as JSON; what is accepted can be applied and kept."""
    try:
        known = floors.checked(value)
    except TrustError as error:
        assert error.line().isprintable()
        return
    assert floors.from_text(floors.to_text(known)) == {name: limits for name, limits in known.items() if limits}
    assert floors.joined(known, known) == known
    for component, limits in known.items():
        assert floors.below(known, component, "", ["x:y"]).keys() <= ({"x:y"} if limits else set())


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.from_regex(r"[0-9a-f~:+.-]{1,20}"), least=st.sampled_from(["0", "1:2-3"]))
def test_any_text_as_a_version(text: str, least: str) -> None:
    assert floors.reaches(text, least) in (True, False)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_nested_toml(depth: int) -> None:
    with pytest.raises(TrustError):
        issuers.parse(b"issuer = " + b"[" * depth, Path())
