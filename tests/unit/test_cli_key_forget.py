"""``key forget`` destroys the key of a guest that is gone, and of no other; ``key show`` tells which those are."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from testdriver import URI, defined

from swtpm_prop.cli.key import command
from swtpm_prop.custody import keys
from swtpm_prop.custody.form import PERMANENT
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.errors import Error
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Side, State

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
OTHER = UUID.replace("0b7", "1b7")
XML = f"<domain type='test'><name>g</name><uuid>{UUID}</uuid><memory>1024</memory><os><type>hvm</type></os></domain>"
AUTHORITY = keys.pem(ec.generate_private_key(ec.SECP256R1()).public_key())
RECORD = KeyRecord(UUID, 1, "https://example.org/hosts/approved", AUTHORITY, Sealed(b"public", b"private"), (), True)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A host that has a guest's key, and nothing else of it."""
    layout = Layout(tmp_path)
    keys.store(RECORD, layout)
    return layout


@pytest.fixture
def guest() -> Iterator[libvirt.virDomain]:
    """A guest named g that libvirt has."""
    with defined(XML) as domain:
        yield domain


def call(layout: Layout, *argv: str, uri: str = URI, typed: str = "") -> Result:
    return CliRunner().invoke(command, [*argv, "--connect", uri], obj=layout, input=typed)


def refused(layout: Layout, *argv: str, uri: str = URI) -> str:
    """The id of the refusal, after which the key is still there."""
    error = call(layout, *argv, uri=uri).exception
    assert isinstance(error, Error), error
    assert layout.guest_key(UUID).exists()
    return error.id


def keep_state(layout: Layout) -> Path:
    path = layout.guest_tpm(UUID) / PERMANENT
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack(">BBHHI", 2, 1, 10, 1, 10))
    return path


def test_the_key_of_a_guest_that_is_gone_is_destroyed(layout: Layout) -> None:
    told = call(layout, "forget", UUID, typed="n\n")
    assert (told.exit_code, "saved images, snapshots" in told.stderr) == (1, True)
    assert keys.load(UUID, layout) == RECORD
    assert call(layout, "forget", UUID, typed="y\n").exit_code == 0
    assert keys.load(UUID, layout) is None
    error = call(layout, "forget", UUID, "--yes").exception
    assert isinstance(error, Error)
    assert error.id == "custody.no-record"


def test_programs_do_not_get_asked(layout: Layout) -> None:
    assert refused(layout, "forget", UUID, "--json") == "usage.confirm"
    done = json.loads(call(layout, "forget", UUID, "--json", "--yes").stdout)
    assert done == {"guest": UUID, "forgotten": True}


def test_a_damaged_record_goes_too(layout: Layout) -> None:
    layout.guest_key(UUID).write_text("{}")
    assert call(layout, "forget", UUID, "--yes").exit_code == 0
    assert not layout.guest_key(UUID).exists()


def test_not_of_a_guest_that_libvirt_has(layout: Layout, guest: libvirt.virDomain) -> None:
    for named in (UUID, "g"):
        assert refused(layout, "forget", named, "--yes") == "custody.guest-here"
    guest.create()
    guest.undefine()  # it runs on, defined no more
    assert refused(layout, "forget", UUID, "--yes") == "custody.guest-here"


@pytest.mark.parametrize(
    ("uri", "id"),
    [
        ("test:///no/such/file", "domain.libvirt"),
        ("qemu+ssh://beta.example/system", "domain.remote"),
        ("qemu:///session", "domain.remote"),
    ],
)
def test_not_if_nobody_can_tell_whether_libvirt_has_the_guest(layout: Layout, uri: str, id: str) -> None:
    assert refused(layout, "forget", UUID, "--yes", uri=uri) == id


def test_not_while_a_migration_is_unfinished(layout: Layout) -> None:
    journal = Journal(layout)
    offered = journal.begin(Transfer("a" * 32, Side.SOURCE, State.OFFERED, UUID, 1, "beta", "127.0.0.1:1"))
    assert refused(layout, "forget", UUID, "--yes") == "transfer.open"
    journal.enter(offered, State.CLOSED, due=False)
    assert call(layout, "forget", UUID, "--yes").exit_code == 0


def test_not_while_the_tpm_state_is_here_unless_it_is_to_stay(layout: Layout) -> None:
    state = keep_state(layout)
    assert refused(layout, "forget", UUID, "--yes") == "custody.state-here"
    assert call(layout, "forget", UUID, "--yes", "--leave-state").exit_code == 0
    assert state.exists()


def test_what_comes_up_while_it_waits_for_others_at_this_guest_counts(layout: Layout) -> None:
    with ThreadPoolExecutor() as pool:
        with Journal(layout).locked(UUID):
            forgetting = pool.submit(refused, layout, "forget", UUID, "--yes")
            time.sleep(0.5)
            keep_state(layout)
        assert forgetting.result() == "custody.state-here"


def test_show_tells_whose_guests_are_gone(layout: Layout, guest: libvirt.virDomain) -> None:
    keys.store(RECORD._replace(uuid=OTHER), layout)
    listed = json.loads(call(layout, "show", "--json").stdout)
    assert [(key["guest"], key["name"], key["defined"]) for key in listed] == [(UUID, "g", True), (OTHER, None, False)]
    first, second = call(layout, "show").stdout.splitlines()[1:]
    assert first.split()[:2] == [UUID, "g"]
    assert second.startswith(f"{OTHER}  not defined here ")
    unknown = json.loads(call(layout, "show", "--json", uri="test:///no/such/file").stdout)
    assert [key["defined"] for key in unknown] == [None, None]
    guest.undefine()
    assert [key["defined"] for key in json.loads(call(layout, "show", "--json").stdout)] == [False, False]
