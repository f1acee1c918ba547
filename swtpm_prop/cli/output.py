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


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns; cells are made printable, colours (click.style) in cells are kept out of the widths."""
    lines = [[_cell(c) for c in row] for row in rows]
    widths = [max([len(h), *(len(click.unstyle(row[i])) for row in lines)]) for i, h in enumerate(headers)]
    click.secho("  ".join(h.ljust(w) for h, w in zip(headers, widths, strict=True)).rstrip(), bold=True)
    for row in lines:
        padded = (c + " " * (w - len(click.unstyle(c))) for c, w in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _cell(text: str) -> str:
    return text if text != click.unstyle(text) and click.unstyle(text).isprintable() else printable(text)


COLOURS = {"held": "green", "broken": "red", "unmeasured": "yellow"}


def state(word: str) -> str:
    """A PCR state in its colour: held green, broken red, unmeasured yellow."""
    return click.style(word, fg=COLOURS.get(word))


@contextmanager
def progress(items: Sequence[T], label: str) -> Iterator[Iterator[T]]:
    """A progress bar on standard error over ``items``; silent when standard error is no terminal."""
    if not sys.stderr.isatty():
        yield iter(items)
        return
    with click.progressbar(items, label=label, file=sys.stderr) as bar:
        yield iter(bar)
