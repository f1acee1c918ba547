"""A guest in custody through what libvirt does to it on one host, and its way back when the host is lost."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import pytest
from fleet import APPROVED, Fleet
from product import PROPERTY, at, run_directories
from waiting import eventually

from lab.domain import Domain
from lab.hardware import STOCK, boot_of
from lab.host import Host
from lab.machine import Machine
from lab.process import LabError, run
from swtpm_prop.custody.form import Form, form
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

SAVED = "/var/lib/libvirt/in-custody"
MARK = "tpm2_nvdefine -Q -C o -s 8 0x1500001; echo -n {} | tpm2_nvwrite -Q -C o -i - 0x1500001"
READ = "tpm2_nvread -C o -s 8 0x1500001"
EXTEND = "tpm2_pcrextend 12:sha256=" + "ab" * 32


@pytest.fixture(scope="module")
def home(fleet: Fleet) -> Host:
    return fleet.keeper


@pytest.fixture(scope="module")
def machine(fleet: Fleet, direct: Domain) -> Iterator[Machine]:
    """A guest with a disk, in custody from its first start on; its TPM keeps a mark."""
    disk = fleet.work / "custody.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"])
    disk.chmod(0o666)
    made = fleet.define(fleet.keeper, replace(direct, uuid=str(uuid4()), name="kept", disk=disk, banks=()))
    try:
        made.boot()
        made.console.check(MARK.format("firstone"))
        yield made
    finally:
        made.remove()


def state(machine: Machine) -> Form:
    return form(at(machine.host, Layout().guest_tpm(machine.domain.uuid)))


def check(machine: Machine) -> None:
    """It runs on the state it had, which is encrypted; the keys it started with lie nowhere."""
    layout, uuid = Layout(), machine.domain.uuid
    assert machine.console.check(READ) == "firstone"
    assert state(machine) is Form.ENCRYPTED
    left = {file.name for file in at(machine.host, layout.guest_run(uuid)).iterdir()}
    assert left - {"keyed"} == {"layer.json", "pcr-banks"}
    record = at(machine.host, layout.guest_key(uuid)).stat()
    assert (record.st_uid, stat.S_IMODE(record.st_mode)) == (0, 0o600)


def test_stop_and_start(machine: Machine):
    check(machine)
    machine.power_off()
    assert eventually(lambda: run_directories(machine.host) == [])
    assert state(machine) is Form.ENCRYPTED
    machine.boot()
    check(machine)


def test_save_and_restore(machine: Machine):
    machine.console.check(EXTEND)
    before = machine.pcrs()
    machine.save(SAVED)
    machine.restore(SAVED)
    assert machine.pcrs() == before
    check(machine)


def test_managed_save(machine: Machine):
    before = machine.pcrs()
    machine.managed_save()
    machine.start()
    assert machine.pcrs() == before
    check(machine)


def test_snapshot_revert(machine: Machine):
    before = machine.pcrs()
    machine.snapshot("marked")
    machine.console.check(EXTEND)
    machine.console.check("echo -n otherone | tpm2_nvwrite -Q -C o -i - 0x1500001")
    assert machine.pcrs() != before
    machine.revert("marked")
    assert machine.pcrs() == before
    check(machine)
    machine.host.virsh("snapshot-delete", machine.domain.uuid, "marked")


def test_daemon_and_agent_restarts(fleet: Fleet, machine: Machine):
    before = machine.pcrs()
    machine.host.libvirtd.kill()
    machine.host.libvirtd.start()
    fleet.members[machine.host.name].agent.restart()
    assert machine.pcrs() == before
    check(machine)


def test_key_show(machine: Machine):
    said = json.loads(machine.host.cli("key", "show", "--json", machine.domain.uuid).stdout)
    assert APPROVED in json.dumps(said)


def test_custody_for_a_guest_that_was_plain_and_back(fleet: Fleet, home: Host, direct: Domain):
    """The TPM stays the same: its state is converted by the start that follows."""
    with Machine(home, replace(direct, uuid=str(uuid4()), name="converted", banks=())) as machine:
        fleet.product.enable(machine)
        machine.boot()
        machine.console.check(MARK.format("firstone"))
        machine.destroy()
        assert state(machine) is Form.PLAIN
        fleet.product.enable(machine, "--custody", APPROVED)
        machine.boot()
        check(machine)
        machine.destroy()
        home.cli("domain", "disable", machine.domain.name)
        machine.boot()
        assert machine.console.check(READ) == "firstone"
        assert state(machine) is Form.PLAIN
        assert not at(home, Layout().guest_marker(machine.domain.uuid)).exists()


def test_libvirts_own_secret_beside_custody(fleet: Fleet, home: Host):
    metadata = (
        f'<vtpm xmlns="urn:swtpm-prop:domain:1"><bank algorithm="sha384" pcrs="0-9"><property uri="{PROPERTY}"/></bank>'
    )
    metadata += f'<custody host-property="{APPROVED}"/></vtpm>'
    secret = "6f1b2a34-5c6d-4e7f-8091-a2b3c4d5e6f7"
    home.put("/run/secret.xml", f"<secret><uuid>{secret}</uuid><usage type='vtpm'><name>x</name></usage></secret>")
    home.virsh("secret-define", "/run/secret.xml")
    home.put("/run/secret", "eA==")
    home.virsh("secret-set-value", "--secret", secret, "--file", "/run/secret")
    with Machine(home, Domain(name="twice", memory=64, metadata=metadata, secret=secret)) as machine:
        with pytest.raises(LabError, match=r"\[domain\.custody-and-secret\]"):
            machine.start()
        assert state(machine) is Form.NONE


def test_recovery_on_another_host(fleet: Fleet, direct: Domain):
    """All that is left of a host is a backup of the guest's TPM state; and the recovery key, that lay in a safe."""
    gold, silver = (fleet.members[name].host for name in ("gold", "silver"))
    lost = fleet.define(gold, replace(direct, uuid=str(uuid4()), name="lost", banks=()))
    uuid = lost.domain.uuid
    try:
        lost.boot()
        lost.console.check(MARK.format("firstone"))
        xml = gold.virsh("dumpxml", "--inactive", uuid)
        lost.power_off()
        place = f"/var/lib/libvirt/swtpm/{uuid}"
        gold.run(["tar", "-C", "/", "-cf", fleet.work / "backup.tar", place.lstrip("/")])
    finally:
        lost.remove()
    silver.run(["tar", "-C", "/", "-xf", fleet.work / "backup.tar"])
    silver.put("/run/lost.xml", xml)
    silver.virsh("define", "/run/lost.xml")
    found = Machine(silver, lost.domain)
    try:
        with pytest.raises(LabError, match=r"\[custody\.key-missing\].*key recover"):
            found.start()
        silver.cli("key", "recover", uuid, "--key", str(fleet.recovery))
        found.boot()
        check(found)
    finally:
        found.remove()


def test_a_host_is_updated(fleet: Fleet):
    """Its next state is approved before it reboots into it; a state that nobody approved opens nothing."""
    silver = fleet.members["silver"]
    machine = fleet.define(silver.host, Domain(name="updated", memory=64))
    try:
        machine.start()
        silver.reboot(boot_of("linux 6.1.0-51"))
        with pytest.raises(LabError, match=r"\[host\.state-not-approved\]"):
            machine.start()
        fleet.approve(silver.host, "update")
        machine.start()
        silver.reboot(STOCK)
        machine.start()
    finally:
        machine.remove()
