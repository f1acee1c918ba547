"""Activate PCR banks in a TPM state that exists: the real swtpm_setup, run as the user libvirt runs it as."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from swtpm_prop.account import Account
from swtpm_prop.emulator.real import key_pipe, real_path
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import ACTIVATION_LOG_BYTES, ACTIVATION_SECONDS


def activate(state: Path, banks: str, key: bytes | None, account: Account, layout: Layout) -> None:
    """Run ``swtpm_setup --reconfigure`` on the TPM state in directory ``state``; takes about 0.6 s.

    Args:
        banks: every bank that shall be active, ``sha256,sha384``.
        key: what the state is encrypted under; None: it is plain.

    Raises:
        HostError: ``host.swtpm-setup``, with the end of what swtpm_setup said.
    """
    with tempfile.NamedTemporaryFile(prefix="swtpm-prop-") as log:
        os.fchown(log.fileno(), *account)
        command = ["swtpm_setup", "--tpm2", "--tpm-state", str(state), "--pcr-banks", banks, "--reconfigure"]
        command += ["--logfile", log.name]
        try:
            with key_pipe(key) as end:
                command += [] if end is None else ["--keyfile-fd", str(end), "--cipher", "aes-256-cbc"]
                # swtpm_setup must find the real swtpm: the layer is not laid out yet.
                status = _run(command, end, real_path(layout), account)
        except OSError as error:
            raise _failed(f"cannot be run, {error}") from error
        if status != 0:
            said = _end(log.file).decode(errors="replace").splitlines()
            ended = "did not end" if status is None else f"ended with status {status}"
            raise _failed(f"{ended}, {' / '.join(said[-4:])}")


def _run(command: list[str], key_end: int | None, path: str, account: Account) -> int | None:
    """The exit status; None if the program took too long and was ended, with all it started.

    swtpm_setup 0.7.1 waits for ever when its swtpm cannot read the state.
    """
    with subprocess.Popen(
        command,
        env={"PATH": path, "LC_ALL": "C"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=() if key_end is None else (key_end,),
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        start_new_session=True,
    ) as process:
        try:
            return process.wait(ACTIVATION_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def _end(log: IO[bytes]) -> bytes:
    log.seek(max(0, log.seek(0, os.SEEK_END) - ACTIVATION_LOG_BYTES))
    return log.read(ACTIVATION_LOG_BYTES)


def _failed(what: str) -> HostError:
    return HostError(
        "host.swtpm-setup",
        f"swtpm_setup, which shall activate the property bank, {what}",
        "see that swtpm's user can read and write the TPM state and that it is whole",
    )
