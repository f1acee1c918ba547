"""Locks that hooks, agent and commands take in turn, each for moments."""

from __future__ import annotations

import fcntl
import time

_PAUSE = 0.002
"""Seconds between two tries; opening a key takes a software TPM six times as long."""


def take(descriptor: int, seconds: float) -> bool:
    """Take the flock(2) lock of an open file for oneself; whether that came about in so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        else:
            return True
        time.sleep(_PAUSE)
