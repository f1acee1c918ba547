"""What a guest's own logs say of its measurements: the options that name the logs, and what they are read to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from swtpm_prop.errors import WireError
from swtpm_prop.limits import EVENT_LOG_BYTES, IMA_LOG_BYTES
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.measurements import Known, Measurement, of_event_log, of_ima_list

Command = TypeVar("Command", bound=Callable[..., Any])


def options(command: Command) -> Command:
    """``--event-log`` and ``--ima-log`` of a guest, for descriptions; arrive as ``event_log`` and ``ima_log``."""
    file = click.Path(path_type=Path)
    ima = click.option("--ima-log", multiple=True, type=file, metavar="FILE", help="The guest's IMA list, as well.")
    log = click.option(
        "--event-log", multiple=True, type=file, metavar="FILE", help="The guest's event log, to say more."
    )
    return log(ima(command))


def known(event_logs: Sequence[Path], ima_logs: Sequence[Path]) -> Known:
    """All that the logs describe.

    Raises:
        TrustError: a file cannot be read.
        WireError: ``eventlog.*``, ``imalog.*``.
    """

    def measurements() -> Iterator[Measurement]:
        for path in event_logs:
            yield from _described(path, of_event_log(read_file(path, EVENT_LOG_BYTES)))
        for path in ima_logs:
            yield from _described(path, of_ima_list(read_file(path, IMA_LOG_BYTES)))

    return Known(measurements())


def _described(path: Path, found: Iterator[Measurement]) -> Iterator[Measurement]:
    """Whatever is wrong with a log says which one."""
    try:
        yield from found
    except WireError as error:
        mend = "copy it from the guest again, and name firmware's log and IMA's list each with its own option"
        raise WireError(error.id, f"{path}: {error.what}", mend) from error
