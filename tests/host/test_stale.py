"""A host whose store is no longer renewed: what its guests, its logs and its operator hear of it, and how it mends."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Pair
from product import Product, at, expected
from storekeeper import Keeper, quiet

from lab.domain import Domain
from lab.host import Host
from lab.machine import Machine
from lab.process import LabError
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

GOOD_FOR = 8.0  # seconds from the first publication to the end of its timestamp
DAYS = 3  # how long a timestamp is good
DEV_LOG = Path("/dev/log")
JOURNAL = "/run/systemd/journal/dev-log"  # where systemd lets DEV_LOG lead; hosts share /dev, each has its own /run


@pytest.fixture
def keeper(pair: Pair) -> Keeper:
    """A store, with nothing in it yet."""
    directory = pair.work / "stale"
    directory.mkdir()
    made = Keeper(directory)
    made.init()
    return made


@pytest.fixture
def certified(pair: Pair, product: Product, direct: Domain) -> Iterator[tuple[Machine, Path]]:
    """A guest that is opted in, and the certificate of its reference boot; the host follows no store afterwards."""
    with Machine(pair.one, replace(direct, name="stale")) as machine:
        machine.boot()
        log = product.content("stale.eventlog", machine.event_log())
        machine.destroy()
        product.enable(machine)
        yield machine, product.certify("--event-log", log)
    for path in (Layout().host, Layout().store_root):
        at(pair.one, path).unlink(missing_ok=True)
    product.build()


def test_a_store_that_is_no_longer_renewed(product: Product, keeper: Keeper, certified: tuple[Machine, Path]):
    machine, certificate = certified
    host = machine.host
    keeper.publisher.add([certificate], quiet)
    ends = time.time() + GOOD_FOR
    keeper.publish(days=GOOD_FOR / 86400 - DAYS)
    follow(host, keeper, "warn")
    time.sleep(max(0, ends + 2 - time.time()))

    starts_and_certifies_nothing(product, machine)
    follow_policy(host, keeper, "refuse")
    said = refused(machine)
    assert "refuses to start guests" in said
    assert said.endswith("[store.stale]: run swtpm-prop store sync, or store build, with what is current")

    keeper.publish("online")
    host.cli("store", "sync")
    starts_and_holds(product, machine)


def follow(host: Host, keeper: Keeper, stale: str) -> None:
    """Let the host follow the store, as its operator would."""
    host.put(str(Layout().store_root), keeper.file("1.root.json").read_text())
    follow_policy(host, keeper, stale)
    host.cli("store", "sync")


def follow_policy(host: Host, keeper: Keeper, stale: str) -> None:
    host.put(str(Layout().host), f'[store]\nurl = "{keeper.public}"\nstale = "{stale}"\n')


def starts_and_certifies_nothing(product: Product, machine: Machine) -> None:
    """The start warns the system's log, every measurement breaks its PCR, and all who are asked say why."""
    host = machine.host
    with system_log(host) as lines:
        machine.boot()
    (line,) = [line for line in lines if "[store.stale]" in line]
    assert line.startswith("<28>")  # daemon.warning (RFC 3164, 4.1.1)
    assert "swtpm-prop: the certificate index has expired, nothing will be certified" in line
    assert "run swtpm-prop store sync" in line

    states = product.agreed(machine)
    assert states == expected(broken=[pcr for pcr, state in states.items() if state != "unmeasured"])
    assert {0, 4, 5} <= {pcr for pcr, state in states.items() if state == "broken"}
    assert {record["content"]["reason"] for record in product.log(machine)[1:]} == {"stale-index"}
    name = machine.domain.name
    status = host.cli("domain", "status", name, check=False)
    assert "expired at" in status.stderr
    assert "nothing measured since is certified [store.stale]" in status.stderr
    assert "not certified, stale-index: the index expired at" in status.stdout
    assert "stale-index: the index expired at" in host.cli("domain", "log", name).stdout
    doctor = host.cli("doctor", "--json", check=False)
    assert doctor.returncode == 1
    (finding,) = [finding for finding in json.loads(doctor.stdout) if finding["id"] == "index.expired"]
    assert finding["state"] == "problem"
    assert "nothing is certified any more" in finding["what"]
    machine.destroy()


def refused(machine: Machine) -> str:
    """What virsh says of the start, the last line."""
    with pytest.raises(LabError) as caught:
        machine.start()
    assert machine.state() == "shut off"
    return str(caught.value).strip().splitlines()[-1]


def starts_and_holds(product: Product, machine: Machine) -> None:
    with system_log(machine.host) as lines:
        machine.boot()
    assert not [line for line in lines if "[store.stale]" in line]
    states = product.agreed(machine)
    assert states == expected(held=[pcr for pcr, state in states.items() if state != "unmeasured"])
    assert states[4] == "held"
    said = json.loads(machine.host.cli("domain", "status", "--json", machine.domain.name).stdout)
    assert said["index"] == {"usable": True, "problem": ""}
    machine.destroy()


@contextmanager
def system_log(host: Host) -> Iterator[list[str]]:
    """Be the system's log of the host; what came is in the list afterwards."""
    place = at(host, Path(JOURNAL))
    place.parent.mkdir(parents=True, exist_ok=True)
    received: list[str] = []
    linked = DEV_LOG.is_symlink()
    if not linked:
        DEV_LOG.symlink_to(JOURNAL)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(str(place))
            yield received
            listening.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    received.append(listening.recv(8192).decode(errors="replace"))
    finally:
        place.unlink(missing_ok=True)
        if not linked:
            DEV_LOG.unlink()
