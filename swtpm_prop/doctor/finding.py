"""One finding of one check, and the host it was made on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.emulator.real import PATH
from swtpm_prop.install import manifest, tree
from swtpm_prop.install.manifest import Manifest
from swtpm_prop.layout import Layout


class State(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """What a check found: a stable id, the state, one sentence, and how to mend it (empty when ok)."""

    id: str
    state: State
    what: str
    mend: str = ""


def ok(id: str, what: str) -> Finding:
    """As it should be."""
    return Finding(id, State.OK, what)


def warning(id: str, what: str, mend: str) -> Finding:
    """Works now, or cannot be told."""
    return Finding(id, State.WARNING, what, mend)


def problem(id: str, what: str, mend: str) -> Finding:
    """Guests do not start, or their layer does not do its work."""
    return Finding(id, State.PROBLEM, what, mend)


@dataclass(frozen=True)
class Patient:
    """The host under examination.

    Args:
        layout: where its files are.
        live: it is the system that runs here, so its processes can be looked at and its programs be run.
    """

    layout: Layout
    live: bool

    def at(self, path: str | Path) -> Path:
        """Where a path of the host lies here."""
        return tree.at(self.layout.root, path)

    @cached_property
    def installed(self) -> Manifest | None:
        """What an installation recorded; None if there is none that can be read."""
        return manifest.load(self.layout)

    def program(self, name: str) -> Path | None:
        """The distribution's program as the daemon's PATH finds it behind our directory, as the host names it."""
        for directory in PATH.split(":"):
            if self.at(f"{directory}/{name}").is_file():
                return Path(directory) / name
        return None
