"""What the operator decides for this host: ``host.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from swtpm_prop.errors import HostError
from swtpm_prop.limits import HOST_BYTES

_STALE = ("warn", "refuse")


class HostConfig(NamedTuple):
    """The host's configuration.

    Attributes:
        url: the store that ``store sync`` follows; empty: none.
        stale: whether an opted-in guest may start ("warn": with nothing certified) or not ("refuse") once the index
            has expired.
    """

    url: str = ""
    stale: str = "warn"


def load(path: Path) -> HostConfig:
    """Read the file; without one everything is as it comes.

    Raises:
        HostError: ``host.config``: a misspelt word must not silently mean the default.
    """
    try:
        with path.open("rb") as file:
            data = file.read(HOST_BYTES + 1)
    except FileNotFoundError:
        return HostConfig()
    except OSError as error:
        raise _refused(path, str(error)) from error
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> HostConfig:
    if len(data) > HOST_BYTES:
        raise _refused(path, f"it has more than {HOST_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"it is no TOML: {error}") from None
    store = document.get("store", {})
    unknown = sorted(document.keys() - {"store"}) or sorted(_keys(path, store) - set(HostConfig._fields))
    if unknown:
        raise _refused(path, f"'{unknown[0]}' is not known")
    config = HostConfig(**store)
    if not isinstance(config.url, str):
        raise _refused(path, "store.url is no string")
    if config.stale not in _STALE:
        raise _refused(path, f"store.stale is neither of {' and '.join(_STALE)}")
    return config


def _keys(path: Path, table: Any) -> set[str]:
    if not isinstance(table, dict):
        raise _refused(path, "'store' is no table")
    return set(table)


def _refused(path: Path, why: str) -> HostError:
    return HostError("host.config", f"'{path}' is not usable: {why}", "correct it; see the operator's guide")
