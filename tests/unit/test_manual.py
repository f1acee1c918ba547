"""The manual page and the completions speak of every command and option, and are what man and a shell can read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from swtpm_prop.cli.main import NOUNS, cli
from swtpm_prop.cli.manual import commands, page, write


def rendered() -> str:
    """The page as a reader sees it, on lines that break nothing; a warning of the formatter fails."""
    wide = ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=2000n", "-rLT=2000n"]
    done = subprocess.run(wide, input=page(), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_page_has_every_command_and_option() -> None:
    shown = rendered()
    sections = {}
    named = list(commands())
    starts = [shown.index(f"\n   {' '.join(words)}\n") for words, _ in named]
    for (words, command), start, end in zip(named, starts, [*starts[1:], len(shown)], strict=True):
        sections[words] = shown[start:end]
        usage = " ".join((*words, *command.collect_usage_pieces(click.Context(command))))
        assert f"       swtpm-prop {usage}\n" in sections[words]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        named_there = re.findall(r"(?:^ {7}|, )(-[-\w]+)", sections[words], re.MULTILINE)
        missing = {name for option in options for name in option.opts} - set(named_there)
        assert not missing, words
    assert {noun for noun, *_ in sections} == set(NOUNS)
    assert "--per-package DIR" in sections["cert", "issue"]
    assert "[required]" in sections["cert", "issue"]


def test_prose_is_no_request() -> None:
    lines = page().splitlines()
    assert {line.split()[0] for line in lines if line.startswith(".")} == {
        ".TH",
        ".SH",
        ".SS",
        ".PP",
        ".TP",
        ".B",
        ".I",
    }
    assert not [line for line in lines if line.startswith("'")]


@pytest.mark.parametrize(
    ("words", "found"),
    [("", "store"), ("store ", "publish"), ("cert issue --", "--public-key"), ("domain st", "status")],
)
def test_completion(tmp_path: Path, words: str, found: str) -> None:
    assert CliRunner().invoke(write, [str(tmp_path)]).exit_code == 0
    assert (tmp_path / "man/man1/swtpm-prop.1").read_text() == page()
    script = tmp_path / "bash-completion/completions/swtpm-prop"
    line = f"swtpm-prop {words}".split(" ")
    assert found in completed(line)
    subprocess.run(["bash", "-n", script], check=True)
    assert "_SWTPM_PROP_COMPLETE=bash_complete" in script.read_text()


def completed(line: list[str]) -> list[str]:
    """What the script's call back into the program answers for the last word."""
    environment = {
        "_SWTPM_PROP_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        said = CliRunner().invoke(cli, prog_name="swtpm-prop").stdout
    return [answer.partition(",")[2] for answer in said.splitlines()]
