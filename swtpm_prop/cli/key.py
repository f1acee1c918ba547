"""``swtpm-prop key``: whose keys this host's TPM keeps, sealing them anew, bringing one back after a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop.account import swtpm_account
from swtpm_prop.cli import key_forget, output, passphrase
from swtpm_prop.cli.context import layout_of
from swtpm_prop.cli.guest import guest_argument, guest_uuid, known_here
from swtpm_prop.custody import keys, opening, rebinding
from swtpm_prop.custody.form import form
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.errors import DomainError, Error, HostError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import KEY_BYTES
from swtpm_prop.transfer.journal import Journal
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.keys import keyid, load_private
from swtpm_prop.trust.uri import check_property

_FILE = click.Path(path_type=Path)


class Standing(NamedTuple):
    """A guest's key on this host.

    Attributes:
        uuid: the guest's.
        record: what this host has; None if that is damaged.
        refusal: why it does not open here now; None: it does.
        name: the guest's; empty: libvirt here does not have it; None: libvirt cannot be asked.
    """

    uuid: str
    record: KeyRecord | None
    refusal: Error | None
    name: str | None


@click.group()
def command() -> None:
    """Keys of guests, which this host's TPM opens in an approved state of the host only."""


command.add_command(key_forget.forget)


@command.command()
@guest_argument(required=False)
@output.json_option
@click.pass_context
def show(ctx: click.Context, guest: str | None, uri: str, as_json: bool) -> None:
    """Show whose keys this host has, what they demand of it, and whether they open now.

    GUEST is a name or a UUID; without one all are listed, those too whose guest is not defined here any more. Exit
    status 1 if one does not open.
    """
    layout = layout_of(ctx)
    asked = [guest_uuid(guest, uri)] if guest else sorted(path.stem for path in layout.keys.glob("*.json"))
    names = _names(uri)
    found = [Standing(uuid, *_opened(uuid, layout), _name(uuid, names)) for uuid in asked]
    if as_json:
        shown = [_for_programs(standing, layout) for standing in found]
        output.print_json(shown[0] if guest else shown)
    elif guest:
        _print(found[0], layout)
    elif found:
        columns = ("guest", "name", "demands of its host", "opens")
        rows = [(s.uuid, _called(s), s.record.property if s.record else "?", _opens(s)) for s in found]
        output.table(columns, rows)
    else:
        click.echo("this host has no key of a guest")
    if any(standing.refusal for standing in found):
        ctx.exit(1)


@command.command()
@guest_argument()
@click.option("--property", metavar="URI", help="The host property it shall demand; default: the one it demands.")
@click.option("--accept-plain", is_flag=True, help="The plain TPM state that is there is the guest's; encrypt it.")
@output.json_option
@click.pass_context
def rebind(ctx: click.Context, guest: str, uri: str, property: str | None, accept_plain: bool, as_json: bool) -> None:
    """Seal the key of GUEST anew, with the authority and the recovery keys that this host's configuration names now.

    The key itself stays the same: saved images and snapshots go on to open. The guest may run.
    """
    layout = layout_of(ctx)
    if property is not None:
        check_property(property)
    uuid = guest_uuid(guest, uri)
    # A guest that goes to another host meanwhile takes its key away: a record sealed anew must not outlive that.
    with Journal(layout).locked(uuid):
        record = rebinding.rebind(uuid, property, accept_plain, layout)
    _done(record, uri, as_json, layout)


@command.command()
@guest_argument()
@click.option("--key", "key", type=_FILE, required=True, metavar="PEM", help="A private recovery key.")
@click.option(
    "--from", "source", type=_FILE, metavar="FILE", help="The guest's swtpm-prop-recovery.json, if not in its place."
)
@click.option("--property", metavar="URI", help="The host property it shall demand; default: the one it demanded.")
@passphrase.option
@output.json_option
@click.pass_context
def recover(
    ctx: click.Context,
    guest: str,
    uri: str,
    key: Path,
    source: Path | None,
    property: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Take the key of GUEST, whose host is lost, into this host's TPM.

    First put its TPM state, from a backup or the lost host's disk, where libvirt keeps it. The guest must not run
    anywhere, and its old host must never start it again: revoke that host.
    """
    layout = layout_of(ctx)
    uuid = guest_uuid(guest, uri)
    if property is not None:
        check_property(property)
    private = _recovery_key(key, passphrase_file)
    place = source or keys.recovery_copy(uuid, layout)
    with Journal(layout).locked(uuid):
        record = rebinding.recover(uuid, private, place, property, swtpm_account(layout), layout)
    _done(record, uri, as_json, layout)


def _recovery_key(path: Path, passphrase_file: Path | None) -> ec.EllipticCurvePrivateKey:
    pem = read_file(path, KEY_BYTES)
    try:
        key = load_private(pem, None)
    except TrustError as error:
        if error.id != "trust.key-passphrase":
            raise
        key = load_private(pem, passphrase.ask(passphrase_file)(f"passphrase of '{path}'").encode())
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HostError("custody.recovery-key", f"'{path}' is no key on P-256", "name the recovery key")
    return key


def _opened(uuid: str, layout: Layout) -> tuple[KeyRecord | None, Error | None]:
    """A guest's record, and why its key does not open."""
    record = None
    try:
        record = keys.load(uuid, layout)
        if record is None:
            raise rebinding.without_record(uuid)
        with opening.hardware(layout) as tpm:
            opening.open_(record, tpm, layout)
    except Error as error:
        return record, error
    return record, None


def _names(uri: str) -> dict[str, str] | None:
    """As `known_here`; None if libvirt cannot be asked: keys are there without it."""
    try:
        return known_here(uri)
    except DomainError:
        return None


def _name(uuid: str, names: dict[str, str] | None) -> str | None:
    return None if names is None else names.get(uuid, "")


def _called(standing: Standing) -> output.Painted:
    if standing.name is None:
        return output.paint("?", "yellow")
    return output.paint(standing.name, None) if standing.name else output.paint("not defined here", "yellow")


def _opens(standing: Standing) -> output.Painted:
    if standing.refusal is None:
        return output.paint("yes", "green")
    return output.paint(f"no: {standing.refusal.id}", "red")


def _print(standing: Standing, layout: Layout) -> None:
    record = standing.record
    if record is None:
        raise standing.refusal or AssertionError
    recovery = ", ".join(wrap.keyid[:16] for wrap in record.recovery) or "none: the TPM is lost with this host"
    rows = [
        ("guest", record.uuid),
        ("name", _called(standing)),
        ("demands of its host", record.property),
        ("by the word of key", keyid(record.authority_key())[:16]),
        ("moves between hosts", str(record.epoch)),
        ("TPM state here", form(layout.guest_tpm(record.uuid)).value),
        ("recovery keys", recovery),
        ("opens here now", _opens(standing)),
    ]
    output.table(("Key", "Value"), rows)
    if standing.refusal:
        click.echo(standing.refusal.line(), err=True)


def _for_programs(standing: Standing, layout: Layout) -> dict[str, Any]:
    record, refusal = standing.record, standing.refusal
    about: dict[str, Any] = {"guest": standing.uuid, "name": standing.name or None}
    about |= {"defined": None if standing.name is None else bool(standing.name), "opens": refusal is None}
    if refusal:
        about["refusal"] = {"id": refusal.id, "what": refusal.what, "mend": refusal.mend}
    if record:
        about |= {
            "property": record.property,
            "authority": keyid(record.authority_key()),
            "epoch": record.epoch,
            "state": form(layout.guest_tpm(record.uuid)).value,
            "recovery": [wrap.keyid for wrap in record.recovery],
        }
    return about


def _done(record: KeyRecord, uri: str, as_json: bool, layout: Layout) -> None:
    standing = Standing(record.uuid, record, None, _name(record.uuid, _names(uri)))
    if as_json:
        output.print_json(_for_programs(standing, layout))
    else:
        _print(standing, layout)
    if not record.recovery:
        output.warn("no recovery key is named in host.toml: this guest's TPM is lost with this host")
