"""The product's agent on a laboratory host, started as a service manager would."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab.host import Host
from lab.process import LabError

PORT = 4879
PID, LOG = "/run/lab-agent.pid", "/var/log/lab-agent.log"
PATIENCE = 10.0  # seconds


class Agent:
    """The agent of ``host``."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def pid(self) -> int | None:
        """Its process id as the host sees it; None when it is not running."""
        try:
            number = int(self._host.read(PID))
        except (OSError, ValueError):
            return None
        return number if (self._host.root / f"proc/{number}").exists() else None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        program = Path(sys.prefix) / "bin/swtpm-prop"
        line = f'echo $$ >{PID} && exec "$@" >>{LOG} 2>&1'
        self._host.run(["setsid", "-f", "sh", "-c", line, "sh", program, "agent"])
        self.wait()

    def wait(self) -> None:
        """Wait until it listens, whoever started it."""
        listening = ["ss", "-Hltn", f"sport = {PORT}"]
        self._await("does not listen", lambda: bool(self._host.run(listening).stdout))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it; nothing wrong if it does not run."""
        if number := self.pid:
            self._host.run(["kill", f"-{how.value}", str(number)], check=False)
            self._await("does not end", lambda: self.pid is None)

    def restart(self) -> None:
        self.stop()
        self.start()

    def log(self) -> str:
        """What it said since the host came up."""
        return self._host.read(LOG)

    def _await(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise LabError(f"the agent of {self._host.name} {what}:\n{self.log()}")
            time.sleep(0.02)
