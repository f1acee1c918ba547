"""The hook script as it is installed: hooks/qemu with this host's interpreter and directories filled in."""

from __future__ import annotations

import shlex
from pathlib import Path

from swtpm_prop.layout import Layout

_SOURCE = Path(__file__).with_name("qemu")


def render(python: Path, layout: Layout) -> str:
    """The script's text; ``python`` is an interpreter, by absolute path, that has this package."""
    text = _SOURCE.read_text(encoding="ascii")
    places = {"PYTHON": python, "RUN": layout.run, "GUESTS": layout.guests, "LOGS": layout.logs}
    for name, path in places.items():
        text = text.replace(f"@{name}@", shlex.quote(str(path)))
    return text
