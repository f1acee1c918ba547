"""Is the certificate index there, whole, and not about to run out?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.trust.index import Index

SOON = 7 * 86400
"""A week, in seconds: time enough to build the next index."""

MEND = "run swtpm-prop store build with certificates that are still valid"


def index(patient: Patient) -> Iterator[Finding]:
    """Without a usable index no guest with property banks starts; with an expired one nothing is certified.

    Raises:
        StoreError: it is missing or damaged; the error's own words are the finding.
    """
    path = patient.layout.index
    opened = Index.open(str(path))
    try:
        yield _judge(opened.expires, f"the index {path}")
        soon = [claim for claim, _ in opened.claims() if claim.not_after < int(time.time()) + SOON]
        total = opened.certificates
    finally:
        opened.close()
    if soon:
        what = f"{len(soon)} of {total} certificates have expired or expire within a week, first {soon[0].id}"
        yield warning("index.certificates-expire", what, MEND)


def _judge(expires: int, who: str) -> Finding:
    when = datetime.fromtimestamp(expires, UTC).isoformat(timespec="seconds")
    left = expires - int(time.time())
    if left < 0:
        return problem("index.expired", f"{who} has expired on {when}: nothing is certified any more", MEND)
    if left < SOON:
        return warning("index.expires-soon", f"{who} expires on {when}", MEND)
    return ok("index.usable", f"{who} is whole and good until {when}")
