"""Records of the property log: what was measured, what became of it, and why.

The shape is a record of the TCG Canonical Event Log (version 1.0, JSON encoding): recnum, pcr, digests, content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from swtpm_prop.tpm.algorithms import Digests
from swtpm_prop.translate.verdict import Verdict

MEASUREMENT = "measurement"
STARTUP = "startup"
RESUME = "resume"
FAILURE = "failure"


class Record(NamedTuple):
    """One line of the property log, still without its number and its time.

    Attributes:
        pcr: the PCR measured into; None where the record speaks of all.
        digests: what the guest supplied, as it supplied it.
        content: the part of our own; its ``event`` is one of the words above.
        text: ``content`` as JSON, but for the brace that closes it.
    """

    pcr: int | None
    digests: Digests
    content: Mapping[str, Any]
    text: str

    def to_line(self, recnum: int, time: str) -> str:
        """`to_json` as ``json.dumps`` writes it without blanks, from parts: measurements share most of it."""
        pcr = "null" if self.pcr is None else self.pcr
        digests = ",".join([f'{{"hashAlg":"{a.name}","digest":"{value.hex()}"}}' for a, value in self.digests])
        return (
            f'{{"recnum":{recnum},"pcr":{pcr},"digests":[{digests}],"content_type":"swtpm-prop",'
            f'"content":{self.text},"time":"{time}"}}}}'
        )

    def to_json(self, recnum: int, time: str) -> dict[str, Any]:
        """The record for ``json.dumps``; ``time`` is RFC 3339 in UTC."""
        return {
            "recnum": recnum,
            "pcr": self.pcr,
            "digests": [{"hashAlg": a.name, "digest": value.hex()} for a, value in self.digests],
            "content_type": "swtpm-prop",
            "content": {**self.content, "time": time},
        }


def measurement(command: str, pcr: int, digests: Digests, bank: str, state: str, verdict: Verdict) -> Record:
    """A measurement into a translated PCR of ``bank``, whose state is now ``state``."""
    return Record(pcr, digests, *_measured(command, bank, state, verdict))


@lru_cache(maxsize=64)
def _measured(command: str, bank: str, state: str, verdict: Verdict) -> tuple[Mapping[str, Any], str]:
    """What measurements with the same end have in common; a boot has a handful of ends."""
    return _with_text({"event": MEASUREMENT, "command": command, "bank": bank, "state": state, **verdict._asdict()})


def snapshot(event: str, states: Mapping[str, Mapping[int, str]]) -> Record:
    """The state of every translated PCR at a Startup or after a resume: bank to PCR to state."""
    return Record(None, (), *_with_text({"event": event, "states": states}))


def failure(id: str, what: str) -> Record:
    """The layer gave up: from here on the TPM refuses every command that could change a PCR."""
    return Record(None, (), *_with_text({"event": FAILURE, "reason": id, "detail": what}))


def _with_text(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    return content, json.dumps(content, separators=(",", ":")).removesuffix("}")
