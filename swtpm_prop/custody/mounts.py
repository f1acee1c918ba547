"""What kind of file system something lies on: in memory, on a disk of this host, or where other hosts see it too."""

from __future__ import annotations

import re
from pathlib import Path

MEMORY = frozenset({"tmpfs", "ramfs"})

OWN = MEMORY | {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "jfs", "reiserfs", "overlay"}
"""Kinds that one host alone can have mounted; network and cluster file systems are among the others."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


def kind(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that ``path`` is on, or would be on; empty if it cannot be told.

    Args:
        path: is looked for by name and not by device number, for btrfs has numbers of its own.
        mounts: as proc_pid_mountinfo(5) has it.
    """
    real, point, found = str(path.resolve()), "", ""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        place = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), fields[4])
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        # Of several at one place the last covers the others.
        if inside and len(place) >= len(point):
            point, found = place, fields[fields.index("-") + 1]
    return found
