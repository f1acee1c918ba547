"""Builds the certificate index from verified certificates: all of it or nothing, the same bytes for the same input."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.trust import tables
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.files import exclusive
from swtpm_prop.trust.index import Index, slot
from swtpm_prop.trust.tables import Report


class Summary(NamedTuple):
    """What an index holds: certificates, entries (distinct digests of a certificate), end of use, size in bytes."""

    certificates: int
    entries: int
    expires: int
    size: int


def build(path: Path, certificates: Iterable[Certificate], expires: int | None, report: Report) -> Summary:
    """Replace the index at ``path``; whatever goes wrong, the old one stays and nothing else is left.

    Args:
        path: where guests read it; its directory exists.
        certificates: verified ones (`certificate.verify`), taken one by one; the same one twice is one.
        expires: seconds since the epoch after which nothing in it counts; None: the latest end of a certificate.
        report: called as it goes.

    Raises:
        StoreError: ``store.directory``, ``store.busy`` (another build runs), ``store.write``, ``store.no-expiry`` (no
            certificate and no ``expires``), ``store.collision``, ``store.candidates``.
        Error: whatever ``certificates`` raises.
    """
    with _replacing(path) as new, _writing(new) as db:
        db.executescript(tables.SCHEMA)
        # One transaction: SQLite's change counter, and with it the bytes, depend on nothing else.
        db.execute("BEGIN")
        entries = tables.fill(db, certificates, expires, report)
        db.execute("COMMIT")
        report("checking", entries)
        if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise StoreError("store.write", "SQLite built a file that it does not accept", "check disk and memory")
    return _summary(path)


def update(
    path: Path, added: Iterable[Certificate], removed_ids: Collection[str], expires: int | None, report: Report
) -> Summary:
    """Replace the index at ``path`` by a copy in which only what changed is written; else as `build`.

    It then holds, row for row, what `build` would make of the same certificates: those that `held` names without
    ``removed_ids``, and ``added``. One that is there already is not added, one that is not there is not removed. If
    nothing changes, nothing is written. Where there is no usable index `held` is empty: then ``added`` is all there is,
    and the index is built from it.

    Args:
        path: as in `build`.
        added: verified certificates, taken one by one.
        removed_ids: ids of certificates.
        expires: as in `build`.
        report: called as it goes.

    Raises:
        StoreError: as `build`, and ``store.index-missing``, ``store.index-unreadable``, ``store.index-format``,
            ``store.index-corrupt``: there is nothing to remove from, or what has to change is damaged; the index must
            be built from all certificates.
        Error: whatever ``added`` raises.
    """
    coming = iter(added)
    first = list(islice(coming, 1))
    try:
        base = _summary(path)
    except StoreError:
        if removed_ids:
            raise
        return build(path, chain(first, coming), expires, report)
    if not first and not removed_ids and expires == base.expires:
        return base
    with _replacing(path) as new:
        report("copying", 0)
        _copy(path, new)
        with _writing(new) as db:
            db.execute("BEGIN")
            tables.change(db, chain(first, coming), removed_ids, expires, report)
            db.execute("COMMIT")
    return _summary(path)


def held(path: Path) -> frozenset[str]:
    """The ids of the certificates in the index at ``path``; none if there is no usable index."""
    try:
        with closing(Index.open(str(path))) as index:
            return frozenset(index.ids())
    except StoreError:
        return frozenset()


def _summary(path: Path) -> Summary:
    with closing(Index.open(str(path))) as index:
        return Summary(index.certificates, index.entries, index.expires, path.stat().st_size)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write the new index to; it takes its place unless something is raised."""
    with exclusive(path.parent, "the index") as directory:
        new = path.with_name(f".{path.name}.new")
        # A build that was killed left it, for there is none running now.
        new.unlink(missing_ok=True)
        try:
            yield new
            _settle(new)
            new.replace(path)
            os.fsync(directory)
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def _writing(new: Path) -> Iterator[sqlite3.Connection]:
    """A connection without any safety of its own, for a file that counts only once it is whole."""
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.create_function("slot", 1, slot, deterministic=True)
            db.executescript(tables.STAGING)
            yield db
    except sqlite3.Error as error:
        raise _failed(error) from error


def _copy(path: Path, new: Path) -> None:
    """The kernel copies, or shares the blocks where the file system can."""
    with path.open("rb") as old, new.open("xb") as copy:
        while os.copy_file_range(old.fileno(), copy.fileno(), _COPY_BYTES):
            pass


_COPY_BYTES = 1 << 30


def _settle(new: Path) -> None:
    """On the disk, readable for every guest's swtpm, and accepted by the reader."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
    Index.open(str(new)).close()


def _failed(error: sqlite3.Error) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_CONSTRAINT_CHECK:
        return StoreError(
            "store.candidates",
            f"more than {CANDIDATES} entries for one digest",
            "find the issuer that certifies one thing so often and take it from the trust file",
        )
    if code & 0xFF == sqlite3.SQLITE_CORRUPT:
        return tables.damaged(str(error))
    return StoreError(
        "store.write",
        f"the index cannot be written: {error}",
        "free space on its disk and be root, then build or sync again",
    )
