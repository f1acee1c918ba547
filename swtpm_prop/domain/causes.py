"""What broke a PCR, and what was measured without a certificate: the property log, explained by the guest's logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from swtpm_prop.domain.log import Record, malformed, read
from swtpm_prop.errors import printable
from swtpm_prop.tpm.algorithms import BY_NAME, Digest
from swtpm_prop.trust.measurements import Known, LeftOut, Measurement, genuine, weakness
from swtpm_prop.trust.sources import Subject

MENDABLE = {"unknown", "mismatch", "property", "expired", "not-yet-valid", "stale-index", "no-index"}
"""Reasons of a refusal (`translate.verdict.Verdict`) that a certificate mends; the others are about the command."""


class Cause(NamedTuple):
    """The first measurement that broke a PCR.

    Attributes:
        bank, pcr: what it broke.
        time: RFC 3339.
        command, reason, detail: what the guest did, and why that was not certified.
        digests: as the guest supplied them, by algorithm name, in hex.
        type, description: what the guest's own logs say it was; empty where they say nothing.
    """

    bank: str
    pcr: int
    time: str
    command: str
    reason: str
    detail: str
    digests: dict[str, str]
    type: str
    description: str


def causes(records: Iterable[Record], known: Known) -> list[Cause]:
    """For each PCR that is broken at the end of a log, what broke it, if the log still has it.

    Raises:
        DomainError: ``domain.log-malformed``.
    """
    first: dict[tuple[str, int], Record] = {}
    for record in records:
        try:
            _note(record, first)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise malformed(f"record {record.get('recnum')!r}") from error
    return [_cause(bank, pcr, record, known) for (bank, pcr), record in sorted(first.items())]


def find(record: Record, known: Known) -> Measurement | None:
    """What the guest's own logs say of a measurement.

    Raises:
        DomainError: ``domain.log-malformed``.
    """
    return known.find(record["pcr"], {name: bytes.fromhex(value) for name, value in _digests(record).items()})


def uncertified(path: Path, known: Known, left_out: LeftOut) -> Iterator[Subject]:
    """What a property log says was measured without a certificate, to be certified now.

    What no certificate mends is counted in ``left_out``: commands that the layer cannot translate, SHA-1 alone, padded
    digests, violations.

    Raises:
        DomainError: ``domain.no-log``, ``domain.log-unreadable``, ``domain.log-malformed``.
    """
    for record in read(path):
        content = _content(record)
        if content.get("event") != "measurement" or content.get("certified"):
            continue
        digests = [Digest(BY_NAME[name], bytes.fromhex(value)) for name, value in _digests(record).items()]
        reason = str(content.get("reason"))
        if reason not in MENDABLE or (reason := weakness(digests)):
            left_out[reason] += 1
            continue
        found = find(record, known)
        what = f"{found.type} {found.description}" if found else f"{content.get('command')}, not described"
        yield Subject(printable(f"{what} (PCR {record['pcr']})"), genuine(digests))


def _note(record: Record, first: dict[tuple[str, int], Record]) -> None:
    """Keep the first breaking record of each PCR, until it is not broken any more (a reset, an earlier snapshot)."""
    content = record["content"]
    if content["event"] == "measurement":
        if content["state"] == "broken":
            first.setdefault((str(content["bank"]), int(record["pcr"])), record)
    elif content["event"] in ("startup", "resume"):
        states = content["states"]
        for bank, pcr in [at for at in first if states.get(at[0], {}).get(str(at[1])) != "broken"]:
            del first[bank, pcr]


def _cause(bank: str, pcr: int, record: Record, known: Known) -> Cause:
    content = record["content"]
    time, command, reason, detail = (str(content.get(name, "")) for name in ("time", "command", "reason", "detail"))
    found = find(record, known)
    described = (found.type, found.description) if found else ("", "")
    return Cause(bank, pcr, time, command, reason, detail, _digests(record), *described)


def _content(record: Record) -> Mapping[str, Any]:
    content = record.get("content")
    if not isinstance(content, dict):
        raise malformed(f"record {record.get('recnum')!r}")
    return content


def _digests(record: Record) -> dict[str, str]:
    """Algorithm name to hex digits, which are hex digits of the right length."""
    try:
        found = {str(entry["hashAlg"]): str(entry["digest"]) for entry in record["digests"]}
        whole = all(len(bytes.fromhex(value)) == BY_NAME[name].size for name, value in found.items())
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(f"record {record.get('recnum')!r}") from error
    if not whole or not isinstance(record.get("pcr"), int):
        raise malformed(f"record {record.get('recnum')!r}")
    return found
