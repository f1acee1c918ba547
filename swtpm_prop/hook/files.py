"""Files the hook leaves for a guest: each is written whole, or not at all, and never through a symbolic link."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from swtpm_prop.account import Account
from swtpm_prop.errors import HostError

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def make_directory(path: Path, mode: int) -> None:
    """A directory of root's, made if missing; its parents get the usual mode."""
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(mode)


def write_new(path: Path, content: bytes, owner: Account, mode: int) -> None:
    """Create a file that must not exist yet."""
    descriptor = os.open(path, _NEW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)


def write_directory(path: Path, files: dict[str, bytes], owner: Account) -> None:
    """Put a directory (0750) with ``files`` (0640) in the place of ``path``; its name appears when all are there."""
    new = path.with_name(f".{path.name}.new")
    discard(new)
    try:
        new.mkdir(mode=0o700)
        for name, content in files.items():
            write_new(new / name, content, owner, 0o640)
        os.chown(new, *owner)
        new.chmod(0o750)
        discard(path)
        new.rename(path)
    except BaseException:
        discard(new)
        raise


def discard(directory: Path) -> None:
    """Remove a directory that holds plain files only; silent if there is none."""
    try:
        entries = list(directory.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        entry.unlink()
    directory.rmdir()


def rotate_log(path: Path, owner: Account) -> None:
    """Keep the earlier log as ``.1`` and begin an empty one that ``owner`` may write to.

    Raises:
        HostError: ``host.log-foreign``: something else than a regular file is in its place.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise HostError("host.log-foreign", f"{path} is not a regular file", "remove it and start the guest again")
        path.rename(f"{path}.1")
    write_new(path, b"", owner, 0o640)
