"""One guest through everything libvirt does to it: each PCR of both banks is what a model of the guest says."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Pair
from product import (
    TRANSLATED,
    Product,
    at,
    expected,
    extend,
    processes,
    read_bank,
    run_directories,
)
from waiting import eventually

from lab.domain import Domain
from lab.host import Host
from lab.machine import Machine
from lab.process import LabError, run
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

GOOD, BAD = b"certified\n", b"not certified\n"
SAVED = "/var/lib/libvirt/saved"


class Life:
    """The guest, with what its raw PCRs and the states of its translated PCRs must be."""

    def __init__(self, pair: Pair, product: Product, domain: Domain) -> None:
        self.home, self.away = pair.one, pair.other
        self.product = product
        self.machine = Machine(pair.one, domain)
        self.sound = False
        with self.machine as plain:
            plain.boot()
            self._booted = plain.pcrs()["sha256"]
            log = product.content("lifecycle.eventlog", plain.event_log())
        product.build(product.certify("--event-log", log, "--file", product.content("good", GOOD)))
        self.restarted()

    def renew(self) -> None:
        """The guest from nothing, wherever a test left it."""
        self.machine.remove()
        self.machine.host = self.home
        self.machine.define()
        self.product.enable(self.machine)
        self.machine.boot()
        self.restarted()

    def restarted(self) -> None:
        """From now on the PCRs must be those of a boot; the raw ones as the guest had them without us."""
        self.raw = dict(self._booted)
        self.states = expected(held={pcr for pcr in TRANSLATED if int(self.raw[pcr], 16)})

    def measure(self, pcr: int, content: bytes) -> None:
        extend(self.machine, pcr, content)
        before = bytes.fromhex(self.raw[pcr])
        self.raw[pcr] = hashlib.sha256(before + hashlib.sha256(content).digest()).hexdigest()
        self.states[pcr] = "broken" if content == BAD or self.states[pcr] == "broken" else "held"

    def mark(self) -> None:
        """Measure what no reboot would: a PCR more that is held, and a broken one."""
        if self.states[12] == "unmeasured":
            self.measure(11, GOOD)
            self.measure(12, BAD)

    def check(self) -> None:
        """Guest, ``domain status`` and model agree, and the guest has its layer and nobody else has one."""
        assert read_bank(self.machine, "sha256") == self.raw
        assert self.product.agreed(self.machine) == self.states
        elsewhere = self.home if self.machine.host is self.away else self.away
        assert run_directories(self.machine.host) == [self.machine.domain.uuid]
        assert eventually(lambda: run_directories(elsewhere) == [])

    def check_gone(self, host: Host) -> None:
        """What one start of the guest needed is no longer on the host; its log is."""
        assert eventually(lambda: processes(host, "swtpm") == run_directories(host) == [])
        assert at(host, Layout().guest_log(self.machine.domain.uuid)).exists()

    def events(self) -> list[str]:
        """What the log of the present start says beside measurements."""
        events = [record["content"]["event"] for record in self.product.log(self.machine)]
        return [event for event in events if event != "measurement"]

    def check_resumed(self) -> None:
        """A log of its own says what the layer found in the TPM."""
        first = self.product.log(self.machine)[0]
        assert first["recnum"] == 0
        assert first["content"]["event"] == "resume"
        assert {int(pcr): state for pcr, state in first["content"]["states"]["sha384"].items()} == self.states


@pytest.fixture(scope="module")
def shared(pair: Pair, product: Product, direct: Domain) -> Iterator[Life]:
    disk = pair.work / "lifecycle.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"])
    disk.chmod(0o666)
    made = Life(pair, product, replace(direct, name="lifecycle", disk=disk, banks=()))
    yield made
    made.machine.remove()


@pytest.fixture
def life(shared: Life) -> Iterator[Life]:
    """The guest, running at home and marked; it must agree with its model after every test."""
    if not shared.sound or shared.machine.host is not shared.home:
        shared.renew()
    shared.sound = False
    shared.mark()
    yield shared
    shared.check()
    shared.sound = True


def test_reboot(life: Life):
    before = life.events()
    life.machine.reboot()
    life.restarted()
    assert life.events() == [*before, "startup"]


def test_reset(life: Life):
    before = life.events()
    life.machine.reset()
    life.restarted()
    assert life.events() == [*before, "startup"]


def test_shutdown_and_start(life: Life):
    uuid, layout = life.machine.domain.uuid, Layout()
    files = {path.name for path in at(life.home, layout.guest_run(uuid)).iterdir()}
    assert files == {"layer.json", "pcr-banks"}
    # swtpm's user reads what is its own and what is everybody's, and writes its log alone
    assert access(life.home, layout.guest_run(uuid)) == ("root", "tss", 0o750)
    assert access(life.home, layout.guest_run(uuid) / "layer.json") == ("root", "tss", 0o640)
    assert access(life.home, layout.guest_log(uuid)) == ("tss", "tss", 0o640)
    assert access(life.home, layout.guest_marker(uuid)) == ("root", "root", 0o644)
    log = at(life.home, Layout().guest_log(life.machine.domain.uuid))
    earlier = log.read_bytes()
    life.machine.power_off()
    life.check_gone(life.home)
    life.machine.boot()
    life.restarted()
    assert life.events() == ["startup"]
    assert Path(f"{log}.1").read_bytes() == earlier


def access(host: Host, path: Path) -> tuple[str, str, int]:
    """Owner, group and mode."""
    here = at(host, path)
    return here.owner(), here.group(), stat.S_IMODE(here.stat().st_mode)


def test_save_and_restore(life: Life):
    life.machine.save(SAVED)
    life.check_gone(life.home)
    life.machine.restore(SAVED)
    life.check_resumed()


def test_managed_save(life: Life):
    life.machine.managed_save()
    life.check_gone(life.home)
    life.machine.start()
    life.check_resumed()


def test_snapshot_revert(life: Life):
    life.machine.snapshot("marked")
    kept = deepcopy((life.raw, life.states))
    life.measure(11, BAD)
    life.measure(13, GOOD)
    life.check()
    life.machine.revert("marked")
    life.raw, life.states = kept
    life.check_resumed()
    # libvirt migrates no guest that has one
    life.home.virsh("snapshot-delete", life.machine.domain.uuid, "marked")


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_daemon_restart(life: Life, end: str):
    before = [process.name for process in processes(life.home, "swtpm")]
    getattr(life.home.libvirtd, end)()
    life.measure(11, GOOD)
    life.home.libvirtd.start()
    life.check()
    life.measure(12, BAD)
    assert [process.name for process in processes(life.home, "swtpm")] == before
    assert life.machine.state() == "running"


def test_live_migration_there_and_back(life: Life):
    for to, left in ((life.away, life.home), (life.home, life.away)):
        life.machine.migrate(to)
        life.check_resumed()
        life.check_gone(left)
        life.check()
        life.measure(11, GOOD)
        life.measure(14, BAD)
        life.check()


def test_refused_migration(life: Life):
    index = at(life.away, Layout().index)
    index.rename(f"{index}.away")
    try:
        with pytest.raises(LabError, match=r"\[store\.index-missing\]"):
            life.machine.migrate(life.away)
    finally:
        Path(f"{index}.away").rename(index)
    check_untouched(life)


def test_aborted_migration(life: Life):
    refusals: list[LabError] = []

    def migrate() -> None:
        try:
            life.machine.migrate(life.away, "--bandwidth", "1")
        except LabError as error:
            refusals.append(error)

    migration = threading.Thread(target=migrate)
    migration.start()
    assert eventually(lambda: "Memory processed" in life.home.virsh("domjobinfo", life.machine.domain.uuid))
    assert run_directories(life.away) == [life.machine.domain.uuid]
    life.home.virsh("domjobabort", life.machine.domain.uuid)
    migration.join()
    assert len(refusals) == 1
    check_untouched(life)


def check_untouched(life: Life) -> None:
    """A migration that came to nothing: the guest runs at home as before, and has left nothing on the other host."""
    life.check()
    assert eventually(lambda: processes(life.away, "swtpm") == [])
    assert eventually(lambda: not at(life.away, Layout().guest_tpm(life.machine.domain.uuid)).exists())
    life.measure(11, GOOD)
    life.measure(12, BAD)
