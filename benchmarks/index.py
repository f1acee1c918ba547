"""The certificate index by size: time to build, bytes, time to open, lookups warm and cold, memory.

Cold and warm are random digests, boot is the same 30 again and again, miss has no certificate.

Run: python -m benchmarks.index [DIGESTS...], by default 10000 100000 1000000; 10000000 takes minutes and gigabytes.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust.build import build
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.sources import Subject

PROPERTIES = ("https://example.org/properties/boot",)
NOW = 1_800_000_000
SUBJECTS = 10_000
LOOKUPS = 2000
BOOT = 30
"""Measurements of a boot, which come again with every boot."""


def digests(of: int, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: hashlib.new(name, of.to_bytes(8)).digest() for name in names}


def certificates(count: int, names: tuple[str, ...]) -> Iterator[Certificate]:
    for first in range(0, count, SUBJECTS):
        subjects = tuple(Subject("", digests(of, names)) for of in range(first, min(first + SUBJECTS, count)))
        id = "sha256:" + hashlib.sha256(b"certificate %d" % first).hexdigest()
        yield Certificate(id, "https://example.org/", NOW, PROPERTIES, NOW - 1, NOW + 1, "00", subjects)


def lookups(index: Index, measured: list[dict[str, bytes]], certified: bool) -> float:
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


def measure(count: int, names: tuple[str, ...], path: Path) -> None:
    begin = time.perf_counter()
    summary = build(path, certificates(count, names), None, lambda _doing, _done: None)
    built = time.perf_counter() - begin

    supplied = tuple(algorithm.name for algorithm in STRONG)
    known = [digests(of * 7919 % count, supplied) for of in range(LOOKUPS)]
    unknown = [digests(count + of, supplied) for of in range(LOOKUPS)]
    forget(path)
    opening = []
    for _ in range(20):
        begin_ns = time.perf_counter_ns()
        Index.open(str(path)).close()
        opening.append(time.perf_counter_ns() - begin_ns)
    forget(path)
    before = private_kib()
    index = Index.open(str(path))
    cold = lookups(index, known, certified=True)
    warm = statistics.median(lookups(index, known, certified=True) for _ in range(5))
    miss = lookups(index, unknown, certified=False)
    boot = lookups(index, known[:BOOT] * (LOOKUPS // BOOT), certified=True)
    print(
        f"{count:>9} {'+'.join(names):<20} {built:>7.1f} {summary.size / 1e6:>8.1f} {summary.size / count:>6.0f}"
        f" {opening[0] / 1e6:>7.2f} {statistics.median(opening) / 1e6:>6.2f}"
        f" {cold:>8.1f} {warm:>6.1f} {boot:>6.1f} {miss:>6.1f} {private_kib() - before:>7}",
        flush=True,
    )
    index.close()


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [10_000, 100_000, 1_000_000]
    print(" " * 31 + "  build     size  bytes  open ms         judgement, median us        private")
    print("  digests algorithms                 s       MB  /each    cold   warm     cold   warm   boot   miss     KiB")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        for count in counts:
            for names in (("sha256",), ("sha256", "sha384", "sha512")):
                measure(count, names, Path(directory) / "index.sqlite")


if __name__ == "__main__":
    main()
