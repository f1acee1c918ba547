"""What must not start does not: one line from virsh says why, nothing stays, and once mended the guest starts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Define, Pair
from product import PROPERTY, Product, at, expected, extend, processes, run_directories
from waiting import eventually

from lab.domain import Domain
from lab.host import Host
from lab.machine import Machine
from lab.process import ENVIRONMENT, LabError
from swtpm_prop.domain.metadata import NAMESPACE
from swtpm_prop.emulator.shims import preload_object
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

BANK = f'<bank algorithm="sha384" pcrs="0-9"><property uri="{PROPERTY}"/></bank>'
GOOD, LATER = b"certified\n", b"certified later\n"
INDEX = Layout().index


def vtpm(inside: str = BANK, namespace: str = NAMESPACE) -> str:
    return f'<vtpm xmlns="{namespace}">{inside}</vtpm>'


@pytest.fixture
def host(pair: Pair, product: Product) -> Host:
    return pair.one


@pytest.fixture
def guest(host: Host, define: Define) -> Machine:
    """An opted-in guest that was never started."""
    return define(host, Domain(name="refused", metadata=vtpm()))


def starts(machine: Machine) -> None:
    """It starts with the layer (and waits before its first instruction), and leaves nothing when it goes."""
    machine.host.virsh("start", "--paused", machine.domain.uuid)
    assert run_directories(machine.host) == [machine.domain.uuid]
    (process,) = processes(machine.host, "swtpm")
    assert "/_preload." in (process / "maps").read_text()
    machine.destroy()
    check_nothing_left(machine)


def refused(machine: Machine, id: str) -> str:
    """Its start is refused with one line of ours, which has ``id``; returns the line."""
    with pytest.raises(LabError) as caught:
        machine.host.virsh("start", "--paused", machine.domain.uuid)
    said = str(caught.value)
    assert said.count("swtpm-prop: ") == 1, said
    line = said[said.index("swtpm-prop: ") :].rstrip("\n")
    assert f"[{id}]" in line
    assert line.isprintable()
    check_nothing_left(machine)
    return line


def check_nothing_left(machine: Machine) -> None:
    host = machine.host
    assert eventually(lambda: run_directories(host) == [])
    assert eventually(lambda: not processes(host, "swtpm") and not processes(host, "qemu-system-x86_64"))
    assert machine.state() == "shut off"


# -- metadata -----------------------------------------------------------------------------------

HOSTILE_METADATA = {
    "another version": (vtpm(namespace="urn:swtpm-prop:domain:2"), "domain.namespace"),
    "unknown attribute": (vtpm(BANK.replace("pcrs=", 'more="x" pcrs=')), "domain.schema"),
    "unknown element": (vtpm(f"{BANK}<more/>"), "domain.schema"),
    "element of others": (vtpm(f'{BANK}<x xmlns="urn:other"/>'), "domain.schema"),
    "no bank": (vtpm(""), "domain.schema"),
    "no property": (vtpm('<bank algorithm="sha384" pcrs="0"/>'), "domain.schema"),
    "SHA-1": (vtpm(BANK.replace("sha384", "sha1")), "domain.schema"),
    "PCR 24": (vtpm(BANK.replace("0-9", "0-24")), "domain.pcr-not-translatable"),
    "PCR 16": (vtpm(BANK.replace("0-9", "16")), "domain.pcr-not-translatable"),
    "reversed range": (vtpm(BANK.replace("0-9", "9-0")), "domain.pcrs"),
    "doubled bank": (vtpm(BANK + BANK), "domain.bank-doubled"),
    "line break in a property": (vtpm(BANK.replace(PROPERTY, f"{PROPERTY}&#10;x")), "domain.property"),
    "too big": (vtpm(BANK.replace(PROPERTY, PROPERTY + "x" * 3_000_000)), "domain.size"),
    "custody": (vtpm(f'{BANK}<custody host-property="{PROPERTY}"/>'), "tpm.unreachable"),
    "attested migration": (vtpm(f'{BANK}<migration allow="attested"/>'), "domain.migration-without-custody"),
    "inside another's": (f'<x xmlns="urn:other">{vtpm()}</x>', "domain.misplaced"),
    "two inside another's": (f'<x xmlns="urn:other">{vtpm()}{vtpm()}</x>', "domain.misplaced"),
    "beside another version": (vtpm() + vtpm(namespace="urn:swtpm-prop:domain:2"), "domain.namespace"),
}


@pytest.mark.parametrize(("metadata", "id"), HOSTILE_METADATA.values(), ids=HOSTILE_METADATA)
def test_hostile_metadata(host: Host, define: Define, metadata: str, id: str):
    machine = define(host, Domain(name="hostile", metadata=metadata))
    refused(machine, id)
    assert not at(host, Layout().guest_marker(machine.domain.uuid)).exists()
    assert not at(host, Layout().guest_log(machine.domain.uuid)).exists()
    assert not at(host, Layout().guest_tpm(machine.domain.uuid)).exists()


def test_mended_metadata(host: Host, define: Define):
    machine = define(host, Domain(name="hostile", metadata=vtpm("")))
    refused(machine, "domain.schema")
    machine.domain = replace(machine.domain, metadata=vtpm())
    machine.define()
    starts(machine)


def test_a_document_type_does_not_get_past_libvirt(host: Host, guest: Machine):
    """libvirt keeps the reference without the declaration; it cannot read its own copy, and starts nothing."""
    xml = guest.domain.xml().replace('"sha384"', '"&bank;"')
    host.put("/run/doctype.xml", '<!DOCTYPE domain [<!ENTITY bank "sha384">]>' + xml)
    host.virsh("define", "/run/doctype.xml")
    with pytest.raises(LabError, match="Entity 'bank' not defined"):
        host.virsh("start", "--paused", guest.domain.uuid)
    check_nothing_left(guest)
    guest.define()
    starts(guest)


def test_of_two_elements_libvirt_keeps_the_first(host: Host, define: Define):
    machine = define(host, Domain(name="doubled", metadata=vtpm() + vtpm("")))
    starts(machine)


def test_ten_megabytes_do_not_get_past_libvirt(host: Host):
    huge = vtpm(BANK.replace(PROPERTY, PROPERTY + "x" * 10_000_000))
    with pytest.raises(LabError, match="Unable to encode message payload"):
        Machine(host, Domain(name="huge", metadata=huge)).define()


# -- names --------------------------------------------------------------------------------------

NAMES = ["-h", "--json", "...", "a\tb", "\u009b31mred", "\u202elaog", 'it\'s "$(reboot)" `x`; <&>', "%s%n", "ä ö"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_hostile_names(host: Host, product: Product, define: Define, name: str):
    machine = define(host, Domain(name=name))
    product.enable(machine)
    with index_away(host):
        refused(machine, "store.index-missing")
    starts(machine)
    assert json.loads(host.cli("domain", "show", "--json", "--", name).stdout)["name"] == name


def test_a_name_like_the_uuid_of_an_opted_in_guest(host: Host, guest: Machine, define: Define):
    starts(guest)
    other = define(host, Domain(name=guest.domain.uuid))
    host.virsh("start", "--paused", other.domain.uuid)
    (process,) = processes(host, "swtpm")
    assert "/_preload." not in (process / "maps").read_text()
    other.destroy()
    check_nothing_left(other)


# -- the index ----------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def foreign(path: Path) -> None:
    path.write_bytes(database("create table entry (id integer primary key, digests blob)"))


def newer(path: Path) -> None:
    path.write_bytes(database("pragma user_version = 99", path.read_bytes()))


def database(change: str, before: bytes = b"") -> bytes:
    """An SQLite file after one statement."""
    with closing(sqlite3.connect(":memory:")) as db:
        if before:
            db.deserialize(before)
        db.execute(change)
        db.commit()
        return db.serialize()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "store.index-missing"),
    "half-written": (truncated, "store.index-corrupt"),
    "empty": (lambda path: path.write_bytes(b""), "store.index-corrupt"),
    "text": (lambda path: path.write_text("x" * 20000), "store.index-format"),
    "another database": (foreign, "store.index-format"),
    "of a later version": (newer, "store.index-format"),
    "a directory": (directory, "store.index-unreadable"),
    "unreadable for swtpm": (lambda path: path.chmod(0o600), "store.index-unreadable"),
    "in a closed directory": (lambda path: path.parent.chmod(0o700), "store.index-unreadable"),
}


@pytest.mark.parametrize(("damage", "id"), DAMAGES.values(), ids=DAMAGES)
def test_unusable_index(host: Host, guest: Machine, damage: Callable[[Path], object], id: str):
    with index_away(host, keep=True):
        damage(at(host, INDEX))
        refused(guest, id)
    starts(guest)


@contextmanager
def index_away(host: Host, keep: bool = False) -> Iterator[None]:
    """Without the index, or with a copy to damage; it is back afterwards."""
    path = at(host, INDEX)
    good = path.read_bytes()
    if not keep:
        path.unlink()
    try:
        yield
    finally:
        path.parent.chmod(0o755)
        host.run(["rm", "-rf", str(INDEX)])
        path.write_bytes(good)
        path.chmod(0o644)


def test_index_while_the_guest_runs(host: Host, product: Product, direct: Domain, define: Define):
    """Each measurement is judged by the index that is there then; one that cannot be used certifies nothing."""
    first = product.certify("--file", product.content("good", GOOD))
    second = product.certify("--file", product.content("later", LATER))
    product.build(first)
    machine = define(host, replace(direct, name="judged", banks=()))
    product.enable(machine, "--pcrs", "8-9,11-14")
    machine.boot()
    path = at(host, INDEX)

    def measured(pcr: int, content: bytes) -> tuple[str, str]:
        extend(machine, pcr, content)
        record = product.log(machine)[-1]
        return record["content"]["state"], record["content"]["reason"]

    assert measured(8, GOOD) == ("held", "")
    assert measured(9, LATER) == ("broken", "unknown")
    product.build(second)
    assert measured(11, LATER) == ("held", "")
    assert measured(8, GOOD) == ("broken", "unknown")
    good = path.read_bytes()
    path.unlink()
    assert measured(12, LATER) == ("broken", "no-index")
    path.write_bytes(good[: len(good) // 2])
    assert measured(11, LATER) == ("broken", "no-index")
    product.build(second)
    assert measured(12, LATER) == ("broken", "")
    assert measured(13, LATER) == ("held", "")
    wanted = expected(held={13}, broken={8, 9, 11, 12})
    read = product.states(machine)
    assert {pcr: read[pcr] for pcr in (8, 9, 11, 12, 13, 14)} == {pcr: wanted[pcr] for pcr in (8, 9, 11, 12, 13, 14)}
    assert product.status(machine) == {pcr: wanted[pcr] for pcr in (8, 9, 11, 12, 13, 14)}


# -- the host -----------------------------------------------------------------------------------


def test_hook_that_does_not_run(host: Host, guest: Machine):
    starts(guest)
    with without_hook(host):
        refused(guest, "layer.not-prepared")
    starts(guest)


def test_hook_that_does_not_run_before_swtpm_setup(host: Host, define: Define):
    """Of a swtpm_setup that refuses virsh shows no more than where it says why."""
    guest = define(host, Domain(name="refused", metadata=vtpm(), banks=("sha256",)))
    starts(guest)
    log = "/var/log/swtpm/libvirt/qemu/refused-swtpm.log"
    with without_hook(host), pytest.raises(LabError, match=log):
        host.virsh("start", "--paused", guest.domain.uuid)
    assert "[layer.not-prepared]" in host.read(log).splitlines()[-1]
    check_nothing_left(guest)
    starts(guest)


@contextmanager
def without_hook(host: Host) -> Iterator[None]:
    """libvirt skips a hook that has no run bit, in silence."""
    hook = at(host, Layout().hook)
    hook.chmod(0o644)
    try:
        yield
    finally:
        hook.chmod(0o755)


def test_preload_object_unreadable_for_swtpm(host: Host, guest: Machine):
    # covered in this host's view alone: the file itself is everybody's
    host.run(["sh", "-c", f"umask 077; cp {preload_object()} /run/closed.so"])
    host.run(["mount", "--bind", "/run/closed.so", preload_object()])
    try:
        refused(guest, "layer.preload-unreadable")
    finally:
        host.run(["umount", preload_object()])
    starts(guest)


@pytest.mark.parametrize("name", ["swtpm", "swtpm_setup"])
def test_start_script_missing(host: Host, guest: Machine, name: str):
    script = at(host, Layout().libexec / name)
    script.rename(script.with_name("away"))
    try:
        refused(guest, "host.swtpm-path")
    finally:
        script.with_name("away").rename(script)
    if name == "swtpm":
        # the daemon has meanwhile found Debian's and goes on starting that
        refused(guest, "hook.no-layer")
    host.libvirtd.restart()
    starts(guest)


def test_bank_that_swtpm_setup_did_not_activate(host: Host, product: Product, direct: Domain, define: Define):
    """The daemon goes on using Debian's, which it found once: the TPM fails, and the next start activates the bank."""
    script = at(host, Layout().libexec / "swtpm_setup")
    machine = define(host, replace(direct, name="inactive", metadata=vtpm(), banks=()))
    script.rename(script.with_name("away"))
    refused(machine, "host.swtpm-path")
    script.with_name("away").rename(script)
    machine.boot()
    status, said = machine.console.run("tpm2_pcrextend 0:sha256=" + "00" * 32)
    assert status != 0, said
    done = host.cli("domain", "status", "--json", machine.domain.name, check=False)
    assert done.returncode == 1
    assert "[layer.bank-inactive]" in json.loads(done.stdout)["failure"]
    machine.destroy()
    machine.boot()
    assert set(product.status(machine).values()) == {"broken", "unmeasured"}
    machine.console.check("tpm2_pcrextend 0:sha256=" + "00" * 32)
    host.libvirtd.restart()


def test_daemon_not_restarted_since_the_installation(host: Host, guest: Machine):
    host.libvirtd.stop()
    host.libvirtd.start(ENVIRONMENT["PATH"])
    try:
        refused(guest, "host.swtpm-path")
    finally:
        host.libvirtd.stop()
        host.libvirtd.start()
    starts(guest)


def test_tpm_that_cannot_record_properties(host: Host, define: Define):
    machine = define(host, Domain(name="old", tpm="tis", metadata=vtpm()))
    xml = machine.domain.xml().replace("version='2.0'", "version='1.2'")
    host.put("/run/old.xml", xml)
    host.virsh("define", "/run/old.xml")
    refused(machine, "domain.tpm-kind")
    host.put("/run/old.xml", xml[: xml.index("<tpm ")] + xml[xml.index("</tpm>") + 6 :])
    host.virsh("define", "/run/old.xml")
    refused(machine, "domain.tpm")
    machine.define()
    starts(machine)
