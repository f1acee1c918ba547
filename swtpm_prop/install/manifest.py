"""The record of an installation, written before each change: an interrupted one can be repeated or taken out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swtpm_prop import durable
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout

VERSION = 1


@dataclass
class Manifest:
    """What the product put on a host; all paths as the host names them.

    Args:
        release: the product's version.
        python: interpreter the hook runs.
        preload: object the swtpm script preloads.
        package: directory of the Python package the layer is loaded from.
        since: when the product was first put in, seconds since the epoch, UTC; an upgrade keeps it.
        complete: the last installation ran to its end.
        files: path -> SHA-256 (hex) that our content may have: one, or old and new while an upgrade is under way.
        blocks: the same for marked blocks in files of others.
        created: files of blocks that did not exist before.
        directories: directories that did not exist before, outermost first.
    """

    release: str
    python: str
    preload: str
    package: str
    since: int
    complete: bool = False
    files: dict[str, list[str]] = field(default_factory=dict)
    blocks: dict[str, list[str]] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)

    def save(self, layout: Layout) -> None:
        """Replace the manifest atomically."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"
        durable.replace(path_of(layout), text.encode(), 0o644)


def path_of(layout: Layout) -> Path:
    """Where the manifest lies."""
    return layout.state / "installed.json"


def load(layout: Layout) -> Manifest | None:
    """The manifest, or None where nothing was installed.

    Raises:
        HostError: ``install.manifest-unreadable``: it is there and makes no sense.
    """
    path = path_of(layout)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise ValueError("another version")
        return Manifest(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HostError(
            "install.manifest-unreadable", f"{path} cannot be used ({error})", "restore it from a backup, or remove it"
        ) from error
