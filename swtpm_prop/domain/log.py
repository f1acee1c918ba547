"""The property log of a guest: reading its lines, and folding them to the state of each translated PCR."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from swtpm_prop.errors import DomainError
from swtpm_prop.limits import LOG_LINE_BYTES

BANK_INACTIVE = "layer.bank-inactive"
"""Reason of a failure that activating the bank mends."""

Record = Mapping[str, Any]
"""One line, as `swtpm_prop.translate.record.Record.to_json` makes it."""


class Standing(NamedTuple):
    """What a log says of now.

    Attributes:
        states: bank name to PCR to ``unmeasured``, ``held`` or ``broken``.
        failure: why the layer gave up or the log does not go on; empty while both work.
        time: of the last record, RFC 3339; empty without one.
    """

    states: dict[str, dict[int, str]]
    failure: str = ""
    time: str = ""

    def broken(self) -> bool:
        """Whether any translated PCR is broken, or may be because the log does not go on."""
        return bool(self.failure) or any("broken" in pcrs.values() for pcrs in self.states.values())


def fold(records: Iterable[Record]) -> Standing:
    """The standing after all records of one start, in their order.

    Raises:
        DomainError: ``domain.log-malformed``: a record has not the shape of the property log.
    """
    standing = Standing({})
    for record in records:
        try:
            standing = _after(standing, record["content"], record["pcr"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise malformed(f"record {record.get('recnum')}") from error
    return standing


def _after(before: Standing, content: Mapping[str, Any], pcr: int | None) -> Standing:
    event, time = content["event"], str(content["time"])
    if event in ("startup", "resume"):
        states = {str(b): {int(p): str(s) for p, s in pcrs.items()} for b, pcrs in content["states"].items()}
        return Standing(states, before.failure, time)
    if event == "measurement":
        before.states.setdefault(str(content["bank"]), {})[int(pcr or 0)] = str(content["state"])
        return before._replace(time=time)
    if event == "failure":
        return before._replace(failure=f"{content['detail']} [{content['reason']}]", time=time)
    raise ValueError(event)


def parse_line(line: bytes) -> Record:
    """One line as a record.

    Raises:
        DomainError: ``domain.log-malformed``.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise malformed("a line that is no JSON") from error
    if not isinstance(record, dict):
        raise malformed("a line that is no record")
    return record


def read(path: Path) -> Iterator[Record]:
    """The records of a log. A last line without its newline is still being written and left out.

    A damaged line (the disk was full) may have been the one that said ``broken``: nothing is said without it.

    Raises:
        DomainError: ``domain.no-log``, ``domain.log-malformed``.
    """
    with open_log(path) as file:
        while (line := file.readline(LOG_LINE_BYTES)).endswith(b"\n"):
            yield parse_line(line)
        if len(line) == LOG_LINE_BYTES:
            raise malformed("an overlong line")


def open_log(path: Path) -> BufferedReader:
    """Open the log for reading.

    Raises:
        DomainError: ``domain.no-log``, ``domain.log-unreadable``.
    """
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise DomainError("domain.no-log", "the guest has no property log here", "start it once, opted in") from error
    except OSError as error:
        raise DomainError("domain.log-unreadable", f"the property log cannot be read, {error}", "be root") from error


def ended_inactive(path: Path) -> bool:
    """Whether the last thing the log says is that a property bank was not active; False without a readable log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_LINE_BYTES))
            lines = file.read(LOG_LINE_BYTES).split(b"\n")
        content = parse_line(lines[-2])["content"]
        return bool(content["event"] == "failure" and content["reason"] == BANK_INACTIVE)
    except (OSError, DomainError, LookupError, TypeError):
        return False


def malformed(what: str) -> DomainError:
    """The error for a log that holds ``what``; the swtpm process writes it, and may have been taken over."""
    return DomainError("domain.log-malformed", f"the property log holds {what}", "the next start begins a new one")
