"""How every noun learns passphrases and PINs: from a file, or from the person at the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from swtpm_prop.errors import printable
from swtpm_prop.limits import KEY_BYTES
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.signers import Ask

_HELP = "Its first line opens the keys; or you are asked."


def option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The ``--passphrase-file`` option; arrives as parameter ``passphrase_file``."""
    return click.option("--passphrase-file", type=click.Path(path_type=Path), metavar="FILE", help=_HELP)(command)


def ask(passphrase_file: Path | None) -> Ask:
    """Who is asked; nothing is read or asked before it is needed."""

    def asked(secret: str) -> str:
        if passphrase_file is not None:
            return read_file(passphrase_file, KEY_BYTES).split(b"\n")[0].decode(errors="replace")
        answer: str = click.prompt(printable(secret), hide_input=True, err=True)
        return answer

    return asked
