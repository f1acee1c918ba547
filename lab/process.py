"""Run a program to its end, or say how it failed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ENVIRONMENT = {  # what a service manager would give
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
SECONDS = 120.0  # nothing a laboratory runs takes longer; a hang must become a failure


class LabError(RuntimeError):
    """The laboratory could not do what it was asked; the text says what was seen."""


def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` with ``stdin`` as its input and both outputs captured as text.

    Raises:
        LabError: it ended with another status than 0 (unless ``check`` is off), or not in time.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, errors="replace", env=env, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise LabError(f"{' '.join(words)}: still running after {timeout:g} s") from late
    if check and done.returncode:
        raise LabError(f"{' '.join(words)}: status {done.returncode}\n{done.stderr or done.stdout}".rstrip())
    return done
