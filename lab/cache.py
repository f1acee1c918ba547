"""Built artefacts (initramfs, kernel images, disks), kept under the digest of everything they were made from."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lab.debian import cache

UNUSED = 24 * 3600.0  # seconds


def artefact(name: str, ingredients: list[Path | str], build: Callable[[Path], None]) -> Path:
    """The file ``name`` made by ``build(path)``, once for the same ingredients (files by content, and texts).

    It appears by one rename, under a lock. What was made of other ingredients under this name goes when it was not
    used for a day, so that the cache does not grow with every edit.
    """
    shelf = cache() / "artefacts"
    shelf.mkdir(exist_ok=True)
    made = shelf / f"{_digest(ingredients)}-{name}"
    with (shelf / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=shelf, prefix=".build-") as scratch:
                build(Path(scratch) / name)
                (Path(scratch) / name).rename(made)
            for other in shelf.glob(f"*-{name}"):
                if other.stat().st_mtime < time.time() - UNUSED:
                    other.unlink()
        made.touch()
    return made


def _digest(ingredients: list[Path | str]) -> str:
    total = hashlib.sha256()
    for ingredient in ingredients:
        content = ingredient.read_bytes() if isinstance(ingredient, Path) else ingredient.encode()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:16]
