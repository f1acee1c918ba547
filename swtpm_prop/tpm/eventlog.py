"""TCG event logs of firmware: parse, and replay into PCR values.

Both record formats of the TCG PC Client Platform Firmware Profile are read: crypto-agile (TCG_PCR_EVENT2, announced by
a first record with the signature ``Spec ID Event03``) and SHA-1 only (TCG_PCClientPCREvent). All integers are
little-endian. The parser is strict: every length is checked, nothing may be left over, and any input either parses or
raises WireError with an id ``eventlog.*``.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from swtpm_prop import limits
from swtpm_prop.errors import WireError
from swtpm_prop.tpm.algorithms import ALGORITHMS, BY_ID, SHA1, Digest, HashAlgorithm

EV_NO_ACTION = 0x00000003
"""Informational: such a record was never extended into a PCR."""

SPEC_ID = b"Spec ID Event03\0"
STARTUP_LOCALITY = b"StartupLocality\0"

_LEGACY = struct.Struct("<II20sI")
_AGILE = struct.Struct("<III")
_WORD = struct.Struct("<I")
_PAIR = struct.Struct("<HH")


class Event(NamedTuple):
    """One record: its place in the log, PCR index, event type, digests as measured, and the event data."""

    number: int
    pcr: int
    type: int
    digests: tuple[Digest, ...]
    data: bytes


class EventLog(NamedTuple):
    """A parsed log.

    Attributes:
        events: every record, the Spec ID record and other EV_NO_ACTION ones too.
        algorithms: the hash algorithms the header announces, in its order; (SHA-1,) for the older format.
        startup_locality: locality of TPM2_Startup, the last byte of PCR 0 before its first extend: 0, 3 or 4.
    """

    events: tuple[Event, ...]
    algorithms: tuple[HashAlgorithm, ...]
    startup_locality: int


def parse(data: bytes) -> EventLog:
    """Read a whole event log, as ``/sys/kernel/security/tpm0/binary_bios_measurements`` gives it.

    Raises:
        WireError: ``eventlog.too-big``, ``eventlog.truncated``, ``eventlog.header``, ``eventlog.digests``,
            ``eventlog.pcr``, ``eventlog.locality``.
    """
    if len(data) > limits.EVENT_LOG_BYTES:
        raise WireError("eventlog.too-big", f"event log of {len(data)} bytes, the limit is {limits.EVENT_LOG_BYTES}")
    cursor = _Cursor(bytes(data))
    first = _legacy_event(cursor, 0)
    if first.type == EV_NO_ACTION and first.data.startswith(SPEC_ID):
        algorithms = _spec_id(first.data)
        events = [first, *_rest(cursor, algorithms)]
    else:
        algorithms = (SHA1,)
        events = [first, *_rest(cursor, None)]
    return EventLog(tuple(events), algorithms, _startup_locality(events))


def replay(log: EventLog, algorithm: HashAlgorithm) -> dict[int, bytes]:
    """The value of every PCR the log touches in the bank of ``algorithm``, as extending each record makes it.

    PCR 0 starts with the startup locality in its last byte (TPM 2.0 Part 1, 11.4.5), 17 to 22 start at all ones.

    Raises:
        WireError: ``eventlog.algorithm`` if a measurement has no digest for this bank, or the hash is not known here.
    """
    if algorithm not in ALGORITHMS:
        raise WireError("eventlog.algorithm", f"cannot replay algorithm {algorithm.name}")
    values: dict[int, bytes] = {}
    for event in log.events:
        if event.type == EV_NO_ACTION:
            continue
        measured = next((digest.value for digest in event.digests if digest.algorithm == algorithm), None)
        if measured is None:
            raise WireError("eventlog.algorithm", f"event {event.number} has no {algorithm.name} digest")
        start = values.get(event.pcr, _initial(event.pcr, algorithm, log.startup_locality))
        values[event.pcr] = hashlib.new(algorithm.name, start + measured).digest()
    return values


class _Cursor:
    """Bytes with a position; taking more than is left is an error, never a short answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise WireError("eventlog.truncated", f"event log ends at {len(self._data)}, a record needs {end} bytes")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def done(self) -> bool:
        return self._at == len(self._data)


def _rest(cursor: _Cursor, algorithms: tuple[HashAlgorithm, ...] | None) -> list[Event]:
    by_id = {algorithm.id: algorithm for algorithm in algorithms or ()}
    events: list[Event] = []
    while not cursor.done():
        index = len(events) + 1
        if index >= limits.EVENTS:
            raise WireError("eventlog.too-big", f"event log of more than {limits.EVENTS} events")
        events.append(_legacy_event(cursor, index) if algorithms is None else _agile_event(cursor, index, by_id))
    return events


def _legacy_event(cursor: _Cursor, index: int) -> Event:
    pcr, type_, digest, size = _LEGACY.unpack(cursor.take(_LEGACY.size))
    return _checked(Event(index, pcr, type_, (Digest(SHA1, digest),), cursor.take(size)))


def _agile_event(cursor: _Cursor, index: int, algorithms: dict[int, HashAlgorithm]) -> Event:
    pcr, type_, count = cursor.unpack(_AGILE)
    if not 0 < count <= len(algorithms):
        raise WireError("eventlog.digests", f"event {index} has {count} digests, the header names {len(algorithms)}")
    digests: dict[int, Digest] = {}
    for _ in range(count):
        identifier = int.from_bytes(cursor.take(2), "little")
        if identifier not in algorithms or identifier in digests:
            raise WireError("eventlog.digests", f"event {index} has a foreign or doubled algorithm 0x{identifier:04x}")
        algorithm = algorithms[identifier]
        digests[identifier] = Digest(algorithm, cursor.take(algorithm.size))
    (size,) = cursor.unpack(_WORD)
    return _checked(Event(index, pcr, type_, tuple(digests.values()), cursor.take(size)))


def _checked(event: Event) -> Event:
    if event.pcr >= limits.PCRS and event.type != EV_NO_ACTION:
        raise WireError("eventlog.pcr", f"event {event.number} measures into PCR {event.pcr}, the last one is 23")
    return event


def _unknown(identifier: int, size: int) -> HashAlgorithm:
    """An algorithm that libtpms has no bank for (SM3 for one): only its length is known."""
    return HashAlgorithm(identifier, f"0x{identifier:04x}", size, identifier.to_bytes(2, "big"))


def _spec_id(data: bytes) -> tuple[HashAlgorithm, ...]:
    """The algorithms of a TCG_EfiSpecIdEvent: signature, class, versions, then the list, then vendor information."""
    cursor = _Cursor(data)
    cursor.take(len(SPEC_ID) + 8)
    (count,) = cursor.unpack(_WORD)
    algorithms: dict[int, HashAlgorithm] = {}
    for _ in range(count):
        identifier, size = cursor.unpack(_PAIR)
        algorithm = BY_ID.get(identifier) or _unknown(identifier, size)
        if identifier in algorithms or size != algorithm.size or not size:
            raise WireError("eventlog.header", f"algorithm 0x{identifier:04x} doubled or with digests of {size} bytes")
        algorithms[identifier] = algorithm
    cursor.take(cursor.take(1)[0])
    if not algorithms or not cursor.done():
        raise WireError("eventlog.header", "the Spec ID record names no algorithm, or something follows it")
    return tuple(algorithms.values())


def _startup_locality(events: list[Event]) -> int:
    found = [e.data for e in events if e.type == EV_NO_ACTION and e.pcr == 0 and e.data.startswith(STARTUP_LOCALITY)]
    if not found:
        return 0
    tail = found[0][len(STARTUP_LOCALITY) :]
    if len(found) > 1 or tail not in (b"\0", b"\3", b"\4"):
        raise WireError("eventlog.locality", "the startup locality is doubled, or is not 0, 3 or 4")
    return tail[0]


def _initial(pcr: int, algorithm: HashAlgorithm, locality: int) -> bytes:
    if pcr == 0:
        return bytes(algorithm.size - 1) + bytes([locality])
    return (b"\xff" if 17 <= pcr <= 22 else b"\0") * algorithm.size
