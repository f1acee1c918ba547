"""Real swtpm processes for tests: start one as libvirt does, plain or behind the layer, and talk to it.

Control channel: 4-byte command, then its request; the answer starts with a 4-byte result (all big endian; swtpm,
include/swtpm/tpm_ioctl.h).
"""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import swtpm_prop
from swtpm_prop.custody.keys import migration_key
from swtpm_prop.layout import Layout

USER = "tss"
UUID = "6f1b2a34-5c6d-4e7f-8091-a2b3c4d5e6f7"
REAL = Path("/usr/bin/swtpm")
REAL_SETUP = Path("/usr/bin/swtpm_setup")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_INIT, _SHUTDOWN, _SET_LOCALITY = 2, 3, 5
_HASH_START, _HASH_DATA, _HASH_END = 6, 7, 8
_STORE_VOLATILE, _GET_STATEBLOB, _SET_STATEBLOB, _STOP, _SET_DATAFD = 10, 12, 13, 14, 16

DELETE_VOLATILE = 1
PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3
_NO_SUCH_STATE = 0x800
"""TPM_RETRY: no savestate before a Shutdown(STATE); QEMU passes over it too."""

STARTUP_CLEAR = bytes.fromhex("80010000000c000001440000")
STARTUP_STATE = bytes.fromhex("80010000000c000001440001")
SHUTDOWN_STATE = bytes.fromhex("80010000000c000001450001")


@contextmanager
def world_directory() -> Iterator[Path]:
    """A temporary directory that user tss can search (pytest's own are for root alone)."""
    path = Path(tempfile.mkdtemp(prefix="swtpm-prop-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def require_readable() -> None:
    """Fail with a clear message where user tss cannot read the code under test."""
    package = Path(swtpm_prop.__file__).parent
    ran = subprocess.run(["/usr/bin/test", "-r", package / "__init__.py"], user=USER, group=USER, extra_groups=[])
    assert ran.returncode == 0, f"user {USER} cannot read {package}: run from a checkout or prefix it can read"


def owned_directory(path: Path) -> Path:
    """A directory for user tss, parents for everyone."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.chown(path, USER, USER)
    return path


class TpmError(Exception):
    """The control channel answered with an error."""


class Tpm:
    """One running swtpm: data by a socket pair (SET_DATAFD, as QEMU does), control by a unix socket.

    Args:
        base: directory for the state (``base/<uuid>/tpm2``), the control socket and the log.
        program: what to start: the real swtpm, or a shim.
        options: further arguments.
        env: the whole environment.
        command: everything before the arguments (instead of ``program socket``).
    """

    def __init__(
        self,
        base: Path,
        program: Path = REAL,
        *,
        uuid: str = UUID,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        user: str = USER,
    ) -> None:
        self.base = owned_directory(base)
        self.state = owned_directory(base / uuid / "tpm2")
        self.control_path = base / "control.sock"
        self.log = base / "swtpm.log"
        self.arguments = [
            str(program), "socket", "--ctrl", f"type=unixio,path={self.control_path},mode=0600",
            "--tpmstate", f"dir={self.state},mode=0600", "--log", f"file={self.log}", "--tpm2", *options,
        ]  # fmt: skip
        self.env = {"PATH": PATH, "LANG": "C"} if env is None else dict(env)
        self.user = user
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.data: socket.socket | None = None

    def __enter__(self) -> Tpm:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- life -----------------------------------------------------------------------------------

    def start(self, timeout: float = 5.0) -> Tpm:
        """Start the process and connect; the TPM still waits for ``init``."""
        self.control_path.unlink(missing_ok=True)
        self.process = self.spawn()
        self.control = self._connect(time.monotonic() + timeout)
        self.data, theirs = socket.socketpair()
        self.data.settimeout(30)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
        self.control.sendmsg([struct.pack(">I", _SET_DATAFD)], rights)
        theirs.close()
        self._result("SET_DATAFD")
        return self

    def spawn(self, **options: Any) -> subprocess.Popen[bytes]:
        """The process alone; ``options`` go to Popen."""
        options = {"stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        return subprocess.Popen(
            self.arguments, env=self.env, user=self.user, group=self.user, extra_groups=[], cwd="/", **options
        )

    def close(self) -> None:
        """Shut down by the control channel, else by SIGTERM; the state stays."""
        for end in (self.data, self.control):
            if end is not None:
                end.close()
        self.data = self.control = None
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            if self.process.stderr is not None:
                self.process.stderr.close()
            self.process = None

    def up(self, flags: int = 0) -> Tpm:
        """INIT and TPM2_Startup(CLEAR), as firmware does."""
        self.init(flags)
        answer = self.send(STARTUP_CLEAR)
        assert answer[6:10] == bytes(4), answer.hex()
        return self

    # -- data channel ---------------------------------------------------------------------------

    def send(self, command: bytes) -> bytes:
        """One command, its response; framed by the size field of the response."""
        assert self.data is not None
        self.data.sendall(command)
        answer = self._receive(self.data, 10)
        return answer + self._receive(self.data, int.from_bytes(answer[2:6], "big") - 10)

    # -- control channel ------------------------------------------------------------------------

    def init(self, flags: int = 0) -> None:
        """CMD_INIT; ``flags`` DELETE_VOLATILE as after SET_STATEBLOB."""
        self._control(_INIT, struct.pack(">I", flags), "INIT")

    def stop(self) -> None:
        """CMD_STOP: the TPM ends, the process stays; ``init`` starts it again (what QEMU does at reset)."""
        self._control(_STOP, b"", "STOP")

    def reset(self) -> None:
        """A machine reset: STOP, INIT."""
        self.stop()
        self.init()

    def shutdown(self) -> None:
        """CMD_SHUTDOWN: the process ends."""
        self._control(_SHUTDOWN, b"", "SHUTDOWN")
        assert self.process is not None
        self.process.wait(10)

    def locality(self, locality: int) -> None:
        """CMD_SET_LOCALITY for the commands that follow."""
        self._control(_SET_LOCALITY, bytes([locality]), "SET_LOCALITY")

    def hash_start(self) -> None:
        """CMD_HASH_START: begin an H-CRTM or DRTM sequence."""
        self._control(_HASH_START, b"", "HASH_START")

    def hash_data(self, data: bytes) -> None:
        """CMD_HASH_DATA, at most 4096 bytes."""
        self._control(_HASH_DATA, struct.pack(">I", len(data)) + data, "HASH_DATA")

    def hash_end(self) -> None:
        """CMD_HASH_END: extend the result."""
        self._control(_HASH_END, b"", "HASH_END")

    def hash_sequence(self, data: bytes) -> None:
        """What ``swtpm_ioctl -h`` does."""
        self.hash_start()
        self.hash_data(data)
        self.hash_end()

    def store_volatile(self) -> None:
        """CMD_STORE_VOLATILE: write the volatile state to disk; the next INIT resumes from it."""
        self._control(_STORE_VOLATILE, b"", "STORE_VOLATILE")

    def get_state(self, kind: int) -> tuple[int, bytes]:
        """CMD_GET_STATEBLOB: flags and bytes of PERMANENT, VOLATILE or SAVESTATE; no bytes if there is none."""
        assert self.control is not None
        self.control.sendall(struct.pack(">IIII", _GET_STATEBLOB, 1, kind, 0))
        result, flags, _total, length = struct.unpack(">IIII", self._receive(self.control, 16))
        if result not in (0, _NO_SUCH_STATE):
            raise TpmError(f"GET_STATEBLOB: {result:#x}")
        return flags, self._receive(self.control, length)

    def set_state(self, kind: int, flags: int, blob: bytes) -> None:
        """CMD_SET_STATEBLOB, in one piece; only while the TPM is stopped."""
        assert self.control is not None
        self.control.sendall(struct.pack(">IIII", _SET_STATEBLOB, flags, kind, len(blob)) + blob)
        self._result("SET_STATEBLOB")

    def snapshot(self) -> dict[int, tuple[int, bytes]]:
        """All three state blobs, as QEMU saves or migrates them."""
        return {kind: self.get_state(kind) for kind in (PERMANENT, VOLATILE, SAVESTATE)}

    def restore(self, blobs: Mapping[int, tuple[int, bytes]]) -> None:
        """Load the blobs of ``snapshot`` and resume, as QEMU does at a restore or an incoming migration."""
        self.stop()
        for kind, (flags, blob) in blobs.items():
            if blob:
                self.set_state(kind, flags, blob)
        self.init(DELETE_VOLATILE)

    def _connect(self, deadline: float) -> socket.socket:
        """The socket's file is there a moment before somebody listens."""
        assert self.process is not None
        control = socket.socket(socket.AF_UNIX)
        control.settimeout(30)
        while control.connect_ex(str(self.control_path)) != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                control.close()
                raise TpmError(self._end_text())
            time.sleep(0.001)
        return control

    def _control(self, code: int, request: bytes, name: str) -> None:
        assert self.control is not None
        self.control.sendall(struct.pack(">I", code) + request)
        self._result(name)

    def _result(self, name: str) -> None:
        assert self.control is not None
        result = int.from_bytes(self._receive(self.control, 4), "big")
        if result:
            raise TpmError(f"{name}: {result:#x}")

    def _receive(self, end: socket.socket, size: int) -> bytes:
        received = b""
        while len(received) < size:
            part = end.recv(size - len(received))
            if not part:
                raise TpmError(f"swtpm closed the connection: {self._end_text()}")
            received += part
        return received

    def _end_text(self) -> str:
        assert self.process is not None
        self.process.terminate()
        _, stderr = self.process.communicate(timeout=10)
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"exit {self.process.returncode}: {stderr.decode(errors='replace').strip()} {log[-500:].strip()}"


def bank(
    algorithm: str = "sha384",
    pcrs: Sequence[int] = (*range(10), 11, 12, 13, 14),
    visible: bool = True,
    properties: Sequence[str] = ("https://example.org/properties/boot",),
) -> dict[str, Any]:
    """One entry of ``banks`` in layer.json."""
    return {"algorithm": algorithm, "pcrs": list(pcrs), "visible": visible, "properties": list(properties)}


class LayerHost:
    """A host's directories below ``root`` with the shims installed, for guests behind the layer.

    The index is whatever file the test puts at ``layout.index``.
    """

    def __init__(self, root: Path) -> None:
        from swtpm_prop.emulator import shims

        require_readable()
        self.layout = Layout(root)
        for path in (self.layout.guests, self.layout.run, self.layout.logs, self.layout.libexec):
            path.mkdir(parents=True, exist_ok=True)
        self.layout.index.parent.mkdir(parents=True, exist_ok=True)
        self.layout.state.chmod(0o711)
        self.layout.guests.chmod(0o711)
        for name in ("swtpm", "swtpm_setup"):
            shim = self.layout.libexec / name
            shim.write_text(shims.render(name, shims.preload_object(), self.layout))
            shim.chmod(0o755)
        self.shim = self.layout.libexec / "swtpm"
        self.setup_shim = self.layout.libexec / "swtpm_setup"
        self.env = {"PATH": f"{self.layout.libexec}:{PATH}", "LANG": "C"}

    def opt_in(self, banks: Sequence[Mapping[str, Any]] = (), *, raw: str = "sha256", uuid: str = UUID) -> Path:
        """What the hook writes before a start; the path of layer.json."""
        banks = list(banks) or [bank()]
        active = ",".join(dict.fromkeys([*raw.split(","), *(str(each["algorithm"]) for each in banks)]))
        self.layout.guest_marker(uuid).write_text(active + "\n")
        run = self.layout.guest_run(uuid)
        run.mkdir(exist_ok=True)
        run.chmod(0o750)
        shutil.chown(run, "root", USER)
        log = self.layout.guest_log(uuid)
        log.unlink(missing_ok=True)
        log.touch(0o640)
        shutil.chown(log, USER, USER)
        layer = {"version": 1, "uuid": uuid, "index": str(self.layout.index), "log": str(log), "banks": banks}
        self._guest_file(run / "pcr-banks", active + "\n")
        return self._guest_file(run / "layer.json", json.dumps(layer))

    def take_into_custody(self, key: bytes, *, uuid: str = UUID) -> None:
        """What the hook writes besides for a guest whose key is in custody (call ``opt_in`` before)."""
        self._guest_file(self.layout.guest_run(uuid) / "keyed", "")
        self._guest_file(self.layout.state_key(uuid), key.hex())
        self._guest_file(self.layout.migration_key(uuid), migration_key(key).hex())

    def tpm(self, base: Path, *, uuid: str = UUID, options: Sequence[str] = ()) -> Tpm:
        """A swtpm started through the shim (call ``opt_in`` before)."""
        return Tpm(base, self.shim, uuid=uuid, options=options, env=self.env)

    def records(self, uuid: str = UUID) -> list[dict[str, Any]]:
        """The property log."""
        return [json.loads(line) for line in self.layout.guest_log(uuid).read_text().splitlines()]

    @staticmethod
    def _guest_file(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o640)
        shutil.chown(path, "root", USER)
        return path


def manufacture(base: Path, banks: str = "sha1,sha256,sha384,sha512", *, uuid: str = UUID) -> Path:
    """Make a TPM state with these active banks in ``base`` (real swtpm_setup, as user tss); its directory."""
    state = owned_directory(base / uuid / "tpm2")
    owned_directory(base)
    subprocess.run(
        [REAL_SETUP, "--tpm2", "--tpm-state", state, "--pcr-banks", banks, "--overwrite"],
        user=USER, group=USER, extra_groups=[], check=True, capture_output=True, cwd="/",
        env={"PATH": PATH, "HOME": os.fspath(base)},
    )  # fmt: skip
    return state
