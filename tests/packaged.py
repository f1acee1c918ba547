"""Debian packages that tests make of a tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

CONTROL = "Package: {}\nVersion: {}\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n{}"


def make_deb(
    directory: Path, tree: Path, file: str = "thing", name: str = "thing", version: str = "1:2.0-1", more: str = ""
) -> Path:
    """``directory/file.deb`` with all that is in ``tree``, as dpkg-deb makes it; ``more``: further control fields."""
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(CONTROL.format(name, version, more))
    deb = directory / f"{file}.deb"
    command = ["dpkg-deb", "-Znone", "--build", "--root-owner-group", tree, deb]
    subprocess.run(command, check=True, capture_output=True)
    return deb
