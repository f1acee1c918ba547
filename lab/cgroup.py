"""A cgroup of its own for each laboratory host, so that libvirt's cgroup code runs as it does on a real host."""

from __future__ import annotations

import time
from pathlib import Path

V1 = Path("/sys/fs/cgroup/cpu")
V2 = Path("/sys/fs/cgroup")


class Cgroup:
    """One directory below the machine's cpu controller; ``version`` is ``v1`` or ``v2``."""

    def __init__(self, version: str, path: Path) -> None:
        self.version = version
        self.path = path

    @property
    def root(self) -> Path:
        """Joined by process 1 before it makes its cgroup namespace, whose root this becomes."""
        return self.path / "cgroup.procs"

    @property
    def daemon(self) -> Path:
        """Joined by libvirtd; version 2 wants a leaf."""
        return self.root if self.version == "v1" else self.path / "daemon/cgroup.procs"

    def remove(self) -> None:
        """Take the directory away; the kernel lets go of ended processes only after a moment."""
        deadline = time.monotonic() + 5
        while self.path.is_dir():
            for directory in sorted(self.path.rglob("*/"), reverse=True):
                _rmdir(directory)
            if _rmdir(self.path) or time.monotonic() > deadline:
                return
            time.sleep(0.02)


def create(name: str) -> Cgroup | None:
    """A new cgroup with the cpu controller; None where the machine has none to give."""
    try:
        if (V1 / "cpu.shares").exists():
            return _make("v1", V1 / name)
        if "cpu" in (V2 / "cgroup.controllers").read_text().split():
            (V2 / "cgroup.subtree_control").write_text("+cpu")
            return _make("v2", V2 / name)
    except OSError:
        pass  # read-only or delegated without cpu, as in a container: libvirt then runs without cgroups
    return None


def left(prefix: str) -> list[Cgroup]:
    """The cgroups whose names begin so, whoever made them."""
    return [Cgroup(version, path) for version, place in (("v1", V1), ("v2", V2)) for path in place.glob(f"{prefix}.*")]


def joined(procs: Path | None, argv: list[str]) -> list[str]:
    """``argv`` started as a member of the cgroup with this ``cgroup.procs``; as it is for None."""
    return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(procs), *argv] if procs else argv


def _make(version: str, path: Path) -> Cgroup:
    path.mkdir()
    return Cgroup(version, path)


def _rmdir(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True
