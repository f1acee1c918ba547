"""``swtpm-prop doctor``: say what is wrong on this host and how to mend it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from swtpm_prop.cli import output
from swtpm_prop.cli.install import root_option
from swtpm_prop.doctor.checks import examine
from swtpm_prop.doctor.finding import Finding, Patient, State
from swtpm_prop.errors import printable
from swtpm_prop.layout import Layout

COLOURS = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "red"}


@click.command()
@root_option
@output.json_option
def command(root: Path, as_json: bool) -> None:
    """Examine the host; exit status 1 if there is a problem.

    With --root, only files are looked at: no process, and no program of that host is run.
    """
    findings = examine(Patient(Layout(root), live=root == Path("/")))
    if as_json:
        output.print_json([finding._asdict() for finding in findings])
    else:
        _print(findings)
    if any(finding.state is State.PROBLEM for finding in findings):
        sys.exit(1)


def _print(findings: list[Finding]) -> None:
    output.table(
        ("state", "finding", "what"), [(output.paint(f.state, COLOURS[f.state]), f.id, f.what) for f in findings]
    )
    for finding in findings:
        if finding.mend:
            click.echo(f"\n{click.style(finding.id, bold=True)}: {printable(finding.mend)}")
