"""Is everything that was put in still there, unchanged, and able to run?"""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from swtpm_prop import __version__
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.install import tree
from swtpm_prop.install.manifest import Manifest
from swtpm_prop.limits import DOCTOR_SECONDS

INSTALL = "run swtpm-prop install"


def installed(patient: Patient) -> Iterator[Finding]:
    """Compare the host with what the last installation recorded."""
    listed = patient.installed
    if listed is None:
        yield problem("install.absent", "swtpm-prop is not put into libvirt", INSTALL)
        return
    if not listed.complete:
        yield problem("install.interrupted", "the last installation did not come to its end", INSTALL)
    if listed.release != __version__:
        yield warning("install.other-release", f"release {listed.release} is put in, this is {__version__}", INSTALL)
    differences = list(_differences(patient, listed))
    yield from differences
    if listed.complete and not differences:
        yield ok("install.whole", f"release {listed.release} is put in, all {len(listed.files)} files are as they were")


def _differences(patient: Patient, listed: Manifest) -> Iterator[Finding]:
    for path, hashes in (*listed.files.items(), *listed.blocks.items()):
        place = patient.at(path)
        content = tree.block(place) if path in listed.blocks else tree.read(place)
        if content is None:
            yield problem("install.file-missing", f"{path} is gone or lacks our lines", INSTALL)
        elif tree.sha256(content) not in hashes:
            mend = f"move {path} away, then {INSTALL}"
            yield problem("install.file-changed", f"{path} was changed since it was put in", mend)


def programs(patient: Patient) -> Iterator[Finding]:
    """libvirt skips a hook without run bit without a word, and root must be the only one to write what root runs."""
    layout = patient.layout
    wrong = False
    for path in (layout.hook, layout.libexec / "swtpm", layout.libexec / "swtpm_setup"):
        if not path.exists():
            continue
        status = path.stat()
        if status.st_mode & 0o111 != 0o111:
            wrong = True
            yield problem("hook.not-executable", f"{path} cannot be run: its mode is not 0755", f"chmod 0755 {path}")
        if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            wrong = True
            mend = f"chown root:root {path} && chmod 0755 {path}"
            yield problem("hook.not-roots", f"{path} can be written by others than root", mend)
    if not layout.hook.parent.is_dir():
        yield problem("hook.directory-missing", f"{layout.hook.parent} does not exist", INSTALL)
    elif layout.hook.exists() and not wrong:
        yield ok("hook.executable", "the hook and the start scripts belong to root and can be run")


def interpreter(patient: Patient) -> Iterator[Finding]:
    """The hook's Python exists and has the package."""
    if patient.installed is None:
        return
    python = Path(patient.installed.python)
    if not patient.at(python).exists():
        mend = f"install the package there again, or {INSTALL} from where it is now"
        yield problem("hook.interpreter-missing", f"the hook's interpreter {python} does not exist", mend)
        return
    if patient.live:
        yield _imports(patient.at(python))


def _imports(python: Path) -> Finding:
    code = "import swtpm_prop.hook, swtpm_prop.translate, swtpm_prop.trust, swtpm_prop.domain"
    ran = subprocess.run(
        [python, "-I", "-c", code], cwd="/", capture_output=True, text=True, timeout=DOCTOR_SECONDS, check=False
    )
    if ran.returncode == 0:
        return ok("hook.package", f"{python} has the package")
    why = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
    return problem("hook.package-missing", f"{python} cannot import the package: {why}", "install the package again")
