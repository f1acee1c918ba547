"""``swtpm-prop cert``: make, show, check and compare property certificates."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from swtpm_prop.cli import cert_issue, cert_text, output
from swtpm_prop.errors import TrustError, UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import CERTIFICATE_BYTES
from swtpm_prop.trust import certificate, difference, issuers
from swtpm_prop.trust.certificate import Certificate, format_time
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.sources import Subject

_FILE = click.Path(path_type=Path)


@click.group()
def command() -> None:
    """Make and read property certificates."""


command.add_command(cert_issue.command)


@command.command()
@click.argument("file", type=_FILE)
@output.json_option
def show(file: Path, as_json: bool) -> None:
    """Print what a certificate says. Nothing is verified."""
    cert_text.show(_read(file), as_json)


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
        output.print_json({"verified": True, **cert_text.summary(checked)})
    else:
        click.secho(f"{checked.id} is valid until {format_time(checked.not_after)}", fg="green")


@command.command()
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
@click.option("--all", "every", is_flag=True, help="Every subject that differs, after the components.")
@output.json_option
@click.pass_context
def diff(ctx: click.Context, before: Path, after: Path, every: bool, as_json: bool) -> None:
    """Print what AFTER speaks of otherwise than BEFORE; exit status 1 if anything. Nothing is verified.

    Each is a certificate or a directory, of which all *.json are taken together.
    """
    old, new = _subjects(before), _subjects(after)
    changes = list(difference.compare(old, new))
    components = difference.components(old, new, changes)
    if as_json:
        output.print_json(
            {
                "components": [component._asdict() for component in components],
                "subjects": [change._asdict() for change in changes],
            }
        )
    elif changes:
        headers = ("Component", "Version", "New version", "Added", "Removed", "Changed")
        output.table(headers, [[str(value) for value in component] for component in components])
        if every:
            click.echo()
            output.table(("Change", "Component", "Subject", "Version", "New version"), changes)
    if changes:
        ctx.exit(1)


def _subjects(path: Path) -> list[Subject]:
    """What a certificate speaks of, or all of a directory together."""
    if not path.is_dir():
        return list(_read(path).subjects)
    # As store build takes them: a leading dot is that of editors' and our own temporary files.
    files = sorted(file for file in path.glob("[!.]*.json") if file.is_file())
    if not files:
        raise UsageError("usage.no-certificate", f"'{path}' has no *.json", "name a certificate or a directory of them")
    with output.progress(files, "reading") as running:
        return [subject for file in running for subject in _read(file).subjects]


def _read(file: Path) -> Certificate:
    return _about(file, certificate.read, read_file(file, CERTIFICATE_BYTES))


def _about(file: Path, check: Callable[[bytes], Certificate], data: bytes) -> Certificate:
    try:
        return check(data)
    except TrustError as error:
        raise TrustError(error.id, f"'{file}' is not acceptable: {error.what}", error.mend) from error
