"""What custody adds to a live migration and to a start, beside libvirt's own encryption of the TPM; medians.

Two libvirt hosts with a software TPM each, in one fleet, and three guests in turn: the TPM of one is encrypted by a
secret that an operator gave to both hosts' libvirt; one records properties, and its TPM is not encrypted; the third
does too, and its TPM is encrypted by a key that its host's TPM keeps. None has an operating system, so that little but
the TPM is moved. Downtime is what libvirt measures ("virsh domjobinfo --completed").
Run as root: python -m benchmarks.migration [--rounds 20]
"""

from __future__ import annotations

import argparse
import base64
import secrets
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from lab.domain import Domain
from lab.host import Host, laboratory
from lab.machine import Machine

sys.path += [str(Path(__file__).parent.parent / place) for place in ("tests", "tests/host")]

from fleet import Fleet
from product import Product

SECRET = "<secret ephemeral='no' private='yes'><uuid>{0}</uuid><usage type='vtpm'><name>{0}</name></usage></secret>"

RESULT = "virCommandRun:"


def share_secret(hosts: tuple[Host, ...]) -> str:
    """A secret of libvirt's, the same on all hosts; its UUID."""
    identity, value = str(uuid.uuid4()), base64.b64encode(secrets.token_bytes(32)).decode()
    for host in hosts:
        host.put("/run/secret.xml", SECRET.format(identity))
        host.put("/run/secret", value, 0o600)
        host.virsh("secret-define", "/run/secret.xml")
        host.virsh("secret-set-value", "--secret", identity, "--file", "/run/secret")
    return identity


def timed(act: Callable[[], object]) -> float:
    """Milliseconds."""
    before = time.perf_counter()
    act()
    return (time.perf_counter() - before) * 1000


def downtime(machine: Machine) -> float:
    """Milliseconds that the guest stood still in the migration it came with, as libvirt says."""
    said = machine.host.virsh("domjobinfo", machine.domain.uuid, "--completed")
    (line,) = [line for line in said.splitlines() if line.startswith("Total downtime:")]
    return float(line.split()[2])


def started(machine: Machine) -> float:
    """Milliseconds of a start with a TPM state that is there."""
    spent = timed(lambda: machine.host.virsh("start", "--paused", machine.domain.uuid))
    machine.host.virsh("destroy", machine.domain.uuid)
    return spent


def handshakes(host: Host, name: str) -> list[float]:
    """Milliseconds of each run of the hook that let the guest in: evidence, judgement, duplication, import.

    Taken from libvirtd's log: between the line that says what it runs and the same thread's that says how it ended.
    """
    lines = [line.split(": ", 2) for line in host.libvirtd.log().splitlines() if "+0000: " in line]
    spent = []
    for at, (began, thread, text) in enumerate(lines):
        if text.endswith(f" {name} migrate begin -"):
            ended = next(time for time, other, said in lines[at + 1 :] if other == thread and RESULT in said)
            spent.append((moment(ended) - moment(began)) / timedelta(milliseconds=1))
    return spent


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def report(what: str, names: tuple[str, ...], times: list[list[float]]) -> None:
    medians = [statistics.median(taken) for taken in times]
    print(f"\n{what:34} {'median':>9} {'fastest':>9} {'more':>9} {'ratio':>7}")
    for name, median, taken in zip(names, medians, times, strict=True):
        more = median - medians[0]
        print(f"  {name:32} {median:7.1f}ms {min(taken):7.1f}ms {more:+7.1f}ms {median / medians[0]:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    names = ("libvirt's secret", "opted in, no custody", "custody")
    with laboratory("alpha", "beta") as (work, hosts):
        one, other = hosts
        for host in hosts:
            host.install_product()
        product = Product(work, hosts)
        product.build()
        fleet = Fleet(work, product, hosts)
        plain = Machine(one, Domain(name="plain", memory=64, secret=share_secret(hosts)))
        plain.define()
        opted_in = Machine(one, Domain(name="layer", memory=64))
        opted_in.define()
        product.enable(opted_in)
        guests = (plain, opted_in, fleet.define(one, Domain(name="custody", memory=64)))
        starts: list[list[float]] = [[] for _ in guests]
        for number in range(rounds + 1):
            for machine, taken in zip(guests, starts, strict=True):
                spent = started(machine)
                taken += [spent] if number else []  # the first makes the TPM state
        for machine in guests:
            machine.start()
        totals: list[list[float]] = [[] for _ in guests]
        downtimes: list[list[float]] = [[] for _ in guests]
        for number in range(rounds + 1):
            to = other if guests[0].host is one else one
            for which in (0, 1, 2) if number % 2 else (2, 1, 0):
                total = timed(lambda which=which, to=to: guests[which].migrate(to))  # type: ignore[misc]
                if number:
                    totals[which].append(total)
                    downtimes[which].append(downtime(guests[which]))
        report("virsh start --paused", names, starts)
        report("virsh migrate --live --p2p", names, totals)
        report("downtime", names, downtimes)
        lets_in = [[spent for host in hosts for spent in handshakes(host, each.domain.name)] for each in guests]
        report("hook that lets it in, of the total", names, lets_in)
        for machine in guests:
            machine.remove()


if __name__ == "__main__":
    main()
