"""Certificates and their index at the size of a distribution: time, bytes, memory, and what an update saves.

1. A statement of all that guests measure of the files of ten Debian kernel packages, IMA included: made, issued,
   verified.
2. Envelopes made to hurt: how soon and in how much memory each is refused, or accepted where it is at the limit.
3. An index of a million digests, with --large also one of ten million: everything verified and built, against 1 % of
   the certificates replaced by as many new ones; judgements from a process of their own. Cold: the file is dropped
   from the page cache before. Boot: the same thirty measurements again and again. Miss: nobody certified it.

Each measurement runs in a process of its own, whose peak of memory is given. What makes the input is not timed.

Run: python -m benchmarks.index [--large] [--digests N]; --large takes a quarter of an hour and 8 GB in /var/tmp.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from lab import debian
from lab.guest import kernels
from swtpm_prop.errors import TrustError
from swtpm_prop.limits import CERTIFICATE_BYTES, SUBJECTS
from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust import build, certificate, dsse, packages
from swtpm_prop.trust.certificate import Certificate, Claim
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.floors import ALL, NONE, Floors
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.issuers import Issuer, Trust
from swtpm_prop.trust.sources import COMPONENT, NO_ANNOTATIONS, VERSION, Subject

ISSUER = "https://example.org/issuers/debian"
PROPERTIES = ("https://example.org/properties/boot",)
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUST: Trust = {ISSUER: Issuer(ISSUER, (KEY.public_key(),), ("https://example.org/properties",), 1)}
OLD = "linux"
"""The component of the first certificate's things, in version 1."""
NOW = 1_800_000_000
PACKAGES = 10
PER_CERTIFICATE = 10_000
LOOKUPS = 2000
COLD = 200
BOOT = 30
"""Measurements of a boot, which come again with every boot."""


def alone(measure: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a measurement returns in a new process, and the peak of that process's memory in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peaked, (measure, *arguments))


def _peaked(measure: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    result = measure(*arguments)
    status = Path("/proc/self/status").read_text()
    return result, int(status.split("VmHWM:")[1].split()[0]) / 1024


def clocked(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return function(*arguments), time.perf_counter() - begin


# -- a statement of ten packages ----------------------------------------------------------------


def statement(debs: list[Path], to: Path) -> tuple[int, float, float]:
    """As cert issue --deb: how many subjects, seconds to hash the packages and to issue the certificate."""
    begin = time.perf_counter()
    found = [subject for deb in debs for subject in packages.from_deb(deb, with_ima=True)]
    subjects = list({tuple(subject.digests.values()): subject for subject in found}.values())
    hashed = time.perf_counter() - begin
    data, issued = clocked(certificate.issue, Claim(ISSUER, PROPERTIES, subjects, NOW - 1, NOW + 1), [KEY], NOW)
    to.write_bytes(data)
    return len(subjects), hashed, issued


def verify(file: Path) -> tuple[float, str]:
    """Seconds, and what came of it."""
    begin = time.perf_counter()
    try:
        what = f"{len(certificate.verify(read_file(file, CERTIFICATE_BYTES), TRUST, NOW).subjects)} subjects"
    except TrustError as error:
        what = error.id
    return time.perf_counter() - begin, what


def print_statement(directory: Path) -> None:
    debs, to = [debian.archive(name) for name in kernels(PACKAGES)], directory / "packages.dsse"
    (count, hashed, issued), issuing = alone(statement, debs, to)
    (verified, what), verifying = alone(verify, to)
    size = sum(deb.stat().st_size for deb in debs)
    print(f"All files of {PACKAGES} Debian kernel packages ({size / 1e6:.0f} MB), with IMA: {what}")
    print(f"  certificate {to.stat().st_size / 1e6:6.1f} MB   {to.stat().st_size / count:.0f} bytes a subject")
    print(f"  hash        {hashed:6.2f} s    unpacking them included")
    print(f"  issue       {issued:6.2f} s    peak {issuing:.0f} MiB")
    print(f"  verify      {verified:6.2f} s    peak {verifying:.0f} MiB   {1e6 * verified / count:.0f} us a subject")


# -- envelopes made to hurt ---------------------------------------------------------------------


def hostile() -> Iterator[tuple[str, bytes]]:
    yield "100 MB, refused unread", b'{"payload": "' + b"A" * 100_000_000
    room = CERTIFICATE_BYTES - 1000
    yield "as large as allowed, no JSON", b"[" + b"1," * (room // 2)
    yield "nested as deep as it fits", b'{"a":' * (room // 6)
    yield "nested lists", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
    yield "small objects side by side", b'{"a":[' + b"{}," * (room // 3 - 8) + b"{}]}"
    yield "payload: small objects", signed(b'{"a":[' + b"{}," * (room // 4 - 99) + b"{}]}")
    yield f"{SUBJECTS} subjects", issue(range(SUBJECTS), ("sha256",))
    yield f"{SUBJECTS + 1} subjects", signed(many_subjects())


def signed(payload: bytes) -> bytes:
    return dsse.sign(certificate.PAYLOAD_TYPE, payload, [KEY])


def many_subjects() -> bytes:
    one = json.loads(base64.b64decode(json.loads(issue(range(1), ("sha256",)))["payload"]))
    return json.dumps({**one, "subject": one["subject"] * (SUBJECTS + 1)}).encode()


def print_hostile(directory: Path) -> None:
    print("\nEnvelopes made to hurt      MB      s   peak MiB   outcome")
    file = directory / "hostile.dsse"
    for name, data in hostile():
        file.write_bytes(data)
        (seconds, what), peak = alone(verify, file)
        print(f"  {name:<30} {len(data) / 1e6:5.0f} {seconds:6.2f} {peak:10.0f}   {what}", flush=True)


# -- the index ----------------------------------------------------------------------------------


def digests(of: int, names: Iterable[str]) -> dict[str, bytes]:
    return {name: hashlib.new(name, of.to_bytes(8)).digest() for name in names}


def issue(things: range, names: Iterable[str]) -> bytes:
    """A certificate; that of the first things names their component, so that a floor can be above them."""
    said = {COMPONENT: OLD, VERSION: "1"} if things.start == 0 else NO_ANNOTATIONS
    subjects = [Subject("", digests(of, names), said) for of in things]
    return certificate.issue(Claim(ISSUER, PROPERTIES, subjects, NOW - 1, NOW + 1), [KEY], NOW)


class Store:
    """Certificates of a range of things, verified as they are taken; keeps the time that issuing them takes."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.issuing = 0.0

    def __iter__(self) -> Iterator[Certificate]:
        for first in range(self.first, self.end, PER_CERTIFICATE):
            things = range(first, min(first + PER_CERTIFICATE, self.end))
            data, seconds = clocked(issue, things, [algorithm.name for algorithm in STRONG])
            self.issuing += seconds
            yield certificate.verify(data, TRUST, None)


def silent(_doing: str, _done: int) -> None:
    pass


def built(path: Path, count: int) -> float:
    store = Store(0, count)
    return clocked(build.build, path, store, NOW, silent)[1] - store.issuing


def updated(path: Path, first: int, count: int, removed: list[str], expires: int, floors: Floors = NONE) -> float:
    store = Store(first, first + count)
    return clocked(build.update, path, store, removed, expires, silent, floors)[1] - store.issuing


def judged(index: Index, measured: list[dict[str, bytes]], certified: bool) -> float:
    """Median microseconds of a judgement."""
    times = []
    for digest in measured:
        begin = time.perf_counter_ns()
        verdict = index.judge(PROPERTIES, digest, NOW)
        times.append(time.perf_counter_ns() - begin)
        assert verdict.certified is certified
    return statistics.median(times) / 1000


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def private_kib() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))


def lookups(path: Path, count: int) -> dict[str, float]:
    supplied = [algorithm.name for algorithm in STRONG]
    known = [digests(of * 7919 % count, supplied) for of in range(LOOKUPS)]
    unknown = [digests(2 * count + of, supplied) for of in range(LOOKUPS)]
    Index.open(str(path)).judge(PROPERTIES, known[0], NOW)
    forget(path)
    before = private_kib()
    index, opening = clocked(Index.open, str(path))
    return {
        "open, cold": 1e6 * opening,
        "first judgement, cold": judged(index, known[-COLD - 1 : -COLD], certified=True),
        "cold": judged(index, known[-COLD:], certified=True),
        "warm": statistics.median(judged(index, known, certified=True) for _ in range(5)),
        "boot": judged(index, known[:BOOT] * (LOOKUPS // BOOT), certified=True),
        "miss": min(judged(index, unknown, certified=False) for _ in range(2)),
        "private KiB": private_kib() - before,
    }


def with_floor(path: Path) -> float:
    """Median microseconds of a judgement of a boot's measurements, none of which is below the floor."""
    known = [digests(PER_CERTIFICATE + of, [algorithm.name for algorithm in STRONG]) for of in range(BOOT)]
    return judged(Index.open(str(path)), known * (LOOKUPS // BOOT), certified=True)


def print_index(directory: Path, count: int) -> None:
    path = directory / "index.sqlite"
    full, peak = alone(built, path, count)
    size = path.stat().st_size
    print(f"\nIndex of {count:,} digests, certificates of {PER_CERTIFICATE:,}")
    print(f"  size                          {size / 1e6:9.1f} MB   {size / count:.0f} bytes a subject")
    print(f"  all verified and built        {full:9.2f} s    peak {peak:.0f} MiB", flush=True)
    asked, _ = alone(lookups, path, count)
    for name, value in asked.items():
        print(f"  {name if ' ' in name else 'judgement, ' + name:<30}{value:9.1f} {'' if 'KiB' in name else 'us'}")
    share = max(count // 100, PER_CERTIFICATE)
    floor = {OLD: {ALL: "2"}}
    for name, arguments in (
        ("later end alone", (0, 0, [], NOW + 1)),
        ("nothing changed", (0, 0, [], NOW + 1)),
        ("floor raised", (0, 0, [], NOW + 1, floor)),
    ):
        print_update(name, full, path, *arguments)
    asked, _ = alone(with_floor, path)
    print(f"  {'judgement, boot, with a floor':<30}{asked:9.1f} us")
    removed = sorted(build.held(path))[: share // PER_CERTIFICATE]
    print_update("1 % replaced", full, path, count, share, removed, NOW + 1, floor)
    print(f"  size after that               {path.stat().st_size / 1e6:9.1f} MB")


def print_update(name: str, full: float, path: Path, *arguments: Any) -> None:
    seconds, peak = alone(updated, path, *arguments)
    print(f"  {name:<30}{seconds:9.3f} s    peak {peak:.0f} MiB   {full / seconds:.0f} x faster", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="ten million digests too")
    parser.add_argument("--digests", type=int, default=1_000_000, help="of the first index (1000000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        print_statement(directory)
        print_hostile(directory)
        print_index(directory, arguments.digests)
        if arguments.large:
            print_index(directory, 10_000_000)


if __name__ == "__main__":
    main()
