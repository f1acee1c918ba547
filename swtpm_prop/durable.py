"""Files that must be there, whole, or be gone, even if the power fails at the next moment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a file for root alone (0600), as `replace`; its directory (0700) is made if need be.

    Raises:
        OSError: nothing has changed then.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace(path, data, 0o600)


def replace(path: Path, data: bytes, mode: int, new: Path | None = None) -> None:
    """Put a new file in the place of ``path``, whole or not at all.

    Args:
        path, data, mode: of the file.
        new: the name it has until it is whole; None: `leftover`, for who alone writes this file, by a lock.

    Raises:
        OSError: nothing has changed then.
    """
    new = new or leftover(path)
    with suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def leftover(path: Path) -> Path:
    """The name a file has until it is whole; who is killed may leave it behind, the next one clears it."""
    return path.with_name(f".{path.name}.new")


def remove(path: Path) -> None:
    """Remove the file; silent if there is none."""
    with suppress(FileNotFoundError):
        path.unlink()
        _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
