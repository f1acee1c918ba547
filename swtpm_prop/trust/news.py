"""How approvals of hosts' states and lists of revoked hosts travel in a store, beside the certificates.

The store carries them and says which is newest; whoever takes them verifies them (`attest.news`). Each kind has one
file for each who speaks, so that the next edition takes the place of the last: ``news/approvals-<key id>.json`` and
``news/fleet-<key id>.crl``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from tuf.api.metadata import TargetFile

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import NEWS_BYTES
from swtpm_prop.trust.files import read_file, write_file

PREFIX = "news/"

_FORM = re.compile(r"news/(?:approvals-[0-9a-f]{64}\.json|fleet-[0-9a-f]{40}\.crl)")
_HASH = re.compile(r"[0-9a-f]{64}")


def is_name(target: str) -> bool:
    """Whether a target of a store, or a file of a publisher, can be one of these."""
    return _FORM.fullmatch(target) is not None


def check(target: TargetFile) -> None:
    """Refuse what cannot be one of these.

    Raises:
        StoreError: ``store.target``, ``store.too-large``.
    """
    # The hash takes part in the name by which it is fetched, and so would others beside it.
    hashes = target.hashes
    if not is_name(target.path) or hashes.keys() != {"sha256"} or _HASH.fullmatch(hashes["sha256"]) is None:
        raise StoreError(
            "store.target",
            "it is no approval list and no list of revoked hosts",
            "ask the publisher to publish with swtpm-prop store publish",
        )
    if target.length > NEWS_BYTES:
        raise StoreError(
            "store.too-large", f"it has {target.length} bytes, allowed are {NEWS_BYTES}", "ask the publisher why"
        )


def place(directory: Path, name: str, data: bytes) -> bool:
    """Put one into a publisher's directory for the next publication; returns whether that changes anything.

    Raises:
        TrustError: as `write_file`.
    """
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    if path.exists() and path.read_bytes() == data:
        return False
    write_file(path, data)
    return True


def targets(directory: Path) -> dict[str, TargetFile]:
    """What a publisher's directory has of them; editors' files and the like are passed over.

    Raises:
        TrustError: as `read_file`.
    """
    names = (f"{PREFIX}{path.name}" for path in sorted((directory / PREFIX).glob("*")))
    return {name: _target(name, read_file(directory / name, NEWS_BYTES)) for name in names if is_name(name)}


def is_kept(directory: Path, target: TargetFile) -> bool:
    """Whether a host has this very edition in its copy of the store."""
    path = directory / target.path
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == target.hashes["sha256"]


def sweep(directory: Path, listed: Mapping[str, TargetFile]) -> tuple[Path, ...]:
    """Throw away what the store no longer lists; returns what stays."""
    for path in (directory / PREFIX).glob("*"):
        if f"{PREFIX}{path.name}" not in listed:
            path.unlink()
    return tuple(directory / name for name in sorted(listed))


def _target(name: str, data: bytes) -> TargetFile:
    return TargetFile(len(data), {"sha256": hashlib.sha256(data).hexdigest()}, name)
