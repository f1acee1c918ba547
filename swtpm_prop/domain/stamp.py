"""The agent's stamp in a running guest's metadata: which host's agent a migration's destination has to ask."""

from __future__ import annotations

import re
from typing import NamedTuple

from swtpm_prop.domain.identity import STAMP, Identity
from swtpm_prop.errors import DomainError

NAMESPACE = STAMP
PREFIX = "agent"

ENDPOINT = re.compile(r"(?:[0-9A-Za-z.\-]{1,253}|\[[0-9A-Fa-f:.]{2,64}\]):[0-9]{1,5}")
"""``host:port`` of an agent, as hosts tell it to each other."""

_HOST = re.compile(r"[0-9a-z.\-]{1,253}")


class Stamp(NamedTuple):
    """Where a guest runs.

    Nothing rests on it: the peer has to show by its certificate who it is, and answers for guests of its own alone.

    Attributes:
        endpoint: "host:port" of the agent there.
        host: its name in the fleet, as in its certificate.
    """

    endpoint: str
    host: str


def to_xml(stamp: Stamp) -> str:
    """The element without a namespace, the form that virDomainSetMetadata takes (see `metadata.to_xml`).

    Raises:
        DomainError: ``domain.stamp``: no host could make sense of it.
    """
    if not _sound(stamp):
        raise DomainError(
            "domain.stamp",
            f"'{stamp.endpoint}' and '{stamp.host}' are no endpoint and name that other hosts could use",
            "correct listen or endpoint in [agent] of host.toml",
        )
    return f'<agent endpoint="{stamp.endpoint}" host="{stamp.host}"/>'


def read(identity: Identity) -> Stamp | None:
    """The stamp of a domain XML; None if there is none, or none that an agent would write."""
    stamp = Stamp(identity.stamp.get("endpoint", ""), identity.stamp.get("host", ""))
    return stamp if _sound(stamp) else None


def _sound(stamp: Stamp) -> bool:
    return bool(ENDPOINT.fullmatch(stamp.endpoint) and _HOST.fullmatch(stamp.host))


def transfer(identity: Identity) -> str:
    """The id of the transfer by which libvirt is receiving the guest, as `arrival.note` wrote it; empty if none."""
    return identity.stamp.get("transfer", "")
