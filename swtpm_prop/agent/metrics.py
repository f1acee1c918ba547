"""What the agent counts, as Prometheus reads it, and whether it is well; served on one small port."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from swtpm_prop.limits import METRICS_BYTES, METRICS_SECONDS

TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus, "Exposition formats"."""

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """A metric: its name, what it says, ``counter`` or ``gauge``, and its samples."""

    name: str
    help: str
    type: str
    samples: Iterable[tuple[Labels, float]]


class Counts:
    """Counters that only rise, by name and labels; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Labels]] = {}

    def count(self, name: str, **labels: str) -> None:
        """One more."""
        with self._lock:
            self._counts.setdefault(name, Counter())[tuple(sorted(labels.items()))] += 1

    def samples(self, name: str) -> list[tuple[Labels, float]]:
        """What was counted under a name, in the order of the labels."""
        with self._lock:
            return sorted(self._counts.get(name, {}).items())


def render(families: Iterable[Family]) -> str:
    """Prometheus' text format."""
    return "".join(f"{line}\n" for family in families for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}"
    yield f"# TYPE {family.name} {family.type}"
    for labels, value in family.samples:
        inside = ",".join(f'{name}="{_escape(text)}"' for name, text in labels)
        yield f"{family.name}{{{inside}}} {value:g}" if inside else f"{family.name} {value:g}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


Pages = dict[str, Callable[[], tuple[int, str]]]
"""Path to what answers it: HTTP status and text."""


def serve(listener: socket.socket, pages: Pages, stopped: threading.Event) -> None:
    """Answer one request after the other until stopped; what is slow, big or odd is cut off."""
    while not stopped.is_set():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            # Out of descriptors or memory: the talks in hand end soon.
            stopped.wait(0.1)
            continue
        with connection:
            try:
                _answer(connection, pages)
            except OSError:
                continue  # it went away, or was too slow


def _answer(connection: socket.socket, pages: Pages) -> None:
    connection.settimeout(METRICS_SECONDS)
    # A scraper's request comes in one piece; who sends it in several has no claim on our time.
    words = connection.recv(METRICS_BYTES).split(b"\r\n", 1)[0].split(b" ")
    status, text = 404, "not here\n"
    if len(words) != 3 or words[0] != b"GET":
        status, text = 400, "GET /metrics or GET /health\n"
    elif (page := pages.get(words[1].decode("ascii", "replace"))) is not None:
        status, text = page()
    body = text.encode()
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {TYPE}\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Connection: close\r\n\r\n".encode("ascii") + body)


_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}
