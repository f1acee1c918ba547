"""The property log for people: its standing as a table, its records as lines, and waiting for more of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from swtpm_prop.cli import output
from swtpm_prop.domain.causes import Cause, find
from swtpm_prop.domain.log import Record, Standing, malformed, open_log, parse_line
from swtpm_prop.errors import printable
from swtpm_prop.limits import LOG_LINE_BYTES
from swtpm_prop.trust.measurements import Known

POLL_SECONDS = 0.2
"""How often `follow` looks for more."""

MEASURES = {
    0: "firmware code",
    1: "firmware configuration",
    2: "option ROM code",
    3: "option ROM configuration",
    4: "boot loader and kernel",
    5: "boot configuration, partition table",
    6: "platform events",
    7: "Secure Boot policy",
    8: "boot loader commands",
    9: "files of the boot loader, initrd",
    10: "IMA",
    11: "unified kernel image, boot phases",
    12: "kernel command line, credentials",
    13: "system extensions",
    14: "shim's machine owner keys",
    15: "machine identity",
}
"""What is usually measured where (TCG PC Client Platform Firmware Profile, 3.3.4; UAPI Linux TPM PCR registry)."""


def print_standing(standing: Standing) -> None:
    """One row a PCR, one column a bank."""
    banks = sorted(standing.states)
    pcrs = sorted({pcr for states in standing.states.values() for pcr in states})
    rows = [
        [str(pcr), *(output.state(standing.states[bank].get(pcr, "")) for bank in banks), MEASURES.get(pcr, "")]
        for pcr in pcrs
    ]
    output.table(["PCR", *banks, "usually measures"], rows)
    if standing.failure:
        click.secho(printable(f"failure: {standing.failure}"), fg="red")


def print_causes(found: Sequence[Cause]) -> None:
    """For each broken PCR, what broke it."""
    for cause in found:
        what = f"{cause.type} {cause.description}" if cause.type else f"{cause.command}, see --event-log and --ima-log"
        click.secho(printable(f"PCR {cause.pcr} {cause.bank} broken at {cause.time}: {what}"), fg="red")
        click.echo(printable(f"  not certified, {cause.reason}: {cause.detail or cause.command}"))
        for name, digest in cause.digests.items():
            click.echo(f"  {name}:{digest}")


def print_record(record: Record, as_json: bool, known: Known) -> None:
    """One line: when, which PCR, its state after it, what that rests on, and what it was if the guest's logs say it.

    Raises:
        DomainError: ``domain.log-malformed``.
    """
    try:
        found = find(record, known) if record["content"]["event"] == "measurement" else None
        if as_json:
            described = {"described": {"type": found.type, "description": found.description}} if found else {}
            click.echo(json.dumps({**record, **described}))
            return
        words = [output.cut(f"{found.type} {found.description}")] if found else []
        click.echo("  ".join([*_columns(record), *words]).rstrip())
    except (KeyError, TypeError, AttributeError) as error:
        raise malformed(f"record {record.get('recnum')!r}") from error


def _columns(record: Record) -> list[str]:
    content = record["content"]
    when, event = printable(str(content["time"])), content["event"]
    if event == "measurement":
        word = str(content["state"])
        pcr, bank = printable(str(record["pcr"])), printable(str(content["bank"]))
        return [when, f"PCR {pcr:<2}", bank, output.state(f"{word:<10}"), _because(record)]
    if event == "failure":
        return [when, click.style(printable(f"failure: {content['detail']} [{content['reason']}]"), fg="red")]
    words = [word for states in content["states"].values() for word in states.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return [when, printable(f"{event}: {counts}")]


def _because(record: Record) -> str:
    content = record["content"]
    if content["certified"]:
        # On no certificate rests what the layer itself recognises; the detail says what.
        certificates = ", ".join(name[:23] for name in content["certificates"])
        return printable(f"certified by {certificates}" if certificates else f"certified: {content['detail']}")
    return printable(f"not certified, {content['reason']}: {content['detail'] or content['command']}")


def follow(path: Path) -> Iterator[Record]:
    """The records of the log as they come, going on with the new file when the guest starts again; never ends.

    Raises:
        DomainError: as `swtpm_prop.domain.log.read`.
    """
    while True:
        with open_log(path) as file:
            ended = False
            while not ended:
                # First look whether the file was replaced, then read what it has: nothing can fall between.
                ended = _replaced(path, file.fileno())
                while (line := file.readline(LOG_LINE_BYTES)).endswith(b"\n"):
                    yield parse_line(line)
                if len(line) == LOG_LINE_BYTES:
                    raise malformed("an overlong line")
                file.seek(-len(line), os.SEEK_CUR)
                time.sleep(POLL_SECONDS)


def _replaced(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino != os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
