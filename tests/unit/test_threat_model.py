"""What the threat model says is shown by a test names one that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
PLACES = re.findall(r"tests/[\w/]+\.py", (HERE / "docs/threat-model.md").read_text())


@pytest.mark.parametrize("place", sorted(set(PLACES)))
def test_what_shows_it_is_there(place: str) -> None:
    assert (HERE / place).is_file()
