"""What the operator decides for this host: ``host.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from swtpm_prop.errors import HostError
from swtpm_prop.limits import HOST_BYTES, PCRS


class StoreConfig(NamedTuple):
    """The certificates that count here.

    Attributes:
        url: the store that ``store sync`` follows; empty: none.
        stale: whether an opted-in guest may start ("warn": with nothing certified) or not ("refuse") once the index
            has expired.
    """

    url: str = ""
    stale: str = "warn"


class TpmConfig(NamedTuple):
    """The host's own TPM.

    Attributes:
        tcti: how to reach it, as tpm2-tss names it (Tss2_TctiLdr_Initialize).
        pcrs: what of the SHA-256 bank makes the host's state, in rising order.
        event_log: what the firmware measured.
    """

    tcti: str = "device:/dev/tpmrm0"
    pcrs: tuple[int, ...] = tuple(range(8))
    event_log: Path = Path("/sys/kernel/security/tpm0/binary_bios_measurements")


class CustodyConfig(NamedTuple):
    """The keys of guests.

    Attributes:
        recovery: public keys that a guest's key is also wrapped to; PEM files.
    """

    recovery: tuple[Path, ...] = ()


class AgentConfig(NamedTuple):
    """The door to other hosts; each a "host:port".

    Attributes:
        listen: where the agent listens for other hosts.
        endpoint: where other hosts reach it; empty: this host's name and the port of ``listen``.
        peers: agents to ask for a guest whose metadata names none.
        metrics: where the agent serves its metrics and its health, on loopback.
    """

    listen: str = "0.0.0.0:4879"
    endpoint: str = ""
    peers: tuple[str, ...] = ()
    metrics: str = "127.0.0.1:9879"

    def reached_at(self, host: str) -> str:
        """Where other hosts reach the agent of this one, whose name in the fleet is ``host``."""
        return self.endpoint or f"{host}:{self.listen.rpartition(':')[2]}"


class HostConfig(NamedTuple):
    """The host's configuration, a field for each table."""

    store: StoreConfig = StoreConfig()
    tpm: TpmConfig = TpmConfig()
    custody: CustodyConfig = CustodyConfig()
    agent: AgentConfig = AgentConfig()


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
    try:
        return _parse(data, path.parent)
    except ValueError as error:
        raise _refused(path, str(error)) from None


def _parse(data: bytes, directory: Path) -> HostConfig:
    if len(data) > HOST_BYTES:
        raise ValueError(f"it has more than {HOST_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no TOML: {error}") from None
    unknown = sorted(document.keys() - set(HostConfig._fields))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not known")
    return HostConfig(
        StoreConfig(**_table(document, "store", {"url": _text, "stale": _stale})),
        TpmConfig(**_table(document, "tpm", {"tcti": _words, "pcrs": parse_pcrs, "event-log": _path(directory)})),
        CustodyConfig(**_table(document, "custody", {"recovery": _list(_path(directory))})),
        AgentConfig(**_table(document, "agent", _AGENT)),
    )


def _table(document: dict[str, Any], name: str, readers: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """A table's values as the readers give them, by the names of the fields."""
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"'{name}' is no table")
    unknown = sorted(table.keys() - readers)
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not known")
    values = {}
    for key, value in table.items():
        try:
            values[key.replace("-", "_")] = readers[key](value)
        except ValueError as error:
            raise ValueError(f"{name}.{key} {error}") from None
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no string")
    return value


def _words(value: Any) -> str:
    if not _text(value):
        raise ValueError("is empty")
    return _text(value)


def _stale(value: Any) -> str:
    if value not in ("warn", "refuse"):
        raise ValueError("is neither of warn and refuse")
    return _text(value)


def parse_pcrs(value: Any) -> tuple[int, ...]:
    """PCRs of a host from a list like "0-4,7", in rising order.

    Raises:
        ValueError: says what is wrong, after "has", "names" or "is".
    """
    pcrs: set[int] = set()
    for item in _text(value).split(","):
        match = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", item)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span or span[-1] >= PCRS or pcrs.intersection(span):
            raise ValueError(f"has '{item}', which is no further PCR and no rising range of them")
        pcrs.update(span)
    # Any program may reset these two, and extend them anew.
    if pcrs & {16, 23}:
        raise ValueError("names PCR 16 or 23, which say nothing about a host")
    return tuple(sorted(pcrs))


def _path(directory: Path) -> Callable[[Any], Path]:
    return lambda value: directory / _words(value)


def _list(reader: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError("is no list")
        return tuple(reader(each) for each in value)

    return read


def _endpoint(value: Any) -> str:
    host, _, port = _text(value).rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError("is no host:port")
    return _text(value)


def _loopback(value: Any) -> str:
    from ipaddress import ip_address  # every start of a guest in custody reads this file; few say this

    host = _endpoint(value).rpartition(":")[0].strip("[]")
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError("is not on loopback (127.0.0.0/8, [::1] or localhost): whoever asks is not asked who it is")
    return _text(value)


_AGENT = {
    "listen": _endpoint,
    "endpoint": lambda value: value if value == "" else _endpoint(value),
    "peers": _list(_endpoint),
    "metrics": _loopback,
}


def _refused(path: Path, why: str) -> HostError:
    return HostError("host.config", f"'{path}' is not usable: {why}", "correct it; see the operator's guide")
