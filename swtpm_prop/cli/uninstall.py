"""``swtpm-prop uninstall``: take out of this host's libvirt exactly what was put in."""

from __future__ import annotations

from pathlib import Path

import click

from swtpm_prop.cli import output
from swtpm_prop.cli.install import report, restart, root_option
from swtpm_prop.install import steps
from swtpm_prop.layout import Layout


@click.command()
@root_option
@click.option("--purge", is_flag=True, help="Remove certificates, index, logs and configuration as well.")
@output.json_option
def command(root: Path, purge: bool, as_json: bool) -> None:
    """Take out what was put in; what was changed since stays and is named.

    It refuses while guests with property banks run. Guests that are switched off and still opted in will start
    with an ordinary TPM afterwards; those in custody will not start at all, and keep --purge from being done.
    """
    layout = Layout(root)
    kept = steps.in_custody(layout)
    left = [uuid for uuid in steps.opted_in(layout) if uuid not in kept]
    done = steps.uninstall(layout, purge=purge)
    remaining = restart(root)
    if left:
        remaining.append(f"these guests were opted in and now start with an ordinary TPM: {', '.join(left)}")
    if kept:
        what = "the TPM states of these guests are encrypted, they do not start until swtpm-prop is installed again"
        remaining.append(f"{what}: {', '.join(kept)}")
    report(done, remaining, as_json=as_json)
