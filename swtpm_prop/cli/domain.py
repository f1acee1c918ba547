"""``swtpm-prop domain``: switch guests on and off through libvirt, show what they ask for, their state and log."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
import libvirt

from swtpm_prop import host_config
from swtpm_prop.cli import explain, output, property_log
from swtpm_prop.cli.context import layout_of
from swtpm_prop.cli.guest import LOCAL, Guest, find, libvirt_failed
from swtpm_prop.domain import log
from swtpm_prop.domain.causes import causes
from swtpm_prop.domain.log import Standing
from swtpm_prop.domain.metadata import NAMESPACE, PREFIX, Vtpm, fit, parse_domain, to_xml
from swtpm_prop.domain.pcrs import DEFAULT, format_pcrs, parse_pcrs
from swtpm_prop.domain.processes import has_layer
from swtpm_prop.errors import DomainError, StoreError
from swtpm_prop.layout import Layout
from swtpm_prop.tpm.algorithms import BY_NAME, STRONG
from swtpm_prop.translate.policy import Bank, held_value
from swtpm_prop.trust.certificate import format_time
from swtpm_prop.trust.index import Index

Function = TypeVar("Function", bound=Callable[..., Any])


@click.group()
def command() -> None:
    """Switch guests on and off, show their state and log."""


def of_guest(function: Function) -> Function:
    """The arguments that every verb has: the guest's name, the libvirt that has it, ``--json``."""
    connect = click.option(
        "--connect", "uri", default=LOCAL, envvar="LIBVIRT_DEFAULT_URI", show_default=True, help="libvirt's URI."
    )
    return click.argument("name")(connect(output.json_option(function)))


# -- metadata -------------------------------------------------------------------------------------


@command.command()
@of_guest
@click.option("--property", "properties", multiple=True, required=True, metavar="URI", help="Required; repeatable.")
@click.option("--bank", type=click.Choice([a.name for a in STRONG]), default="sha384", show_default=True)
@click.option("--pcrs", default=DEFAULT, show_default=True, help="PCRs that record properties.")
@click.option("--hidden", is_flag=True, help="Hide the bank from the guest, for kernels that sign their extends.")
@click.option("--custody", metavar="URI", help="Encrypt its TPM for hosts with this property alone.")
@click.option("--migration", type=click.Choice(["attested"]), help="Let it move to hosts that prove this property.")
@click.pass_context
def enable(
    ctx: click.Context,
    name: str,
    uri: str,
    as_json: bool,
    properties: tuple[str, ...],
    bank: str,
    pcrs: str,
    hidden: bool,
    custody: str | None,
    migration: str | None,
) -> None:
    """Let the guest NAME record properties, from its next start on."""
    guest = find(name, uri)
    asked = Vtpm((Bank(BY_NAME[bank], parse_pcrs(pcrs), not hidden, properties),), custody, migration)
    vtpm = fit(asked, guest.xml)
    _refuse_saved(guest)
    _warn_if_custody_ends(guest, vtpm)
    _set_metadata(guest, to_xml(vtpm, prefix=""))
    if uri == LOCAL:
        _warn_if_not_installed(layout_of(ctx))
        _warn_if_not_recoverable(vtpm, layout_of(ctx))
    _print(guest, vtpm, as_json)


@command.command()
@of_guest
def disable(name: str, uri: str, as_json: bool) -> None:
    """Let the guest NAME be an ordinary one, from its next start on."""
    guest = find(name, uri)
    _warn_if_custody_ends(guest, None)
    _set_metadata(guest, None)
    _print(guest, None, as_json)


@command.command()
@of_guest
def show(name: str, uri: str, as_json: bool) -> None:
    """Show what the guest NAME asks for, and the value its property PCRs have while they hold."""
    guest = find(name, uri)
    _print(guest, parse_domain(guest.xml), as_json)


def _set_metadata(guest: Guest, xml: str | None) -> None:
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    try:
        guest.domain.setMetadata(kind, xml, PREFIX, NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    except libvirt.libvirtError as error:
        raise libvirt_failed(error) from error
    if guest.domain.isActive():
        output.warn(
            "the guest is running: the change counts from its next start; "
            "neither a reboot inside the guest nor going on from a saved image is one"
        )


def _refuse_saved(guest: Guest) -> None:
    """A saved image holds the metadata of its time: the guest would go on from it without the layer."""
    try:
        saved = guest.domain.hasManagedSaveImage()
    except libvirt.libvirtError as error:
        raise libvirt_failed(error) from error
    if saved:
        raise DomainError(
            "domain.saved",
            "the guest would go on from its saved image, without properties",
            "start it and shut it down, or drop the image with virsh managedsave-remove",
        )


def _warn_if_not_installed(layout: Layout) -> None:
    needed = {layout.hook: "install", layout.libexec / "swtpm": "install", layout.index: "store build"}
    for path, mend in needed.items():
        if not path.exists():
            output.warn(f"{path} is missing, the guest will not start with properties: run swtpm-prop {mend}")


def _warn_if_custody_ends(guest: Guest, vtpm: Vtpm | None) -> None:
    with suppress(DomainError):
        before = parse_domain(guest.xml)
        if before and before.custody and not (vtpm and vtpm.custody):
            output.warn("custody ends: the next start makes the guest's TPM state plain, on a host that has its key")


def _warn_if_not_recoverable(vtpm: Vtpm, layout: Layout) -> None:
    if vtpm.custody and not host_config.load(layout.host).custody.recovery:
        output.warn(
            f"no recovery key is named in {layout.host}: if this host is lost, the guest's TPM is lost with it, "
            "and what the guest sealed to it"
        )


def _print(guest: Guest, vtpm: Vtpm | None, as_json: bool) -> None:
    banks = [_bank_for_programs(bank) for bank in vtpm.banks] if vtpm else []
    if as_json:
        name = guest.domain.name()
        custody, migration = (vtpm.custody, vtpm.migration) if vtpm else (None, None)
        about = {"name": name, "uuid": guest.uuid, "enabled": vtpm is not None, "banks": banks}
        output.print_json({**about, "custody": custody, "migration": migration})
    elif not banks:
        click.echo("properties off")
    for bank in banks if not as_json else ():
        click.echo(f"bank        {bank['algorithm']}{'' if bank['visible'] else ', hidden from the guest'}")
        click.echo(f"PCRs        {bank['pcrs']}")
        for uri in bank["properties"]:
            click.echo(f"property    {uri}")
        click.echo(f"held value  {bank['held']}")
    if vtpm and vtpm.custody and not as_json:
        click.echo(f"custody     on hosts with {vtpm.custody}")
        click.echo(f"migration   {vtpm.migration or 'none'}")


def _bank_for_programs(bank: Bank) -> dict[str, Any]:
    return {
        "algorithm": bank.algorithm.name,
        "pcrs": format_pcrs(bank.pcrs),
        "visible": bank.visible,
        "properties": list(bank.properties),
        "held": held_value(bank).hex(),
    }


# -- state and log --------------------------------------------------------------------------------


@command.command()
@of_guest
@explain.options
@click.pass_context
def status(
    ctx: click.Context, name: str, uri: str, as_json: bool, event_log: tuple[Path, ...], ima_log: tuple[Path, ...]
) -> None:
    """Show the state of each translated PCR of the guest NAME, and what broke it.

    Exit status 1 if one is broken, or if the guest runs without its layer: then nothing is known of its PCRs.
    """
    guest = _here(name, uri)
    known = explain.known(event_log, ima_log)
    path = layout_of(ctx).guest_log(guest.uuid)
    trouble = _index_trouble(layout_of(ctx))
    records = list(log.read(path))
    standing = log.fold(records)
    found = causes(records, known)
    layer = _has_layer(path)
    running = _runs(guest)
    if running and not layer:
        bare = _without_layer()
        if not as_json:
            raise bare
        standing, found = Standing({}, bare.line()), []
    if as_json:
        index = {"usable": trouble is None, "problem": trouble.line() if trouble else ""}
        about = {"name": name, "uuid": guest.uuid, "running": running, "layer": layer, "index": index}
        output.print_json({**about, **standing._asdict(), "causes": [cause._asdict() for cause in found]})
    else:
        if not running:
            click.echo("not running; this is how its last run ended", err=True)
        if trouble:
            output.warn(trouble.line())
        property_log.print_standing(standing)
        property_log.print_causes(found)
    if standing.broken():
        ctx.exit(1)


def _runs(guest: Guest) -> bool:
    """Whether the guest has a TPM by now: libvirt calls it active before it starts swtpm."""
    try:
        starting = guest.domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]
        return bool(guest.domain.isActive()) and not starting
    except libvirt.libvirtError as error:
        raise libvirt_failed(error) from error


def _has_layer(path: Path) -> bool:
    try:
        return has_layer(path)
    except PermissionError as error:
        what = f"it cannot be told whether the guest's TPM has its layer, {error}"
        raise DomainError("domain.layer-unknown", what, "be root") from error


def _index_trouble(layout: Layout) -> StoreError | None:
    """Why this host certifies nothing now, whatever is measured; what is held stays so until then."""
    try:
        index = Index.open(str(layout.index))
    except StoreError as error:
        return error
    index.close()
    if index.expires >= time.time():
        return None
    return StoreError(
        "store.stale",
        f"the certificate index expired at {format_time(index.expires)}: nothing measured since is certified",
        "run swtpm-prop store sync, or store build, with what is current",
    )


def _without_layer() -> DomainError:
    return DomainError(
        "domain.without-layer",
        "the guest runs without its layer: nothing is known of its PCRs, and its log is that of an earlier run",
        "shut it down and start it again; if it stays so, swtpm-prop doctor says why",
    )


@command.command("log")
@of_guest
@click.option("--follow", is_flag=True, help="Wait for more, across restarts of the guest, until interrupted.")
@explain.options
@click.pass_context
def log_(
    ctx: click.Context,
    name: str,
    uri: str,
    as_json: bool,
    follow: bool,
    event_log: tuple[Path, ...],
    ima_log: tuple[Path, ...],
) -> None:
    """Show the property log of the guest NAME: what was measured, and which certificate it rests on or why on none."""
    path = layout_of(ctx).guest_log(_here(name, uri).uuid)
    known = explain.known(event_log, ima_log)
    for record in property_log.follow(path) if follow else log.read(path):
        property_log.print_record(record, as_json, known)


def _here(name: str, uri: str) -> Guest:
    """The guest, if its log can be on this host."""
    host = urlsplit(uri).hostname
    if host:
        raise DomainError(
            "domain.remote", f"the property log of a guest is on its host, {host}", "run the same command there"
        )
    return find(name, uri)
