"""``swtpm-prop host check``: whether this host's state is approved now, and what of it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from swtpm_prop import durable, host_config
from swtpm_prop.attest import report
from swtpm_prop.cli import host_events, output
from swtpm_prop.cli.host_tpm import event_log_option, read_event_log
from swtpm_prop.cli.install import root_option
from swtpm_prop.custody import approvals, opening
from swtpm_prop.custody.approvals import ApprovalList, Difference
from swtpm_prop.errors import Error, HostError, TrustError, printable
from swtpm_prop.layout import Layout
from swtpm_prop.limits import APPROVAL_LIST_BYTES, EVENT_LOG_BYTES
from swtpm_prop.tpm import eventlog
from swtpm_prop.tpm.eventlog import Event
from swtpm_prop.trust import issuers
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.issuers import Trust

_LAST = "approved.eventlog"
"""Beside the host's keys: the event log of the last state that was found approved. It only explains, never decides."""


class Finding(NamedTuple):
    """Whether this host has a property.

    Attributes:
        property: URI.
        label: the approved state, or the one nearest to the host's; empty: there is none.
        refused: why it does not hold; None if it does.
        differing: PCR to its approved value and the one it has.
        events: of the differing PCRs, those that the last approved boot did not have; None if nobody can tell.
    """

    property: str
    label: str
    refused: Error | None
    differing: Mapping[int, tuple[bytes, bytes]]
    events: tuple[Event, ...] | None


@click.command()
@click.option("--property", "properties", multiple=True, metavar="URI", help="Default: all that the lists here name.")
@event_log_option
@root_option
@output.json_option
def check(properties: tuple[str, ...], event_log: Path | None, root: Path, as_json: bool) -> None:
    """Say whether this host's state is approved; exit status 1 and what differs if it is not."""
    layout = Layout(root)
    config = host_config.load(layout.host).tpm
    trust = issuers.load(layout.trust)
    asked = properties or _known(layout, trust)
    if not asked:
        raise HostError(
            "host.nothing-approved",
            "no approval list here names any state",
            "'swtpm-prop store sync' gets the lists, 'swtpm-prop host update' takes them from files",
        )
    lists = {uri: approvals.load(layout, trust, uri)[1] for uri in asked}
    wanted = frozenset[int]().union(*(listed.pcrs(uri) for uri, listed in lists.items()))
    with opening.hardware(layout) as hardware:
        values, epoch = hardware.pcrs(wanted), hardware.epoch()
    log = _explained(read_event_log(event_log, config), values)
    findings = [_finding(layout, uri, listed, values, epoch, log) for uri, listed in lists.items()]
    held = all(finding.refused is None for finding in findings)
    if held and log is not None:
        durable.write(layout.host_keys / _LAST, log)
    if as_json:
        output.print_json({"epoch": epoch, "held": held, "properties": [_json(finding) for finding in findings]})
    else:
        _print(findings, epoch)
    if not held:
        raise click.exceptions.Exit(1)


def _known(layout: Layout, trust: Trust) -> list[str]:
    """All properties of the lists that are installed and of authorities that are trusted."""
    known: set[str] = set()
    for keyid, public in approvals.authorities(trust).items():
        path = layout.approvals / f"{keyid}.json"
        if path.exists():
            listed = approvals.verify(read_file(path, APPROVAL_LIST_BYTES), public)
            known.update(approval.property for approval in listed.approvals)
    return sorted(known)


def _finding(
    layout: Layout, uri: str, listed: ApprovalList, values: Mapping[int, bytes], epoch: int, log: bytes | None
) -> Finding:
    try:
        found = approvals.find(listed, uri, values)
    except HostError as error:
        return Finding(uri, "", error, {}, None)
    if isinstance(found, Difference):
        refused = HostError(
            "host.state-not-approved",
            f"the state is not approved: {found.says}",
            "have this state approved, or go back to an approved one",
        )
        return Finding(uri, found.label, refused, found.pcrs, _new(layout, log, found.pcrs))
    if epoch > listed.epoch:
        ahead = HostError(
            "host.epoch-ahead",
            f"this host's TPM is in epoch {epoch}, the authority's list in epoch {listed.epoch}",
            f"get the newest list; if this is it, its authority must 'host approve --epoch {epoch}' and send it again",
        )
        return Finding(uri, found.label, ahead, {}, None)
    return Finding(uri, found.label, None, {}, None)


def _explained(log: bytes, values: Mapping[int, bytes]) -> bytes | None:
    """The event log, if it explains the PCRs that firmware's logs speak of."""
    if not log:
        return None
    try:
        eventlog.parse(log)
        report.measured(log, values)
    except Error as error:
        click.secho(error.line(), fg="yellow", err=True)
        return None
    return log


def _new(layout: Layout, log: bytes | None, pcrs: Mapping[int, Any]) -> tuple[Event, ...] | None:
    if log is None:
        return None
    try:
        before = eventlog.parse(read_file(layout.host_keys / _LAST, EVENT_LOG_BYTES)).events
    except TrustError:
        return None
    seen = Counter((event.pcr, host_events.digest(event)) for event in before)
    new = []
    for event in report.of_pcrs(eventlog.parse(log).events, pcrs):
        measured = (event.pcr, host_events.digest(event))
        if seen[measured]:
            seen[measured] -= 1
        else:
            new.append(event)
    return tuple(new)


def _print(findings: Sequence[Finding], epoch: int) -> None:
    for finding in findings:
        if finding.refused is None:
            click.secho(f"{printable(finding.property)}: held, as '{printable(finding.label)}'", fg="green")
            continue
        click.secho(f"{printable(finding.property)}: not held", fg="red")
        click.echo(f"  {finding.refused.line()}")
        if finding.differing:
            rows = [
                (str(number), approved.hex(), now.hex())
                for number, (approved, now) in sorted(finding.differing.items())
            ]
            output.table(("PCR", "Approved", "Now"), rows)
        if finding.events:
            click.secho("New since the last approved boot:", bold=True)
            host_events.print_events(finding.events)
    click.echo(f"this host's TPM is in epoch {epoch}")


def _json(finding: Finding) -> dict[str, Any]:
    refused = finding.refused
    return {
        "property": finding.property,
        "held": refused is None,
        "label": finding.label or None,
        "id": None if refused is None else refused.id,
        "what": None if refused is None else refused.what,
        "differing": {
            str(number): {"approved": approved.hex(), "now": now.hex()}
            for number, (approved, now) in sorted(finding.differing.items())
        },
        "newEvents": None if finding.events is None else host_events.for_programs(finding.events),
    }
