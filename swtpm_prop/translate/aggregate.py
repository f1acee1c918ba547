"""IMA's boot aggregate: the one measurement that no certificate can name, because it repeats what other PCRs hold.

It is the first measurement into PCR 10 and covers the sha256 bank's PCRs 0 to 9, so it changes with every update. It
tells nothing that those PCRs do not tell themselves; so it is certified if it is what they say now, as long as there is
an index that certifies anything at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from functools import partial

from swtpm_prop.tpm import commands as tpm
from swtpm_prop.tpm import ima
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.pcr import READ_PCRS, build_pcr_read, parse_pcr_read
from swtpm_prop.translate.policy import Bank, Judge
from swtpm_prop.translate.verdict import Verdict, covers

_PCRS = tuple(ima.AGGREGATED)
_READS = tuple(((SHA256, _PCRS[start : start + READ_PCRS]),) for start in range(0, len(_PCRS), READ_PCRS))
_RECOGNISED = Verdict(True, (), "", "IMA's boot aggregate of the sha256 bank's PCRs 0 to 9 as they are")


def expecting_aggregate(judge: Judge) -> Generator[bytes, bytes, Judge]:
    """A judge that also knows the boot aggregate of this moment; the same judge without an active sha256 bank."""
    values: list[bytes] = []
    for selection in _READS:
        response = yield build_pcr_read(selection)
        part = parse_pcr_read(response, selection) if tpm.succeeded(response) else None
        if part is None:
            return judge
        values += part
    pcrs = dict(zip(_PCRS, values, strict=True))
    data = (ima.boot_aggregate_measurement(template, pcrs) for template in ima.FILE_TEMPLATES)
    return partial(_judge, judge, tuple(hashlib.sha256(each).digest() for each in data))


def _judge(judge: Judge, expected: tuple[bytes, ...], bank: Bank, measured: Mapping[str, bytes]) -> Verdict:
    verdict = judge(bank, measured)
    if verdict.reason == "unknown" and any(covers({"sha256": digest}, measured) for digest in expected):
        return _RECOGNISED
    return verdict
