"""Does the layer really load into swtpm? Started the way libvirt starts it, and told nothing it could work with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swtpm_prop.account import Account, swtpm_account
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem
from swtpm_prop.emulator.real import PATH
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOCTOR_SECONDS

GUEST = "00000000-0000-0000-0000-000000000000"
"""Stands for a guest; libvirt gives no guest the nil UUID."""

EXPECTED = "[layer.config-invalid]"
"""What the layer says of an empty layer.json: by then object, libpython, package and layer have been loaded."""


def rehearsal(patient: Patient) -> Iterator[Finding]:
    """Start swtpm behind the layer for a guest whose layer.json is empty: the layer itself must refuse that."""
    script = patient.layout.libexec / "swtpm"
    if not patient.live or patient.installed is None or os.geteuid() != 0 or not script.exists():
        return
    account = swtpm_account(patient.layout)
    with _guest(patient.layout, account):
        said = _start(script, account)
    if EXPECTED in said:
        yield ok("preload.loads", "the layer loads into swtpm as swtpm's user")
        return
    why = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    mend = "mend what it says, or install the package again"
    yield problem("preload.does-not-load", f"the layer does not load into swtpm: {why}", mend)


@contextmanager
def _guest(layout: Layout, account: Account) -> Iterator[None]:
    directory = layout.guest_run(GUEST)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        config = directory / "layer.json"
        config.write_text("{}")
        for path, mode in ((config, 0o640), (directory, 0o750)):
            os.chown(path, 0, account.gid)
            path.chmod(mode)
        yield
    finally:
        shutil.rmtree(directory)


def _start(script: Path, account: Account) -> str:
    """What swtpm says before it ends; a directory that does not exist keeps it from making anything."""
    state = f"/nonexistent/{GUEST}/tpm2"
    arguments = ["socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={state}/ctrl"]
    try:
        ran = subprocess.run(
            [script, *arguments],
            env={"PATH": f"{script.parent}:{PATH}"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOCTOR_SECONDS,
            check=False,
            user=account.uid,
            group=account.gid,
            extra_groups=[],
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ran.stdout + ran.stderr
