"""Linux IMA under ima_policy=tcb on real kernels: PCR 10 of guests that are certified from packages and a tree alone.

It holds until something else runs; what a kernel measures is what packages certify, and what its list replays to.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import userland
from conftest import Define, Pair
from product import Product

from lab import cpio, guest
from lab.debian import kernel, package
from lab.domain import Domain
from lab.machine import Machine
from swtpm_prop.tpm import ima, imalog
from swtpm_prop.tpm.algorithms import SHA1, SHA256
from swtpm_prop.trust import packages

pytestmark = pytest.mark.host

BUSYBOX = package("busybox-static")
LIST = "/sys/kernel/security/ima/binary_runtime_measurements"
POLICY = "ima_policy=tcb rootfstype=ramfs"  # tcb leaves out tmpfs, which an initramfs is otherwise


@pytest.fixture
def initrd(pair: Pair, direct: Domain) -> Path:
    """The laboratory's, with a merged /usr/sbin beside its /bin, and a name with a space."""
    assert direct.initrd is not None
    more = {
        "sbin": cpio.link("usr/sbin"),
        "usr/sbin/busybox": cpio.program((BUSYBOX / "bin/busybox").read_bytes()),
        "with space": cpio.file(b"x"),
    }
    first = direct.initrd.read_bytes()
    path = pair.work / "ima.initrd"
    path.write_bytes(first + bytes(-len(first) % 4) + gzip.compress(cpio.archive(more)))
    return path


@pytest.mark.parametrize(("template", "option"), [("ima-ng", "ima_template=ima-ng"), ("ima-sig", "")])
def test_certified_from_the_package_is_what_the_kernel_measures(
    pair: Pair, direct: Domain, initrd: Path, define: Define, template: str, option: str
):
    command_line = f"{guest.CMDLINE} {POLICY} {option}"
    banks = ("sha1", "sha256")
    machine = define(pair.one, replace(direct, initrd=initrd, cmdline=command_line, banks=banks))
    machine.boot()
    machine.console.check("/sbin/busybox true; cat '/with space'")
    machine.console.check("for b in sha1 sha256; do cat /sys/class/tpm/tpm0/pcr-$b/10; done >/pcr")
    sha1, sha256 = (bytes.fromhex(line) for line in machine.console.get("/pcr").decode().split())
    pcrs = {pcr: bytes.fromhex(value) for pcr, value in machine.pcrs()["sha256"].items()}
    entries = whole(machine.console.get(LIST), {SHA1.name: sha1, SHA256.name: sha256})

    measured = {entry.path: imalog.measured(entry, SHA256) for entry in entries}
    take = partial(packages.from_tree, BUSYBOX, owners={}, with_ima=True)
    certified = {s.name: s.digests["sha256"] for path in packages.files(BUSYBOX) for s in take(path)}
    assert measured[b"/bin/busybox"] == certified[f"/bin/busybox {template}"]
    content = next(entry.digest for entry in entries if entry.path == b"/bin/busybox")
    merged = next(entry for entry in entries if entry.path == b"/usr/sbin/busybox")
    assert merged.data == ima.file_measurement(template, b"/usr/sbin/busybox", content)
    assert b"/sbin/busybox" not in measured
    assert b"/with_space" in measured
    assert entries[0].data == ima.boot_aggregate_measurement(template, pcrs)


@pytest.fixture(scope="module")
def certified(pair: Pair, product: Product) -> Iterator[list[Domain]]:
    """Guests with the same userland and different kernels, firmware too: all they run is certified, from no boot."""
    unpacked, own = userland.unpacked(pair.work / "packages"), userland.own_tree(pair.work / "own")
    sources = [word for deb in userland.archives() for word in ("--deb", deb)]
    kernels = [name for series in ("6.1", "6.12") for name in guest.kernels(1, series)]
    sources += [word for tree in (own, *map(package, kernels)) for word in ("--tree", tree)]
    product.build(product.certify(*sources))
    domains = []
    for name, firmware in zip(kernels, ("seabios", "ovmf"), strict=True):
        initrd = userland.initramfs(pair.work / f"{name}.initrd", unpacked, own, name)
        cmdline = f"{guest.CMDLINE} {POLICY}"
        domains.append(Domain(name=name, firmware=firmware, kernel=kernel(name), initrd=initrd, cmdline=cmdline))
    yield domains
    product.build()


COPY = "mkdir /strange; cp /bin/busybox /strange; /strange/busybox true"
REPLACE = "cp /bin/tpm2 /tmp/x; echo >>/tmp/x; mv /tmp/x /bin/tpm2; tpm2_getrandom 1"
VIOLATE = "exec 3>>/init; cat /init; exec 3>&-"
# for each guest: how it is opted in; what then breaks PCR 10, one after each boot
CASES = (
    ((), ((COPY, "/strange/busybox"), (VIOLATE, "/init (violation)"))),
    (("--hidden",), ((REPLACE, "/usr/bin/tpm2"),)),
)


def test_pcr_10_holds_until_something_uncertified_runs(
    pair: Pair, product: Product, certified: list[Domain], define: Define
):
    aggregates = set()
    for domain, (options, steps) in zip(certified, CASES, strict=True):
        machine = define(pair.one, domain)
        product.enable(machine, "--pcrs", "0-14", *options)
        machine.boot()
        for number, (line, what) in enumerate(steps):
            if number:
                machine.reset()
            aggregates.add(holds(product, machine))
            machine.console.check(line)
            broken_by(product, machine, what)
        machine.destroy()
    assert len(aggregates) == len(certified)


def holds(product: Product, machine: Machine) -> bytes:
    """PCR 10 is held after boot and after another certified program, each measurement rests on what it should.

    Returns the template data of the boot aggregate.
    """
    assert product.status(machine)[ima.PCR] == "held"
    before = measurements(product, machine)
    machine.console.check("tpm2_getrandom 4 --hex")
    assert product.status(machine)[ima.PCR] == "held"
    entries = imalog.parse(machine.console.get(LIST))
    aggregate, *others = measurements(product, machine)
    assert len(others) + 1 == len(entries) > len(before)
    assert b"/usr/bin/tpm2" in {entry.path for entry in entries[len(before) :]}
    (module,) = (entry.path for entry in entries if b"/efivarfs." in entry.path)
    assert module.endswith(b".ko" if "/6.1." in module.decode() else b".ko.xz")  # as the package has it
    assert {entry.template for entry in entries} == {"ima-sig"}  # files alone: no buffer, key or critical data
    assert (aggregate["certified"], aggregate["certificates"]) == (True, [])
    assert "boot aggregate" in aggregate["detail"]
    assert all(other["certified"] and len(other["certificates"]) == 1 for other in others)
    return entries[0].data


def broken_by(product: Product, machine: Machine, what: str) -> None:
    """PCR 10 is broken, and the commands for people and for programs say by what."""
    assert product.status(machine)[ima.PCR] == "broken"
    log, name = product.content("ima.list", machine.console.get(LIST)), machine.domain.name
    words = ("--ima-log", str(log), "--", name)
    said = json.loads(machine.host.cli("domain", "status", "--json", *words, check=False).stdout)
    (cause,) = (cause for cause in said["causes"] if cause["pcr"] == ima.PCR)
    assert (cause["reason"], cause["type"], cause["description"]) == ("unknown", "ima-sig", what)
    assert f"ima-sig {what}\n" in machine.host.cli("domain", "status", *words, check=False).stdout
    boot = machine.host.cli("domain", "log", *words).stdout.rpartition("startup: ")[2]
    lines = [line for line in boot.splitlines() if "PCR 10" in line]
    assert "certified: IMA's boot aggregate" in lines[0]
    assert next(line for line in lines if "not certified" in line).endswith(f"ima-sig {what}")


def measurements(product: Product, machine: Machine) -> list[dict[str, Any]]:
    """What the property log has of PCR 10 since the last boot."""
    records = product.log(machine)
    (*_, boot) = (at for at, record in enumerate(records) if record["content"]["event"] == "startup")
    return [record["content"] for record in records[boot:] if record["pcr"] == ima.PCR]


def whole(data: bytes, pcr_10: dict[str, bytes]) -> tuple[imalog.Entry, ...]:
    """The list, as far as it had gone when PCR 10 was read: it grows with each program that the console starts."""
    entries = imalog.parse(data)
    for end in range(1, len(entries) + 1):
        so_far = entries[:end]
        if imalog.replay(so_far, SHA256)[ima.PCR] == pcr_10["sha256"]:
            assert imalog.replay(so_far, SHA1)[ima.PCR] == pcr_10["sha1"]
            return so_far
    raise AssertionError("no part of the list replays to PCR 10")
