"""How the work for an input grows with its size, in processor time: what else runs on the machine does not count."""

from __future__ import annotations

import time
from collections.abc import Callable


def growth(work: Callable[[int], object], size: int) -> float:
    """How many times as long ``work(size)`` takes as ``work(size // 8)``: 8 where it is linear, 64 if quadratic."""
    return _seconds(work, size) / _seconds(work, size // 8)


def _seconds(work: Callable[[int], object], size: int) -> float:
    """The quickest of several, each some hundredths of a second long or one piece of work."""
    times = []
    for _ in range(5):
        begin, done = time.thread_time(), 0
        while not done or time.thread_time() - begin < 0.01:
            work(size)
            done += 1
        times.append((time.thread_time() - begin) / done)
    return min(times)
