"""What the index says of one measurement, and the rule by which a certificate covers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from swtpm_prop.tpm.algorithms import STRONG


class Verdict(NamedTuple):
    """Whether a measurement has every property of a bank.

    Attributes:
        certified: True only if every property of the bank is certified for this measurement now.
        certificates: ids of the certificates that say so, sorted; empty if not certified.
        reason: empty if certified; else a stable word: ``unknown`` (no certificate names the digests),
            ``mismatch`` (one names a common digest and another differs), ``below-floor`` (of a component in a version
            that is too low for a property on this host), ``property`` (certified, but not for
            every property), ``expired``, ``not-yet-valid``, ``stale-index``, ``weak`` (nothing stronger than
            SHA-1 supplied), ``ambiguous`` (one algorithm twice in one command), ``no-index``.
        detail: a sentence for people: which certificate, which property, since when; may be empty.
    """

    certified: bool
    certificates: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


def covers(certified: Mapping[str, bytes], measured: Mapping[str, bytes]) -> bool:
    """The all-common rule: at least one common algorithm of SHA-256 or stronger, and every common one equal.

    Args:
        certified, measured: algorithm name to digest bytes; SHA-1 is ignored on both sides.
    """
    common = False
    for name in _STRONG_NAMES:
        if name in certified and name in measured:
            if certified[name] != measured[name]:
                return False
            common = True
    return common


_STRONG_NAMES = tuple(algorithm.name for algorithm in STRONG)
