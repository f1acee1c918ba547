"""Process 1 of a laboratory host: gives it a private view of the machine, then lives as long as its standard input.

Runs alone (``python -I init.py PLAN``) in fresh namespaces; PLAN is JSON: ``name``, ``root`` (the host's private
tree), ``grafts`` (directories of the machine to cover), ``private`` (paths never taken from the machine), ``cgroup``
(``v1``, ``v2`` or null). Everything ends with process 1, and process 1 with the laboratory that holds its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MS_BIND, MS_REC = 0x1000, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.argv[1])
    socket.sethostname(plan["name"])
    root = Path(plan["root"])
    bind(root / "etc", Path("/etc"))
    for directory in plan["grafts"]:
        graft(Path(directory), root / directory.lstrip("/"), frozenset(plan["private"]))
    mount("tmpfs", Path("/run"), "tmpfs", data="mode=755")
    Path("/run/lock").mkdir()
    mount_sys(plan["cgroup"])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, reap)
    print("ready", flush=True)
    while os.read(0, 4096):
        pass


def graft(directory: Path, private: Path, never: frozenset[str]) -> None:
    """Cover ``directory`` by ``private``, through which what the machine has there still shows, but for ``never``."""
    for entry in directory.iterdir():
        copy = private / entry.name
        if str(entry) in never or os.path.lexists(copy):
            continue
        if entry.is_symlink():
            copy.symlink_to(entry.readlink())
        elif entry.is_dir():
            copy.mkdir()
            bind(entry, copy)
        elif entry.is_file():
            copy.touch()
            bind(entry, copy)
    bind(private, directory)


def mount_sys(cgroup: str | None) -> None:
    """A sysfs of this network namespace; below it only the one cgroup controller libvirt is to use."""
    mount("sysfs", Path("/sys"), "sysfs")
    tree = Path("/sys/fs/cgroup")
    if cgroup == "v1":
        mount("tmpfs", tree, "tmpfs")
        (tree / "cpu").mkdir()
        mount("cgroup", tree / "cpu", "cgroup", data="cpu")
    elif cgroup == "v2":
        mount("cgroup2", tree, "cgroup2")
        # version 2 allows processes in leaves only, and libvirt puts its own groups beside this one
        (tree / "daemon").mkdir()
        (tree / "daemon/cgroup.procs").write_text("1")
        (tree / "cgroup.subtree_control").write_text("+cpu")


def bind(source: Path, target: Path) -> None:
    mount(str(source), target, "", MS_BIND | MS_REC)


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode()):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(target))


def reap(*_: object) -> None:
    """Daemons and swtpm detach from their parents and end up here."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
