"""What an attacker may carry away of a guest in custody stays closed: each piece, with a piece beside it that is open.

Every way to talk a host out of a key is tried with real TPMs in tests/unit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet
from inside import copied, key_of, keyed, on, state_of
from product import at
from waiting import eventually

from lab.domain import Domain
from lab.host import Host
from lab.machine import Machine
from lab.process import LabError
from lab.tap import Tap
from swtpm_prop.custody.form import Form, form
from swtpm_prop.custody.keys import migration_key
from swtpm_prop.layout import Layout
from tests.swtpm import PERMANENT as PERMANENT_KIND
from tests.swtpm import Tpm, TpmError, owned_directory, world_directory

pytestmark = pytest.mark.host

HAND_OUT = """
from pathlib import Path
from swtpm_prop.custody import keys, opening
from swtpm_prop.layout import Layout
record = keys.load("{0}", Layout())
with opening.hardware(Layout()) as tpm:
    granted = opening.authorization(record, tpm, Layout())
    print(*(part.hex() for part in tpm.duplicate(record.sealed, granted, bytes.fromhex("{1}"))))
"""
TAKE_IN = """
from swtpm_prop.custody import opening
from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.layout import Layout
with opening.hardware(Layout()) as tpm:
    tpm.import_(ImportBlob(*map(bytes.fromhex, "{0}".split())))
"""
PARENT = """
from swtpm_prop.custody import opening
from swtpm_prop.layout import Layout
with opening.hardware(Layout()) as tpm:
    print(tpm.parent_public.hex())
"""
BLOB = re.compile(rb"\x02\x01\x00\x0a(..)(....)", re.S)
"""swtpm's header of a state blob: version, least version, its size, flags, size of all (src/swtpm/swtpm_nvstore.c)."""
MIGRATION_ENCRYPTED = 2  # of its flags
WRONG = "00" * 32


@pytest.fixture
def gold(fleet: Fleet) -> Host:
    return fleet.members["gold"].host


@pytest.fixture
def silver(fleet: Fleet) -> Host:
    return fleet.members["silver"].host


@pytest.fixture
def kept(fleet: Fleet, gold: Host) -> Iterator[Machine]:
    """A guest in custody, running; without an operating system, so that no memory of it holds what its TPM holds."""
    machine = fleet.define(gold, Domain(name="closed", memory=64))
    try:
        machine.start()
        yield machine
    finally:
        machine.remove()


@pytest.fixture
def plain(fleet: Fleet, gold: Host) -> Iterator[Machine]:
    """The same, opted in but in nobody's custody."""
    with Machine(gold, Domain(name="open", memory=64)) as machine:
        fleet.product.enable(machine)
        machine.start()
        yield machine


@pytest.fixture
def world() -> Iterator[Path]:
    with world_directory() as path:
        yield path


def opened(world: Path, directory: Path, key: str = "") -> bytes:
    """A copy of the state in ``directory`` as a swtpm reads it, with a key in hex or none: what is in the blob.

    Raises:
        TpmError: it cannot.
    """
    with copied(world, directory, key) as tpm:
        tpm.init()
        return tpm.get_state(PERMANENT_KIND)[1][10:]


def shown(content: bytes, places: list[bytes]) -> list[bytes]:
    """What of the inside of a TPM can be found in one of the places; nothing with a pattern, which is everywhere."""
    windows = [content[at : at + 24] for at in range(0, len(content) - 24, 24)]
    return [window for window in windows if len(set(window)) > 16 and any(window in place for place in places)]


def migrated(machine: Machine, to: Host, tap: Path, *words: str) -> list[bytes]:
    """Everything that went over the cables meanwhile."""
    with Tap(machine.host, tap) as listening:
        machine.migrate(to, *words)
    return listening.streams()


@pytest.mark.parametrize("words", [(), ("--tunnelled",)], ids=["direct", "tunnelled"])
def test_a_captured_migration_stream(kept: Machine, plain: Machine, silver: Host, world: Path, words: tuple[str, ...]):
    inside, bare = opened(world, state_of(kept), key_of(kept)), opened(world, state_of(plain))
    state_key = key_of(kept)
    captured = migrated(plain, silver, world / "plain", *words)
    assert shown(bare, captured)
    captured = migrated(kept, silver, world / "kept", *words)
    assert not shown(inside, captured)
    blobs = [(stream, found) for stream in captured for found in BLOB.finditer(stream)]
    assert blobs
    assert all(int.from_bytes(found[1], "big") & MIGRATION_ENCRYPTED for _, found in blobs)
    stream, first = blobs[0]
    blob = stream[first.start() : first.start() + int.from_bytes(first[2], "big")]
    key = migration_key(bytes.fromhex(state_key)).hex()
    for wrong in (WRONG, state_key):
        with pytest.raises(TpmError):
            received(world, blob, wrong)
    received(world, blob, key)


def received(world: Path, blob: bytes, key: str) -> None:
    """Let a swtpm with this migration key resume from the blob."""
    options = keyed(world, "--migration-key", key)
    with Tpm(owned_directory(world / f"receiver{len(list(world.iterdir()))}"), options=options) as tpm:
        tpm.stop()
        tpm.set_state(PERMANENT_KIND, 0, blob)
        tpm.init()


def test_a_captured_state_directory(kept: Machine, plain: Machine, world: Path):
    opened(world, state_of(plain))
    for key in ("", WRONG):
        with pytest.raises(TpmError):
            opened(world, state_of(kept), key)
    inside = opened(world, state_of(kept), key_of(kept))
    assert not shown(inside, [file.read_bytes() for file in state_of(kept).parent.rglob("*") if file.is_file()])


def test_a_copy_of_the_disk_in_another_host(kept: Machine, gold: Host, silver: Host, tmp_path: Path):
    """Approved too, member of the same fleet, and with everything that lies on the disk of the first: but its TPM."""
    uuid, layout = kept.domain.uuid, Layout()
    kept.destroy()
    places = (layout.guest_tpm(uuid).parent, layout.guest_key(uuid), layout.guest_marker(uuid))
    gold.run(["tar", "-C", "/", "-cf", "/var/tmp/disk.tar", *(str(place).lstrip("/") for place in places)])
    silver.run(["tar", "-C", "/", "-xf", "/var/tmp/disk.tar"])
    gold.run(["rm", "/var/tmp/disk.tar"])
    copy = Machine(silver, kept.domain)
    try:
        silver.put("/run/copy.xml", gold.virsh("dumpxml", "--inactive", uuid))
        silver.virsh("define", "/run/copy.xml")
        with pytest.raises(LabError, match=r"\[tpm\.foreign-object\]"):
            copy.start()
    finally:
        copy.remove()
        silver.run(["rm", "-rf", *map(str, places)])
    kept.start()


def test_a_captured_import_blob(fleet: Fleet, kept: Machine, gold: Host, silver: Host):
    """It is for the one TPM that it was made for; not even for the one that made it."""
    blob = on(gold, HAND_OUT.format(kept.domain.uuid, on(silver, PARENT)))
    for host in (gold, fleet.members["stranger"].host):
        with pytest.raises(LabError, match=r"tpm\.foreign-object"):
            on(host, TAKE_IN.format(blob))
    on(silver, TAKE_IN.format(blob))


def test_its_own_host_in_a_state_that_nobody_approved(fleet: Fleet, kept: Machine, gold: Host):
    kept.destroy()
    tpm = fleet.members["gold"].tpm
    tpm.extend(4, b"another kernel after all")
    refused(kept, "host.state-not-approved")
    tpm.boot()
    kept.start()


def test_its_own_host_after_the_approval_was_revoked(fleet: Fleet, kept: Machine, gold: Host, world: Path):
    """The TPM remembers, whatever list somebody puts back."""
    kept.destroy()
    shutil.copytree(at(gold, Layout().approvals), world / "before")
    fleet.revoke("stock")
    try:
        refused(kept, "host.nothing-approved", "host.state-not-approved")  # the list may have another state
        shutil.rmtree(at(gold, Layout().approvals))
        shutil.copytree(world / "before", at(gold, Layout().approvals))
        refused(kept, "tpm.approval-revoked")
    finally:
        fleet.approve(gold, "stock")
    kept.start()


def test_nothing_is_left_where_the_guest_was(fleet: Fleet, kept: Machine, gold: Host, silver: Host, world: Path):
    """Until the guest runs elsewhere its key opens here; then neither key nor state is here."""
    uuid, layout = kept.domain.uuid, Layout()
    inside = opened(world, state_of(kept), key_of(kept))
    assert inside
    kept.migrate(silver)
    assert eventually(lambda: at(silver, layout.guest_key(uuid)).exists())
    assert eventually(lambda: not at(gold, layout.guest_key(uuid)).exists())
    assert eventually(lambda: form(at(gold, layout.guest_tpm(uuid))) is Form.NONE)
    left = [file for file in at(gold, layout.state).rglob("*") if file.is_file() and uuid in str(file)]
    key = bytes.fromhex(key_of(kept))
    for file in left:
        content = file.read_bytes()
        assert key not in content
        assert key.hex().encode() not in content.lower()
    with pytest.raises(LabError):
        key_of(Machine(gold, kept.domain))


def refused(machine: Machine, *ids: str) -> None:
    """It does not start, for one of these reasons."""
    with pytest.raises(LabError, match=rf"\[({'|'.join(map(re.escape, ids))})\]"):
        machine.start()
    assert machine.state() == "shut off"
