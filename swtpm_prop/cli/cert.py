"""``swtpm-prop cert``: make, show and check property certificates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import output
from swtpm_prop.errors import TrustError, UsageError, printable
from swtpm_prop.layout import Layout
from swtpm_prop.limits import CERTIFICATE_BYTES, EVENT_LOG_BYTES, KEY_BYTES
from swtpm_prop.trust import certificate, issuers, keys, sources
from swtpm_prop.trust.certificate import Certificate, Claim, format_time, parse_time
from swtpm_prop.trust.files import read_file, write_file
from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject

_DAY = 86400
_SHOWN = 20
_FILE = click.Path(path_type=Path)


@click.group()
def command() -> None:
    """Make and read property certificates."""


def _source(name: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, multiple=True, type=_FILE, metavar="FILE", help=help)


@command.command()
@click.option("--issuer", required=True, metavar="URI", help="Who certifies, as the trust file names it.")
@click.option("--key", "key_files", required=True, multiple=True, type=_FILE, metavar="PEM", help="Signing key(s).")
@click.option("--passphrase-file", type=_FILE, metavar="FILE", help="Its first line opens the keys; or you are asked.")
@click.option("--property", "properties", required=True, multiple=True, metavar="URI", help="What is certified.")
@_source("--file", "A file: its plain hash, as GRUB measures what it reads.")
@_source("--pe", "A PE image: its Authenticode hash, as firmware measures what it loads.")
@_source("--uki", "A unified kernel image: all that firmware and systemd-stub measure of it.")
@_source("--event-log", "A TCG event log of a reference boot: everything it measured.")
@click.option("--not-before", metavar="TIME", help="First moment, like 2026-01-31T00:00:00Z; default now.")
@click.option("--not-after", metavar="TIME", help="Last moment.")
@click.option("--valid-days", type=click.IntRange(1, 36500), help="Instead of --not-after; default 365.")
@click.option("--output", "to", required=True, type=_FILE, metavar="FILE", help="Where the certificate goes.")
@output.json_option
def issue(
    issuer: str,
    key_files: tuple[Path, ...],
    passphrase_file: Path | None,
    properties: tuple[str, ...],
    file: tuple[Path, ...],
    pe: tuple[Path, ...],
    uki: tuple[Path, ...],
    event_log: tuple[Path, ...],
    not_before: str | None,
    not_after: str | None,
    valid_days: int | None,
    to: Path,
    as_json: bool,
) -> None:
    """Certify that what is measured of these files has these properties."""
    now = int(time.time())
    first, last = _window(now, not_before, not_after, valid_days)
    subjects = _subjects(
        [(sources.from_file, path) for path in file]
        + [(sources.from_pe, path) for path in pe]
        + [(sources.from_uki, path) for path in uki]
        + [(_from_event_log, path) for path in event_log]
    )
    signers = [_signer(path, passphrase_file) for path in key_files]
    data = certificate.issue(Claim(issuer, properties, subjects, first, last), signers, now)
    write_file(to, data)
    _show(certificate.read(data), as_json)


@command.command()
@click.argument("file", type=_FILE)
@output.json_option
def show(file: Path, as_json: bool) -> None:
    """Print what a certificate says. Nothing is verified."""
    _show(_about(file, certificate.read, read_file(file, CERTIFICATE_BYTES)), as_json)


@command.command()
@click.argument("file", type=_FILE)
@click.option("--trust", "trust_file", type=_FILE, default=Layout().trust, show_default=True, help="Known issuers.")
@output.json_option
def verify(file: Path, trust_file: Path, as_json: bool) -> None:
    """Check a certificate against the trust file, for now; exit status 1 if it is not acceptable."""
    trust = issuers.load(trust_file)
    data = read_file(file, CERTIFICATE_BYTES)
    checked = _about(file, lambda read: certificate.verify(read, trust, int(time.time())), data)
    if as_json:
        output.print_json({"verified": True, **_summary(checked)})
    else:
        click.secho(f"{checked.id} is valid until {format_time(checked.not_after)}", fg="green")


# -- issuing ------------------------------------------------------------------------------------


def _window(now: int, not_before: str | None, not_after: str | None, valid_days: int | None) -> tuple[int, int]:
    if not_after is not None and valid_days is not None:
        raise UsageError("usage.validity", "--not-after and --valid-days exclude each other")
    first = parse_time(not_before) if not_before else now
    return first, parse_time(not_after) if not_after else first + (valid_days or 365) * _DAY


def _subjects(tasks: Sequence[tuple[Callable[[Path], Iterable[Subject]], Path]]) -> list[Subject]:
    if not tasks:
        raise UsageError("usage.no-subject", "nothing to certify", "name files with --file, --pe, --uki or --event-log")
    subjects: dict[tuple[bytes, ...], Subject] = {}
    with output.progress(tasks, "hashing") as running:
        for take, path in running:
            for subject in take(path):
                # The same measurement may come from several sources; the first name will do.
                subjects.setdefault(tuple(subject.digests.values()), subject)
    return list(subjects.values())


def _from_event_log(path: Path) -> Iterable[Subject]:
    return sources.from_event_log(read_file(path, EVENT_LOG_BYTES))


def _signer(path: Path, passphrase_file: Path | None) -> keys.PrivateKey:
    """Open a key; ask for its passphrase only if it has one."""
    pem = read_file(path, KEY_BYTES)
    if b"ENCRYPTED" not in pem:
        return keys.load_private(pem, None)
    if passphrase_file is not None:
        passphrase = read_file(passphrase_file, KEY_BYTES).split(b"\n")[0]
    else:
        passphrase = click.prompt(f"Passphrase of {printable(str(path))}", hide_input=True, err=True).encode()
    return keys.load_private(pem, passphrase)


# -- showing ------------------------------------------------------------------------------------


def _about(file: Path, check: Callable[[bytes], Certificate], data: bytes) -> Certificate:
    try:
        return check(data)
    except TrustError as error:
        raise TrustError(error.id, f"'{file}' is not acceptable: {error.what}", error.mend) from error


def _summary(shown: Certificate) -> dict[str, Any]:
    return {
        "id": shown.id,
        "issuer": shown.issuer,
        "created": format_time(shown.created),
        "notBefore": format_time(shown.not_before),
        "notAfter": format_time(shown.not_after),
        "serial": shown.serial,
        "properties": list(shown.properties),
        "subjectCount": len(shown.subjects),
    }


def _show(shown: Certificate, as_json: bool) -> None:
    subjects = shown.subjects[:_SHOWN]
    if as_json:
        output.print_json({**_summary(shown), "subjects": [_for_programs(subject) for subject in subjects]})
        return
    rows = [("certificate", shown.id), ("issuer", shown.issuer), ("serial", shown.serial)]
    rows += [("property", uri) for uri in shown.properties]
    rows += [("valid", f"{format_time(shown.not_before)} to {format_time(shown.not_after)}")]
    output.table(("Field", "Value"), rows)
    click.echo()
    headers = ("Subject", "Component", "Version", "Algorithms", "Digest")
    output.table(headers, [_subject_row(subject) for subject in subjects])
    if len(shown.subjects) > len(subjects):
        click.echo(f"and {len(shown.subjects) - len(subjects)} more subjects")


def _for_programs(subject: Subject) -> dict[str, Any]:
    digests = {algorithm: digest.hex() for algorithm, digest in subject.digests.items()}
    return {"name": subject.name, "digest": digests, "annotations": dict(subject.annotations)}


def _subject_row(subject: Subject) -> tuple[str, ...]:
    first, *_ = subject.digests.items()
    of = [subject.annotations.get(name, "") for name in (COMPONENT, VERSION)]
    return subject.name, *of, " ".join(subject.digests), f"{first[0]}:{first[1].hex()}"
