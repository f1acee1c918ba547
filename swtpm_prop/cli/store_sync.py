"""``swtpm-prop store sync``: follow a store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from swtpm_prop import host_config
from swtpm_prop.cli import output, store_news
from swtpm_prop.cli.install import root_option
from swtpm_prop.errors import Error, UsageError, printable
from swtpm_prop.layout import Layout
from swtpm_prop.trust import follow
from swtpm_prop.trust.certificate import format_time
from swtpm_prop.trust.fetch import Fetcher, address
from swtpm_prop.trust.follow import Outcome


@click.command()
@click.option("--url", metavar="URL|DIR", help="The store: https:, file: or a directory; default: url in host.toml.")
@root_option
@output.json_option
def sync(url: str | None, root: Path, as_json: bool) -> None:
    """Fetch what is new in the store, verify it, and bring the index up to date.

    Certificates that this host does not accept are left out and named, then the exit status is 1. If anything is wrong
    with the store itself, the index stays as it was.

    On a host with keys in its TPM approval lists and the fleet's list of revoked hosts are put into force, too.
    """
    layout = Layout(root)
    source = url or host_config.load(layout.host).store.url
    if not source:
        raise UsageError("usage.no-store", "no store is named", f"give --url, or url in [store] of {layout.host}")
    done = follow.sync(layout, address(source), Fetcher(), output.progress, _report)
    installed, refused = store_news.install(layout, done.news)
    done = done._replace(refused=(*done.refused, *refused))
    if as_json:
        _print_json(done, installed)
    else:
        _print(done, installed)
    if done.refused:
        raise click.exceptions.Exit(1)


def _print_json(done: Outcome, installed: Sequence[str]) -> None:
    refused = [{"target": target, "id": error.id, "what": error.what} for target, error in done.refused]
    summary = {**done.summary._asdict(), "expires": format_time(done.summary.expires)}
    changes = {"added": done.added, "removed": done.removed, "refused": refused}
    output.print_json({**changes, "index": summary, "installed": list(installed)})


def _print(done: Outcome, installed: Sequence[str]) -> None:
    for target, error in done.refused:
        click.secho(Error(error.id, f"left out {target}: {error.what}", error.mend).line(), fg="red", err=True)
    click.echo(
        f"certificates: {done.summary.certificates} ({done.added} came, {done.removed} went),"
        f" entries: {done.summary.entries}; guests believe them until {format_time(done.summary.expires)}"
    )
    for what in installed:
        click.echo(printable(what))


def _report(doing: str, _done: int) -> None:
    if doing != "reading certificates" and sys.stderr.isatty():
        click.echo(f"{doing} ...", err=True)
