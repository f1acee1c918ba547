"""``python -m swtpm_prop.cli.manual DIR``: manual page and shell completions, made of the commands themselves.

DIR is a prefix's ``share``; whoever installs or packages the program runs this once. The page is in man(7).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

from swtpm_prop import __version__
from swtpm_prop.cli.main import NOUNS, cli
from swtpm_prop.layout import Layout

NAME = "swtpm-prop"

_DESCRIPTION = (
    "A virtual TPM records hashes, so every update of a guest loses what was sealed to it. swtpm-prop lets one PCR "
    "bank of a libvirt guest's emulated TPM record properties that a trusted party certified for those hashes. What "
    "is sealed to that bank survives every certified update; the other banks stay as they are.",
    "A guest opts in by an element in the metadata of its domain. Every command takes --help; everything that prints "
    "takes --json.",
)
_FILES = {
    Layout().trust: "Whom to trust for which properties.",
    Layout().host: "What the operator decides for this host.",
    Layout().store_root: "The first root of the store that this host follows.",
    Layout().index: "The certificate index that every guest reads.",
    Layout().guest_log("UUID"): "A guest's property log: each measurement, and which certificate applied or why none.",
}
_EXIT = "0 done, or held; 1 refused, not held, or a problem found; 2 wrong usage."
_SEE = "swtpm(8), virsh(1), tpm2_unseal(1), systemd-cryptenroll(1)"

_PLACES = {
    BashComplete: f"bash-completion/completions/{NAME}",
    ZshComplete: f"zsh/site-functions/_{NAME}",
    FishComplete: f"fish/vendor_completions.d/{NAME}.fish",
}


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
def write(directory: Path) -> None:
    """Write manual page and completions below DIR, a prefix's share."""
    files = {f"man/man1/{NAME}.1": page()}
    for shell, place in _PLACES.items():
        files[place] = shell(cli, {}, NAME, f"_{NAME.upper().replace('-', '_')}_COMPLETE").source()
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def page() -> str:
    """The manual page: every noun, verb and option."""
    lines = [
        f'.TH {NAME.upper()} 1 "" "{NAME} {__version__}"',
        *(".SH NAME", f"{NAME} \\- {_text((cli.help or '').rstrip('.'))}"),
        *(".SH SYNOPSIS", f".B {_text(NAME)}", ".I noun", "[\\fIverb\\fR] [\\fIargument\\fR ...]"),
        ".SH DESCRIPTION",
    ]
    for paragraph in _DESCRIPTION:
        lines += [".PP", _text(paragraph)]
    for noun, what in sorted(NOUNS.items()):
        lines += _item(noun, f"{what[0].upper()}{what[1:]}.")
    lines.append(".SH COMMANDS")
    for words, command in commands():
        lines += _command(words, command)
    lines.append(".SH FILES")
    for path, what in _FILES.items():
        lines += _item(str(path), what)
    lines += [".SH EXIT STATUS", _text(_EXIT), ".SH SEE ALSO", _text(_SEE)]
    return "\n".join(lines) + "\n"


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Everything that can be run, with the words that name it, in the order of the alphabet."""
    context = click.Context(cli)
    for noun in cli.list_commands(context):
        yield from _below((noun,), cli.get_command(context, noun))


def _below(words: tuple[str, ...], command: click.Command | None) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for verb, inner in sorted(command.commands.items()):
            yield from _below((*words, verb), inner)
    elif command is not None:
        yield words, command


def _command(words: tuple[str, ...], command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(words))
    usage = " ".join((NAME, *words, *command.collect_usage_pieces(context)))
    yield f".SS {_text(' '.join(words))}"
    yield f".B {_text(usage)}"
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        yield from (".PP", _text(" ".join(paragraph.replace("\b", "").split())))
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            yield from _item(*record)


def _item(term: str, what: str) -> Iterator[str]:
    yield from (".TP", f".B {_text(term)}", _text(what))


def _text(text: str) -> str:
    """Plain text as roff reads it: no escapes, no requests, hyphens that can be copied into a shell."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    write()
