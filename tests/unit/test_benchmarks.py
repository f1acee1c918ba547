"""Benchmarks are run by hand and seldom: that each one still begins is seen here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", sorted(path.stem for path in (CLONE / "benchmarks").glob("*.py")))
def test_a_benchmark_finds_what_it_needs(name: str) -> None:
    line = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    assert "--" in subprocess.run(line, cwd=CLONE, check=True, capture_output=True, text=True).stdout
