"""``swtpm-prop fleet``: the fleet's CA on its keeper's machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from swtpm_prop.attest import endorsement, enrolment
from swtpm_prop.attest.enrolment import Applicant
from swtpm_prop.attest.fleet import CA, CRL, Fleet, Member
from swtpm_prop.cli import output, passphrase
from swtpm_prop.errors import UsageError
from swtpm_prop.limits import ENROLMENT_BYTES
from swtpm_prop.trust.certificate import format_time
from swtpm_prop.trust.files import read_file, write_file

_FILE = click.Path(path_type=Path)
_fleet = click.argument("directory", type=_FILE, metavar="DIR")


@click.group()
def command() -> None:
    """Admit hosts to a fleet and revoke them: on the keeper's machine, best one without network."""


@command.command()
@_fleet
@click.option("--name", default="swtpm-prop fleet", show_default=True, help="For people, in the CA's certificate.")
@click.option("--passphrase-file", type=_FILE, metavar="FILE", help="Its first line protects the CA's key.")
@output.json_option
def init(directory: Path, name: str, passphrase_file: Path | None, as_json: bool) -> None:
    """Make a fleet: its CA's key and certificate, and an empty list of revoked certificates.

    Hosts get fleet.pem by a way they trust.
    """
    secret = passphrase.ask(passphrase_file)("").encode() if passphrase_file else None
    fleet = Fleet.create(directory, name, secret, _now())
    if as_json:
        output.print_json(
            {"ca": str(directory / CA), "crl": str(directory / CRL), "crlEnds": format_time(fleet.crl_ends())}
        )
        return
    click.echo(f"hosts trust this fleet by '{directory / CA}'; whoever has '{directory / 'ca.key'}' admits hosts")
    if secret is None:
        click.secho("the CA's key has no passphrase: --passphrase-file gives it one", fg="yellow", err=True)


@command.command()
@_fleet
@click.argument("request", type=_FILE, metavar="REQUEST")
@click.option("--output", "-o", "to", type=_FILE, required=True, metavar="FILE", help="Where the answer goes.")
@click.option("--ek-roots", type=_FILE, multiple=True, metavar="PEM", help="Certificates of TPM makers; repeatable.")
@click.option("--trust-ek-by-hand", is_flag=True, help="No maker vouches: you have compared the Name with 'host init'.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@passphrase.option
@output.json_option
def admit(
    directory: Path,
    request: Path,
    to: Path,
    ek_roots: tuple[Path, ...],
    trust_ek_by_hand: bool,
    yes: bool,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Admit the host of a request; the answer opens in that host's TPM only."""
    if bool(ek_roots) == trust_ek_by_hand:
        raise UsageError(
            "usage.ek", "who vouches for the TPM?", "give either --ek-roots of makers, or --trust-ek-by-hand"
        )
    if as_json and not yes:
        raise UsageError("usage.confirm", "--json cannot ask", "look at it without, then add --yes")
    now = _now()
    makers = endorsement.load_makers(ek_roots) if ek_roots else None
    asked, applicant = enrolment.examine(read_file(request, ENROLMENT_BYTES), makers, now)
    fleet = Fleet(directory)
    fleet.check_new(applicant)
    if not as_json:
        _show(applicant, fleet.members())
    if not yes:
        click.confirm(f"Is this '{applicant.host}'?", abort=True, err=True)
    admission = fleet.admit(asked, applicant, passphrase.ask(passphrase_file), now)
    write_file(to, admission.answer)
    if as_json:
        output.print_json(
            {
                "host": applicant.host,
                "ekName": applicant.ek_name.hex(),
                "vouchedBy": applicant.vouched_by or None,
                "notAfter": format_time(admission.not_after),
                "answer": str(to),
            }
        )
    else:
        click.echo(f"'{to}' is for that host; its certificates end {format_time(admission.not_after)}")


@command.command()
@_fleet
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@passphrase.option
@output.json_option
def revoke(directory: Path, hosts: tuple[str, ...], passphrase_file: Path | None, as_json: bool) -> None:
    """Revoke all certificates of hosts; it counts where the new fleet.crl has come."""
    fleet = Fleet(directory)
    gone = fleet.revoke(hosts, passphrase.ask(passphrase_file), _now())
    _print_revoked(fleet, gone, as_json)


@command.command()
@_fleet
@passphrase.option
@output.json_option
def renew(directory: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Sign the list of revoked certificates anew; hosts do not believe one that has expired."""
    fleet = Fleet(directory)
    gone = fleet.revoke((), passphrase.ask(passphrase_file), _now())
    _print_revoked(fleet, gone, as_json)


@command.command("list")
@_fleet
@output.json_option
def list_(directory: Path, as_json: bool) -> None:
    """Show who was admitted, and until when the list of revoked certificates counts."""
    fleet = Fleet(directory)
    members = fleet.members()
    if as_json:
        output.print_json({"crlEnds": format_time(fleet.crl_ends()), "admissions": [_json(entry) for entry in members]})
        return
    rows = [
        (entry.host, _state(entry), format_time(entry.not_after), entry.vouched_by or "keeper", entry.ek_name)
        for entry in members
    ]
    output.table(("Host", "State", "Until", "Vouched for by", "Endorsement key"), rows)
    click.echo(f"\nthe list of revoked certificates counts until {format_time(fleet.crl_ends())}")


def _show(applicant: Applicant, members: Sequence[Member]) -> None:
    ek_name = applicant.ek_name.hex()
    rows = [
        ("host", applicant.host),
        ("endorsement key", ek_name),
        ("vouched for by", applicant.vouched_by or "you: compare it with what 'host init' shows on that host"),
    ]
    rows += [("admitted before", f"{e.host}, {_state(e)}") for e in members if e.ek_name == ek_name]
    output.table(("Field", "Value"), rows)


def _print_revoked(fleet: Fleet, gone: Sequence[Member], as_json: bool) -> None:
    ends = format_time(fleet.crl_ends())
    if as_json:
        output.print_json({"revoked": [_json(entry) for entry in gone], "crlEnds": ends})
        return
    for entry in gone:
        click.echo(f"revoked {entry.host} ({entry.ek_name})")
    click.echo(f"'{fleet.directory / CRL}' counts until {ends}; bring it to the hosts: 'store add', or 'host update'")


def _json(entry: Member) -> dict[str, Any]:
    return {
        "host": entry.host,
        "ekName": entry.ek_name,
        "vouchedBy": entry.vouched_by or None,
        "admitted": format_time(entry.admitted),
        "notAfter": format_time(entry.not_after),
        "revoked": None if entry.revoked is None else format_time(entry.revoked),
    }


def _state(entry: Member) -> str:
    if entry.revoked is not None:
        return f"revoked {format_time(entry.revoked)}"
    return "member" if entry.not_after >= _now() else "expired"


def _now() -> int:
    return int(time.time())
