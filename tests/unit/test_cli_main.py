"""The command line as a program: its exit status, whatever way a command asks for it."""

from __future__ import annotations

import click
import pytest

from swtpm_prop.cli import main
from swtpm_prop.errors import HostError, UsageError


def asks(ctx: click.Context) -> None:
    ctx.exit(1)


def raises(_: click.Context) -> None:
    raise click.exceptions.Exit(1)


def fails(_: click.Context) -> None:
    raise HostError("host.gone", "it is gone")


def misused(_: click.Context) -> None:
    raise UsageError("usage.some", "not so")


def works(_: click.Context) -> None:
    pass


@pytest.mark.parametrize(("body", "status"), [(asks, 1), (raises, 1), (fails, 1), (misused, 2), (works, None)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, body, status):
    group = click.Group(commands=[click.Command("try", callback=click.pass_context(body))])
    monkeypatch.setattr(main, "cli", group)
    monkeypatch.setattr("sys.argv", ["swtpm-prop", "try"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == status
