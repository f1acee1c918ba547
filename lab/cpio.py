"""Write a cpio archive in the form the kernel takes as initramfs (newc; its early-userspace/buffer-format)."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import NamedTuple

TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One member: its mode with file type, and its content (of a symbolic link: the target)."""

    mode: int
    content: bytes = b""


def directory() -> Entry:
    return Entry(stat.S_IFDIR | 0o755)


def file(content: bytes, mode: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | mode, content)


def program(content: bytes) -> Entry:
    return file(content, 0o755)


def link(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Mapping[str, Entry]) -> bytes:
    """The archive of ``entries`` (relative path to member); missing parent directories are added, times are zero."""
    everything = dict(entries)
    for path in entries:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            everything.setdefault("/".join(parts[:depth]), directory())
    members = [*sorted(everything.items()), (TRAILER, Entry(0))]
    return b"".join(_member(number, path, entry) for number, (path, entry) in enumerate(members, 1))


def _member(number: int, path: str, entry: Entry) -> bytes:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, time, size, device x4, length of the name, checksum: eight hex digits each
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
