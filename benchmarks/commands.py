"""What a TPM command costs behind the layer: side by side with a plain swtpm, interleaved, medians and their ratios.

This program and both swtpms run on one CPU that nothing else should use. On two, waking an idle one now and then takes
35 microseconds on a virtual machine, which says nothing of swtpm and hides the difference. The certified measurements
are those of a boot, thirty, again and again. Cold are those of the first boot after the index was replaced or the host
started: a new swtpm, nothing of the index in the page cache, nothing asked twice.

Run as root: python -m benchmarks.commands [--digests 1000000] [--rounds 2000]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from benchmarks.index import forget
from swtpm_prop.tpm import commands as wire
from swtpm_prop.tpm.algorithms import ALGORITHMS, SHA256, SHA384, STRONG, Digest
from swtpm_prop.tpm.pcr import build_pcr_read
from swtpm_prop.trust import build
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.sources import Subject
from tests.certified import GOOD, ISSUER, PROPERTY, subject
from tests.model import PASSWORD, command, extend
from tests.swtpm import LayerHost, Tpm, manufacture, world_directory

OWNER = 0x40000001
NULL = 0x40000007
PER_CERTIFICATE = 50_000
BOOT = tuple(GOOD + b"%d" % number for number in range(30))
"""What the guest measures, all certified."""


def digests(data: bytes) -> tuple[Digest, ...]:
    return tuple(Digest(a, hashlib.new(a.name, data).digest()) for a in ALGORITHMS)


def certificates(count: int) -> Iterator[Certificate]:
    """``count`` random subjects, and in the first certificate those of a boot."""
    now = int(time.time())
    boot = [subject(data) for data in BOOT]
    for first in range(0, count, PER_CERTIFICATE):
        size = min(PER_CERTIFICATE, count - first)
        subjects = [Subject("random", {a.name: os.urandom(a.size) for a in STRONG}) for _ in range(size)]
        name = "sha256:" + hashlib.sha256(str(first).encode()).hexdigest()
        yield Certificate(name, ISSUER, now, (PROPERTY,), now - 60, now + 86400, f"{first:x}", (*subjects, *boot))
        boot = []


def create_key(tpm: Tpm) -> int:
    """An ECC attestation key: restricted, signing, ECDSA, SHA-256, P-256 (TPM 2.0 Library, part 3 section 24.1)."""
    public = struct.pack(">HHI", 0x0023, 0x000B, 0x00050072) + b"\0\0" + b"\0\x10" + b"\0\x18\0\x0b\0\x03\0\x10"
    public += b"\0\0\0\0"
    body = b"\0\4\0\0\0\0" + struct.pack(">H", len(public)) + public + b"\0\0" + bytes(4)
    answer = tpm.send(command(0x131, (OWNER,), PASSWORD, body))
    assert answer[6:10] == bytes(4), answer.hex()
    return int.from_bytes(answer[10:14], "big")


def requests(key: int) -> dict[str, Sequence[bytes]]:
    """What is sent in turn."""
    quote = b"\0\0" + b"\0\x10" + struct.pack(">I", 1) + b"\0\x0c\x03\xff\0\0"
    capability = struct.pack(">HII", wire.NO_SESSIONS, 22, wire.CC_GET_CAPABILITY) + struct.pack(">III", 5, 0, 64)
    return {
        "GetRandom": (bytes.fromhex("80010000000c0000017b0010"),),
        "PCR_Read": (build_pcr_read(((SHA256, (0, 1, 2, 3)), (SHA384, (0, 1, 2, 3)))),),
        "GetCapability": (capability,),
        "Quote": (command(0x158, (key,), PASSWORD, quote),),
        "PCR_Extend (certified)": [extend(4, digests(data)) for data in BOOT],
        "PCR_Extend (unknown)": (extend(7, digests(b"unknown")),),
        "PCR_Extend (not translated)": (extend(16, digests(GOOD)),),
    }


def timed(tpm: Tpm, request: bytes) -> float:
    started = time.perf_counter_ns()
    answer = tpm.send(request)
    spent = (time.perf_counter_ns() - started) / 1000
    if answer[6:10] == wire.RC_RETRY.to_bytes(4, "big"):
        return timed(tpm, request)
    if answer[6:10] != bytes(4):
        raise RuntimeError(f"{request.hex()} answered {answer.hex()}")
    return spent


def private_kib(tpm: Tpm) -> int:
    """What a further guest takes: the clean pages of libpython and libsqlite3, 4 MiB, all guests share."""
    assert tpm.process is not None
    rollup = Path(f"/proc/{tpm.process.pid}/smaps_rollup").read_text()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return fields["Private_Dirty"]


def copy_state(template: Path, base: Path) -> Path:
    target = base / template.parent.name / template.name
    shutil.copytree(template, target)
    for path in (base, target.parent, target, *target.iterdir()):
        shutil.chown(path, "tss", "tss")
    return base


def compare(plain: Tpm, ours: Tpm, rounds: int) -> None:
    keys = create_key(plain), create_key(ours)
    print(f"{'command':30} {'plain':>10} {'layer':>10} {'ratio':>7}")
    for name in requests(0):
        pair = cycle(requests(keys[0])[name]), cycle(requests(keys[1])[name])
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds if name != "Quote" else rounds // 10):
            for tpm, turn, taken in zip((plain, ours), pair, times, strict=True):
                taken.append(timed(tpm, next(turn)))
        medians = [statistics.median(taken) for taken in times]
        print(f"{name:30} {medians[0]:8.1f}us {medians[1]:8.1f}us {medians[1] / medians[0]:6.2f}x")
    sizes = private_kib(plain), private_kib(ours)
    print(f"{'private memory':30} {sizes[0]:7} KiB {sizes[1]:7} KiB {(sizes[1] - sizes[0]) / 1024:+5.1f} MiB")


def start_time(plain: Tpm, ours: Tpm, rounds: int) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for tpm, taken in zip((plain, ours), times, strict=True):
            started = time.perf_counter_ns()
            tpm.start()
            taken.append((time.perf_counter_ns() - started) / 1e6)
            tpm.close()
    medians = [statistics.median(taken) for taken in times]
    print(f"{'start until connected':30} {medians[0]:8.1f}ms {medians[1]:8.1f}ms {medians[1] - medians[0]:+5.1f} ms")


def first_extends(plain: Tpm, ours: Tpm, index: Path, rounds: int) -> None:
    """The measurements of a boot right after a start, with the index's file dropped from the page cache before."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for tpm, taken in zip((plain, ours), times, strict=True):
            with tpm:
                tpm.up()
                forget(index)
                taken += [timed(tpm, extend(4, digests(data))) for data in BOOT]
    medians, worst = ([measure(taken) for taken in times] for measure in (statistics.median, max))
    name = "PCR_Extend (certified, cold)"
    print(
        f"{name:30} {medians[0]:8.1f}us {medians[1]:8.1f}us {medians[1] / medians[0]:6.2f}x   worst {worst[1]:.0f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digests", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    # Inherited by the swtpms.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with world_directory() as base:
        host = LayerHost(base / "host")
        started = time.perf_counter()
        built = build.build(host.layout.index, certificates(options.digests), None, lambda doing, done: None)
        host.layout.index.chmod(0o644)
        spent = time.perf_counter() - started
        print(f"index: {built.entries} digests, {built.size / 2**20:.0f} MiB, built in {spent:.1f} s")
        template = manufacture(base / "template", "sha256,sha384")
        host.opt_in()
        plain = Tpm(copy_state(template, base / "plain"))
        ours = host.tpm(copy_state(template, base / "ours"))
        start_time(plain, ours, 20)
        first_extends(plain, ours, host.layout.index, 10)
        with plain, ours:
            compare(plain.up(), ours.up(), options.rounds)


if __name__ == "__main__":
    main()
