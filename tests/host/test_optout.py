"""A guest that did not opt in: the real swtpm and swtpm_setup are called as on a host without the product."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Define, Pair
from product import Product, at, processes, run_directories
from waiting import eventually

from lab.domain import Domain
from lab.host import Host
from lab.libvirtd import PATH
from lab.machine import Machine
from lab.process import ENVIRONMENT
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

RECORDER = "/run/recorder"
CALLS = f"{RECORDER}/calls"
# stands where the real programs are looked for, behind the product's own directory: what comes here is what they get
RECORD = f"""#!/bin/sh
{{ printf '%s' "${{0##*/}}"; printf '\\t%s' "$@"; printf '\\tLD_PRELOAD=%s\\n' "$LD_PRELOAD"; }} >>{CALLS}
exec "/usr/bin/${{0##*/}}" "$@"
"""


class Running(NamedTuple):
    """What a guest's swtpm is on a host, and every call of swtpm and swtpm_setup that led to it."""

    calls: list[str]
    argv: str
    environment: dict[str, str]
    objects: set[str]


@pytest.fixture(scope="module")
def recorded(plain: Pair, pair: Pair, product: Product) -> Iterator[tuple[Host, Host]]:
    """A host without the product and one with it, whose real swtpm programs are recorded."""
    hosts = (plain.one, pair.one)
    usual = ENVIRONMENT["PATH"]
    for host, ours in zip(hosts, ("", PATH.removesuffix(usual)), strict=True):
        for name in ("swtpm", "swtpm_setup"):
            host.put(f"{RECORDER}/{name}", RECORD, 0o755)
        host.libvirtd.stop()
        host.libvirtd.start(f"{ours}{RECORDER}:{usual}")
    yield hosts
    for host in hosts:
        host.libvirtd.stop()
        host.libvirtd.start()


@pytest.fixture
def layered(recorded: tuple[Host, Host]) -> Iterator[tuple[Host, Host]]:
    """The layer refuses a script between it and swtpm: only swtpm_setup is recorded where it is to come up."""
    script = at(recorded[1], Path(RECORDER) / "swtpm")
    script.chmod(0o644)
    yield recorded
    script.chmod(0o755)


@pytest.mark.parametrize("banks", [(), ("sha256", "sha384")], ids=["", "banks"])
def test_the_same_reaches_the_real_programs(recorded: tuple[Host, Host], define: Define, banks: tuple[str, ...]):
    domain = Domain(name="optout", banks=banks)
    without, with_us = (started(define(host, domain)) for host in recorded)
    assert with_us.calls == without.calls
    assert any(call.startswith("swtpm_setup") for call in with_us.calls)
    assert with_us.argv == without.argv
    assert with_us.objects == without.objects
    assert with_us.environment == without.environment
    assert not any("swtpm-prop" in text or "swtpm_prop" in text for text in with_us.objects)


def test_nothing_of_ours_knows_the_guest(recorded: tuple[Host, Host], define: Define):
    host = recorded[1]
    machine = define(host, Domain(name="unknown"))
    started(machine)
    uuid, layout = machine.domain.uuid, Layout()
    ours = (layout.guest_run(uuid), layout.guest_marker(uuid), layout.guest_log(uuid))
    assert not any(at(host, path).exists() for path in ours)


def test_an_opted_in_guest_differs_by_its_layer_and_its_bank_alone(
    layered: tuple[Host, Host], product: Product, define: Define
):
    without, host = layered
    domain = Domain(name="optin")
    plain = started(define(without, domain))
    machine = define(host, domain)
    product.enable(machine)
    guest = started(machine)
    assert guest.argv == plain.argv
    assert {path for path in guest.objects - plain.objects if "/_preload." in path}
    assert guest.environment.keys() - plain.environment.keys() == {"LD_PRELOAD", "SWTPM_PROP_LAYER"}
    state = str(Layout().guest_tpm(domain.uuid))
    setups = [[c for c in r.calls if c.startswith("swtpm_setup") and state in c] for r in (plain, guest)]
    (first,), (second,) = setups
    assert second == first.replace("\tLD_PRELOAD", "\t--pcr-banks\tsha256,sha384\tLD_PRELOAD")


def test_opted_out_again_it_is_as_any_other(layered: tuple[Host, Host], product: Product, define: Define):
    without, host = layered
    domain = Domain(name="again")
    machine = define(host, domain)
    product.enable(machine)
    started(machine)
    marker = at(host, Layout().guest_marker(domain.uuid))
    assert marker.read_text() == "sha256,sha384\n"
    machine.destroy()
    assert eventually(lambda: run_directories(host) == [])
    host.cli("domain", "disable", domain.name)
    now, plain = started(machine), started(define(without, domain))
    assert (now.argv, now.objects) == (plain.argv, plain.objects)
    assert not marker.exists()
    assert run_directories(host) == []


def started(machine: Machine) -> Running:
    """Start the guest, which then waits before its first instruction, and look at its swtpm."""
    host = machine.host
    host.put(CALLS, "", 0o666)
    host.virsh("start", "--paused", machine.domain.uuid)
    (process,) = processes(host, "swtpm")
    entries = (process / "environ").read_text().rstrip("\0").split("\0")
    environment = {name: value for name, _, value in (entry.partition("=") for entry in entries) if name != "PATH"}
    objects = {line.split()[-1] for line in (process / "maps").read_text().splitlines() if ".so" in line}
    calls = [normal(call) for call in host.read(CALLS).splitlines() if "--print-capabilities" not in call]
    argv = normal((process / "cmdline").read_text().replace("\0", "\t"))
    return Running(calls, argv, environment, objects)


def normal(call: str) -> str:
    """A call without what differs each time: libvirt's numbers for guests, descriptors, temporary names."""
    call = re.sub(r"/\d+-(\w+-swtpm\.sock)", r"/N-\1", call)
    call = re.sub(r"fd=\d+", "fd=N", call)
    return re.sub(r"/tmp/[\w.-]+", "/tmp/T", call)
