"""Keeps the stamp in the live metadata of guests with custody: where a migration's destination finds this host."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from swtpm_prop.limits import STAMP_SECONDS


class Stamper:
    """Stamps guests that are offered to it, again and again until libvirt takes it or the guest is no longer here.

    It has a thread of its own: a call that changes a guest waits for libvirt's jobs, half a minute at worst.

    Args:
        stamp: stamps a guest by its UUID; False: later.
        wanted: whether the guest needs a stamp (now).
    """

    def __init__(self, stamp: Callable[[str], bool], wanted: Callable[[str], bool]) -> None:
        self._stamp = stamp
        self._wanted = wanted
        self._offered: queue.SimpleQueue[str] = queue.SimpleQueue()

    def offer(self, uuid: str) -> None:
        """The guest runs here, perhaps without a stamp; returns at once."""
        self._offered.put(uuid)

    def run(self, stopped: threading.Event) -> None:
        """Stamp until stopped."""
        waiting: set[str] = set()
        while not stopped.is_set():
            waiting |= self._new()
            waiting = {uuid for uuid in sorted(waiting) if self._wanted(uuid) and not self._stamp(uuid)}

    def _new(self) -> set[str]:
        """What was offered within a while."""
        try:
            return {self._offered.get(timeout=STAMP_SECONDS)}
        except queue.Empty:
            return set()
