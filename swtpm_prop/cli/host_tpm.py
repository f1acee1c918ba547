"""What the verbs of ``swtpm-prop host`` share: PCRs and the event log of this host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from swtpm_prop import host_config
from swtpm_prop.errors import UsageError
from swtpm_prop.host_config import TpmConfig
from swtpm_prop.limits import EVENT_LOG_BYTES
from swtpm_prop.trust.files import read_file

pcrs_option = click.option("--pcrs", metavar="LIST", help="Of which PCRs, like 0-7; default: those of host.toml.")
event_log_option = click.option(
    "--event-log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What the firmware measured; default: that of host.toml.",
)


def chosen_pcrs(pcrs: str | None, config: TpmConfig) -> Sequence[int]:
    """Those of ``--pcrs``, or else those of the configuration; in rising order.

    Raises:
        UsageError: ``usage.pcrs``.
    """
    if pcrs is None:
        return config.pcrs
    try:
        return host_config.parse_pcrs(pcrs)
    except ValueError as error:
        raise UsageError("usage.pcrs", f"--pcrs {error}", "write them like 0-4,7") from None


def read_event_log(named: Path | None, config: TpmConfig) -> bytes:
    """The event log; empty if none is named and this host's firmware left none.

    Raises:
        TrustError: as `read_file`.
    """
    if named is None and not config.event_log.exists():
        return b""
    return read_file(named or config.event_log, EVENT_LOG_BYTES)
