"""Waiting for what other processes and threads do in their own time."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], bool], seconds: float = 30, pause: float = 0.01) -> bool:
    """Whether ``true`` becomes so within the time, which is long: others may be at work on the machine.

    ``pause`` are the seconds between two looks; more, where a look takes time from those who are waited for.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
