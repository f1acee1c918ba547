"""How the demonstration shows itself: chapters, the commands as they run, PCRs side by side, promises kept or not."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click

from lab.process import LabError
from swtpm_prop.cli import output
from swtpm_prop.cli.property_log import MEASURES

Pcrs = Mapping[str, Mapping[int, str]]
"""Bank, number, value in hex."""

Answer = tuple[int, str]
"""A command's exit status and what it said."""

SHOWN = 12  # hex digits of a PCR: enough to see that two differ
TICK = 0.1  # seconds
IMA = 10
WORDS = re.compile(r"\b(held|broken|unmeasured)\b")
REFUSAL = re.compile(r"a policy check failed")


class Stage:
    """Prints to standard output: in colour and with a running clock on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._chapters = 0
        self.broken_promises: list[str] = []

    def chapter(self, title: str, why: str) -> None:
        """Begin a step, with the reason for it."""
        self._chapters += 1
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        click.secho(f"\n{self._chapters}. {title}", bold=True, fg="cyan", nl=False)
        click.secho(f"   [{minutes}:{seconds:02}]", dim=True)
        click.echo(f"{why}\n")

    def say(self, text: str) -> None:
        """A remark between commands."""
        click.echo(f"\n{text}")

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Something that takes long: a clock while it runs, and how long it took."""
        began, done = time.monotonic(), threading.Event()
        clock = threading.Thread(target=_tick, args=(what, began, done), daemon=True)
        if sys.stdout.isatty():
            clock.start()
        else:
            click.echo(f"... {what}")
        try:
            yield
        finally:
            done.set()
            if clock.ident is not None:
                clock.join()
        if sys.stdout.isatty():
            click.secho(f"\r\x1b[K... {what}: {time.monotonic() - began:.0f} s", dim=True)

    def command(self, where: str, line: str, run: Callable[[str], Answer]) -> str:
        """Show a shell line, run it and show what it says, which is returned.

        Raises:
            LabError: it failed.
        """
        status, said = self._shown(where, line, run)
        if status:
            raise LabError(f"that command must not fail: exit status {status}")
        return said

    def attempt(self, where: str, line: str, run: Callable[[str], Answer]) -> Answer:
        """As ``command``, for one that may fail."""
        return self._shown(where, line, run)

    def pcrs(self, before: Pcrs, now: Pcrs, bank: str, held: str) -> None:
        """Raw and property bank side by side: what differs from ``before``, and the property values in words.

        ``held`` is the value known beforehand; nothing else is asked for the words.
        """
        click.echo()
        rows = []
        for pcr in measured(now):
            value, properties = now["sha256"][pcr], now.get(bank, {}).get(pcr, "")
            moved = before and before["sha256"][pcr] != value
            raw = output.paint(f"{value[:SHOWN]} changed", "yellow") if moved else value[:SHOWN]
            words = output.state(word(properties, held)) if properties else "-"
            rows.append((str(pcr), MEASURES[pcr], raw, properties[:SHOWN] or "not active", words))
        output.table(("PCR", "usually measures", "sha256: raw", f"{bank}: property", "in words"), rows)

    def promise(self, text: str, kept: bool) -> None:
        """What was to be shown, and whether it was."""
        click.secho(f"{'   as promised' if kept else '   NOT AS PROMISED'}: {text}", fg="green" if kept else "red")
        if not kept:
            self.broken_promises.append(text)

    def end(self, text: str) -> int:
        """The last words; the exit status."""
        click.echo(f"\nThis took {time.monotonic() - self._began:.0f} seconds. {text}")
        for text in self.broken_promises:
            click.secho(f"not as promised: {text}", fg="red")
        return 1 if self.broken_promises else 0

    def _shown(self, where: str, line: str, run: Callable[[str], Answer]) -> Answer:
        click.secho(f"{where}# ", fg="magenta" if where == "guest" else "blue", bold=True, nl=False)
        click.secho(line, bold=True)
        status, said = run(line)
        for text in said.splitlines():
            click.echo(f"   {WORDS.sub(lambda word: output.state(word[0]), text)}".rstrip())
        return status, said


def measured(pcrs: Pcrs) -> list[int]:
    """The PCRs the boot measured into, without IMA's: what it measures is not this story's."""
    return [pcr for pcr in sorted(MEASURES) if set(pcrs["sha256"][pcr]) != {"0"} and pcr != IMA]


def word(value: str, held: str) -> str:
    """A property PCR's value in words, by the value known beforehand alone."""
    return "held" if value == held else "unmeasured" if set(value) == {"0"} else "broken"


def refused(answer: Answer) -> bool:
    """Whether the TPM refused to unseal because its policy does not hold; any other failure is none."""
    status, said = answer
    return bool(status and REFUSAL.search(said))


def _tick(what: str, began: float, done: threading.Event) -> None:
    for frame in iter(lambda: "|/-\\"[int(time.monotonic() * 8) % 4], None):
        if done.wait(TICK):
            return
        click.echo(f"\r\x1b[K{frame} {what}: {time.monotonic() - began:.0f} s", nl=False)
