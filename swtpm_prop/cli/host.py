"""``swtpm-prop host``: this host's TPM, its place in a fleet, and the states that are approved."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import click

from swtpm_prop import host_config
from swtpm_prop.attest import membership, news, report
from swtpm_prop.cli import host_approve, host_check, output
from swtpm_prop.cli.host_tpm import chosen_pcrs, event_log_option, pcrs_option, read_event_log
from swtpm_prop.cli.install import root_option
from swtpm_prop.custody import host_keys, opening, policy
from swtpm_prop.custody.host_keys import HostKey
from swtpm_prop.errors import UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import ENROLMENT_BYTES, EVENT_LOG_BYTES, FLEET_CERTIFICATE_BYTES
from swtpm_prop.trust.certificate import format_time
from swtpm_prop.trust.files import read_file, write_file

_FILE = click.Path(path_type=Path)
_NEWS_BYTES = max(EVENT_LOG_BYTES, ENROLMENT_BYTES)
_LOST = "missing: put it back from a backup; without it the key is lost if the TPM loses it"


@click.group()
def command() -> None:
    """Set up this host's TPM, join a fleet, approve states of hosts and see whether this one is approved."""


for _verb in (host_approve.approve, host_approve.revoke, host_check.check):
    command.add_command(_verb)


@command.command()
@root_option
@output.json_option
def init(root: Path, as_json: bool) -> None:
    """Make keys and epoch counter in this host's TPM; what is there already stays.

    The endorsement key's Name tells this TPM from all others: who admits this host compares it. The other keys lie in
    files too (TSS2 PEM, for this TPM alone): if one is removed from the TPM, this puts it back.
    """
    layout = Layout(root)
    with opening.hardware(layout) as hardware:
        hardware.initialise()
        shown = {
            "endorsementKey": _name(hardware.ek_public),
            "attestationKey": _name(hardware.ak_public),
            "attestationKeyFile": _file(layout, host_keys.AK),
            "storageParent": _name(hardware.parent_public),
            "storageParentFile": _file(layout, host_keys.PARENT),
            "endorsementCertificate": hardware.ek_certificate() is not None,
            "epoch": hardware.epoch(),
        }
    layout.host_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    if as_json:
        output.print_json(shown)
        return
    certificate = "yes" if shown["endorsementCertificate"] else "no: the fleet's keeper must compare the key's Name"
    rows = [
        ("endorsement key", str(shown["endorsementKey"])),
        ("its certificate", certificate),
        ("attestation key", str(shown["attestationKey"])),
        ("its file", str(shown["attestationKeyFile"] or _LOST)),
        ("storage parent", str(shown["storageParent"])),
        ("its file", str(shown["storageParentFile"] or _LOST)),
        ("epoch", str(shown["epoch"])),
    ]
    output.table(("In this TPM", "Value"), rows)


@command.command()
@click.option("--request", type=_FILE, metavar="FILE", help="First: write a request for the fleet's keeper.")
@click.option("--name", metavar="HOST", help="This host's name in the fleet; default: its full name.")
@click.option("--answer", type=_FILE, metavar="FILE", help="Then: take the keeper's answer.")
@click.option("--ca", type=_FILE, metavar="PEM", help="The fleet's fleet.pem, from a way you trust; kept in /etc.")
@root_option
@output.json_option
def enroll(
    request: Path | None, name: str | None, answer: Path | None, ca: Path | None, root: Path, as_json: bool
) -> None:
    """Join a fleet, or renew this host's certificates: write a request, and take the answer to it."""
    layout = Layout(root)
    if (request is None) == (answer is None):
        raise UsageError("usage.enroll", "request or answer?", "give --request first, --answer when it has come")
    if request is not None:
        host = name or socket.getfqdn().lower().rstrip(".")
        with opening.hardware(layout) as hardware:
            write_file(request, membership.request(hardware, layout.host_keys, host))
            ek_name = _name(hardware.ek_public)
        if as_json:
            output.print_json({"host": host, "endorsementKey": ek_name, "request": str(request)})
        else:
            click.echo(f"'{request}' asks for '{host}' with endorsement key {ek_name}")
    elif answer is not None:
        trusted = read_file(ca or layout.fleet_ca, FLEET_CERTIFICATE_BYTES)
        with opening.hardware(layout) as hardware:
            joined = membership.join(hardware, layout, read_file(answer, _NEWS_BYTES), trusted, int(time.time()))
            epoch = hardware.epoch()
        ends = format_time(joined.not_after)
        if as_json:
            output.print_json({"host": joined.host, "notAfter": ends, "epoch": epoch})
        else:
            click.echo(f"this host is '{joined.host}' of its fleet until {ends}; its TPM is in epoch {epoch}")


@command.command()
@click.option("--output", "-o", "to", type=_FILE, required=True, metavar="FILE", help="Where the evidence goes.")
@pcrs_option
@event_log_option
@root_option
@output.json_option
def evidence(to: Path, pcrs: str | None, event_log: Path | None, root: Path, as_json: bool) -> None:
    """Write what this host's TPM says of it, for an authority to approve elsewhere ('host approve --evidence').

    It has no date: it says what this host was, not what it is.
    """
    layout = Layout(root)
    config = host_config.load(layout.host)
    log = read_event_log(event_log, config.tpm)
    numbers = chosen_pcrs(pcrs, config.tpm)
    with opening.hardware(layout) as hardware:
        made = report.make(hardware, layout.host_keys, numbers, log)
    write_file(to, made)
    if as_json:
        output.print_json({"output": str(to), "pcrs": list(numbers), "eventLog": bool(log)})
    else:
        without = "" if log else ", without an event log: there is none"
        click.echo(f"'{to}' shows PCR {', '.join(map(str, numbers))}{without}")


@command.command()
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
@root_option
@output.json_option
def update(files: tuple[Path, ...], root: Path, as_json: bool) -> None:
    """Take approval lists and the fleet's list of revoked certificates from files, as 'store sync' does from a store.

    From then on approvals of earlier epochs are dead in this host's TPM.
    """
    layout = Layout(root)
    installed = [news.install(layout, read_file(file, _NEWS_BYTES)) for file in files]
    epoch = news.raise_epoch(layout, installed)
    if as_json:
        output.print_json({"installed": [each.what for each in installed], "epoch": epoch})
        return
    for each in installed:
        click.echo(each.what)
    if epoch is not None:
        click.echo(f"this host's TPM is in epoch {epoch}")


def _name(public: bytes) -> str:
    """The Name of a TPM2B_PUBLIC in hex."""
    return policy.name(public[2:]).hex()


def _file(layout: Layout, key: HostKey) -> str | None:
    """Where the key's file lies; None if it was lost."""
    path = layout.host_keys / key.file
    return str(path) if path.exists() else None
