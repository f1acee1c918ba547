"""Builds the certificate index from verified certificates: all of it or nothing, the same bytes for the same input."""

from __future__ import annotations

import os
import sqlite3
import time
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
from swtpm_prop.trust.floors import NONE, Floors, to_text
from swtpm_prop.trust.index import Index, slot, validity, validity_line
from swtpm_prop.trust.tables import Report


class Summary(NamedTuple):
    """What an index holds: certificates, entries (distinct digests of a certificate), end of use, size in bytes."""

    certificates: int
    entries: int
    expires: int
    size: int


def build(
    path: Path, certificates: Iterable[Certificate], expires: int | None, report: Report, floors: Floors = NONE
) -> Summary:
    """Replace the index at ``path``; whatever goes wrong, the old one stays and nothing else is left.

    This host's clock is taken to be right, whatever time the index saw before.

    Args:
        path: where guests read it; its directory exists.
        certificates: verified ones (`certificate.verify`), taken one by one; the same one twice is one.
        expires: seconds since the epoch after which nothing in it counts; None: the latest end of a certificate.
        report: called as it goes.
        floors: what is below them does not count.

    Raises:
        StoreError: ``store.directory``, ``store.busy`` (another build runs), ``store.write``, ``store.no-expiry`` (no
            certificate and no ``expires``), ``store.collision``, ``store.candidates``.
        Error: whatever ``certificates`` raises.
    """
    with exclusive(path.parent, "the index") as directory:
        return _build(path, directory, certificates, expires, report, floors)


def update(
    path: Path,
    added: Iterable[Certificate],
    removed_ids: Collection[str],
    expires: int,
    report: Report,
    floors: Floors = NONE,
) -> Summary:
    """Replace the index at ``path`` by a copy in which only what changed is written; else as `build`.

    It then holds, row for row, what `build` would make of the same certificates and floors: those certificates that
    `held` names without ``removed_ids``, and ``added``. One that is there already is not added, one that is not there
    is not removed. If nothing of this changes, only the end is written, to the file beside it. Where there is no usable
    index `held` is empty: then ``added`` is all there is, and the index is built from it.

    The latest time that was seen before is not forgotten where the clock has been set back since.

    Args:
        path: as in `build`.
        added: verified certificates, taken one by one.
        removed_ids: ids of certificates.
        expires: seconds since the epoch after which nothing in it counts.
        report: called as it goes.
        floors: as in `build`.

    Raises:
        StoreError: as `build`, and ``store.index-missing``, ``store.index-unreadable``, ``store.index-format``,
            ``store.index-undated``, ``store.index-corrupt``: there is nothing to remove from, or what has to change is
            damaged; the index must be built from all certificates.
        Error: whatever ``added`` raises.
    """
    coming = iter(added)
    first = list(islice(coming, 1))
    with exclusive(path.parent, "the index") as directory:
        try:
            base = _opened(path)
        except StoreError:
            if removed_ids:
                raise
            return _build(path, directory, chain(first, coming), expires, report, floors)
        seen = max(base.seen, int(time.time()))
        if not first and not removed_ids and base.floors == to_text(floors):
            _prolong(path, directory, validity_line(base.id, expires, seen))
            return _summary(path)
        with _replacing(path, directory) as new:
            report("copying", 0)
            _copy(path, new)
            with _writing(new) as db:
                db.execute("BEGIN")
                contents = tables.change(db, chain(first, coming), removed_ids, floors, report)
                db.execute("COMMIT")
            _date(new, path, contents.id, expires, seen)
    return _summary(path)


def held(path: Path) -> frozenset[str]:
    """The ids of the certificates in the index at ``path``; none if there is no usable index."""
    try:
        with closing(Index.open(str(path))) as index:
            return frozenset(id for id, _ in index.ends())
    except StoreError:
        return frozenset()


def last_seen(path: Path) -> int:
    """The latest time that the writer of the index at ``path`` saw; 0 if there is no usable index."""
    try:
        return _opened(path).seen
    except StoreError:
        return 0


def _build(
    path: Path, directory: int, certificates: Iterable[Certificate], expires: int | None, report: Report, floors: Floors
) -> Summary:
    with _replacing(path, directory) as new:
        with _writing(new) as db:
            db.executescript(tables.SCHEMA)
            # One transaction: SQLite's change counter, and with it the bytes, depend on nothing else.
            db.execute("BEGIN")
            contents = tables.fill(db, certificates, floors, report)
            db.execute("COMMIT")
            report("checking", contents.entries)
            if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise StoreError("store.write", "SQLite built a file that it does not accept", "check disk and memory")
        until = contents.latest if expires is None else expires
        if until is None:
            what = "an index without certificates needs an end of its own"
            raise StoreError("store.no-expiry", what, "give --expires")
        _date(new, path, contents.id, until, int(time.time()))
    return _summary(path)


def _opened(path: Path) -> Index:
    """The index, closed again, for what it says of itself."""
    index = Index.open(str(path))
    index.close()
    return index


def _summary(path: Path) -> Summary:
    index = _opened(path)
    return Summary(index.certificates, index.entries, index.expires, path.stat().st_size)


@contextmanager
def _replacing(path: Path, directory: int) -> Iterator[Path]:
    """A file beside ``path`` to write the new index to; with its `_date` it takes its place unless something is raised.

    First the dates of both, then the index: whenever this ends, the index that is there has its date.
    """
    new = path.with_name(f".{path.name}.new")
    # A build that was killed left them, for there is none running now.
    with _temporary(new), _temporary(_dates(new)):
        yield new
        _settle(new)
        for file, place in ((_dates(new), _dates(path)), (new, path)):
            file.replace(place)
            os.fsync(directory)


def _prolong(path: Path, directory: int, line: str) -> None:
    """Give the index that is there a new date; touched, it is opened anew by those who have read the old one."""
    new = _dates(path.with_name(f".{path.name}.new"))
    with _temporary(new):
        _write_dates(new, line)
        new.replace(_dates(path))
        os.utime(path)
        os.fsync(directory)


@contextmanager
def _temporary(file: Path) -> Iterator[None]:
    file.unlink(missing_ok=True)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _dates(path: Path) -> Path:
    return Path(validity(str(path)))


def _date(new: Path, path: Path, id: bytes, expires: int, seen: int) -> None:
    """Write down until when the new index is good, and still the same of the one it replaces."""
    line = validity_line(id, expires, seen)
    try:
        old = _opened(path)
    except StoreError:
        _write_dates(_dates(new), line)
    else:
        kept = validity_line(old.id, old.expires, old.seen) if old.id != id else ""
        _write_dates(_dates(new), kept + line)


def _write_dates(file: Path, lines: str) -> None:
    with file.open("x") as opened:
        opened.write(lines)
        opened.flush()
        os.fchmod(opened.fileno(), 0o644)
        os.fsync(opened.fileno())


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
    if code == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
        return tables.collision("what two certificates say of a component begins with the same bits")
    if code & 0xFF == sqlite3.SQLITE_CORRUPT:
        return tables.damaged(str(error))
    return StoreError(
        "store.write",
        f"the index cannot be written: {error}",
        "free space on its disk and be root, then build or sync again",
    )
