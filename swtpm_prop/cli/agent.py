"""``swtpm-prop agent``: answer other hosts and finish interrupted migrations, until told to end."""

from __future__ import annotations

import logging
import signal
import sys
import threading

import click

from swtpm_prop.agent.daemon import Agent
from swtpm_prop.agent.notify import notify
from swtpm_prop.cli.context import layout_of
from swtpm_prop.cli.guest import LOCAL
from swtpm_prop.errors import printable


class _Line(logging.Formatter):
    """A record is one line; journald adds the time, and reads the level from the number in front (sd-daemon(3))."""

    _LEVELS = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (logging.NOTSET, "<7>"))

    def format(self, record: logging.LogRecord) -> str:
        number = next(text for level, text in self._LEVELS if record.levelno >= level)
        return ("" if sys.stderr.isatty() else number) + printable(record.getMessage())


@click.command()
@click.option("--connect", "uri", default=LOCAL, show_default=True, help="libvirt's URI.")
@click.pass_context
def command(ctx: click.Context, uri: str) -> None:
    """Answer other hosts, note where guests run, and finish migrations that something interrupted.

    Runs in the foreground until SIGTERM or SIGINT; systemd runs it as swtpm-prop-agent.service.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    agent = Agent(layout_of(ctx), uri)
    agent.run(stopped, lambda: notify("READY=1"), lambda: notify("STOPPING=1"))
