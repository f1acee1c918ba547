"""Does the running daemon look for swtpm in our directory, and did it start late enough to know the hook?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.install.plan import DAEMONS


class Daemon(NamedTuple):
    """A running daemon: its name, process id, PATH and start time (seconds since the epoch)."""

    name: str
    pid: int
    path: str
    started: float


def daemons(patient: Patient) -> Iterator[Finding]:
    """Every libvirtd and virtqemud that runs here must search our directory first."""
    if not patient.live or patient.installed is None:
        return
    found = list(running())
    if not found:
        yield ok("daemon.not-running", f"no daemon runs ({', '.join(DAEMONS)}); it will find us when it starts")
    for daemon in found:
        yield _judge(patient, daemon)


def _judge(patient: Patient, daemon: Daemon) -> Finding:
    who = f"{daemon.name} (process {daemon.pid})"
    restart = f"systemctl daemon-reload && systemctl restart {daemon.name}"
    libexec = str(patient.layout.libexec)
    if libexec not in daemon.path.split(":"):
        return problem("daemon.path", f"{who} does not look for swtpm in {libexec}", restart)
    if daemon.path.split(":")[0] != libexec:
        mend = f"find the unit setting or environment file that sets PATH, then {restart}"
        return problem("daemon.path-order", f"{who} looks for swtpm elsewhere before {libexec}", mend)
    if patient.installed and daemon.started < patient.installed.since:
        return warning("daemon.started-before", f"{who} started before the hook was put in place", restart)
    return ok("daemon.path", f"{who} looks for swtpm in {libexec} first")


def running() -> Iterator[Daemon]:
    """libvirt's daemons in this mount namespace (those of containers have a file system of their own)."""
    return _processes("mnt", lambda name, _: name in DAEMONS)


def agents() -> Iterator[Daemon]:
    """The product's own agents. Their unit gives them a mount namespace; what a container has, is its own processes."""
    # An interpreter runs the script, whose first argument is the noun.
    script = "/swtpm-prop"
    return _processes("pid", lambda _, words: any(a.endswith(script) and b == "agent" for a, b in pairwise(words)))


def _processes(namespace: str, wanted: Callable[[str, list[str]], bool]) -> Iterator[Daemon]:
    own = Path("/proc/self/ns", namespace).readlink()
    for pid in (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        try:
            name = (pid / "comm").read_text().rstrip("\n")
            words = os.fsdecode((pid / "cmdline").read_bytes()).split("\0")
            if not wanted(name, words) or (pid / "ns" / namespace).readlink() != own:
                continue
            yield Daemon(name, int(pid.name), _environ(pid).get("PATH", ""), _started(pid))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def _environ(process: Path) -> dict[str, str]:
    """The environment a process was started with (proc(5), /proc/PID/environ)."""
    entries = os.fsdecode((process / "environ").read_bytes()).split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _started(process: Path) -> float:
    """Field 22 of /proc/PID/stat counts ticks since boot; the name before it may hold spaces and brackets."""
    ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
