"""What the logs of a guest say was measured: one form for firmware's event log and the kernel's IMA list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from swtpm_prop.tpm import eventlog, imalog
from swtpm_prop.tpm.algorithms import BY_NAME, SHA256, STRONG, Digest
from swtpm_prop.tpm.eventlog_text import describe, type_name
from swtpm_prop.translate.verdict import covers

VIOLATION, PADDED, WEAK = "violation", "padded", "weak"
"""Why no certificate can rest on a measurement: IMA saw the file open for writing; its digests are shorter ones filled
up; it has SHA-1 alone. The last is a word of `translate.verdict.Verdict`, whose others may stand beside these."""

LeftOut = Counter[str]
"""How many measurements are left out of a source, by the word for why."""

_PADDING = bytes(12)
"""A digest that ends so is a shorter one filled up with zeros (a SHA-1 in a SHA-256 bank), not a hash of anything."""


class Measurement(NamedTuple):
    """One measurement of a log.

    Attributes:
        pcr: where it went.
        type: ``EV_...`` of firmware, the template of IMA (``ima-sig``).
        description: what the log says it was; printable, a claim of the guest.
        digests: those that count, by algorithm name: SHA-256 or stronger, and hashes of something. May be empty.
        weakness: if they are, why.
    """

    pcr: int
    type: str
    description: str
    digests: Mapping[str, bytes]
    weakness: str = ""


def of_event_log(data: bytes) -> Iterator[Measurement]:
    """The measurements of a TCG event log; EV_NO_ACTION records are none.

    Raises:
        WireError: ``eventlog.*``.
    """
    for event in eventlog.parse(data).events:
        if event.type != eventlog.EV_NO_ACTION:
            digests = event.digests
            yield Measurement(event.pcr, type_name(event), describe(event), genuine(digests), weakness(digests))


def of_ima_list(data: bytes) -> Iterator[Measurement]:
    """The measurements of an IMA list, by the SHA-256 of their template data; a violation has no digest that counts.

    Kernels pad what they extend other banks with where they lack the hash, so nothing but SHA-256 is said of these.

    Raises:
        WireError: ``imalog.*``.
    """
    for entry in imalog.parse(data):
        digests = [Digest(SHA256, imalog.measured(entry, SHA256))]
        yield Measurement(entry.pcr, entry.template, imalog.describe(entry), genuine(digests), weakness(digests))


def genuine(digests: Iterable[Digest]) -> dict[str, bytes]:
    """The digests that a certificate may rest on, by algorithm name."""
    return {
        digest.algorithm.name: digest.value
        for digest in digests
        if digest.algorithm in STRONG and not digest.value.endswith(_PADDING) and not _is_violation(digest)
    }


def weakness(digests: Collection[Digest]) -> str:
    """Why no certificate may rest on any of the digests; empty if one may."""
    if genuine(digests):
        return ""
    strong = [digest for digest in digests if digest.algorithm in STRONG]
    if not strong:
        return WEAK
    return VIOLATION if all(map(_is_violation, strong)) else PADDED


def _is_violation(digest: Digest) -> bool:
    return set(digest.value) == {0xFF}


class Known:
    """Measurements of logs, to be found again by PCR and digests."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._found: dict[tuple[int, str, bytes], Measurement] = {}
        self._violations: dict[int, dict[str, Measurement]] = {}
        for measurement in measurements:
            if measurement.weakness == VIOLATION:
                self._violations.setdefault(measurement.pcr, {}).setdefault(measurement.description, measurement)
            for name, value in measurement.digests.items():
                self._found.setdefault((measurement.pcr, name, value), measurement)

    def find(self, pcr: int, digests: Mapping[str, bytes]) -> Measurement | None:
        """The first measurement into ``pcr`` that agrees with ``digests`` (by algorithm name) on all that both have.

        A violation is known without any log.
        """
        for name, value in digests.items():
            found = self._found.get((pcr, name, value))
            if found is not None and covers(found.digests, digests):
                return found
        supplied = [Digest(BY_NAME[name], value) for name, value in digests.items()]
        return self._violation(pcr) if weakness(supplied) == VIOLATION else None

    def _violation(self, pcr: int) -> Measurement:
        """All violations are measured alike: which of those in a log it was cannot be told."""
        found = self._violations.get(pcr)
        if not found:
            what = "violation: a file was read while it was open for writing"
            return Measurement(pcr, "IMA", what, {}, VIOLATION)
        first, *_ = found.values()
        return first._replace(description=" or ".join(found))
