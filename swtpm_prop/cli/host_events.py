"""How measurements of a host's boot are printed, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from swtpm_prop.cli import output
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.eventlog import Event
from swtpm_prop.tpm.eventlog_text import describe, type_name


def print_events(events: Sequence[Event]) -> None:
    """All of them, one a line, descriptions whole: what somebody is about to sign may say the worst at the end."""
    rows = [(str(event.number), str(event.pcr), type_name(event), describe(event)) for event in events]
    output.table(("Event", "PCR", "Type", "Description"), rows)


def for_programs(events: Iterable[Event]) -> list[dict[str, Any]]:
    """As `json.dumps` takes it."""
    return [
        {
            "number": event.number,
            "pcr": event.pcr,
            "type": type_name(event),
            "sha256": digest(event).hex(),
            "description": describe(event),
        }
        for event in events
    ]


def digest(event: Event) -> bytes:
    """The SHA-256 that was measured; empty if there is none."""
    return next((found.value for found in event.digests if found.algorithm == SHA256), b"")
