"""Moves open transfers on: by what libvirt tells, and again and again until both hosts agree."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from swtpm_prop.agent.guests import Happening
from swtpm_prop.agent.metrics import Counts
from swtpm_prop.errors import Error
from swtpm_prop.limits import AGENT_SETTLERS, PRUNE_ROUNDS, SETTLE_SECONDS
from swtpm_prop.transfer.settle import Settler

_log = logging.getLogger(__name__)


class Transfers:
    """The open transfers of this host.

    What libvirt saw is written down in the order it happened, by the one thread that calls `note`. Asking peers takes
    as long as they take, so that is done beside it: for several guests at once, for each guest by one thread.

    Args:
        settler: does it.
        counts: counts ``failures`` by id.
    """

    def __init__(self, settler: Settler, counts: Counts) -> None:
        self._settler = settler
        self._counts = counts
        self._pool = ThreadPoolExecutor(AGENT_SETTLERS, "settle")
        self._lock = threading.Lock()
        self._at_work: dict[str, bool] = {}  # guest: whether it has to be looked at once more
        self._delays: dict[str, int] = {}  # guest of which nothing came yet: how long to wait next

    def note(self, happening: Happening) -> None:
        """Write down what libvirt saw, then have it settled."""
        self._try(happening.uuid, lambda: self._settler.observe(happening.uuid, happening.event, at=happening.at))
        with self._lock:
            self._delays.pop(happening.uuid, None)
        if self.open(happening.uuid):
            self.wake(happening.uuid)

    def wake(self, uuid: str) -> None:
        """Have a guest's transfers settled soon; returns at once."""
        with self._lock:
            idle = uuid not in self._at_work
            self._at_work[uuid] = not idle
        if idle:
            with suppress(RuntimeError):  # the pool ends
                self._pool.submit(self._settle, uuid)

    def run(self, stopped: threading.Event) -> None:
        """Settle what is open now and every while, until stopped; what is finished now and seldom, to forget it."""
        for number in itertools.count():
            self.look(finished=number % PRUNE_ROUNDS == 0)
            if stopped.wait(SETTLE_SECONDS):
                return

    def look(self, finished: bool = False) -> None:
        """Have settled soon what is open, and what is ``finished`` too; returns at once."""
        for uuid in self._guests():
            if finished or self.open(uuid):
                self.wake(uuid)

    def open(self, uuid: str) -> bool:
        """Whether the guest has transfers that are not finished; of a journal that cannot be read nobody can say so."""
        try:
            return any(transfer.unfinished for transfer in self._settler.journal.of(uuid))
        except Error as error:
            self._failed(uuid, error)
            return False

    def finish(self) -> None:
        """Begin nothing more; what is under way may be cut off anywhere."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _settle(self, uuid: str) -> None:
        again = True
        while again:
            self._try(uuid, lambda: self._settler.settle(uuid))
            with self._lock:
                again = self._at_work[uuid]
                self._at_work[uuid] = False
                if not again:
                    del self._at_work[uuid]
        self._retry(uuid)

    def _try(self, uuid: str, step: Callable[[], object]) -> None:
        """Take a step, and log what it led to or why it failed."""
        try:
            before = self._states(uuid)
            step()
            for line in sorted(self._states(uuid) - before):
                _log.info("guest %s: %s", uuid, line)
        except Error as error:
            self._failed(uuid, error)
        except Exception as error:
            # A mistake of ours must not leave this guest to nobody.
            self._failed(uuid, Error("agent.failed", f"{type(error).__name__}: {error}", "report this"))

    def _retry(self, uuid: str) -> None:
        """Most that is open is so for moments: the peer's libvirt is still taking the guest down."""
        with self._lock:
            delay = self._delays.get(uuid, 1)
            self._delays[uuid] = min(2 * delay, SETTLE_SECONDS)
        if not self.open(uuid):
            with self._lock:
                self._delays.pop(uuid, None)
        elif delay < SETTLE_SECONDS:
            timer = threading.Timer(delay, self.wake, (uuid,))
            timer.daemon = True
            timer.start()

    def _states(self, uuid: str) -> set[str]:
        return {f"transfer {t.id} with {t.peer} is {t.state}" for t in self._settler.journal.of(uuid)}

    def _guests(self) -> Iterable[str]:
        try:
            return self._settler.journal.guests()
        except Error as error:
            self._failed("", error)
            return ()

    def _failed(self, uuid: str, error: Error) -> None:
        self._counts.count("failures", id=error.id)
        _log.error("guest %s: %s", uuid or "(all)", error.line())
