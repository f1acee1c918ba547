"""A laboratory host's libvirtd: start it with a given PATH, stop it, kill it."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from lab.cgroup import joined
from lab.process import ENVIRONMENT, LabError, run

if TYPE_CHECKING:
    from lab.host import Host

PATH = f"/usr/libexec/swtpm-prop:{ENVIRONMENT['PATH']}"
PID = "/run/libvirtd.pid"
LOG = "/var/log/libvirt/libvirtd.log"
CONFIGURATION = """host_uuid = "{}"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_filters = "1:qemu.qemu_tpm 1:util.command 3:*"
log_outputs = "1:file:{}"
"""
ENDING = 15.0  # seconds; libvirtd finishes the job in hand first


class Libvirtd:
    """The daemon of one host; answers on qemu:///system there, and on TCP for migrations."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._path = PATH

    @property
    def pid(self) -> int | None:
        """Its process id as the host sees it; None when it is not running."""
        try:
            number = int(self._host.read(PID).split()[0])
        except (OSError, IndexError):
            return None
        return number if (self._host.root / f"proc/{number}").exists() else None

    def configuration(self, identity: uuid.UUID) -> str:
        return CONFIGURATION.format(identity, LOG)

    def start(self, path: str = PATH) -> None:
        """Start it with ``path`` as its PATH; the directory of the product comes first unless told otherwise."""
        self._path = path
        command = self._host.inside(["libvirtd", "-d", "-l"])
        group = self._host.cgroup.daemon if self._host.cgroup else None
        run(joined(group, command), env=ENVIRONMENT | {"PATH": path})

    def stop(self) -> None:
        """Ask it to end, and wait until it has; guests go on running."""
        self._end("TERM")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._end("KILL")

    def restart(self) -> None:
        self.stop()
        self.start(self._path)

    def log(self) -> str:
        """What it logged since the host came up: commands it ran, TPM, warnings."""
        return self._host.read(LOG)

    def _end(self, signal: str) -> None:
        pid = self.pid
        if pid is None:
            raise LabError(f"libvirtd of {self._host.name} is not running")
        self._host.run(["kill", f"-{signal}", str(pid)])
        deadline = time.monotonic() + ENDING
        while self.pid is not None:
            if time.monotonic() > deadline:
                raise LabError(f"libvirtd of {self._host.name} does not end")
            time.sleep(0.01)
