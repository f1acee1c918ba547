"""A guest's TPM state at rest: tried with a key, and made one under another by swtpm itself without being lost."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from swtpm_prop.account import Account
from swtpm_prop.custody.form import ENCRYPTED_FLAG, PERMANENT, read, unreadable
from swtpm_prop.emulator.real import key_pipe, real_path
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import CONVERSION_SECONDS, STATE_BYTES, STATE_LOG_BYTES

_TRANSIENT = ("tpm2-00.volatilestate", "tpm2-00.savestate")
"""What swtpm may have left of a TPM that was running; it cannot be read beside a state under another key."""

_LOCK = ".lock"
"""swtpm holds a record lock on it as long as it uses the directory (src/swtpm/swtpm_nvstore_dir.c)."""

_NEW = f".{PERMANENT}.swtpm-prop"

_INIT, _SHUTDOWN, _GET_STATE, _SET_STATE = 2, 3, 12, 13
_PERMANENT_BLOB, _DECRYPTED = 1, 1
"""Commands, blob type and flag of the control channel (swtpm, include/swtpm/tpm_ioctl.h)."""


class Place(NamedTuple):
    """Where a guest's TPM state lies and who works on it.

    Attributes:
        directory: libvirt's, ``Layout.guest_tpm``.
        workspace: how the names of directories begin that hold a copy, maybe a plain one, while `convert` runs.
        account: the user that swtpm runs as.
        path: PATH with the real programs.
    """

    directory: Path
    workspace: Path
    account: Account
    path: str


def place(uuid: str, account: Account, layout: Layout) -> Place:
    """The place of a guest on this host."""
    return Place(layout.guest_tpm(uuid), layout.run / f".{uuid}.state", account, real_path(layout))


def opens(where: Place, key: bytes | None) -> bool:
    """Whether the state, which must be there, is whole and encrypted under this key (None: plain). Takes 10 ms.

    Raises:
        HostError: ``custody.state-busy``.
    """
    with _alone(where), _workspace(where) as work:
        _copy(where, work)
        try:
            _export(where, work, key)
        except _RefusedError:
            return False
        return True


def convert(where: Place, old: bytes | None, new: bytes | None) -> None:
    """Make the state, which must be there, one under another key; at every moment the old or the new one is there.

    Args:
        where: the state; no swtpm may be using it.
        old: 32 bytes, what it is encrypted under; None: it is plain.
        new: what it shall be encrypted under; None: plain.

    Raises:
        HostError: ``custody.state-busy``: a swtpm uses it; ``custody.state-unreadable``: it does not open with
            ``old``; ``custody.state-conversion``: swtpm does not do it. The state is then what it was.
    """
    with _alone(where) as directory, _workspace(where) as before, _workspace(where) as after:
        _copy(where, before)
        try:
            blob = _export(where, before, old)
        except _RefusedError as error:
            raise unreadable(where.directory / PERMANENT, str(error)) from error
        try:
            written = _import(where, after, new, blob)
            # Read back by a process that knows nothing but the file and the key: only then the old one may go.
            if _export(where, after, new) != written:
                raise _failed("what it wrote is not what it reads")
        except _RefusedError as error:
            raise _failed(str(error)) from error
        _put(directory, read(after / PERMANENT) or b"", where.account)


# -- files ----------------------------------------------------------------------------------------


@contextmanager
def _alone(where: Place) -> Iterator[int]:
    """The state's directory, with the lock that swtpm takes."""
    directory = os.open(where.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660, dir_fd=directory)
        with os.fdopen(lock, "wb"):
            found = os.fstat(lock)
            # swtpm's user may have put it there: a second name of a file that is none of its own.
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise unreadable(where.directory / _LOCK, "it is no plain file")
            os.fchown(lock, *where.account)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                what = f"a swtpm is using the TPM state in {where.directory}"
                raise HostError("custody.state-busy", what, "shut the guest down first") from error
            _clear_workspaces(where)
            yield directory
    finally:
        os.close(directory)


@contextmanager
def _workspace(where: Place) -> Iterator[Path]:
    """An empty directory for swtpm's user alone, gone afterwards."""
    above = where.workspace.parent
    if not above.is_dir():
        above.mkdir(parents=True)
        above.chmod(0o755)
    path = Path(tempfile.mkdtemp(prefix=f"{where.workspace.name}.", dir=above))
    try:
        os.chown(path, *where.account)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _clear_workspaces(where: Place) -> None:
    """Of processes that were killed; their swtpm may live on for a moment, so no name is used twice."""
    for path in where.workspace.parent.glob(f"{where.workspace.name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _copy(where: Place, work: Path) -> None:
    """swtpm gets a copy: to open a state can mean to write it."""
    data = read(where.directory / PERMANENT)
    if data is None:
        raise unreadable(where.directory / PERMANENT, "it is not there")
    _write(os.open(work / PERMANENT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), data, where.account)


def _put(directory: int, data: bytes, account: Account) -> None:
    """Replace the state by one rename, on the disk before and after it."""
    with suppress(FileNotFoundError):
        os.unlink(_NEW, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    _write(os.open(_NEW, flags, 0o600, dir_fd=directory), data, account)
    for name in _TRANSIENT:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
    os.rename(_NEW, PERMANENT, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _write(descriptor: int, data: bytes, account: Account) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fchown(descriptor, *account)
        os.fsync(descriptor)


# -- swtpm ----------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """swtpm does not do what it is asked; its words."""


def _export(where: Place, directory: Path, key: bytes | None) -> bytes:
    """The permanent state as swtpm would migrate it without a migration key: plain, whatever it is at rest."""
    with _swtpm(where, directory, key) as control:
        control.call(_INIT, bytes(4))
        return control.state()


def _import(where: Place, directory: Path, key: bytes | None, blob: bytes) -> bytes:
    """Let swtpm write the state into the empty directory; what it then holds.

    It need not be ``blob``: swtpm brings up to date what the next start of the TPM would.
    """
    with _swtpm(where, directory, key) as control:
        control.call(_SET_STATE, struct.pack(">III", 0, _PERMANENT_BLOB, len(blob)) + blob)
        control.call(_INIT, bytes(4))
        return control.state()


class _Control:
    """The control channel of one swtpm: a 4-byte command and its request; the answer begins with a 4-byte result."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def call(self, command: int, request: bytes = b"") -> None:
        self._end.sendall(command.to_bytes(4, "big") + request)
        result = int.from_bytes(self._receive(4), "big")
        if result:
            raise _RefusedError(f"result {result:#x}")

    def state(self) -> bytes:
        self.call(_GET_STATE, struct.pack(">III", _DECRYPTED, _PERMANENT_BLOB, 0))
        flags, total, length = struct.unpack(">III", self._receive(12))
        if length != total or length > STATE_BYTES or flags & ENCRYPTED_FLAG:
            raise _RefusedError("the state does not come in one plain piece")
        return self._receive(length)

    def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            part = self._end.recv(size - len(received))
            if not part:
                raise _RefusedError("it ended")
            received += part
        return received


@contextmanager
def _swtpm(where: Place, directory: Path, key: bytes | None) -> Iterator[_Control]:
    """A swtpm on the state in the directory, spoken to by its control channel alone.

    It gets the key by a pipe. It ends with our end of its data channel, which is there for nothing else, whatever
    becomes of us: the control channel's other end it does not watch.
    """
    control, data = socket.socketpair(), socket.socketpair()
    with (
        control[0] as ours,
        control[1] as theirs,
        data[0],
        data[1] as commands,
        os.fdopen(os.memfd_create("swtpm-log"), "w+b") as log,
        key_pipe(key) as key_end,
    ):
        ours.settimeout(CONVERSION_SECONDS)
        # Opened anew the log would belong to root; as it is, swtpm's user can write to it.
        command = ["swtpm", "socket", "--tpm2", "--fd", str(commands.fileno())]
        command += ["--ctrl", f"type=unixio,clientfd={theirs.fileno()}"]
        command += ["--tpmstate", f"dir={directory},mode=0600", "--log", f"fd={log.fileno()}"]
        command += [] if key_end is None else ["--key", f"fd={key_end},mode=aes-256-cbc,format=hex"]
        passed = [end for end in (theirs.fileno(), commands.fileno(), log.fileno(), key_end) if end is not None]
        with _run(command, where, passed) as process:
            theirs.close()
            commands.close()
            try:
                yield _Control(ours)
                _Control(ours).call(_SHUTDOWN)
                process.wait(CONVERSION_SECONDS)
            except (OSError, _RefusedError, subprocess.TimeoutExpired) as error:
                raise _RefusedError(f"swtpm: {error}, {_last_words(log)}") from error
            finally:
                process.kill()


def _run(command: list[str], where: Place, passed: list[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={"PATH": where.path, "LC_ALL": "C"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=passed,
        user=where.account.uid,
        group=where.account.gid,
        extra_groups=[],
        start_new_session=True,
    )


def _last_words(log: BinaryIO) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - STATE_LOG_BYTES))
    lines = log.read(STATE_LOG_BYTES).decode(errors="replace").splitlines()
    return " / ".join(lines[:1] + lines[-1:])


def _failed(why: str) -> HostError:
    return HostError(
        "custody.state-conversion",
        f"swtpm cannot write the TPM state anew: {why}",
        "see that its user can write below /run and to the guest's TPM state; the state is what it was",
    )
