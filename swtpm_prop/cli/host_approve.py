"""``swtpm-prop host approve | revoke``: an authority says which states of hosts have a property."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from swtpm_prop import host_config
from swtpm_prop.attest import report
from swtpm_prop.cli import host_events, output, passphrase
from swtpm_prop.cli.host_tpm import chosen_pcrs, event_log_option, pcrs_option, read_event_log
from swtpm_prop.cli.install import root_option
from swtpm_prop.custody import approvals, opening
from swtpm_prop.custody.approvals import ApprovalList
from swtpm_prop.errors import HostError, TrustError, UsageError, printable
from swtpm_prop.layout import Layout
from swtpm_prop.limits import APPROVAL_LIST_BYTES, EVENT_LOG_BYTES, FLEET_CERTIFICATE_BYTES, REVOCATIONS_BYTES
from swtpm_prop.tpm.eventlog import Event
from swtpm_prop.trust import signers
from swtpm_prop.trust.files import read_file, write_file
from swtpm_prop.trust.keys import SigningKey

_FILE = click.Path(path_type=Path)
_list_option = click.option("--list", "list_file", type=_FILE, required=True, metavar="FILE", help="The approval list.")
_key_option = click.option("--key", required=True, metavar="PEM|URI", help="The authority's private P-256 key.")
_public_option = click.option("--public-key", type=_FILE, multiple=True, metavar="PEM", help="Of a key by URI.")


class State(NamedTuple):
    """What is to be approved.

    Attributes:
        host: where it was seen; empty: here.
        epoch: of that host's TPM.
        pcrs: PCR to its SHA-256 value.
        events: what made them; None if there is no event log.
    """

    host: str
    epoch: int
    pcrs: Mapping[int, bytes]
    events: tuple[Event, ...] | None


@click.command()
@click.option("--property", metavar="URI", help="The host property that the state has.")
@click.option("--here", is_flag=True, help="The state of this host ...")
@click.option("--evidence", type=_FILE, metavar="FILE", help="... or of another, as its 'host evidence' wrote it.")
@click.option("--label", metavar="TEXT", help="What people call the state, e.g. 'debian 12.9 on R640'.")
@_list_option
@_key_option
@_public_option
@passphrase.option
@pcrs_option
@event_log_option
@click.option("--without-event-log", is_flag=True, help="Approve bare values: nobody can say what they stand for.")
@click.option("--ca", type=_FILE, metavar="PEM", help="Of the fleet, for --evidence; default: this host's.")
@click.option("--crl", type=_FILE, metavar="PEM", help="Of the fleet, for --evidence; default: this host's.")
@click.option("--epoch", type=click.IntRange(2), metavar="N", help="Raise the list's epoch, for a TPM that is ahead.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@root_option
@output.json_option
def approve(
    property: str | None,
    here: bool,
    evidence: Path | None,
    label: str | None,
    list_file: Path,
    key: str,
    public_key: tuple[Path, ...],
    passphrase_file: Path | None,
    pcrs: str | None,
    event_log: Path | None,
    without_event_log: bool,
    ca: Path | None,
    crl: Path | None,
    epoch: int | None,
    yes: bool,
    root: Path,
    as_json: bool,
) -> None:
    """Sign that hosts in a state have a property, after showing the state and what made it.

    The list is made if it is not there. It counts on hosts that trust the key for this property, once they have it.
    """
    layout = Layout(root)
    if (here or evidence is not None) != (property is not None) or (property is None and epoch is None):
        raise UsageError(
            "usage.approve", "what is to be approved?", "give --property with --here or --evidence; or --epoch"
        )
    if here and evidence is not None:
        raise UsageError("usage.approve", "--here and --evidence exclude each other", "give one of them")
    if as_json and not yes:
        raise UsageError("usage.confirm", "--json cannot ask whether to sign", "look at it without, then add --yes")
    state = None
    if property is not None:
        state = _state_there(evidence, layout, ca, crl, pcrs) if evidence else _state_here(layout, pcrs, event_log)
        _check_explained(state, without_event_log)
        if not as_json:
            _show(state, property)
        if not yes:
            click.confirm(f"Approve this state for '{property}'?", abort=True, err=True)
    signing = _key(key, public_key, passphrase_file)
    listed = _read(list_file, signing) if list_file.exists() else approvals.begin(signing)
    if epoch is not None:
        listed = approvals.raise_to(listed, signing, epoch)
    if property is not None and state is not None:
        listed = approvals.approve(listed, signing, label or _label(state), property, state.pcrs)
    _write(list_file, listed, signing, as_json)


@click.command()
@click.argument("label")
@_list_option
@_key_option
@_public_option
@passphrase.option
@output.json_option
def revoke(
    label: str, list_file: Path, key: str, public_key: tuple[Path, ...], passphrase_file: Path | None, as_json: bool
) -> None:
    """Revoke a state: the list's next edition is without it, and in the next epoch.

    In the TPM of every host that has taken that edition the old approval is dead. Hosts that still run in this state
    open no key any more.
    """
    signing = _key(key, public_key, passphrase_file)
    _write(list_file, approvals.revoke(_read(list_file, signing), signing, label), signing, as_json)


def _state_here(layout: Layout, pcrs: str | None, event_log: Path | None) -> State:
    config = host_config.load(layout.host).tpm
    with opening.hardware(layout) as hardware:
        values, epoch = hardware.pcrs(chosen_pcrs(pcrs, config)), hardware.epoch()
    log = read_event_log(event_log, config)
    return State("", epoch, values, report.measured(log, values) if log else None)


def _state_there(file: Path, layout: Layout, ca: Path | None, crl: Path | None, pcrs: str | None) -> State:
    trusted = read_file(ca or layout.fleet_ca, FLEET_CERTIFICATE_BYTES)
    revoked = read_file(crl or layout.fleet_crl, REVOCATIONS_BYTES)
    shown = report.verify(read_file(file, 2 * EVENT_LOG_BYTES), trusted, revoked, int(time.time()))
    values = shown.host.pcrs
    chosen = host_config.parse_pcrs(pcrs) if pcrs else sorted(values)
    missing = sorted(set(chosen) - values.keys())
    if missing:
        raise UsageError("usage.pcrs", f"the evidence does not show PCR {missing[0]}", "have it made with --pcrs there")
    events = None if shown.events is None else report.of_pcrs(shown.events, chosen)
    return State(shown.host.host, shown.host.epoch, {number: values[number] for number in chosen}, events)


def _check_explained(state: State, without_event_log: bool) -> None:
    if state.events is None and not without_event_log:
        raise HostError(
            "host.event-log-missing",
            "no event log says what these PCR values stand for",
            "name one with --event-log; or --without-event-log, if you know the values from elsewhere",
        )


def _show(state: State, property: str) -> None:
    where = printable(state.host) or "This host"
    click.secho(f"{where}, in epoch {state.epoch}, for '{printable(property)}':", bold=True)
    output.table(("PCR", "SHA-256"), [(str(number), value.hex()) for number, value in sorted(state.pcrs.items())])
    if state.events is not None:
        click.echo()
        host_events.print_events(state.events)


def _label(state: State) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return f"{state.host or socket.gethostname()} {moment}"


def _key(name: str, public: tuple[Path, ...], passphrase_file: Path | None) -> SigningKey:
    (key,) = signers.open_keys([name], map(signers.load_public, public), passphrase.ask(passphrase_file))
    return key


def _read(file: Path, key: SigningKey) -> ApprovalList:
    """The newest edition: what the key signed before, for all of it will be signed again."""
    public = key.public_key()
    if not isinstance(public, EllipticCurvePublicKey):
        raise TrustError("approvals.key", "an authority's key must be P-256, for TPMs check it", "use such a key")
    return approvals.verify(read_file(file, APPROVAL_LIST_BYTES), public)


def _write(file: Path, listed: ApprovalList, key: SigningKey, as_json: bool) -> None:
    write_file(file, approvals.sign(listed, key))
    if as_json:
        output.print_json(_json(listed))
        return
    rows = [(each.label, each.property, ",".join(map(str, sorted(each.pcrs)))) for each in listed.approvals]
    output.table(("State", "Property", "PCRs"), rows)
    click.echo(f"\n'{file}' is edition {listed.sequence} of epoch {listed.epoch}; bring it to the hosts: 'store add'")


def _json(listed: ApprovalList) -> dict[str, object]:
    return {
        "authority": listed.authority,
        "epoch": listed.epoch,
        "sequence": listed.sequence,
        "approvals": [
            {
                "label": each.label,
                "property": each.property,
                "pcrs": {str(number): value.hex() for number, value in each.pcrs.items()},
            }
            for each in listed.approvals
        ],
    }
