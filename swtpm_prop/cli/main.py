"""The command line's entry: nouns, loaded only when used, and the one place that turns errors into exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from swtpm_prop import __version__
from swtpm_prop.errors import Error, UsageError

NOUNS = {
    "agent": "answer other hosts and finish interrupted migrations",
    "cert": "make and read property certificates",
    "doctor": "say what is wrong on this host and how to mend it",
    "domain": "switch guests on and off, show their state and log",
    "fleet": "admit hosts to a fleet and revoke them",
    "host": "this host's TPM: keys, enrolment, which states are approved",
    "install": "put swtpm-prop into this host's libvirt",
    "key": "whose keys this host's TPM keeps; seal one anew, bring one back, forget one",
    "pcr": "predict PCR values to seal to or to expect in a quote",
    "store": "publish and follow certificates, build and ask the index",
    "transfer": "migrations under way, and deciding one that stays open",
    "uninstall": "take swtpm-prop out of this host's libvirt",
}


class LazyGroup(click.Group):
    """Imports ``swtpm_prop.cli.<noun>`` and takes its attribute ``command`` when the noun is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The nouns in the order of the alphabet."""
        return sorted(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The noun's command; None if there is no such noun."""
        if cmd_name not in NOUNS:
            return None
        module = importlib.import_module(f"swtpm_prop.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nouns and what they do, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(NOUNS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="swtpm-prop")
def cli() -> None:
    """Virtual TPMs that record certified properties instead of raw digests."""


def main() -> None:
    """Run the command line: 0 done and held, 1 refused or not held, 2 usage."""
    try:
        # Not standalone, it returns what a command asked to exit with (ctx.exit); commands themselves return None.
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
    except UsageError as error:
        click.secho(error.line(), fg="red", err=True)
        sys.exit(2)
    except Error as error:
        click.secho(error.line(), fg="red", err=True)
        sys.exit(1)
