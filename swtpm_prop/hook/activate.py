"""Activate PCR banks in a TPM state that exists: the real swtpm_setup, run as the user libvirt runs it as."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from swtpm_prop.account import Account
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import ACTIVATION_SECONDS

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where libvirt's packages and swtpm's are, if the daemon has no PATH."""


def activate(state: Path, banks: str, account: Account, layout: Layout) -> None:
    """Run ``swtpm_setup --reconfigure`` on the TPM state in directory ``state``; takes about 0.6 s.

    Args:
        banks: every bank that shall be active, ``sha256,sha384``.

    Raises:
        HostError: ``host.swtpm-setup``, with the end of what swtpm_setup said.
    """
    # Without our own directory in PATH: swtpm_setup must find the real swtpm, the layer is not laid out yet.
    path = [entry for entry in os.environ.get("PATH", PATH).split(":") if Path(entry) != layout.libexec]
    command = ["swtpm_setup", "--tpm2", "--tpm-state", str(state), "--pcr-banks", banks, "--reconfigure"]
    try:
        said, status = _run(command, ":".join(path), account)
    except (OSError, subprocess.SubprocessError) as error:
        raise _failed(f"cannot be run, {error}") from error
    if status != 0:
        raise _failed(f"ended with status {status}, {' / '.join(said.split(chr(10))[-4:])}")


def _run(command: list[str], path: str, account: Account) -> tuple[str, int]:
    """What the program said, and its exit status; a program that takes too long is ended with all it started."""
    with subprocess.Popen(
        command,
        env={"PATH": path, "LC_ALL": "C"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=ACTIVATION_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return said.decode(errors="replace").strip(), process.returncode


def _failed(what: str) -> HostError:
    return HostError(
        "host.swtpm-setup",
        f"swtpm_setup, which shall activate the property bank, {what}",
        "see that the TPM state is readable for swtpm's user and used by no other process",
    )
