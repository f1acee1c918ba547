"""``swtpm-prop store init | root | add | revoke | remove | publish``: what the publisher of a store does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import click
from tuf.api.metadata import Metadata, Root

from swtpm_prop.cli import output, passphrase, store_news
from swtpm_prop.errors import TrustError, UsageError
from swtpm_prop.limits import CERTIFICATE_BYTES, OFFLINE_NOTICE
from swtpm_prop.trust import certificate, floors, signers
from swtpm_prop.trust.certificate import format_time
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.publisher import Publisher, Revocation
from swtpm_prop.trust.repository import ROLES, Change, Missing, days

_FILE = click.Path(path_type=Path)
_ID = re.compile(r"sha256:[0-9a-f]{64}")
_BEGINNING = re.compile(r"(sha256:)?[0-9a-f]{4,64}")
_ONLINE = "online"
"""A word for snapshot and timestamp together: the keys that sign without a person."""

_store = click.argument("directory", type=_FILE, metavar="DIR")


def _changes(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, metavar, help in (
        ("--days", "ROLE=N", "How long its signatures are good; repeatable."),
        ("--threshold", "ROLE=N", "How many of its keys must sign; repeatable."),
        ("--add-key", "ROLE=PEM", "A public key; ROLE is root, targets, snapshot, timestamp or online (the last two)."),
    ):
        command = click.option(name, multiple=True, metavar=metavar, help=help)(command)
    return command


@click.command()
@_store
@_changes
@output.json_option
def init(
    directory: Path, add_key: tuple[str, ...], threshold: tuple[str, ...], days: tuple[str, ...], as_json: bool
) -> None:
    """Make a store: name the keys that will sign it. Private keys are not needed yet.

    Then sign and publish it with 'store publish'. Hosts get public/metadata/1.root.json as /etc/swtpm-prop/root.json,
    by a way they trust.
    """
    _show_root(Publisher(directory).init(_change(add_key, (), threshold, days), _now()), as_json)


@click.command()
@_store
@_changes
@click.option("--remove-key", multiple=True, metavar="ROLE=KEYID", help="By its id or the beginning; repeatable.")
@output.json_option
def root(
    directory: Path,
    add_key: tuple[str, ...],
    remove_key: tuple[str, ...],
    threshold: tuple[str, ...],
    days: tuple[str, ...],
    as_json: bool,
) -> None:
    """Draft the next root: other keys, thresholds or periods; without any option the same for another year.

    Enough keys of the old and of the new root must sign it with 'store publish'. Hosts follow from root to root.
    """
    _show_root(Publisher(directory).rotate(_change(add_key, remove_key, threshold, days), _now()), as_json)


@click.command()
@_store
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
@output.json_option
def add(directory: Path, files: tuple[Path, ...], as_json: bool) -> None:
    """Take certificates into the next publication; all of them, or none if one is malformed or was revoked.

    Approval lists ('host approve') and a fleet's list of revoked hosts ('fleet revoke') likewise: each takes the place
    of its last edition.
    """
    publisher = Publisher(directory)
    certificates, news = store_news.divide(files)
    new = publisher.add(certificates, output.progress) if certificates else 0
    editions = store_news.place(publisher, news)
    if as_json:
        output.print_json({"added": new, "editions": editions})
        return
    if certificates:
        click.echo(f"new certificates: {new}, there already: {len(certificates) - new}; next is 'store publish'")
    if news:
        click.echo(f"new lists: {editions}, there already: {len(news) - editions}; next is 'store publish'")


@click.command()
@_store
@click.argument("certificates", nargs=-1, metavar="[ID|FILE]...")
@click.option("--component", metavar="NAME", help="Everything that speaks of this component ...")
@click.option("--below", metavar="VERSION", help="... in versions below this one.")
@click.option("--property", "properties", multiple=True, metavar="URI", help="Only for this property; repeatable.")
@output.json_option
def revoke(
    directory: Path,
    certificates: tuple[str, ...],
    component: str | None,
    below: str | None,
    properties: tuple[str, ...],
    as_json: bool,
) -> None:
    """Take certificates out of the next publication for good: neither they nor what they cover can be added again.

    --component and --below set a floor, for every property or for those named; hosts heed it with the next sync. Other
    certificates that cover some of it are revoked, too, and named. Exit status 1 if nothing is below --below.
    """
    if (component is None) != (below is None) or not (certificates or component) or (properties and not component):
        raise UsageError(
            "usage.revoke",
            "no certificate is named, or only one of --component and --below",
            "name certificates, or --component together with --below, and with them --property",
        )
    ids = [_id(name) for name in certificates]
    limits = floors.one(component, below, properties) if component else floors.NONE
    done = Publisher(directory).revoke(ids, limits, output.progress)
    if as_json:
        output.print_json(done._asdict())
    else:
        _show_revocation(done)


@click.command()
@_store
@click.argument("certificates", nargs=-1, required=True, metavar="ID|FILE...")
@output.json_option
def remove(directory: Path, certificates: tuple[str, ...], as_json: bool) -> None:
    """Take certificates that were issued in error out of the next publication; they can be added again.

    By the id or how it begins, or by file; a file below DIR/certificates may hold anything. To have what they cover
    refused from now on, use 'store revoke'.
    """
    ids = {name for name in certificates if _BEGINNING.fullmatch(name) and not Path(name).exists()}
    beginnings = [f"sha256:{name.removeprefix('sha256:')}" for name in sorted(ids)]
    files = [Path(name) for name in certificates if name not in ids]
    gone = Publisher(directory).remove(beginnings, files, output.progress)
    if as_json:
        output.print_json({"removed": gone})
        return
    click.echo(f"gone with the next 'store publish': {len(gone)}")


@click.command()
@_store
@click.option("--key", "names", multiple=True, metavar="PEM|URI", help="A private key, e.g. hsm:2?label=X; repeatable.")
@passphrase.option
@output.json_option
def publish(directory: Path, names: tuple[str, ...], passphrase_file: Path | None, as_json: bool) -> None:
    """Sign with these keys, and publish what then has enough signatures; the timestamp each time.

    Holders of different keys run it one after the other. Exit status 1 while signatures are missing.
    """
    done = Publisher(directory).publish(names, cache(passphrase.ask(passphrase_file)), _now())
    if as_json:
        ends = {role: format_time(end) for role, end in done.expires.items()}
        output.print_json({**done._asdict(), "missing": [one._asdict() for one in done.missing], "expires": ends})
    else:
        if done.written:
            click.secho(
                f"published certificates: {done.certificates} ({done.added} new, {done.removed} gone), in "
                + " ".join(done.written),
                fg="green",
            )
        for one in done.missing:
            click.secho(_describe(one), fg="yellow", err=True)
        _warn_of_ends(done.expires)
    if done.missing:
        raise click.exceptions.Exit(1)


# -- reading arguments --------------------------------------------------------------------------


def _change(add_key: Sequence[str], remove_key: Sequence[str], threshold: Sequence[str], days: Sequence[str]) -> Change:
    return Change(
        add=[(role, signers.load_public(Path(path))) for role, path in _pairs(add_key)],
        remove=_pairs(remove_key),
        thresholds=_numbers(threshold),
        days=_numbers(days),
    )


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for word in words:
        role, equals, value = word.partition("=")
        if not equals or role not in (*ROLES, _ONLINE) or not value:
            raise UsageError(
                "usage.role",
                f"'{word}' is not ROLE=VALUE with a role of {', '.join(ROLES)}, {_ONLINE}",
                "write for example --days timestamp=3 or --threshold root=2",
            )
        pairs += [(one, value) for one in (("snapshot", "timestamp") if role == _ONLINE else (role,))]
    return pairs


def _numbers(words: Sequence[str]) -> Mapping[str, int]:
    numbers = {}
    for role, value in _pairs(words):
        if re.fullmatch("[1-9][0-9]{0,4}", value) is None:
            raise UsageError(
                "usage.role",
                f"'{role}={value}' has no number of 1 or more",
                "write for example --days timestamp=3 or --threshold root=2",
            )
        numbers[role] = int(value)
    return numbers


def _id(name: str) -> str:
    """The certificate's id, given or read from its file."""
    if _ID.fullmatch(name):
        return name
    try:
        return certificate.read(read_file(Path(name), CERTIFICATE_BYTES)).id
    except TrustError as error:
        raise TrustError(
            error.id,
            f"'{name}' is neither an id like sha256:... nor a certificate: {error.what}",
            "name a certificate file, or the id that swtpm-prop cert show prints",
        ) from error


def _now() -> datetime:
    return datetime.now(UTC)


# -- showing ------------------------------------------------------------------------------------


def _show_root(drafted: Metadata[Root], as_json: bool) -> None:
    signed, good = drafted.signed, days(drafted.signed)
    if as_json:
        roles = {
            role: {"threshold": signed.roles[role].threshold, "days": good[role], "keys": signed.roles[role].keyids}
            for role in ROLES
        }
        output.print_json({"version": signed.version, "expires": signed.expires.isoformat(), "roles": roles})
        return
    rows = [
        (role, str(signed.roles[role].threshold), str(good[role]), " ".join(signed.roles[role].keyids))
        for role in ROLES
    ]
    output.table(("Role", "Must sign", "Days", "Keys"), rows)
    click.echo(f"Root {signed.version} waits for its signatures: run 'store publish' with the keys, wherever they are.")


def _show_revocation(done: Revocation) -> None:
    gone = (*done.revoked, *done.covering)
    click.echo(f"revoked with the next 'store publish': {len(gone)}")
    for id in gone:
        click.echo(f"  {id}")
    if done.limited:
        click.echo(f"stay, for what the floor leaves of them: {len(done.limited)}")
        for id in done.limited:
            click.echo(f"  {id}")
    for id in done.covering:
        what = f"{id} was revoked because it also covers some of that: issue it anew without, if the rest is good"
        click.secho(what, fg="yellow", err=True)


def _describe(one: Missing) -> str:
    return f"{one.role} waits for {one.needed} of these keys: {' '.join(one.keyids)} [store.unsigned]"


def _warn_of_ends(expires: Mapping[str, int]) -> None:
    """Before offline keys are needed: their holders must be found."""
    for role, mend in (("root", "store root, then store publish with root's keys"), ("targets", "its keys")):
        if role in expires and expires[role] < time.time() + OFFLINE_NOTICE:
            what = f"hosts believe {role} until {format_time(expires[role])} only: renew it with {mend}"
            click.secho(f"{what} [store.expires-soon]", fg="yellow", err=True)
