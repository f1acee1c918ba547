"""Is there an swtpm that the layer can be loaded into, and does it really load?"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.account import swtpm_account
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem
from swtpm_prop.limits import DOCTOR_SECONDS

OLDEST = (0, 7)
"""swtpm_setup activates banks of an existing state (--reconfigure) since 0.7."""


class Library(NamedTuple):
    """A shared object a program needs, and where the dynamic linker finds it."""

    name: str
    path: Path | None


def programs(patient: Patient) -> Iterator[Finding]:
    """The real swtpm and swtpm_setup are where the start scripts look for them."""
    for name, package in (("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools")):
        if patient.program(name) is None:
            yield problem(f"swtpm.{name.replace('_', '-')}-missing", f"{name} is not installed", f"install {package}")
    path = patient.program("swtpm")
    if path is not None and patient.live:
        yield _version(patient.at(path))
        yield _linked(patient.at(path))


def _version(path: Path) -> Finding:
    text = _run([str(path), "--version"])
    found = re.search(r"version (\d+)\.(\d+)", text)
    if found is None:
        return problem("swtpm.version-unknown", f"{path} does not tell its version", "install swtpm again")
    version = tuple(int(number) for number in found.groups())
    words = ".".join(found.groups())
    if version < OLDEST:
        return problem("swtpm.too-old", f"{path} is version {words}", "install swtpm 0.7 or newer")
    return ok("swtpm.version", f"{path} is version {words}")


def _linked(path: Path) -> Finding:
    """The layer stands between swtpm and libtpms; that needs a libtpms of its own, found by the dynamic linker."""
    if any(library.name.startswith("libtpms.so") for library in needed(path)):
        return ok("swtpm.dynamic", f"{path} loads libtpms as a shared library")
    mend = "install an swtpm that is dynamically linked to libtpms, such as the distribution's"
    return problem("swtpm.not-dynamic", f"{path} does not load libtpms as a shared library", mend)


def needed(path: Path) -> list[Library]:
    """What the dynamic linker would load for a program or shared object, all levels; [] for a static one."""
    lines = re.findall(r"^\s+(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?$", _run(["ldd", str(path)]), re.MULTILINE)
    return [Library(name, None if where == "not found" else Path(where)) for name, where in lines]


def _run(command: list[str]) -> str:
    """Standard output of a program; empty when it cannot run at all."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_SECONDS, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout


def preload(patient: Patient) -> Iterator[Finding]:
    """The preloaded object exists and finds the libpython it was built for."""
    if patient.installed is None:
        return
    path = patient.at(patient.installed.preload)
    if not path.exists():
        yield problem("preload.missing", f"{path} does not exist", "install the package again")
        return
    lost = [library.name for library in needed(path) if library.path is None]
    if lost:
        mend = "install the package again with the Python of this system"
        yield problem("preload.libraries", f"{path} needs {', '.join(lost)}, which is not installed", mend)
        return
    yield ok("preload.libraries", f"{path} finds the libraries it was built for")


def local_ca(patient: Patient) -> Iterator[Finding]:
    """swtpm_setup run once as root leaves its certificate authority to root; then no guest's set-up succeeds."""
    directory = patient.at("/var/lib/swtpm-localca")
    if not directory.exists():
        return
    account = swtpm_account(patient.layout)
    foreign = [path for path in (directory, *directory.rglob("*")) if path.stat().st_uid != account.uid]
    if not foreign:
        yield ok("swtpm.local-ca", "swtpm's user owns the certificate authority for endorsement keys")
        return
    mend = f"chown -R {account.uid} {directory}"
    yield problem("swtpm.local-ca-owner", f"{foreign[0]} does not belong to swtpm's user", mend)
