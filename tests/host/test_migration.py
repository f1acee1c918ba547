"""Live migration of a guest in custody: its key goes from TPM to TPM, or nothing goes and the guest runs on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

import pytest
from fleet import APPROVED, Fleet, unfinished
from product import at, extend, processes, run_directories
from waiting import eventually

from lab.domain import Domain
from lab.hardware import TCTI
from lab.host import Host
from lab.machine import Machine
from lab.process import LabError
from swtpm_prop.custody.form import Form, form
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

STAY, LEAVE = ("--live", "--unsafe"), ("--live", "--unsafe", "--persistent", "--undefinesource")
WAYS = {
    "peer to peer": ("--p2p", *LEAVE),
    "native": LEAVE,
    "tunnelled": ("--p2p", "--tunnelled", *LEAVE),
    "definition stays and does not come": ("--p2p", *STAY),
    "definition stays and comes": ("--p2p", "--persistent", *STAY),
}


def one_line(id: str) -> str:
    """What matches the one line that a refusal is."""
    return rf"swtpm-prop: [^\n]*\[{re.escape(id)}\][^\n]*"


class Traveller:
    """A guest in custody, with what its PCRs must be wherever it is."""

    def __init__(self, fleet: Fleet, machine: Machine) -> None:
        self.fleet = fleet
        self.machine = machine
        machine.boot()
        extend(machine, 12, b"of this boot alone")
        self.pcrs = machine.pcrs()

    @property
    def uuid(self) -> str:
        return self.machine.domain.uuid

    def migrate(self, to: Host, *words: str) -> None:
        """Ask the source's virsh, with nothing but these words."""
        position = self.machine.console.size(to)
        self.machine.host.virsh("migrate", self.uuid, f"qemu+tcp://{to.name}/system", *words)
        self.machine.host = to
        self.machine.console.attach(to, position)

    def check_is_at(self, here: Host, before: Host) -> None:
        """It runs on, what it is made of is here, in custody, and nothing of it can be opened where it was."""
        assert self.machine.pcrs() == self.pcrs
        self.machine.console.check("tpm2_quote -Q -c 0x81000009 -l sha256:12 -m /run/quote -s /run/signature")
        layout = Layout()
        assert form(at(here, layout.guest_tpm(self.uuid))) is Form.ENCRYPTED
        left = {path.name for path in at(here, layout.guest_run(self.uuid)).iterdir()}
        assert left - {"keyed"} == {"layer.json", "pcr-banks"}
        # what fails is tried again after 1, 2, 4, 8, 15 s
        assert eventually(lambda: not unfinished(here) + unfinished(before), 60, pause=0.1)
        assert self.fleet.transfers(here) == self.fleet.transfers(before) == []
        assert at(here, layout.guest_key(self.uuid)).exists()
        assert not at(before, layout.guest_key(self.uuid)).exists()
        assert form(at(before, layout.guest_tpm(self.uuid))) is Form.NONE
        assert eventually(lambda: processes(before, "swtpm") == run_directories(before) == [])


@pytest.fixture(scope="module")
def traveller(fleet: Fleet, direct: Domain) -> Iterator[Traveller]:
    machine = fleet.define(fleet.keeper, replace(direct, uuid=str(uuid4()), name="traveller", banks=()))
    try:
        made = Traveller(fleet, machine)
        for line in (
            "tpm2_createprimary -Q -C e -G ecc -c /run/primary",
            "tpm2_create -Q -C /run/primary -G ecc:ecdsa -u /run/pub -r /run/priv",
            "tpm2_load -Q -C /run/primary -u /run/pub -r /run/priv -c /run/key",
            "tpm2_evictcontrol -Q -C o -c /run/key 0x81000009",
        ):
            machine.console.check(line)
        yield made
    finally:
        machine.remove()


@pytest.fixture
def other(fleet: Fleet, traveller: Traveller) -> Host:
    """The approved host where the guest is not."""
    gold, silver, _ = (member.host for member in fleet.members.values())
    return silver if traveller.machine.host is gold else gold


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_there_and_back(traveller: Traveller, other: Host, words: tuple[str, ...]):
    home = traveller.machine.host
    for here, before in ((other, home), (home, other)):
        traveller.migrate(here, *words)
        traveller.check_is_at(here, before)
    if traveller.uuid in other.virsh("list", "--all", "--uuid"):
        # libvirt would start it where its definition stayed
        with pytest.raises(LabError, match=one_line("transfer.elsewhere")):
            other.virsh("start", traveller.uuid)
        traveller.check_is_at(home, other)
        other.virsh("undefine", traveller.uuid)


# -- refusals -----------------------------------------------------------------------------------


@contextmanager
def nothing(_fleet: Fleet, _source: Host, _to: Host) -> Iterator[None]:
    yield


@contextmanager
def not_enrolled(fleet: Fleet, _source: Host, to: Host) -> Iterator[None]:
    keys = at(to, Layout().host_keys)
    keys.rename(f"{keys}.away")
    keys.mkdir(mode=0o700)
    try:
        yield
    finally:
        for file in keys.iterdir():
            file.unlink()
        keys.rmdir()
        keys.with_name("host.away").rename(keys)


@contextmanager
def another_parent(fleet: Fleet, _source: Host, to: Host) -> Iterator[None]:
    """Beside the keys that are certified lies a parent whose secrets software has seen."""
    tool = ["-Q", "-T", TCTI, "-C", "o"]
    to.run(["tpm2_evictcontrol", *tool, "-c", "0x81005350"])
    attributes = "restricted|decrypt|userwithauth|sensitivedataorigin"
    to.run(["sh", "-c", f"tpm2_createprimary {' '.join(tool)} -G ecc -a '{attributes}' -c /run/parent"])
    to.run(["tpm2_evictcontrol", *tool, "-c", "/run/parent", "0x81005350"])
    try:
        yield
    finally:
        to.run(["tpm2_evictcontrol", *tool, "-c", "0x81005350"])
        to.cli("host", "init")


@contextmanager
def changed_since_approved(fleet: Fleet, _source: Host, to: Host) -> Iterator[None]:
    fleet.members[to.name].tpm.extend(5, b"something new")
    try:
        yield
    finally:
        fleet.members[to.name].tpm.boot()


@contextmanager
def silent(fleet: Fleet, host: Host) -> Iterator[None]:
    fleet.members[host.name].agent.stop()
    try:
        yield
    finally:
        fleet.members[host.name].agent.start()


@contextmanager
def source_silent(fleet: Fleet, source: Host, _to: Host) -> Iterator[None]:
    with silent(fleet, source):
        yield


@contextmanager
def another_parent_and_no_agent(fleet: Fleet, source: Host, to: Host) -> Iterator[None]:
    """The hook has to open this host's own TLS key, which is below the parent that is certified."""
    with silent(fleet, to), another_parent(fleet, source, to):
        yield


REFUSALS: dict[str, tuple[Callable[..., object], str]] = {
    "not enrolled": (not_enrolled, "host.not-enrolled"),
    "another parent than the certified one": (another_parent, "attest.parent-fixed-tpm"),
    "the same, and no agent there": (another_parent_and_no_agent, "tpm.foreign-object"),
    "in a state that is not approved any more": (changed_since_approved, "transfer.state-not-approved"),
    "source cannot be asked": (source_silent, "transfer.unreachable"),
}


@pytest.mark.parametrize(("spoiled", "id"), REFUSALS.values(), ids=REFUSALS)
def test_refused(traveller: Traveller, other: Host, spoiled: Callable[..., object], id: str):
    source = traveller.machine.host
    with spoiled(traveller.fleet, source, other):  # type: ignore[attr-defined]
        refused(traveller, other, id)
    # nothing is in the way of the next one
    traveller.migrate(other, "--p2p", *LEAVE)
    traveller.check_is_at(other, source)


def test_a_process_at_the_destination_that_comes_to_nothing(traveller: Traveller, other: Host):
    """QEMU is to listen where no address of the host is; of this end libvirt tells no agent."""
    source = traveller.machine.host
    with pytest.raises(LabError, match="bind"):
        traveller.migrate(other, "--p2p", *LEAVE, "--listen-address", "203.0.113.1")
    assert traveller.machine.state() == "running"
    assert eventually(lambda: not unfinished(source) + unfinished(other), pause=0.1)
    assert not at(other, Layout().guest_key(traveller.uuid)).exists()
    # nothing is in the way of the next one
    traveller.migrate(other, "--p2p", *LEAVE)
    traveller.check_is_at(other, source)


def test_refused_by_a_host_that_was_never_approved(traveller: Traveller):
    refused(traveller, traveller.fleet.members["stranger"].host, "transfer.state-not-approved")


def test_no_key_goes_where_no_guest_is_sent(traveller: Traveller, other: Host):
    """Root of an approved host asks for the key of a guest that merely runs elsewhere."""
    source = traveller.machine.host
    xml = source.virsh("dumpxml", traveller.uuid)
    asked = other.run([Layout().hook, "traveller", "migrate", "begin", "-"], stdin=xml, check=False)
    assert asked.returncode == 1
    assert "[transfer.not-migrating]" in asked.stderr
    assert traveller.fleet.transfers(source) == traveller.fleet.transfers(other) == []
    assert traveller.machine.state() == "running"


def refused(traveller: Traveller, to: Host, id: str, *words: str) -> None:
    source = traveller.machine.host
    with pytest.raises(LabError) as caught:
        traveller.migrate(to, *(words or ("--p2p", *LEAVE)))
    caught.match(one_line(id))
    assert str(caught.value).count("swtpm-prop: ") == 1
    assert str(caught.value).rstrip("\n").count("\n") == 1  # the laboratory's own line is the other one
    assert traveller.machine.host is source
    assert traveller.machine.state() == "running"
    assert traveller.machine.pcrs() == traveller.pcrs
    assert traveller.uuid not in to.virsh("list", "--all", "--uuid")
    assert form(at(to, Layout().guest_tpm(traveller.uuid))) is Form.NONE
    assert not at(to, Layout().guest_key(traveller.uuid)).exists()
    assert eventually(lambda: run_directories(to) == [])


def test_offline_migration(fleet: Fleet):
    """libvirt would delete the TPM's state at the source, and move none."""
    source, to = (fleet.members[name].host for name in ("gold", "silver"))
    machine = fleet.define(source, Domain(name="offline", memory=64))
    try:
        machine.start()
        machine.destroy()
        words = ("--offline", "--persistent", "--undefinesource", "--unsafe")
        with pytest.raises(LabError, match=one_line("transfer.not-running")):
            source.virsh("migrate", machine.domain.uuid, f"qemu+tcp://{to.name}/system", *words)
        assert form(at(source, Layout().guest_tpm(machine.domain.uuid))) is Form.ENCRYPTED
        machine.start()
    finally:
        machine.remove()


OFFLINE = {
    "peer to peer": ("--p2p",),
    "native": (),
    "peer to peer, definition leaves": ("--p2p", "--undefinesource"),
    "native, definition leaves": ("--undefinesource",),
}


@pytest.mark.parametrize("words", OFFLINE.values(), ids=OFFLINE)
def test_offline_migration_of_a_guest_that_runs(traveller: Traveller, other: Host, words: tuple[str, ...]):
    refused(traveller, other, "transfer.offline", "--offline", "--persistent", "--unsafe", *words)
    home = traveller.machine.host
    assert traveller.fleet.transfers(home) == traveller.fleet.transfers(other) == []
    # nothing is in the way of one that takes the guest along
    traveller.migrate(other, *(word for word in words if word == "--p2p"), *LEAVE)
    traveller.check_is_at(other, home)


TRANSIENT = "swtpm_prop_guests_transient {}\n"


def test_a_guest_that_arrives_without_its_definition(fleet: Fleet):
    """libvirt deletes its TPM state when it stops: the agent says so while that can be mended."""
    source, to = (fleet.members[name].host for name in ("gold", "silver"))
    machine = fleet.define(source, Domain(name="homeless", memory=64))
    uuid = machine.domain.uuid
    warning = rf"<3>guest {uuid} has no definition here[^\n]*\[custody.transient\]: before that, ([^\n]*)"
    try:
        machine.start()
        source.virsh("migrate", uuid, f"qemu+tcp://{to.name}/system", "--p2p", *STAY)
        machine.host = to
        agent = fleet.members[to.name].agent
        assert eventually(lambda: re.search(warning, agent.log()) is not None)
        assert TRANSIENT.format(1) in metrics(to)
        # the mend, as it was printed
        said = re.search(warning, agent.log())
        assert said is not None
        to.run(["sh", "-c", f"cd /run && {said[1]}"])
        assert eventually(lambda: TRANSIENT.format(0) in metrics(to))
        machine.destroy()
        assert form(at(to, Layout().guest_tpm(uuid))) is Form.ENCRYPTED
        machine.start()
        # without it
        to.virsh("undefine", uuid)
        assert eventually(lambda: TRANSIENT.format(1) in metrics(to))
        machine.destroy()
        assert form(at(to, Layout().guest_tpm(uuid))) is Form.NONE
    finally:
        machine.remove()
        if uuid in source.virsh("list", "--all", "--uuid"):
            source.virsh("undefine", uuid)


def metrics(host: Host) -> str:
    """What Prometheus gets from the host's agent."""
    program = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9879/metrics').read().decode())"
    return host.run([sys.executable, "-c", program]).stdout


def test_a_guest_whose_metadata_does_not_allow_it(fleet: Fleet):
    source, to = (fleet.members[name].host for name in ("gold", "silver"))
    machine = Machine(source, Domain(name="settled", memory=64))
    with machine:
        fleet.product.enable(machine, "--custody", APPROVED)
        machine.start()
        with pytest.raises(LabError, match=one_line("migration.not-allowed")):
            machine.migrate(to)
        assert machine.state() == "running"


LEFT_OUT = {
    "all": r"<metadata>.*</metadata>",
    "custody and migration": r"<prop:(custody|migration) [^>]*>",
}


@pytest.mark.parametrize("pattern", LEFT_OUT.values(), ids=LEFT_OUT)
def test_metadata_left_out_on_the_way_open_nothing(fleet: Fleet, pattern: str):
    """``--xml`` keeps our hook from doing anything; the stream is encrypted all the same, and no TPM there takes it."""
    source, to = (fleet.members[name].host for name in ("gold", "silver"))
    machine = fleet.define(source, Domain(name="stripped", memory=64))
    uuid = machine.domain.uuid
    try:
        machine.start()
        whole = source.virsh("dumpxml", "--migratable", uuid)
        stripped = re.sub(pattern, "", whole, flags=re.S)
        assert stripped != whole
        source.put("/run/stripped.xml", stripped)
        words = ("--p2p", "--live", "--unsafe", "--xml", "/run/stripped.xml")
        with pytest.raises(LabError):
            source.virsh("migrate", uuid, f"qemu+tcp://{to.name}/system", *words)
        assert machine.state() == "running"
        assert fleet.transfers(source) == fleet.transfers(to) == []
        assert not at(to, Layout().guest_key(uuid)).exists()
        assert uuid not in to.virsh("list", "--all", "--uuid")
        assert eventually(lambda: processes(to, "swtpm") == run_directories(to) == [])
    finally:
        machine.remove()
