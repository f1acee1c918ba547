"""Certificates, keys, stores and trust files on the disk: bounded reading, atomic writing, one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swtpm_prop import durable
from swtpm_prop.errors import StoreError, TrustError


def read_file(path: Path, most: int) -> bytes:
    """The whole file, at most ``most`` bytes.

    Raises:
        TrustError: ``trust.file-missing``, ``trust.file-unreadable``, ``trust.too-large``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise TrustError(
            "trust.file-missing", f"there is no file '{path}'", "check the name, or put the file there"
        ) from None
    except (OSError, ValueError) as error:
        raise TrustError(
            "trust.file-unreadable", f"'{path}' cannot be read: {error}", "be root, or let this user read it"
        ) from None
    if len(data) > most:
        raise TrustError(
            "trust.too-large",
            f"'{path}' has more than {most} bytes",
            "check the name: this is not the file that is wanted here",
        )
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write the file, readable for all, or leave what was there; of several who do so at once, one comes last.

    Raises:
        TrustError: ``trust.file-unwritable``.
    """
    try:
        durable.replace(path, data, 0o644, path.with_name(f".{path.name}.{os.urandom(4).hex()}"))
    except (OSError, ValueError) as error:
        raise TrustError(
            "trust.file-unwritable",
            f"'{path}' cannot be written: {error}",
            "free space on its disk, and write where this user may",
        ) from None


@contextmanager
def exclusive(directory: Path, what: str) -> Iterator[int]:
    """Work in the directory alone; gives its descriptor.

    Args:
        directory: it exists.
        what: is kept there, in words for people; named when it cannot be written.

    Raises:
        StoreError: ``store.directory``, ``store.busy``; ``store.write`` for every OSError of the block.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(
            "store.directory",
            f"'{directory}' cannot be used: {error.strerror}",
            "see that swtpm-prop is installed there, or name another place; be somebody who may write to it",
        ) from error
    try:
        _lock(descriptor, directory)
        yield descriptor
    except OSError as error:
        raise StoreError(
            "store.write",
            f"{what} cannot be written: {error}",
            "free space on its disk, see who may write there, and try again",
        ) from error
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError("store.busy", f"another process works in '{directory}'", "wait for it to end") from error
