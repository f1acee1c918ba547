"""The tables of the certificate index, and how rows get into them and out; `trust.build` puts a file around them.

First everything that comes is staged in temporary tables. Then rows are numbered, each within its slot: see
`trust.index` for what the reader makes of the numbers. In an update every slot that gains or loses a row is numbered
anew as a whole, so that the same certificates give the same rows however they came together.
"""

# ruff: noqa: S608 - the statements are made of this module's constants alone

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.trust import floors as levels
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.floors import Floors
from swtpm_prop.trust.index import APPLICATION_ID, FORMAT, LAYOUTS, SLOT_ROWS, checksum, number, pack, part_number, slot
from swtpm_prop.trust.sources import COMPONENT, VERSION

Report = Callable[[str, int], None]
"""What is being done, in words for people, and how many digests are done."""

SCHEMA = f"""
    PRAGMA page_size = 4096;
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {FORMAT};
    CREATE TABLE meta (
        id BLOB, entries INTEGER, certificates INTEGER, low INTEGER, floors TEXT, checksum BLOB
    ) STRICT;
    CREATE TABLE certificate (
        number INTEGER PRIMARY KEY, id TEXT, issuer TEXT, not_before INTEGER, not_after INTEGER, properties TEXT,
        checksum BLOB
    ) STRICT;
    CREATE TABLE part (
        number INTEGER PRIMARY KEY, certificate INTEGER, component TEXT, version TEXT, below TEXT, checksum BLOB,
        slots BLOB
    ) STRICT;
    CREATE INDEX parts ON part (certificate);
    CREATE TABLE entry (
        id INTEGER PRIMARY KEY CHECK (id & {SLOT_ROWS - 1} < {CANDIDATES}), digests BLOB, part INTEGER
    ) STRICT;
    CREATE TABLE alias (id INTEGER PRIMARY KEY CHECK (id & {SLOT_ROWS - 1} < {CANDIDATES}), entry INTEGER) STRICT;
"""

STAGING = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TEMP TABLE incoming (
        number INTEGER PRIMARY KEY, id TEXT, issuer TEXT, not_before INTEGER, not_after INTEGER, properties TEXT,
        checksum BLOB
    );
    CREATE TEMP TABLE arriving (
        number INTEGER PRIMARY KEY, certificate INTEGER, component TEXT, version TEXT, below TEXT, checksum BLOB,
        slots BLOB
    );
    CREATE TEMP TABLE staged (slot INTEGER, digests BLOB, part INTEGER);
    CREATE TEMP TABLE linked (slot INTEGER, entry INTEGER);
    CREATE TEMP TABLE retired (number INTEGER PRIMARY KEY, slots INTEGER);
    CREATE TEMP TABLE touched (slot INTEGER PRIMARY KEY);
    CREATE TEMP TABLE crossed (slot INTEGER PRIMARY KEY);
    CREATE TEMP TABLE present (id INTEGER PRIMARY KEY, digests BLOB, part INTEGER);
"""


class Contents(NamedTuple):
    """What the tables hold: the index's id, how many entries, and the latest end of a certificate if there is one."""

    id: bytes
    entries: int
    latest: int | None


def fill(db: sqlite3.Connection, certificates: Iterable[Certificate], floors: Floors, report: Report) -> Contents:
    """Write the certificates into the empty tables of SCHEMA.

    Raises:
        StoreError: ``store.collision``.
        Error: whatever ``certificates`` raises.
    """
    report("sorting", _stage(db, certificates, floors, report))
    entries = _number(db)
    _link(db, "entry")
    return _describe(db, entries, floors)


def change(
    db: sqlite3.Connection,
    added: Iterable[Certificate],
    removed_ids: Collection[str],
    floors: Floors,
    report: Report,
) -> Contents:
    """Take certificates out and others in, and hold all of them against the floors.

    Raises:
        StoreError: ``store.index-corrupt``, ``store.collision``.
        Error: whatever ``added`` raises.
    """
    _retire(db, removed_ids)
    report("sorting", _stage(db, added, floors, report))
    entries: int = db.execute("SELECT entries FROM meta").fetchone()[0] - _clear(db)
    entries += _number(db)
    _look(db)
    _link(db, "present")
    _lower(db, floors)
    return _describe(db, entries, floors)


def damaged(why: str) -> StoreError:
    """What is in the index is not what was put there."""
    return StoreError(
        "store.index-corrupt",
        f"the certificate index is damaged: {why}",
        "build it again with 'swtpm-prop store build'",
    )


def collision(why: str) -> StoreError:
    """Two rows would have the same number."""
    return StoreError("store.collision", why, "issue one of them anew: it gets another serial, and so another id")


def _stage(db: sqlite3.Connection, certificates: Iterable[Certificate], floors: Floors, report: Report) -> int:
    """Take the certificates in any order; return how many subjects they have."""
    staged = 0
    for certificate in certificates:
        at = number(certificate.id)
        known = db.execute(_KNOWN, (at, at)).fetchone()
        if known is not None and known[0] != certificate.id:
            raise collision(f"certificates {known[0]} and {certificate.id} begin with the same bits")
        if known is not None:
            continue
        properties = "\n".join(sorted(certificate.properties))
        row = (at, certificate.id, certificate.issuer, certificate.not_before, certificate.not_after, properties)
        db.execute("INSERT INTO incoming VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, checksum(*row)))
        for (component, version), packed in _parts(certificate).items():
            part = part_number(certificate.id, component, version)
            db.executemany(
                "INSERT INTO staged VALUES (?, ?, ?)", ((slot(digests), digests, part) for digests in packed)
            )
            said = (part, at, component, version, _below(floors, component, version, properties))
            slots = b"".join(sorted({digests[:_SLOT_BYTES] for digests in packed}))
            db.execute("INSERT INTO arriving VALUES (?, ?, ?, ?, ?, ?, ?)", (*said, checksum(*said), slots))
        staged += len(certificate.subjects)
        report("reading certificates", staged)
    db.execute("INSERT INTO certificate SELECT * FROM incoming ORDER BY number")
    db.execute("INSERT INTO part SELECT * FROM arriving ORDER BY number")
    return staged


def _parts(certificate: Certificate) -> dict[tuple[str, str], list[bytes]]:
    """Its digests by component and version, both empty where it names no component."""
    parts: dict[tuple[str, str], list[bytes]] = {}
    for _, digests, said in certificate.subjects:
        component = said.get(COMPONENT, "")
        version = said.get(VERSION, "") if component else ""
        parts.setdefault((component, version), []).append(pack(digests))
    return parts


def _below(floors: Floors, component: str, version: str, properties: str) -> str:
    """Line by line the properties (given the same way) that the version is too low for, and what they need."""
    missed = levels.below(floors, component, version, properties.split("\n"))
    return "\n".join(f"{uri} {limit}" for uri, limit in missed.items())


def _lower(db: sqlite3.Connection, floors: Floors) -> None:
    """Hold every part against floors that are not those it was held against."""
    if db.execute("SELECT floors FROM meta").fetchone() == (levels.to_text(floors),):
        return
    rows = db.execute(
        """SELECT part.number, certificate, component, version, below, properties
           FROM part JOIN certificate ON certificate.number = certificate WHERE component != ''"""
    )
    for part, at, component, version, was, properties in rows.fetchall():
        below = _below(floors, component, version, properties)
        if below != was:
            values = (below, checksum(part, at, component, version, below), part)
            db.execute("UPDATE part SET below = ?, checksum = ? WHERE number = ?", values)


_SLOT_BYTES = 6
"""Bytes of a digest that tell its slot; a part's row keeps them of all its entries, to find them again."""

_KNOWN = "SELECT id FROM certificate WHERE number = ? UNION ALL SELECT id FROM incoming WHERE number = ?"


def _number(db: sqlite3.Connection) -> int:
    """Number what is staged within each slot; return how many entries.

    They come in the order of their slots, so that a build fills the pages one after the other.
    """
    return db.execute(
        """INSERT INTO entry
           SELECT slot + row_number() OVER (PARTITION BY slot ORDER BY digests, part) - 1, digests, part
           FROM (SELECT slot, digests, part FROM staged GROUP BY slot, digests, part)"""
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
        if db.execute("DELETE FROM certificate WHERE number = ? AND id = ?", (at, id)).rowcount == 0:
            continue
        for part, packed in db.execute("SELECT number, slots FROM part WHERE certificate = ?", (at,)).fetchall():
            slots = [slot(packed[begin : begin + _SLOT_BYTES]) for begin in range(0, len(packed), _SLOT_BYTES)]
            db.executemany("INSERT OR IGNORE INTO touched VALUES (?)", zip(slots))
            db.execute("INSERT INTO retired VALUES (?, ?)", (part, len(set(slots))))
        db.execute("DELETE FROM part WHERE certificate = ?", (at,))


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
        f"""INSERT INTO staged SELECT id & ~{SLOT_ROWS - 1}, digests, part FROM present
            WHERE part NOT IN (SELECT number FROM retired)"""
    )
    db.execute("DELETE FROM entry WHERE id IN (SELECT id FROM present)")
    return taken


_LOST = f"""
    SELECT 1 FROM retired LEFT JOIN (
        SELECT part, count(DISTINCT id & ~{SLOT_ROWS - 1}) AS found FROM present GROUP BY part
    ) ON part = number
    WHERE slots IS NOT found
"""
"""Whether a part of a certificate that goes has not all its entries."""


def _look(db: sqlite3.Connection) -> int:
    """Put what is in the touched slots into ``present``; return how many entries."""
    db.execute("DELETE FROM present")
    rows = f"SELECT id, digests, part FROM {_in_slots('touched', 'entry')}"
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


def _describe(db: sqlite3.Connection, entries: int, floors: Floors) -> Contents:
    """The index's id follows from its certificates and floors, and from nothing else."""
    certificates, latest = db.execute("SELECT count(*), max(not_after) FROM certificate").fetchone()
    text = levels.to_text(floors)
    id = hashlib.sha256(f"{FORMAT} {text}".encode())
    for table in ("certificate", "part"):
        for (sum,) in db.execute(f"SELECT checksum FROM {table} ORDER BY number"):
            id.update(sum)
    (low,) = db.execute("SELECT count(*) FROM part WHERE below != ''").fetchone()
    row = (id.digest(), entries, certificates, low, text)
    db.execute("DELETE FROM meta")
    db.execute("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", (*row, checksum(*row)))
    return Contents(id.digest(), entries, latest)
