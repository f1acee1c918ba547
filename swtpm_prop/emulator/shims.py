"""The shell scripts that libvirt finds instead of swtpm and swtpm_setup, and the object they preload."""

from __future__ import annotations

import re
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.resources import files
from pathlib import Path

from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout

_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+@%-]*")
"""What needs no quoting in a shell and does not end an entry of LD_PRELOAD or PATH."""


def render(name: str, preload: Path, layout: Layout) -> str:
    """The script to install as ``layout.libexec / name``, mode 0755.

    Args:
        name: ``swtpm`` or ``swtpm_setup``.
        preload: the shared object, see ``preload_object``.
        layout: where the guests' files lie.

    Raises:
        HostError: ``shim.path``: a path has a character that the shell or the loader would take for its own.
    """
    values = {
        "PRELOAD": preload,
        "LIBEXEC": layout.libexec,
        "RUN": layout.run,
        "STATE": layout.state,
        "GUESTS": layout.guests,
    }
    text = _text("common.sh") + _text(f"{name}.sh")
    for placeholder, path in values.items():
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise HostError(
                "shim.path",
                f"the path '{path}' cannot stand in LD_PRELOAD or PATH",
                "install in a directory with letters, digits and . _ + @ % - in its name",
            )
        text = text.replace(f"@{placeholder}@", str(path))
    return text


def preload_object() -> Path:
    """The shared object that building this package made; it lies beside this module.

    Raises:
        HostError: ``shim.object-missing``.
    """
    path = Path(__file__).resolve().with_name("_preload" + EXTENSION_SUFFIXES[0])
    if not path.exists():
        raise HostError(
            "shim.object-missing",
            f"{path} was not built",
            "run 'pip install .' (it needs python3-dev and libtpms-dev) with the system's /usr/bin/python3",
        )
    return path


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
