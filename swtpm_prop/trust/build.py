"""Builds the certificate index from verified certificates: all of it or nothing, the same bytes for the same input."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.index import (
    APPLICATION_ID,
    FORMAT,
    LAYOUTS,
    SLOT_ROWS,
    Index,
    checksum,
    number,
    pack,
    slot,
)

Report = Callable[[str, int], None]
"""What is being done, in words for people, and how many digests are done."""


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
    with _exclusive(path.parent) as directory:
        new = path.with_name(f".{path.name}.new")
        # A build that was killed left it, for there is none running now.
        new.unlink(missing_ok=True)
        try:
            summary = _write(new, certificates, expires, report)
            _settle(new)
            new.replace(path)
            os.fsync(directory)
        except OSError as error:
            raise _failed(error) from error
        finally:
            new.unlink(missing_ok=True)
    return summary


@contextmanager
def _exclusive(directory: Path) -> Iterator[int]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError("store.directory", f"'{directory}' is no directory to build in: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise StoreError("store.busy", f"another build runs in '{directory}'", "wait for it to end") from error
    finally:
        os.close(descriptor)


def _write(new: Path, certificates: Iterable[Certificate], expires: int | None, report: Report) -> Summary:
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.create_function("slot", 1, slot, deterministic=True)
            db.executescript(_SCHEMA)
            # One transaction: SQLite's change counter, and with it the bytes, depend on nothing else.
            db.execute("BEGIN")
            staged = _stage(db, certificates, report)
            report("sorting", staged)
            _arrange(db)
            meta = _describe(db, expires)
            db.execute("COMMIT")
            report("checking", staged)
            if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise StoreError("store.write", "SQLite built a file that it does not accept", "check disk and memory")
    except sqlite3.Error as error:
        raise _failed(error) from error
    return Summary(*meta, size=new.stat().st_size)


_SCHEMA = f"""
    PRAGMA page_size = 4096;
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {FORMAT};
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE meta (expires INTEGER, entries INTEGER, certificates INTEGER, checksum BLOB) STRICT;
    CREATE TABLE certificate (
        number INTEGER PRIMARY KEY, id TEXT, issuer TEXT, not_before INTEGER, not_after INTEGER, properties TEXT,
        checksum BLOB
    ) STRICT;
    CREATE TABLE entry (id INTEGER PRIMARY KEY, digests BLOB, certificate INTEGER) STRICT;
    CREATE TABLE alias (id INTEGER PRIMARY KEY, entry INTEGER) STRICT;
    CREATE TEMP TABLE staged (slot INTEGER, digests BLOB, certificate INTEGER);
"""


def _stage(db: sqlite3.Connection, certificates: Iterable[Certificate], report: Report) -> int:
    """Take the certificates in any order; return how many subjects they have."""
    staged = 0
    rows: dict[int, tuple[str, str, int, int, str]] = {}
    for certificate in certificates:
        at = number(certificate.id)
        known = rows.get(at)
        if known is not None and known[0] != certificate.id:
            raise StoreError(
                "store.collision", f"certificates {known[0]} and {certificate.id} begin with the same bits"
            )
        if known is not None:
            continue
        properties = "\n".join(sorted(certificate.properties))
        rows[at] = (certificate.id, certificate.issuer, certificate.not_before, certificate.not_after, properties)
        packed = (pack(subject.digests) for subject in certificate.subjects)
        db.executemany("INSERT INTO staged VALUES (?, ?, ?)", ((slot(digests), digests, at) for digests in packed))
        staged += len(certificate.subjects)
        report("reading certificates", staged)
    checked = ((at, *row, checksum(at, *row)) for at, row in sorted(rows.items()))
    db.executemany("INSERT INTO certificate VALUES (?, ?, ?, ?, ?, ?, ?)", checked)
    return staged


def _arrange(db: sqlite3.Connection) -> None:
    """Number the rows of each slot and write them in the order of their numbers, which fills the pages."""
    try:
        db.execute(
            """INSERT INTO entry
               SELECT slot + row_number() OVER (PARTITION BY slot ORDER BY digests, certificate) - 1,
                      digests, certificate
               FROM (SELECT DISTINCT slot, digests, certificate FROM staged) ORDER BY 1"""
        )
        db.execute(
            f"""INSERT INTO alias
                SELECT slot + row_number() OVER (PARTITION BY slot ORDER BY entry) - 1, entry
                FROM ({_SECONDARY}) ORDER BY 1"""  # noqa: S608 - made of constants alone
        )
    except sqlite3.IntegrityError:
        raise _crowded() from None
    for table in ("entry", "alias"):
        most = db.execute(f"SELECT max(id & {SLOT_ROWS - 1}) FROM {table}").fetchone()[0]  # noqa: S608 - constants
        if most is not None and most >= CANDIDATES:
            raise _crowded()


_SECONDARY = " UNION ALL ".join(
    f"SELECT slot(substr(digests, {begin + 1}, {end - begin})) AS slot, id AS entry FROM entry "  # noqa: S608
    f"WHERE length(digests) = {length}"
    for length, parts in LAYOUTS.items()
    for _, begin, end in parts[1:]
)
"""Slots of the digests that do not number the row."""


def _describe(db: sqlite3.Connection, expires: int | None) -> tuple[int, int, int]:
    certificates, latest = db.execute("SELECT count(*), max(not_after) FROM certificate").fetchone()
    entries = db.execute("SELECT count(*) FROM entry").fetchone()[0]
    until = latest if expires is None else expires
    if until is None:
        raise StoreError("store.no-expiry", "an index without certificates needs an end of its own", "give --expires")
    row = (until, entries, certificates)
    db.execute("INSERT INTO meta VALUES (?, ?, ?, ?)", (*row, checksum(*row)))
    return certificates, entries, until


def _settle(new: Path) -> None:
    """On the disk, readable for every guest's swtpm, and accepted by the reader."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
    Index.open(str(new)).close()


def _crowded() -> StoreError:
    return StoreError(
        "store.candidates",
        f"more than {CANDIDATES} entries for one digest",
        "find the issuer that certifies one thing so often and take it from the trust file",
    )


def _failed(error: Exception) -> StoreError:
    return StoreError("store.write", f"the index cannot be written: {error}")
