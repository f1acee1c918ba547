"""Debian versions compare as dpkg compares them."""

from __future__ import annotations

import itertools
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swtpm_prop.errors import TrustError
from swtpm_prop.trust.version import sort_key

ORDER = [
    *("0~~", "0~", "0", "1.0~rc1-1", "1.0-0.1", "1.0-1~bpo12+1", "1.0-1", "1.0-1a", "1.0-1+b1", "1.0-2", "1.0-10"),
    *("1.0a-1", "1.0+dfsg-1", "1.0.1-1", "1.9-1", "1.10-1", "6.1.0-47", "6.1.153-1", "6.1.159-1", "1:0.1", "2:0"),
]


def test_order() -> None:
    keys = [sort_key(version) for version in ORDER]
    assert all(one < other for one, other in itertools.pairwise(keys))


@pytest.mark.parametrize(
    ("one", "other"), [("1.0", "1.0-0"), ("0:1", "1"), ("1.0", "1.00"), ("a", "a0"), ("1a", "1a0")]
)
def test_equal(one: str, other: str) -> None:
    assert sort_key(one) == sort_key(other)


@pytest.mark.parametrize(
    "text", ["", "-1", "1-", "1 0", "a:1", "1:", ":1", "~1", "1\n", "1_2", "é1", "1" * 300, "1:-1"]
)
def test_no_versions(text: str) -> None:
    with pytest.raises(TrustError) as refused:
        sort_key(text)
    assert refused.value.id == "trust.version"


PARTS = st.text("019.+~aZ", min_size=1, max_size=6)
VERSIONS = st.builds(lambda epoch, part, end: f"{epoch}1{part}{end}", st.sampled_from(("", "0:", "1:")), PARTS, PARTS)


@settings(max_examples=150, deadline=None)
@given(VERSIONS, st.one_of(VERSIONS, st.builds("{}-{}".format, VERSIONS, PARTS)))
def test_dpkg_agrees(one: str, other: str) -> None:
    asked = subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=False)
    assert asked.returncode == (0 if sort_key(one) < sort_key(other) else 1)
    same = subprocess.run(["dpkg", "--compare-versions", one, "eq", other], check=False)
    assert same.returncode == (0 if sort_key(one) == sort_key(other) else 1)
