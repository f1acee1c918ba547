"""Following a store of a million digests: everything from nothing, against what a day brings, side by side.

Fetch by TUF (file:), verification of what is new, the index. Certificates of 10,000 subjects with three digests each.
A change replaces 1 % of them by as many new ones; a new timestamp is what most syncs bring. Each sync runs in a process
of its own, whose peak of memory is given. What the publisher does is not timed.

Run: python -m benchmarks.sync [--digests N]; a million takes three minutes and 1 GB in /var/tmp.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from benchmarks.index import ISSUER, KEY, PER_CERTIFICATE, TRUST, alone, forget, issue, silent
from swtpm_prop.layout import Layout
from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust import follow, signers
from swtpm_prop.trust.fetch import Fetcher, address
from swtpm_prop.trust.publisher import Publisher
from swtpm_prop.trust.repository import ROLES, Change

AIM = 20
"""How many times faster than everything a change of 1 % should be."""


@contextmanager
def quiet(items: Sequence[Any], _label: str) -> Iterator[Iterator[Any]]:
    yield iter(items)


class Store:
    """A publisher whose one key has every role; certificates are known by the range of things they are about."""

    def __init__(self, directory: Path) -> None:
        self.publisher = Publisher(directory / "store")
        self.url = address(str(directory / "store/public"))
        self._directory = directory
        self._key = directory / "key.pem"
        raw, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        self._key.write_bytes(KEY.private_bytes(raw, pkcs8, serialization.NoEncryption()))
        public = directory / "public.pem"
        public.write_bytes(KEY.public_key().public_bytes(raw, serialization.PublicFormat.SubjectPublicKeyInfo))
        self.publisher.init(Change(add=[(role, signers.load_public(public)) for role in ROLES]), datetime.now(UTC))

    def change(self, first: int, end: int, removed: int = 0) -> None:
        """Certify these things, take out as many certificates, publish."""
        going = sorted(self.publisher.certificates.iterdir())[:removed]
        self.publisher.remove((), going, quiet)
        file = self._directory / "new.json"
        for begin in range(first, end, PER_CERTIFICATE):
            file.write_bytes(issue(range(begin, min(begin + PER_CERTIFICATE, end)), [each.name for each in STRONG]))
            self.publisher.add([file], quiet)
        self.publish()

    def publish(self, minutes: int = 0) -> None:
        """Sign what is there, so many minutes from now."""
        self.publisher.publish([str(self._key)], str, datetime.now(UTC) + timedelta(minutes=minutes))


def host(root: Path, store: Store, directory: Path) -> Layout:
    layout = Layout(root)
    for place in (layout.etc, layout.index.parent):
        place.mkdir(parents=True)
    (layout.etc / "issuer.pem").write_bytes((directory / "public.pem").read_bytes())
    prefixes = ", ".join(f'"{prefix}"' for prefix in TRUST[ISSUER].prefixes)
    layout.trust.write_text(f'[[issuer]]\nid = "{ISSUER}"\nkeys = ["issuer.pem"]\nprefixes = [{prefixes}]\n')
    layout.store_root.write_bytes((store.publisher.metadata / "1.root.json").read_bytes())
    return layout


def synced(root: Path, url: str) -> tuple[float, float, int, int]:
    """Seconds, seconds of them on the CPU, certificates that came and went."""
    begin, used = time.perf_counter(), time.process_time()
    done = follow.sync(Layout(root), url, Fetcher(), quiet, silent)
    assert not done.refused
    return time.perf_counter() - begin, time.process_time() - used, done.added, done.removed


def cold(layout: Layout) -> None:
    """Nothing of the store or the index is in the page cache."""
    os.sync()
    for file in (layout.index, *layout.store.rglob("*.json")):
        if file.is_file():
            forget(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digests", type=int, default=1_000_000)
    count = parser.parse_args().digests
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        store = Store(directory)
        store.change(0, count)
        layout = host(directory / "host", store, directory)
        share = max(count // 100, PER_CERTIFICATE)
        print(f"Sync of a store of {count:,} digests, certificates of {PER_CERTIFICATE:,}")
        full = 0.0
        for name, change in (
            ("everything, from nothing", lambda: None),
            ("1 % replaced", lambda: store.change(count, count + share, share // PER_CERTIFICATE)),
            ("1 % replaced, cold", lambda: store.change(count + share, count + 2 * share, share // PER_CERTIFICATE)),
            ("a new timestamp", lambda: store.publish(1)),
            ("nothing new", lambda: None),
        ):
            change()
            os.sync()
            if name.endswith("cold"):
                cold(layout)
            (seconds, used, added, removed), peak = alone(synced, layout.root, store.url)
            full = full or seconds
            ratio = f"{full / seconds:6.0f} x faster"
            print(
                f"  {name:<26}{seconds:8.2f} s   CPU {used:6.2f} s   peak {peak:4.0f} MiB   +{added} -{removed} {ratio}"
            )
            if name == "1 % replaced" and full < AIM * seconds:
                print(f"  aimed at: {AIM} x")


if __name__ == "__main__":
    main()
