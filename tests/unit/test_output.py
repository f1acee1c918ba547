"""What people see: nothing that a certificate, a guest or a log says can act on their terminal."""

from __future__ import annotations

import click
import pytest

from swtpm_prop.cli import output

CLEAR = "\x1b[2J\x1b[1;1H"


@pytest.mark.parametrize("hostile", [CLEAR, "\x1b[8m", "\x1b[32mheld\x1b[0m", "\x1b]0;x\x07", "a\nb"])
def test_no_cell_or_header_acts_on_the_terminal(capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    terminal = click.Context(click.Command("any"))
    terminal.color = True  # as on a terminal; elsewhere click takes the codes out by itself
    with terminal:
        output.table(["PCR", hostile], [[hostile, "held"]])
    shown = capsys.readouterr().out
    assert "\x1b]" not in shown
    assert hostile not in shown
    assert shown.count("\n") == 2


def test_only_states_have_colours_and_no_other_codes_within() -> None:
    assert output.state("held") == "\x1b[32mheld\x1b[0m"
    assert output.state("held      ") == "\x1b[32mheld      \x1b[0m"
    assert "\x1b[2J" not in output.state(f"held{CLEAR}")
