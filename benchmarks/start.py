"""What the product adds to ``virsh start``: four guests on two libvirt hosts, interleaved, medians and differences.

One host is as Debian leaves it, the other has the product, and a software TPM that keeps the key of one guest's TPM
state. Guests are started paused, with a state that exists, so that what is measured is libvirt, hooks, swtpm and QEMU's
start. Run as root: python -m benchmarks.start [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from lab.domain import Domain
from lab.host import laboratory
from lab.machine import Machine
from swtpm_prop.layout import Layout

sys.path += [str(Path(__file__).parent.parent / place) for place in ("tests", "tests/host")]

from fleet import Fleet
from product import Product


def started(machine: Machine) -> float:
    """Milliseconds of ``virsh start --paused``."""
    before = time.perf_counter()
    machine.host.virsh("start", "--paused", machine.domain.name)
    spent = (time.perf_counter() - before) * 1000
    machine.host.virsh("destroy", machine.domain.name)
    return spent


def hook_calls(machine: Machine, rounds: int) -> tuple[float, float]:
    """Milliseconds for the five hook calls of one life of the guest, and for five calls of /bin/true."""
    xml = machine.host.virsh("dumpxml", machine.domain.name)
    hook = str(Layout().hook)
    script = "for op in prepare start started stopped release; do {} </run/bench.xml >/dev/null || exit 1; done"
    machine.host.put("/run/bench.xml", xml)
    calls = (f"{hook} guest $op begin -", "/bin/true guest $op begin -")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            line = f"t=$(date +%s%N); {script.format(call)}; echo $(($(date +%s%N) - t))"
            taken.append(int(machine.host.run(["sh", "-c", line]).stdout) / 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with laboratory("plain", "ours") as (work, (plain, ours)):
        ours.install_product()
        product = Product(work, [ours])
        product.build()
        fleet = Fleet(work, product, [ours])
        names = ("no product on the host", "product, not opted in", "product, opted in", "product, custody")
        guests = [Machine(host, Domain(name=f"guest{n}")) for n, host in enumerate((plain, ours, ours))]
        for machine in guests:
            machine.define()
        product.enable(guests[2])
        guests.append(fleet.define(ours, Domain(name="guest3")))
        for machine in guests:
            started(machine)
        times: list[list[float]] = [[] for _ in guests]
        for _ in range(rounds):
            for machine, taken in zip(guests, times, strict=True):
                taken.append(started(machine))
        medians = [statistics.median(taken) for taken in times]
        print(f"{'virsh start --paused':28} {'median':>9} {'more':>9} {'ratio':>7}")
        for name, median in zip(names, medians, strict=True):
            print(f"{name:28} {median:7.1f}ms {median - medians[0]:+7.1f}ms {median / medians[0]:6.2f}x")
        mine, true = hook_calls(guests[1], rounds)
        print(f"{'five hook calls, opted out':28} {mine:7.1f}ms {mine - true:+7.1f}ms than /bin/true")


if __name__ == "__main__":
    main()
