"""Records of the property log: what was measured, what became of it, and why.

The shape is a record of the TCG Canonical Event Log (version 1.0, JSON encoding): recnum, pcr, digests, content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from swtpm_prop.tpm.algorithms import Digest
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
    """

    pcr: int | None
    digests: tuple[Digest, ...]
    content: Mapping[str, Any]

    def to_json(self, recnum: int, time: str) -> dict[str, Any]:
        """The record for ``json.dumps``; ``time`` is RFC 3339 in UTC."""
        return {
            "recnum": recnum,
            "pcr": self.pcr,
            "digests": [{"hashAlg": d.algorithm.name, "digest": d.value.hex()} for d in self.digests],
            "content_type": "swtpm-prop",
            "content": {**self.content, "time": time},
        }


def measurement(command: str, pcr: int, digests: tuple[Digest, ...], bank: str, state: str, verdict: Verdict) -> Record:
    """A measurement into a translated PCR of ``bank``, whose state is now ``state``."""
    content = {"event": MEASUREMENT, "command": command, "bank": bank, "state": state, **verdict._asdict()}
    return Record(pcr, digests, content)


def snapshot(event: str, states: Mapping[str, Mapping[int, str]]) -> Record:
    """The state of every translated PCR at a Startup or after a resume: bank to PCR to state."""
    return Record(None, (), {"event": event, "states": states})


def failure(id: str, what: str) -> Record:
    """The layer gave up: from here on the TPM refuses every command that could change a PCR."""
    return Record(None, (), {"event": FAILURE, "reason": id, "detail": what})
