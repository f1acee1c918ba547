"""The few changes an installation makes to a file system, each of them atomic."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from swtpm_prop import durable
from swtpm_prop.errors import HostError
from swtpm_prop.install.plan import Block, File, find_block


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path) -> bytes | None:
    """The content of a regular file, None where there is nothing.

    Raises:
        HostError: ``install.foreign-file``: something else than a regular file is there.
    """
    try:
        kind = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(kind):
        raise HostError("install.foreign-file", f"{path} is not a regular file", "move it away and try again")
    return path.read_bytes()


def mode(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def current(root: Path, piece: File | Block) -> bytes | None:
    """What is there now of a file or a block; None if nothing."""
    return block(at(root, piece.path)) if isinstance(piece, Block) else read(at(root, piece.path))


def block(path: Path) -> bytes | None:
    """The marked block in a file; None without one."""
    text = read(path) or b""
    found = find_block(text)
    return text[slice(*found)] if found else None


def set_block(path: Path, content: bytes) -> None:
    """Put a block at the head of a file, or in place of the block it has; empty content takes the block out."""
    text = read(path)
    start, end = find_block(text or b"") or (0, 0)
    old = text or b""
    durable.replace(path, old[:start] + content + old[end:], 0o644 if text is None else mode(path))


def at(root: Path, path: object) -> Path:
    """Where a path of the host lies below ``root``."""
    return root / str(path).lstrip("/")
