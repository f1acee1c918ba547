"""Let something happen on a host in the very moment in which it has written a state of a transfer into its journal."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from product import at

from lab.host import Host

DIRECTORY = Path("/run/lab-faults")
SOCKET = DIRECTORY / "socket"
FIND = "import swtpm_prop; print(swtpm_prop.__path__[0])"
TRAP = """

# -- the laboratory's: whoever has written a state that a trap is set for waits until what is to happen has happened.

_write_for_real = write


def write(path: Path, data: bytes) -> None:
    _write_for_real(path, data)
    if path.parent.parent.name == "transfers":
        import json
        import socket

        found = json.loads(data)
        trap = Path("{directory}") / f"{{found['uuid']}}.{{found['side']}}.{{found['state']}}"
        try:
            trap.unlink()
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as line:
            line.connect("{socket}")
            line.sendall(f"{{trap.name}} {{os.getpid()}}\\n".encode())
            line.recv(1)
"""
"""Appended to durable, through which every state goes."""

IMPATIENT = """
# -- the laboratory's
SETTLE_SECONDS = 1
ARRIVAL_SECONDS = 4
"""
"""Appended to limits: what resolves by itself does so before the test's patience ends."""

Fault = Callable[[int], None]
"""What is to happen, given the process that has written the state, as its host counts."""


class Trap:
    """For the first who writes a certain state."""

    def __init__(self, path: Path, fault: Fault) -> None:
        self.path = path
        self.fault = fault
        self.sprung = threading.Event()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def empty(self) -> bool:
        """Whether nobody has fallen in."""
        return self.path.exists()


class Faults:
    """A ``with`` puts a product with traps in the place of the host's own, for programs that start from then on."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._traps: dict[str, Trap] = {}
        self._happening = threading.Lock()
        self.errors: list[BaseException] = []

    def __enter__(self) -> Faults:
        host = self._host
        package = host.run([Path(sys.prefix) / "bin/python", "-P", "-c", FIND]).stdout.strip()
        copy = f"/var/lib/lab-product-{host.name}"
        host.run(["cp", "-a", package, copy])
        trap = TRAP.format(directory=DIRECTORY, socket=SOCKET)
        for module, text in (("durable.py", trap), ("limits.py", IMPATIENT)):
            file = at(host, Path(copy) / module)
            file.write_text(file.read_text() + text)
        host.run(["mount", "--bind", copy, package])
        self._package = package
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._host.run(["umount", "--lazy", self._package])  # agents still run from it

    def listen(self) -> None:
        """Make the place for traps, in /run: after a reboot again."""
        at(self._host, DIRECTORY).mkdir()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(at(self._host, SOCKET)))
        self._listener.listen()
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def set(self, uuid: str, side: str, state: str, fault: Fault) -> Trap:
        """Let ``fault`` happen when the host's transfer of the guest has come into a state."""
        trap = Trap(at(self._host, DIRECTORY / f"{uuid}.{side}.{state}"), fault)
        self._traps[trap.name] = trap
        trap.path.touch()
        return trap

    def clear(self, uuid: str) -> None:
        """Take away the guest's traps: from now on none of its faults is happening, or will."""
        with self._happening:
            for name in [name for name in self._traps if name.startswith(uuid)]:
                self._traps.pop(name).path.unlink(missing_ok=True)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line:
            name, writer = line.recv(1000).decode().split()
            with self._happening:
                if trap := self._traps.pop(name, None):
                    self._spring(trap, int(writer))
            with suppress(OSError):  # who waited is dead: that was the fault
                line.sendall(b".")

    def _spring(self, trap: Trap, writer: int) -> None:
        try:
            trap.fault(writer)
        except BaseException as error:
            self.errors.append(error)
        finally:
            trap.sprung.set()
