"""Envelopes made to hurt: refused before they are parsed, in memory that follows their size, whatever is in them."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from certifier import digests_of, issue, signed, trust, trust_text
from click.testing import CliRunner

from swtpm_prop.cli import cert
from swtpm_prop.errors import TrustError
from swtpm_prop.limits import CERTIFICATE_BYTES, JSON_VALUES, SUBJECTS
from swtpm_prop.trust import certificate, dsse
from swtpm_prop.trust.sources import Subject

HUNDRED_MB = 100_000_000


def refused(act: Callable[[], object]) -> tuple[str, int]:
    """The id, and the most bytes that were allocated meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(TrustError) as caught:
            act()
        return caught.value.id, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_hundred_megabytes_are_refused_before_they_are_parsed() -> None:
    # Were it parsed, it would be no JSON.
    data = b'{"payload": ' + bytes(HUNDRED_MB)
    id, allocated = refused(lambda: certificate.verify(data, trust(), None))
    assert id == "trust.too-large"
    assert allocated < 100_000


def test_a_file_of_any_size_is_read_up_to_the_limit_only(tmp_path: Path) -> None:
    (tmp_path / "trust.toml").write_text(trust_text())
    with (tmp_path / "huge.dsse").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    asked = ["verify", str(tmp_path / "huge.dsse"), "--trust", str(tmp_path / "trust.toml")]
    tracemalloc.start()
    outcome = CliRunner().invoke(cert.command, asked)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(outcome.exception, TrustError)
    assert outcome.exception.id == "trust.too-large"
    assert allocated < 2 * CERTIFICATE_BYTES + 10_000_000


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'""', b'{"a":1}'])
def test_many_small_values_are_refused_before_they_are_parsed(value: bytes) -> None:
    """A dictionary takes 64 bytes for the two that stand for it."""
    outside = b'{"a":[' + (value + b",") * JSON_VALUES + value + b"]}"
    id, allocated = refused(lambda: certificate.verify(outside, trust(), None))
    assert id == "trust.too-large"
    assert allocated < 100_000


def test_many_small_values_in_the_payload() -> None:
    inside = signed(b'{"a":[' + b"{}," * JSON_VALUES + b"{}]}")
    id, allocated = refused(lambda: certificate.verify(inside, trust(), None))
    assert id == "trust.too-large"
    assert allocated < 5 * len(inside)


@pytest.mark.parametrize("nested", [b'{"a":', b"[", b'{"a":['])
@pytest.mark.parametrize("levels", [17, 900, 100_000, 10_000_000])
def test_deep(nested: bytes, levels: int) -> None:
    closing = nested[::-1].replace(b"[", b"]").replace(b"{", b"}").replace(b'"a":'[::-1], b"")
    inner = nested * levels + (b"1" if nested.endswith(b":") else b"") + closing * levels
    id, _ = refused(lambda: certificate.verify(b'{"a":' + inner + b"}", trust(), None))
    assert id in ("trust.json", "trust.too-large")


def test_there_is_room_for_the_largest_certificate() -> None:
    """Three digests, component and version of each subject, and a comma in its name."""
    notes = {"component": "linux", "version": "6.1.153-1"}
    data = issue(*(Subject(f"/usr/lib/{n},v", digests_of(b"%d" % n), notes) for n in range(1000)))
    payload = dsse.parse(data).payload
    values = sum(map(payload.count, (b"{", b"[", b",")))
    assert values / 1000 * SUBJECTS < JSON_VALUES
