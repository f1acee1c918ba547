"""A host's state on its way to who approves states: evidence, and the event log that says what was measured.

There is no question that it answers, and so no date: it says what a host was, not what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.attest import certificates, evidence, wire
from swtpm_prop.attest.evidence import Verified
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.errors import AttestError
from swtpm_prop.limits import EVENT_LOG_BYTES
from swtpm_prop.tpm import eventlog
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.eventlog import EV_NO_ACTION, Event
from swtpm_prop.trust import strict_json
from swtpm_prop.trust.strict_json import member

_DOMAIN = b"swtpm-prop/v1/host-evidence\0"
_VERSION = 1


class Report(NamedTuple):
    """What a host says of itself, verified.

    Attributes:
        host: who, and its PCRs.
        events: what was measured into these PCRs, in order; None if there is no event log.
    """

    host: Verified
    events: tuple[Event, ...] | None


def make(hardware: Hardware, host_keys: Path, pcrs: Sequence[int], event_log: bytes) -> bytes:
    """This host's report, JSON.

    Args:
        hardware: its TPM.
        host_keys: the directory with ``ak.crt``.
        pcrs: which to show.
        event_log: as the firmware wrote it; empty if there is none.

    Raises:
        HostError: as `evidence.make`.
    """
    shown = evidence.make(hardware, host_keys, _binding(event_log), pcrs)
    report = {"version": _VERSION, "evidence": evidence.to_object(shown), "eventLog": wire.encode(event_log)}
    return json.dumps(report, indent=1).encode() + b"\n"


def verify(data: bytes, ca: bytes, crl: bytes, now: int) -> Report:
    """Check a report; what is returned may be relied on.

    1. Its form.
    2. Its evidence, of whichever host of the fleet it is.
    3. The event log is what made the PCRs.

    Raises:
        AttestError: (1) ``attest.report-malformed``, ``attest.evidence-malformed``; (2) as `evidence.verify`; (3) as
            `measured`.
        WireError: (3) ``eventlog.…``.
    """
    # 1
    with wire.reading("report"):
        found = strict_json.parse(data)
        wire.only(found, {"version", "evidence", "eventLog"})
        if found.get("version") != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
        log = wire.decode(found, "eventLog", EVENT_LOG_BYTES)
        inside = member(found, "evidence", dict)
    shown = evidence.from_object(inside)
    # 2
    host = certificates.read(shown.ak_certificate).host
    verified = evidence.verify(shown, _binding(log), ca, crl, host, now)
    # 3
    return Report(verified, measured(log, verified.pcrs) if log else None)


def measured(event_log: bytes, pcrs: Mapping[int, bytes]) -> tuple[Event, ...]:
    """What was measured into the PCRs, in order, if that is all that was.

    Args:
        event_log: as the firmware wrote it.
        pcrs: PCR to its SHA-256 value.

    Raises:
        AttestError: ``attest.event-log``.
        WireError: ``eventlog.…``.
    """
    log = eventlog.parse(event_log)
    values = eventlog.replay(log, SHA256)
    wrong = sorted(number for number, value in pcrs.items() if values.get(number, untouched(number)) != value)
    if wrong:
        raise AttestError(
            "attest.event-log",
            f"the event log does not explain PCR {', '.join(map(str, wrong))}",
            "choose PCRs that only the firmware's log speaks of; if these are, do not trust that host",
        )
    return of_pcrs(log.events, pcrs)


def of_pcrs(events: Iterable[Event], pcrs: Iterable[int]) -> tuple[Event, ...]:
    """Those that were extended into one of these PCRs."""
    wanted = set(pcrs)
    return tuple(event for event in events if event.pcr in wanted and event.type != EV_NO_ACTION)


def untouched(pcr: int) -> bytes:
    """The value of a PCR into which nothing was measured (TCG PC Client Platform TPM Profile, section 4.6.1)."""
    return (b"\xff" if 17 <= pcr <= 22 else b"\0") * SHA256.size


def _binding(event_log: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + hashlib.sha256(event_log).digest()).digest()
