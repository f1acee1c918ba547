"""``swtpm-prop install``: put the product into this host's libvirt."""

from __future__ import annotations

from pathlib import Path

import click

from swtpm_prop.cli import output
from swtpm_prop.doctor.daemon import agents, running
from swtpm_prop.install import steps
from swtpm_prop.install.survey import survey
from swtpm_prop.layout import Layout

root_option = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    default="/",
    help="The host's root directory, where it is not the running system.",
)


@click.command()
@root_option
@output.json_option
def command(root: Path, as_json: bool) -> None:
    """Put hook, start scripts, service drop-ins and AppArmor additions in place.

    Repeating it does no harm, and brings an older release up to this one. What is in the way is never overwritten.
    With --root, this command's interpreter must be found at the same path on that host.
    """
    layout = Layout(root)
    host = survey(layout)
    done = steps.install(layout, host)
    remaining = restart(root) if done else []
    if root == Path("/"):
        remaining += earlier_agents(host.package)
    if not layout.index.exists():
        remaining.append("swtpm-prop store sync or store build: without an index no guest with property banks starts")
    report(done, remaining, as_json=as_json)


def restart(root: Path) -> list[str]:
    """What is left to the operator: the daemon reads its PATH only when it starts."""
    if root != Path("/"):
        return ["start that host; its libvirt finds swtpm-prop when it starts"]
    daemons = sorted({daemon.name for daemon in running()})
    systemd = Path("/run/systemd/system").is_dir()
    reload = ["systemctl daemon-reload"] if systemd else []
    if not daemons:
        return [*reload, "nothing else: no libvirt daemon runs"]
    if systemd:
        return [*reload, *(f"systemctl restart {name}" for name in daemons)]
    return [f"restart {name} with the PATH of its service drop-in" for name in daemons]


def earlier_agents(package: Path) -> list[str]:
    """Agents that started before this package was put in place: they run on from what was there then."""
    since = max(file.stat().st_ctime for file in package.rglob("*.py"))
    systemd = Path("/run/systemd/system").is_dir()
    how = "systemctl restart swtpm-prop-agent.service" if systemd else "restart swtpm-prop agent"
    return [f"{how}: process {agent.pid} is of an earlier release" for agent in agents() if agent.started < since]


def report(done: list[steps.Done], remaining: list[str], *, as_json: bool) -> None:
    """Print what was done and what is left to do."""
    if as_json:
        output.print_json({"done": [{"action": a, "path": p} for a, p in done], "remaining": remaining})
        return
    if done:
        output.table(("done", "path"), done)
    else:
        click.echo("Nothing was to be done.")
    if remaining:
        click.secho("\nLeft to you:", bold=True)
    for line in remaining:
        click.echo(f"  {line}")
