"""The certificate index as a guest's TPM reads it: digests in, verdict out. Loaded inside swtpm, so it stays lean.

An SQLite file that is never changed, only replaced. Table ``entry`` has a row for each thing certified: the number of
the row begins with its strongest-known digest's first 47 bits, so that finding it is one descent of one tree. The
digests themselves are compared in full. Table ``alias`` leads from the first bits of its other digests to that row.
A row names its part of a certificate, what that says of one version of one component, by 63 bits of a hash, and each
row of ``part`` and ``certificate`` carries a checksum: no flipped bit on the disk can move a digest to another
certificate or change what one says. ``below`` of a part are the properties that it does not have on this host, because
the version is below a floor (`trust.floors`).

Until when all this is good is in a file of its own beside it, so that a new end costs nothing; it names the index it
speaks of, and while one takes the place of the other it names both.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import CANDIDATES, CLAIMS_KEPT, VALIDITY_BYTES
from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.translate.verdict import Verdict

APPLICATION_ID = 0x73775049
"""In the SQLite header (offset 68, big-endian): "swPI"."""

FORMAT = 2
"""In the SQLite header as user_version (offset 60, big-endian)."""

SLOT_ROWS = 1 << 16
"""Row numbers that belong to one digest: its slot is the first of them."""

_FAULTS = (sqlite3.Error, UnicodeDecodeError, MemoryError)
"""What sqlite3 raises for a damaged file: also for names in it that are no UTF-8 and for absurd lengths."""

_HEADER_BYTES = 100
_MEND = "make it again with 'swtpm-prop store sync' or 'store build'"
_CACHE_KIB = 512
"""Pages kept in memory, taken as they are touched: the 60 that a boot's 30 measurements need, twice over."""

_NAMES = tuple(algorithm.name for algorithm in STRONG)


class Claim(NamedTuple):
    """A certificate of the index, or what it says of one version of a component.

    Times are seconds since the epoch, both ends included. ``below`` has the properties for which this version does not
    count on this host, each with the lowest one that does.
    """

    id: str
    issuer: str
    not_before: int
    not_after: int
    properties: tuple[str, ...]
    component: str = ""
    version: str = ""
    below: Mapping[str, str] = {}


def slot(digest: bytes) -> int:
    """The first of ``SLOT_ROWS`` row numbers for a digest: its first 47 bits, then 16 zero bits; below 2^63."""
    return (int.from_bytes(digest[:6], "big") >> 1) * SLOT_ROWS


def number(certificate: str) -> int:
    """The row number of a certificate: the first 63 bits of its id's SHA-256."""
    return int(certificate.removeprefix("sha256:")[:16], 16) >> 1


def part_number(certificate: str, component: str, version: str) -> int:
    """The row number of what a certificate says of one version of a component, both empty if it names none."""
    return int.from_bytes(checksum(certificate, component, version)[:8], "big") >> 1


def validity(path: str) -> str:
    """The file that says until when the index at ``path`` is good."""
    return f"{path}.until"


def validity_line(id: bytes, expires: int, seen: int) -> str:
    """A line of it: the index's id (32 bytes), its end, the latest time its writer saw, a checksum."""
    said = f"{id.hex()} {expires} {seen}"
    return f"{said} {checksum(said).hex()}\n"


def checksum(*fields: object) -> bytes:
    """SHA-256 over a row; against decay of the disk, not against who can write the file."""
    return hashlib.sha256(repr(fields).encode()).digest()


def _layouts() -> dict[int, tuple[tuple[str, int, int], ...]]:
    """Length of a row's digests to (algorithm, begin, end) of each: every choice of algorithms has its own length."""
    layouts = {}
    for choice in range(1, 1 << len(STRONG)):
        parts, end = [], 0
        for bit, algorithm in enumerate(STRONG):
            if choice >> bit & 1:
                parts.append((algorithm.name, end, end + algorithm.size))
                end += algorithm.size
        layouts[end] = tuple(parts)
    return layouts


LAYOUTS = _layouts()


def pack(digests: Mapping[str, bytes]) -> bytes:
    """SHA-256, SHA-384 and SHA-512, as many as there are, joined in this order."""
    return b"".join(digests[algorithm.name] for algorithm in STRONG if algorithm.name in digests)


def unpack(packed: bytes) -> dict[str, bytes]:
    """The digests of a row by algorithm name."""
    return {name: packed[begin:end] for name, begin, end in _layout(packed)}


def _layout(packed: bytes) -> tuple[tuple[str, int, int], ...]:
    try:
        return LAYOUTS[len(packed)]
    except (KeyError, TypeError):
        raise _damaged("a row has no digests") from None


def row_covers(packed: bytes, measured: Mapping[str, bytes]) -> bool:
    """`covers` for the digests of a row, without taking it apart."""
    common = False
    for name, begin, end in _layout(packed):
        if name in measured:
            if packed[begin:end] != measured[name]:
                return False
            common = True
    return common


class Index:
    """A certificate index that is open for reading."""

    def __init__(self, path: str) -> None:
        """Nothing is opened yet; use `open`."""
        self._path = path
        self._identity: tuple[int, ...] | None = None
        self._db: sqlite3.Connection | None = None
        self._failure = "the index is closed"
        self._claims: dict[int, Claim] = {}
        self.expires = self.seen = self.entries = self.certificates = 0
        self.id = b""
        self.floors = ""
        self._low = 0

    @classmethod
    def open(cls, path: str) -> Index:
        """Open the index and see that it is whole; takes a millisecond or two whatever its size.

        Raises:
            StoreError: ``store.index-missing``, ``store.index-unreadable``, ``store.index-format`` (something else, or
                of another version), ``store.index-corrupt``, ``store.index-undated`` (nothing says until when this
                very index is good).
        """
        index = cls(path)
        index._load()
        return index

    def close(self) -> None:
        """Let go of the file; every later judgement is ``no-index``."""
        if self._db is not None:
            self._db.close()
        self._db, self._identity, self._failure = None, None, "the index is closed"
        self._claims.clear()

    def refresh(self) -> None:
        """Follow a replaced file; if the new one is not usable, judgements are ``no-index`` until one is."""
        identity = _identity(self._path)
        if identity == self._identity:
            return
        self.close()
        try:
            self._load()
        except StoreError as error:
            self.close()
            self._failure = error.what
        self._identity = identity

    def judge(self, properties: Sequence[str], measured: Mapping[str, bytes], now: int) -> Verdict:
        """Whether each property is certified for what was measured by some certificate that is valid now.

        Never raises for anything that is wrong with the index: that is the verdict ``no-index``.

        Args:
            properties: all of them are needed; none at all is never certified.
            measured: algorithm name to digest as supplied; SHA-1 is ignored.
            now: seconds since the epoch, UTC. A clock that was set back, behind the latest time that the index's
                writer saw, is not believed: what had ended then has ended.
        """
        try:
            return self._judge(properties, measured, max(now, self.seen))
        except StoreError as error:
            return Verdict(False, (), "no-index", error.what)
        except Exception as error:
            # Whatever it is, it is the index's fault, and one that must not take the guest's TPM away.
            return Verdict(False, (), "no-index", f"the index cannot be read: {error}")

    def matches(self, measured: Mapping[str, bytes]) -> list[tuple[Claim, bool]]:
        """Every certificate that names one of the digests, and whether it covers them all; for people.

        Raises:
            StoreError: ``store.index-corrupt``.
        """
        found: dict[int, bool] = {}
        try:
            for query, name in _SEARCHES:
                for packed, at in _rows(self._connection(), query, measured.get(name)):
                    found[at] = found.get(at, False) or row_covers(packed, measured)
            return sorted((self._claim(at), covered) for at, covered in found.items())
        except _FAULTS as error:
            raise _damaged(str(error)) from error

    def claims(self) -> Iterator[tuple[Claim, int]]:
        """Every certificate and how many entries it has, by id; with component and version if it has but one of them.

        Raises:
            StoreError: ``store.index-corrupt``.
        """
        counts: dict[str, tuple[Claim, int]] = {}
        try:
            for at, count in self._connection().execute("SELECT part, count(*) FROM entry GROUP BY 1"):
                claim = self._claim(at)
                known, counted = counts.get(claim.id, (claim, 0))
                counts[claim.id] = claim if claim == known else Claim(*claim[:5]), counted + count
        except _FAULTS as error:
            raise _damaged(str(error)) from error
        yield from (counts[id] for id in sorted(counts))

    def ends(self) -> Iterator[tuple[str, int]]:
        """The id and the last second of every certificate, the first to end first; reads no entries.

        Raises:
            StoreError: ``store.index-corrupt``.
        """
        try:
            yield from self._connection().execute("SELECT id, not_after FROM certificate ORDER BY not_after, id")
        except _FAULTS as error:
            raise _damaged(str(error)) from error

    # -- judging --------------------------------------------------------------------------------

    def _judge(self, properties: Sequence[str], measured: Mapping[str, bytes], now: int) -> Verdict:
        db = self._connection()
        if now > self.expires:
            return Verdict(False, (), "stale-index", f"the index expired at {_time(self.expires)}")
        covering: dict[int, Claim] = {}
        other = 0
        for query, name in _SEARCHES:
            for packed, at in _rows(db, query, measured.get(name)):
                if row_covers(packed, measured):
                    covering[at] = self._claims.get(at) or self._claim(at)
                else:
                    other = at
            # Where something is below a floor, the last row found may be the one that says so.
            if covering and not self._low:
                chosen = _choose(properties, covering.values(), now)
                if chosen:
                    return Verdict(True, chosen)
        if covering:
            counting = _above_floors(covering.values()) if self._low else covering.values()
            chosen = _choose(properties, counting, now) if self._low else ()
            return Verdict(True, chosen) if chosen else _refusal(properties, covering.values(), counting, now)
        if other:
            why = f"certificate {self._claim(other).id} has one of the digests, but not all"
            return Verdict(False, (), "mismatch", why)
        if any(name in measured for name in _NAMES):
            return Verdict(False, (), "unknown", "no certificate has these digests")
        return Verdict(False, (), "weak", "nothing stronger than SHA-1 was supplied")

    def _claim(self, at: int) -> Claim:
        if at not in self._claims:
            if len(self._claims) >= CLAIMS_KEPT:
                self._claims.clear()
            self._claims[at] = self._read_claim(at)
        return self._claims[at]

    def _read_claim(self, at: int) -> Claim:
        row = self._connection().execute(_BY_NUMBER, (at,)).fetchone()
        if row is None or row[6] != checksum(*row[:6]) or row[10] != checksum(at, row[0], *row[7:10]):
            raise _damaged("a certificate is missing or changed")
        _, id, issuer, not_before, not_after, properties, _, component, version, below, _ = row
        limits = dict(line.split(" ") for line in below.splitlines())
        return Claim(id, issuer, not_before, not_after, tuple(properties.split("\n")), component, version, limits)

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError("store.index-closed", self._failure, _MEND)
        return self._db

    # -- opening --------------------------------------------------------------------------------

    def _load(self) -> None:
        self._identity = _check_header(self._path)
        # "immutable": no locks and no journal, because the file is replaced and never written.
        name = self._path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        try:
            self._db = sqlite3.connect(
                f"file:{name}?mode=ro&immutable=1",
                uri=True,
                isolation_level=None,
                check_same_thread=False,  # swtpm serialises commands, but may run them on a thread of its own
                cached_statements=8,
            )
            # No mmap: it would save a microsecond where the cache misses, but a page that cannot be read would kill
            # swtpm with SIGBUS instead of being an error, and pages touched would count as the guest's own memory.
            self._db.execute("PRAGMA mmap_size=0")
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._db.execute("PRAGMA trusted_schema=OFF")
            # One transaction for good: nobody writes, and to begin and end one is two fifths of a lookup.
            self._db.execute("BEGIN")
            self._check_contents(self._db)
        except StoreError:
            self.close()
            raise
        except _FAULTS as error:
            self.close()
            raise _damaged(str(error)) from error

    def _check_contents(self, db: sqlite3.Connection) -> None:
        """The one row of ``meta``, and both ends of the tree, which a file cut and padded would not have."""
        meta = db.execute("SELECT id, entries, certificates, low, floors, checksum FROM meta").fetchall()
        if len(meta) != 1 or meta[0][-1] != checksum(*meta[0][:-1]):
            raise _damaged("it does not say what it holds")
        self.id, self.entries, self.certificates, self._low, self.floors, _ = meta[0]
        self.expires, self.seen = _read_validity(self._path, self.id)
        for query in (_FIRST, _LAST):
            row = db.execute(query).fetchone()
            if (row is None) != (self.entries == 0):
                raise _damaged("it has not as many entries as it says")
            if row is not None:
                unpack(row[0])
                self._claim(row[1])


_BY_ENTRY = "SELECT digests, part FROM entry WHERE id BETWEEN ? AND ?"
_BY_ALIAS = """
    SELECT entry.digests, entry.part FROM alias JOIN entry ON entry.id = alias.entry
    WHERE alias.id BETWEEN ? AND ?
"""
_BY_NUMBER = """
    SELECT certificate.number, id, issuer, not_before, not_after, properties, certificate.checksum,
        component, version, below, part.checksum
    FROM part JOIN certificate ON certificate.number = part.certificate WHERE part.number = ?
"""
_FIRST = "SELECT digests, part FROM entry ORDER BY id LIMIT 1"
_LAST = "SELECT digests, part FROM entry ORDER BY id DESC LIMIT 1"


_SEARCHES = (*((_BY_ENTRY, name) for name in _NAMES), *((_BY_ALIAS, name) for name in _NAMES[1:]))
"""First where most are found: by the digest that numbers the row. A SHA-256 digest always does, so it has no alias."""


def _rows(db: sqlite3.Connection, query: str, digest: bytes | None) -> Iterable[tuple[bytes, int]]:
    """Digests and number of the part of each row that may have this digest."""
    if digest is None:
        return ()
    first = slot(digest)
    return db.execute(query, (first, first + CANDIDATES - 1))


def _choose(properties: Sequence[str], claims: Iterable[Claim], now: int) -> tuple[str, ...]:
    """For each property the certificate that lasts longest; empty if a property has none that is valid."""
    chosen = set()
    for uri in properties:
        last, id = 0, ""
        for claim in claims:
            if uri in claim.properties and claim.not_before <= now <= claim.not_after:
                last, id = max((last, id), (claim.not_after, claim.id))
        if not id:
            return ()
        chosen.add(id)
    return tuple(sorted(chosen))


def _above_floors(claims: Iterable[Claim]) -> list[Claim]:
    """The claims without the properties for which the thing is below a floor, whoever certifies it, as what it may.

    A version of the same component that is high enough keeps them: most files of a package do not change.
    """
    barred = {(uri, claim.component) for claim in claims for uri in claim.below}
    left = []
    for claim in claims:
        bars = {uri for uri, component in barred if component != claim.component or uri in claim.below}
        left.append(claim._replace(properties=tuple(uri for uri in claim.properties if uri not in bars)))
    return left


def _refusal(properties: Sequence[str], claims: Iterable[Claim], counting: Iterable[Claim], now: int) -> Verdict:
    """Why certificates that cover the measurement are not enough: the first property that is not certified.

    ``counting`` are those claims with the properties that floors leave them.
    """
    for uri in properties:
        able = [claim for claim in counting if uri in claim.properties]
        if any(claim.not_before <= now <= claim.not_after for claim in able):
            continue
        low = next((claim for claim in claims if uri in claim.below), None)
        if low and not able:
            named = f"{low.component} {low.version}".rstrip()
            return Verdict(False, (), "below-floor", f"{named} is below {low.below[uri]}, the lowest for {uri}")
        if not able:
            return Verdict(False, (), "property", f"certificate {next(iter(claims)).id} does not certify {uri}")
        last = max(able, key=lambda claim: claim.not_after)
        if last.not_after < now:
            why = f"certificate {last.id} for {uri} expired at {_time(last.not_after)}"
            return Verdict(False, (), "expired", why)
        why = f"certificate {last.id} for {uri} is valid from {_time(last.not_before)} on"
        return Verdict(False, (), "not-yet-valid", why)
    return Verdict(False, (), "property", "the bank demands no property")


def _check_header(path: str) -> tuple[int, ...]:
    """The identity of a file whose SQLite header (SQLite file format, section 1.3) is one of ours."""
    header, status = _read_start(path, _HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise _damaged("it is cut off")
    if header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StoreError("store.index-format", f"'{path}' is no certificate index", _MEND)
    version = int.from_bytes(header[60:64], "big")
    if version != FORMAT:
        raise StoreError("store.index-format", f"the index has format {version}, this program reads {FORMAT}", _MEND)
    page = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    if status.st_size != pages * page or not pages:
        raise _damaged(f"it has {status.st_size} bytes, not {pages * page}")
    return _identify(status)


def _read_validity(path: str, id: bytes) -> tuple[int, int]:
    """End of the index with this id, and the latest time its writer saw; seconds since the epoch."""
    try:
        data, _ = _read_start(validity(path), VALIDITY_BYTES)
        for line in data.decode("ascii").splitlines():
            name, expires, seen, _ = line.split(" ")
            if name == id.hex() and f"{line}\n" == validity_line(id, int(expires), int(seen)):
                return int(expires), int(seen)
        why = "it speaks of another one"
    except StoreError as error:
        why = error.what
    except ValueError:
        why = "it is damaged"
    what = f"'{validity(path)}' does not say until when the certificate index is good: {why}"
    raise StoreError("store.index-undated", what, _MEND)


def _read_start(path: str, most: int) -> tuple[bytes, os.stat_result]:
    try:
        # Not blocking: a FIFO in its place must not hold up a guest's start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StoreError("store.index-unreadable", f"'{path}' is no regular file", _MEND)
            return os.read(descriptor, most), status
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise StoreError("store.index-missing", f"there is no certificate index '{path}'", _MEND) from None
    except (OSError, ValueError) as error:
        raise StoreError("store.index-unreadable", f"the certificate index cannot be read: {error}", _MEND) from None


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        return _identify(os.stat(path))  # noqa: PTH116 - pathlib is too large for swtpm
    except OSError:
        return None


def _identify(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _damaged(why: str) -> StoreError:
    return StoreError("store.index-corrupt", f"the certificate index is damaged: {why}", _MEND)
