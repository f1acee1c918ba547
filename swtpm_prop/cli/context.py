"""What a command is run on: this host, unless a test says otherwise."""

from __future__ import annotations

import click

from swtpm_prop.layout import Layout


def layout_of(ctx: click.Context) -> Layout:
    """The layout that the command was given as its context's object; without one this host's."""
    return ctx.find_object(Layout) or Layout()
