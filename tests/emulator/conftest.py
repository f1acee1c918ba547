"""One host with an index, and TPM states to copy: making a state takes half a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.certified import GOOD, build_index
from tests.swtpm import USER, LayerHost, manufacture, world_directory


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """A TPM state with all four banks active."""
    with world_directory() as directory:
        manufacture(directory)
        yield directory


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that user tss can search."""
    with world_directory() as path:
        yield path


@pytest.fixture
def host(directory: Path) -> LayerHost:
    """A host with shims and an index that certifies GOOD; nobody opted in yet."""
    made = LayerHost(directory / "host")
    build_index(made.layout.index, [GOOD])
    return made


@pytest.fixture
def new_base(directory: Path, template: Path) -> Callable[[str], Path]:
    """Make ``directory/<name>`` with a TPM state for a guest of UUID."""

    def make(name: str) -> Path:
        base = directory / name
        shutil.copytree(template, base)
        for path in (base, *base.rglob("*")):
            shutil.chown(path, USER, USER)
        return base

    return make
