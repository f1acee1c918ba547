"""The written list of translated PCRs, "0-9,11-14": reading and writing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from swtpm_prop.errors import DomainError

LAST = 15
"""PCRs 0 to 15 start at zero and cannot be reset (TCG PC Client Platform TPM Profile, section 4.6)."""

DEFAULT = "0-9,11-14"
"""Without 10, where IMA counts every file, and 15, where systemd measures machine-specific values."""

_ITEM = re.compile("([0-9]{1,2})(?:-([0-9]{1,2}))?")


def parse_pcrs(text: str) -> frozenset[int]:
    """Read a list of PCRs and of ranges, each PCR at most once.

    Raises:
        DomainError: ``domain.pcrs`` (syntax, reversed range, doubled PCR), ``domain.pcr-not-translatable``.
    """
    pcrs: set[int] = set()
    for item in text.split(","):
        span = _span(item, text)
        if not pcrs.isdisjoint(span):
            raise _malformed(text, f"'{item}' repeats a PCR")
        pcrs.update(span)
    return frozenset(pcrs)


def format_pcrs(pcrs: Iterable[int]) -> str:
    """The shortest list that `parse_pcrs` reads back, in rising order."""
    spans: list[list[int]] = []
    for pcr in sorted(pcrs):
        if spans and pcr == spans[-1][1] + 1:
            spans[-1][1] = pcr
        else:
            spans.append([pcr, pcr])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _span(item: str, text: str) -> range:
    found = _ITEM.fullmatch(item)
    if found is None:
        raise _malformed(text, f"'{item}' is neither a PCR nor a range")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise _malformed(text, f"range '{item}' is reversed")
    if last > LAST:
        raise DomainError(
            "domain.pcr-not-translatable",
            f"PCR {last} cannot record properties",
            f"name PCRs 0 to {LAST}; the others can be reset, do not start at zero or do not exist",
        )
    return range(first, last + 1)


def _malformed(text: str, why: str) -> DomainError:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return DomainError("domain.pcrs", f"PCR list '{shown}' is malformed, {why}", f"write it like {DEFAULT}")
