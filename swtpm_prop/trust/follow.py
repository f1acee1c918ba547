"""Follow a store: fetch it as a TUF client, verify what is new against the trust file, bring the index up to date.

The index is always one of two: as it was, or the new one, whole. Everything else here is a cache that the next sync
completes or throws away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tuf.api import exceptions
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from swtpm_prop.errors import Error, StoreError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import (
    CERTIFICATE_BYTES,
    METADATA_BYTES_MOST,
    ROOT_BYTES,
    ROOT_ROTATIONS,
    STORE_BYTES,
    TIMESTAMP_BYTES,
)
from swtpm_prop.trust import build, certificate, issuers, keys, news
from swtpm_prop.trust.build import Summary
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.files import exclusive, read_file, write_file
from swtpm_prop.trust.floors import Floors, checked, joined
from swtpm_prop.trust.issuers import Trust
from swtpm_prop.trust.repository import FLOORS, ROLES
from swtpm_prop.trust.tables import Report

Running = Callable[[Sequence[str], str], Any]
"""Wraps long work to show progress, as `cli.output.progress`; a context manager of an iterator."""

_TARGET = re.compile(r"certificates/([0-9a-f]{64})\.json")


class Refusal(NamedTuple):
    """A target of the store that is left out, and why."""

    target: str
    error: Error


class Outcome(NamedTuple):
    """What a sync did.

    Attributes:
        added: certificates that are new in the index.
        removed: certificates that left it.
        refused: what of the store is left out.
        summary: what the index holds now.
        news: files with approvals of hosts' states and lists of revoked hosts, as the store has them now; nothing of
            them is verified but that they are the store's.
    """

    added: int
    removed: int
    refused: tuple[Refusal, ...]
    summary: Summary
    news: tuple[Path, ...] = ()


def sync(layout: Layout, url: str, fetcher: FetcherInterface, running: Running, report: Report) -> Outcome:
    """Bring the host's index to what the store at ``url`` says now.

    A certificate that this host does not accept is left out and named, and the others count: it would otherwise be in
    the power of one issuer to stop the revocations of all. Anything wrong with the store itself changes nothing.

    Args:
        layout: where the pinned root, the trust file, the cache and the index are.
        url: ends in a slash; has ``metadata/`` and ``targets/`` below it.
        fetcher: how to get there.
        running: shows progress.
        report: as `build.build` calls it.

    Raises:
        StoreError: ``store.root-missing``, ``store.busy``, ``store.write``; of the store ``store.download``,
            ``store.too-large``, ``store.signature``, ``store.expired``, ``store.rollback``, ``store.mismatch``,
            ``store.invalid``; and what `build.update` raises.
        TrustError: what `issuers.load` raises.
    """
    trust, own = issuers.load(layout.trust), issuers.load_floors(layout.trust)
    with _alone(layout):
        cache = _Cache(layout.store, trust)
        with _told(url):
            updater = _refreshed(layout, url, fetcher)
            roles = _accepted(layout)
            end = _end(roles, build.last_seen(layout.index))
            floors = joined(own, _floors(roles[Targets.type]))
            listed, told, refused = _listed(roles[Targets.type])
            _fetch(updater, cache, listed, running)
            _fetch_news(updater, cache, told)
        refused += _verify(cache, listed, trust, running)
        held = build.held(layout.index)
        wanted = {cache.verified[name]: name for name in listed if name in cache.verified}
        added = [name for id, name in wanted.items() if id not in held]
        try:
            summary = build.update(layout.index, cache.certificates(added), held - wanted.keys(), end, report, floors)
        except StoreError as error:
            if error.id != "store.index-corrupt":
                raise
            summary = build.build(layout.index, cache.certificates(wanted.values()), end, report, floors)
        cache.sweep(listed)
        kept = news.sweep(layout.store, told)
    return Outcome(len(added), len(held - wanted.keys()), tuple(refused), summary, kept)


def _alone(layout: Layout) -> AbstractContextManager[int]:
    try:
        layout.store.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            "store.directory",
            f"'{layout.store}' cannot be made: {error.strerror}",
            "be root, and see that swtpm-prop is installed and its disk is whole",
        ) from error
    return exclusive(layout.store, "the host's copy of the store")


# -- fetching -----------------------------------------------------------------------------------


def _refreshed(layout: Layout, url: str, fetcher: FetcherInterface) -> Updater:
    """Follow the chain of roots from the pinned one, then take timestamp, snapshot and targets."""
    try:
        pinned = read_file(layout.store_root, ROOT_BYTES)
    except TrustError as error:
        mend = "get the store's first root from its publisher by a way you trust"
        raise StoreError("store.root-missing", error.what, mend) from error
    config = UpdaterConfig(
        max_root_rotations=ROOT_ROTATIONS,
        root_max_length=ROOT_BYTES,
        timestamp_max_length=TIMESTAMP_BYTES,
        snapshot_max_length=METADATA_BYTES_MOST,
        targets_max_length=METADATA_BYTES_MOST,
    )
    place = str(layout.store / "metadata")
    Path(place).mkdir(exist_ok=True)
    updater = Updater(place, f"{url}metadata/", None, f"{url}targets/", fetcher, config, bootstrap=pinned)
    updater.refresh()
    return updater


def _accepted(layout: Layout) -> dict[str, Any]:
    """What the refresh accepted and kept, by role."""
    kept = layout.store / "metadata"
    return {role: Metadata.from_file(str(kept / f"{role}.json")).signed for role in ROLES}


def _end(roles: Mapping[str, Any], seen: int) -> int:
    """What nobody renews counts no longer: the first role to run out ends the index. ``seen`` is the latest time seen.

    The TUF client has compared them with the clock; it may have been set back.
    """
    end = int(min(role.expires for role in roles.values()).timestamp())
    if end < seen:
        what = f"the store expired at {certificate.format_time(end)}, and this host has seen later times than that"
        raise StoreError(
            "store.expired", what, "set the clock of this host; if it is right, run swtpm-prop store build"
        )
    return end


def _floors(targets: Targets) -> Floors:
    try:
        return checked(targets.unrecognized_fields.get(FLOORS, {}))
    except TrustError as error:
        raise StoreError("store.invalid", f"the store makes no sense: {error.what}", _WAIT) from error


def _listed(targets: Targets) -> tuple[dict[str, TargetFile], dict[str, TargetFile], list[Refusal]]:
    """The certificates the store lists, by SHA-256 in hex; its news, by path; what it lists that is neither."""
    listed: dict[str, TargetFile] = {}
    told: dict[str, TargetFile] = {}
    refused = []
    for path, target in targets.targets.items():
        try:
            if path.startswith(news.PREFIX):
                news.check(target)
                told[path] = target
            else:
                listed[_certificate(target)] = target
        except StoreError as error:
            refused.append(Refusal(path, error))
    total = sum(target.length for each in (listed, told) for target in each.values())
    if total > STORE_BYTES:
        raise StoreError(
            "store.too-large",
            f"the store has {total} bytes, allowed are {STORE_BYTES}",
            "ask the publisher to take out what nobody needs",
        )
    return listed, told, refused


def _certificate(target: TargetFile) -> str:
    """The SHA-256 that names a certificate."""
    name = _TARGET.fullmatch(target.path)
    # Other hashes beside it would take part in the name by which it is fetched.
    if name is None or target.hashes != {"sha256": name[1]}:
        raise StoreError(
            "store.target",
            "it is not named by its SHA-256 below certificates/",
            "ask the publisher to publish with swtpm-prop store publish",
        )
    if target.length > CERTIFICATE_BYTES:
        raise StoreError(
            "store.too-large",
            f"it has {target.length} bytes, allowed are {CERTIFICATE_BYTES}",
            "ask the publisher to divide this certificate",
        )
    return name[1]


def _fetch_news(updater: Updater, cache: _Cache, told: Mapping[str, TargetFile]) -> None:
    for path, target in told.items():
        if not news.is_kept(cache.directory, target):
            updater.download_target(target, str(cache.new))
            cache.keep(cache.directory / path)


def _fetch(updater: Updater, cache: _Cache, listed: Mapping[str, TargetFile], running: Running) -> None:
    kept = cache.names()
    absent = [name for name in listed if name not in kept]
    with running(absent, "fetching") as each:
        for name in each:
            updater.download_target(listed[name], str(cache.new))
            cache.keep(cache.path(name))


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Every way in which a store can be unusable, as one of our errors."""
    try:
        yield
    except exceptions.DownloadLengthMismatchError as error:
        raise StoreError("store.too-large", f"the store sends more than it may: {error}", _WAIT) from error
    except exceptions.DownloadError as error:
        raise StoreError("store.download", f"the store at {url} cannot be fetched: {error}", "try again") from error
    except exceptions.RepositoryError as error:
        id, what = next(
            (row[1:] for row in _UNUSABLE if isinstance(error, row[0])), ("store.invalid", "makes no sense")
        )
        raise StoreError(id, f"the store {what}: {error}", _WAIT) from error


_WAIT = "the index stays as it was; tell the store's publisher if it lasts"
_UNUSABLE: tuple[tuple[type[Exception], str, str], ...] = (
    (
        exceptions.ExpiredMetadataError,
        "store.expired",
        "has expired, or somebody withholds what is new, or the clock is wrong",
    ),
    (exceptions.BadVersionNumberError, "store.rollback", "is older than what this host has seen"),
    (exceptions.UnsignedMetadataError, "store.signature", "is not signed as its root demands"),
    (exceptions.LengthOrHashMismatchError, "store.mismatch", "does not match its own metadata"),
)


# -- verifying ----------------------------------------------------------------------------------


class _Cache:
    """What was fetched, and under which trust file it was verified."""

    def __init__(self, directory: Path, trust: Trust) -> None:
        self.directory = directory
        self._record = directory / "verified.json"
        self._trust = _fingerprint(trust)
        self.new = directory / "new"
        self.verified = self._read_record()
        """Certificates that are good under the present trust file: SHA-256 of the file to the certificate's id."""
        for kind in ("certificates", news.PREFIX):
            (directory / kind).mkdir(exist_ok=True)
        # What a killed sync was writing.
        for left in (self.new, *directory.glob("metadata/tmp*"), *directory.glob(".verified.json.*")):
            left.unlink(missing_ok=True)

    def names(self) -> set[str]:
        """What is kept, by SHA-256."""
        return {file.stem for file in (self.directory / "certificates").iterdir()}

    def path(self, name: str) -> Path:
        """Where the file with this SHA-256 is kept."""
        return self.directory / "certificates" / f"{name}.json"

    def keep(self, path: Path) -> None:
        """Keep there what was just fetched."""
        with self.new.open("rb") as file:
            os.fsync(file.fileno())
        self.new.replace(path)

    def read(self, name: str) -> bytes:
        """The file, as its name says it is; what the disk has spoilt is forgotten."""
        data = read_file(self.path(name), CERTIFICATE_BYTES)
        if hashlib.sha256(data).hexdigest() != name:
            self.path(name).unlink()
            raise StoreError("store.damaged", f"the copy of certificate {name} is damaged", "sync again")
        return data

    def certificates(self, names: Iterable[str]) -> Iterator[Certificate]:
        """Certificates that were verified, read again: a store is larger than memory."""
        for name in names:
            yield certificate.read(self.read(name))

    def save(self) -> None:
        """Remember what is verified, so that it need not be again."""
        value = {"trust": self._trust, "certificates": self.verified}
        write_file(self._record, json.dumps(value).encode())

    def sweep(self, listed: Mapping[str, TargetFile]) -> None:
        """Throw away what the store no longer lists."""
        for name in self.names() - listed.keys():
            self.path(name).unlink()

    def _read_record(self) -> dict[str, str]:
        """Nothing if it is missing, damaged or of another trust file: then everything is verified again."""
        try:
            value = json.loads(self._record.read_bytes())
            return dict(value["certificates"]) if value["trust"] == self._trust else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}


def _verify(cache: _Cache, listed: Mapping[str, TargetFile], trust: Trust, running: Running) -> list[Refusal]:
    """Verify what was not yet; the window is left to the index, which judges each measurement by it."""
    cache.verified = {name: id for name, id in cache.verified.items() if name in listed}
    refused = []
    with running([name for name in listed if name not in cache.verified], "verifying") as each:
        for name in each:
            try:
                cache.verified[name] = certificate.verify(cache.read(name), trust, None).id
            except TrustError as error:
                refused.append(Refusal(listed[name].path, error))
    cache.save()
    return refused


def _fingerprint(trust: Trust) -> str:
    """SHA-256 over what the trust file says, keys in files included."""
    said = [(i.id, sorted(map(keys.keyid, i.keys)), sorted(i.prefixes), i.threshold) for _, i in sorted(trust.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
