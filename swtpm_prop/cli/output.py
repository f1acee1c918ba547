"""How every noun prints: tables and colour for people on a terminal, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from swtpm_prop.errors import printable

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """The ``--json`` option that everything that prints has; arrives as parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def print_json(value: Any) -> None:
    """Print one JSON value; every character beyond ASCII is escaped."""
    click.echo(json.dumps(value, indent=2, sort_keys=False, ensure_ascii=True))


class Painted(str):
    """A cell in a colour of ours, whose text is printable already."""


def paint(text: str, colour: str | None) -> Painted:
    """The text, whoever wrote it, made printable and in a colour."""
    return Painted(click.style(printable(text), fg=colour))


ROW_CHARS = 160
"""As much of a name or a description stands in a row of a table or a log; JSON has all of it."""


def cut(text: str) -> str:
    """At most ROW_CHARS printable characters, with an ellipsis where there were more."""
    text = printable(text)
    return text if len(text) <= ROW_CHARS else text[: ROW_CHARS - 1] + "…"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns; all that is not `Painted` is made printable, colours are kept out of the widths."""
    heads = [printable(header) for header in headers]
    lines = [[cell if isinstance(cell, Painted) else printable(cell) for cell in row] for row in rows]
    widths = [max([len(h), *(len(click.unstyle(row[i])) for row in lines)]) for i, h in enumerate(heads)]
    click.secho("  ".join(h.ljust(w) for h, w in zip(heads, widths, strict=True)).rstrip(), bold=True)
    for row in lines:
        padded = (c + " " * (w - len(click.unstyle(c))) for c, w in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


COLOURS = {"held": "green", "broken": "red", "unmeasured": "yellow"}


def state(word: str) -> Painted:
    """A PCR state in its colour, padded or not: held green, broken red, unmeasured yellow."""
    return paint(word, COLOURS.get(word.strip()))


@contextmanager
def progress(items: Sequence[T], label: str) -> Iterator[Iterator[T]]:
    """A progress bar on standard error over ``items``; silent when standard error is no terminal."""
    if not sys.stderr.isatty():
        yield iter(items)
        return
    with click.progressbar(items, label=label, file=sys.stderr) as bar:
        yield iter(bar)


def warn(text: str) -> None:
    """A warning on standard error."""
    click.secho(f"warning: {printable(text)}", fg="yellow", err=True)
