"""The tables of the certificate index, and how rows get into them and out; `trust.build` puts a file around them.

First everything that comes is staged in temporary tables. Then rows are numbered, each within its slot: see
`trust.index` for what the reader makes of the numbers. In an update every slot that gains or loses a row is numbered
anew as a whole, so that the same certificates give the same rows however they came together.
"""

# ruff: noqa: S608 - the statements are made of this module's constants alone

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.index import APPLICATION_ID, FORMAT, LAYOUTS, SLOT_ROWS, checksum, number, pack, slot

Report = Callable[[str, int], None]
"""What is being done, in words for people, and how many digests are done."""

SCHEMA = f"""
    PRAGMA page_size = 4096;
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {FORMAT};
    CREATE TABLE meta (expires INTEGER, entries INTEGER, certificates INTEGER, checksum BLOB) STRICT;
    CREATE TABLE certificate (
        number INTEGER PRIMARY KEY, id TEXT, issuer TEXT, not_before INTEGER, not_after INTEGER, properties TEXT,
        checksum BLOB, slots BLOB
    ) STRICT;
    CREATE TABLE entry (
        id INTEGER PRIMARY KEY CHECK (id & {SLOT_ROWS - 1} < {CANDIDATES}), digests BLOB, certificate INTEGER
    ) STRICT;
    CREATE TABLE alias (id INTEGER PRIMARY KEY CHECK (id & {SLOT_ROWS - 1} < {CANDIDATES}), entry INTEGER) STRICT;
"""

STAGING = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TEMP TABLE incoming (
        number INTEGER PRIMARY KEY, id TEXT, issuer TEXT, not_before INTEGER, not_after INTEGER, properties TEXT,
        checksum BLOB, slots BLOB
    );
    CREATE TEMP TABLE staged (slot INTEGER, digests BLOB, certificate INTEGER);
    CREATE TEMP TABLE linked (slot INTEGER, entry INTEGER);
    CREATE TEMP TABLE retired (number INTEGER PRIMARY KEY, slots INTEGER);
    CREATE TEMP TABLE touched (slot INTEGER PRIMARY KEY);
    CREATE TEMP TABLE crossed (slot INTEGER PRIMARY KEY);
    CREATE TEMP TABLE present (id INTEGER PRIMARY KEY, digests BLOB, certificate INTEGER);
"""


def fill(db: sqlite3.Connection, certificates: Iterable[Certificate], expires: int | None, report: Report) -> int:
    """Write the certificates into the empty tables of SCHEMA; return how many entries there are.

    Raises:
        StoreError: ``store.no-expiry``, ``store.collision``.
        Error: whatever ``certificates`` raises.
    """
    report("sorting", _stage(db, certificates, report))
    entries = _number(db)
    _link(db, "entry")
    _describe(db, entries, expires)
    return entries


def change(
    db: sqlite3.Connection,
    added: Iterable[Certificate],
    removed_ids: Collection[str],
    expires: int | None,
    report: Report,
) -> int:
    """Take certificates out and others in; return how many entries there are.

    Raises:
        StoreError: ``store.index-corrupt``, ``store.no-expiry``, ``store.collision``.
        Error: whatever ``added`` raises.
    """
    _retire(db, removed_ids)
    report("sorting", _stage(db, added, report))
    entries: int = db.execute("SELECT entries FROM meta").fetchone()[0] - _clear(db)
    entries += _number(db)
    _look(db)
    _link(db, "present")
    _describe(db, entries, expires)
    return entries


def damaged(why: str) -> StoreError:
    """What is in the index is not what was put there."""
    return StoreError(
        "store.index-corrupt",
        f"the certificate index is damaged: {why}",
        "build it again with 'swtpm-prop store build'",
    )


def _stage(db: sqlite3.Connection, certificates: Iterable[Certificate], report: Report) -> int:
    """Take the certificates in any order; return how many subjects they have."""
    staged = 0
    for certificate in certificates:
        at = number(certificate.id)
        known = db.execute(_KNOWN, (at, at)).fetchone()
        if known is not None and known[0] != certificate.id:
            raise StoreError(
                "store.collision",
                f"certificates {known[0]} and {certificate.id} begin with the same bits",
                "issue one of them anew: it gets another serial, and so another id",
            )
        if known is not None:
            continue
        packed = [pack(subject.digests) for subject in certificate.subjects]
        db.executemany("INSERT INTO staged VALUES (?, ?, ?)", ((slot(digests), digests, at) for digests in packed))
        properties = "\n".join(sorted(certificate.properties))
        row = (at, certificate.id, certificate.issuer, certificate.not_before, certificate.not_after, properties)
        slots = b"".join(sorted({digests[:_SLOT_BYTES] for digests in packed}))
        db.execute("INSERT INTO incoming VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, checksum(*row), slots))
        staged += len(packed)
        report("reading certificates", staged)
    db.execute("INSERT INTO certificate SELECT * FROM incoming ORDER BY number")
    return staged


_SLOT_BYTES = 6
"""Bytes of a digest that tell its slot; a certificate's row keeps them of all its entries, to find them again."""

_KNOWN = "SELECT id FROM certificate WHERE number = ? UNION ALL SELECT id FROM incoming WHERE number = ?"


def _number(db: sqlite3.Connection) -> int:
    """Number what is staged within each slot; return how many entries.

    They come in the order of their slots, so that a build fills the pages one after the other.
    """
    return db.execute(
        """INSERT INTO entry
           SELECT slot + row_number() OVER (PARTITION BY slot ORDER BY digests, certificate) - 1, digests, certificate
           FROM (SELECT slot, digests, certificate FROM staged GROUP BY slot, digests, certificate)"""
    ).rowcount


def _link(db: sqlite3.Connection, entries: str) -> None:
    """Write the aliases of the entries in a table, among those that are linked already."""
    db.execute(f"INSERT INTO linked {_aliases(entries)}")
    db.execute(
        """INSERT INTO alias
           SELECT slot + row_number() OVER (PARTITION BY slot ORDER BY entry) - 1, entry FROM linked"""
    )


def _retire(db: sqlite3.Connection, removed_ids: Collection[str]) -> None:
    """Take certificates out, and note in which slots their entries are."""
    for id in removed_ids:
        at = number(id)
        row = db.execute("SELECT slots FROM certificate WHERE number = ? AND id = ?", (at, id)).fetchone()
        if row is None:
            continue
        slots = [slot(row[0][begin : begin + _SLOT_BYTES]) for begin in range(0, len(row[0]), _SLOT_BYTES)]
        db.executemany("INSERT OR IGNORE INTO touched VALUES (?)", zip(slots))
        db.execute("INSERT INTO retired VALUES (?, ?)", (at, len(set(slots))))
        db.execute("DELETE FROM certificate WHERE number = ?", (at,))


def _clear(db: sqlite3.Connection) -> int:
    """Empty each slot that gains or loses a row, and stage again what stays; return how many entries it took out.

    So a slot is always numbered as a whole, and an update leaves the very rows that a build would.
    """
    db.execute("INSERT OR IGNORE INTO touched SELECT slot FROM staged ORDER BY slot")
    taken = _look(db)
    if db.execute(_LOST).fetchone() is not None:
        raise damaged("entries of a certificate are missing")
    # Aliases: of what goes, of what comes, and those of other entries that share their slots.
    for table in ("present", "staged"):
        db.execute(f"INSERT OR IGNORE INTO crossed SELECT slot FROM ({_aliases(table)}) ORDER BY slot")
    db.execute(
        f"""INSERT INTO linked SELECT slot, entry FROM {_in_slots("crossed", "alias")}
            WHERE entry NOT IN (SELECT id FROM present)"""
    )
    db.execute(f"DELETE FROM alias WHERE id IN (SELECT id FROM {_in_slots('crossed', 'alias')})")
    db.execute(
        f"""INSERT INTO staged SELECT id & ~{SLOT_ROWS - 1}, digests, certificate FROM present
            WHERE certificate NOT IN (SELECT number FROM retired)"""
    )
    db.execute("DELETE FROM entry WHERE id IN (SELECT id FROM present)")
    return taken


_LOST = f"""
    SELECT 1 FROM retired LEFT JOIN (
        SELECT certificate, count(DISTINCT id & ~{SLOT_ROWS - 1}) AS found FROM present GROUP BY certificate
    ) ON certificate = number
    WHERE slots IS NOT found
"""
"""Whether a certificate that goes has not all its entries."""


def _look(db: sqlite3.Connection) -> int:
    """Put what is in the touched slots into ``present``; return how many entries."""
    db.execute("DELETE FROM present")
    rows = f"SELECT id, digests, certificate FROM {_in_slots('touched', 'entry')}"
    return db.execute(f"INSERT INTO present {rows}").rowcount


def _in_slots(slots: str, table: str) -> str:
    """A table's rows in the slots that another names; found slot by slot, for the other way round reads all rows."""
    return f"{slots} CROSS JOIN {table} ON {table}.id BETWEEN slot AND slot + {SLOT_ROWS - 1}"


def _aliases(table: str) -> str:
    """The slots of the digests that do not number a row, each with the row's number."""
    return " UNION ALL ".join(
        f"SELECT slot(substr(digests, {begin + 1}, {_SLOT_BYTES})) AS slot, rowid AS entry FROM {table}"
        f" WHERE length(digests) = {length}"
        for length, parts in LAYOUTS.items()
        for _, begin, _ in parts[1:]
    )


def _describe(db: sqlite3.Connection, entries: int, expires: int | None) -> None:
    certificates, latest = db.execute("SELECT count(*), max(not_after) FROM certificate").fetchone()
    until = latest if expires is None else expires
    if until is None:
        raise StoreError("store.no-expiry", "an index without certificates needs an end of its own", "give --expires")
    row = (until, entries, certificates)
    db.execute("DELETE FROM meta")
    db.execute("INSERT INTO meta VALUES (?, ?, ?, ?)", (*row, checksum(*row)))
