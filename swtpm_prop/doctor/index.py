"""Is the certificate index there, whole, and not about to run out? Does something renew it?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from swtpm_prop import host_config
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.errors import HostError
from swtpm_prop.trust.index import Index

TIMER = "/etc/systemd/system/timers.target.wants/swtpm-prop-sync.timer"
"""What ``systemctl enable swtpm-prop-sync.timer`` makes."""


CLOCK_SECONDS = 300
"""How far the clock may be behind the latest time seen without a word: clocks are set by so much, and nobody cares."""


class _Renewal(NamedTuple):
    """How an index is renewed, and how long before its end, in seconds, that is overdue."""

    soon: int
    mend: str


BUILT = _Renewal(7 * 86400, "run swtpm-prop store build with certificates that are still valid")
FOLLOWED = _Renewal(12 * 3600, "run swtpm-prop store sync; if that does not help, the store itself is not renewed")
"""A store's timestamp is good for some days only, and renewed daily."""


def store(patient: Patient) -> Iterator[Finding]:
    """A host that names a store follows it.

    Raises:
        HostError: the configuration is not usable; the error's own words are the finding.
    """
    layout = patient.layout
    url = host_config.load(layout.host).store.url
    if not url:
        return
    if not layout.store_root.exists():
        mend = f"get the store's first root from its publisher as {layout.store_root}"
        yield problem("store.root-missing", f"the store {url} cannot be verified without its root", mend)
    elif not patient.at(TIMER).is_symlink():
        mend = "systemctl enable --now swtpm-prop-sync.timer, unless something else runs swtpm-prop store sync"
        yield warning("store.not-followed", f"no timer follows the store {url}", mend)
    else:
        yield ok("store.followed", f"a timer follows the store {url}")


def index(patient: Patient) -> Iterator[Finding]:
    """Without a usable index no guest with property banks starts; with an expired one nothing is certified.

    Raises:
        StoreError: it is missing or damaged; the error's own words are the finding.
    """
    path = patient.layout.index
    renewal = _renewal(patient)
    opened = Index.open(str(path))
    try:
        now = max(int(time.time()), opened.seen)
        yield _judge(opened.expires - now, opened.expires, f"the index {path}", renewal)
        soon = [id for id, end in opened.ends() if end < now + BUILT.soon]
        total = opened.certificates
    finally:
        opened.close()
    if opened.seen > time.time() + CLOCK_SECONDS:
        when = _format(opened.seen)
        what = f"the clock is behind: the index was renewed at {when}, and that is what its certificates are judged by"
        yield warning("index.clock-behind", what, "set this host's clock; if it is right, it was ahead then")
    if soon:
        what = f"{len(soon)} of {total} certificates have expired or expire within a week, first {soon[0]}"
        yield warning("index.certificates-expire", what, renewal.mend)


def _renewal(patient: Patient) -> _Renewal:
    try:
        return FOLLOWED if host_config.load(patient.layout.host).store.url else BUILT
    except HostError:
        return BUILT


def _format(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _judge(left: int, expires: int, who: str, renewal: _Renewal) -> Finding:
    when = _format(expires)
    if left < 0:
        return problem("index.expired", f"{who} has expired on {when}: nothing is certified any more", renewal.mend)
    if left < renewal.soon:
        return warning("index.expires-soon", f"{who} expires on {when}", renewal.mend)
    return ok("index.usable", f"{who} is whole and good until {when}")
