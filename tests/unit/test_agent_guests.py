"""What the agent knows of libvirt's guests, by libvirt's own test driver, which runs in this process."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from waiting import eventually

from swtpm_prop.agent import guests as agent_guests
from swtpm_prop.agent.guests import Guests, Happening, check_moves, job_leaves, presence_after, presence_of
from swtpm_prop.domain.identity import identify
from swtpm_prop.domain.stamp import Stamp, read, to_xml
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.machine import Event, Presence

URI = "test:///default"
OTHER = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
NODE = """<node><domain type='test'><name>test</name><uuid>6ba7b810-9dad-41d1-80b4-00c04fd430c8</uuid>
<memory>8192</memory><os><type>hvm</type></os></domain></node>"""
STAMP = Stamp("alpha.example:4879", "alpha")
NAME = "a 'guest' <\u00e9>"
STATUS = """<domstatus state='running' reason='booted' pid='4711'>
  <monitor path='/var/lib/libvirt/qemu/domain-1-guest/monitor.sock' type='unix'/>
  {job}
  <domain type='kvm' id='1'>
    <name>guest</name>
    <uuid>{uuid}</uuid>
    <metadata><job async='migration out' phase='begin3' flags='0x21b'/></metadata>
  </domain>
</domstatus>
"""
"""As libvirt 9.0 writes it; what stands in the guest's own metadata means nothing."""


@pytest.fixture
def told() -> queue.Queue[Happening]:
    return queue.Queue()


@pytest.fixture
def guests(tmp_path: Path, told: queue.Queue[Happening]) -> Iterator[Guests]:
    """Of a libvirt of its own: what an earlier test did to the common one is told of whenever its loop comes to it."""
    (tmp_path / "node.xml").write_text(NODE)
    guests = Guests(f"test://{tmp_path}/node.xml", told.put, Layout())
    guests.start()
    assert eventually(lambda: guests.connected)
    yield guests
    guests.stop()


@pytest.fixture
def domain(guests: Guests) -> libvirt.virDomain:
    assert guests._connection is not None
    return guests._connection.lookupByName("test")


def test_follows_a_guest(domain: libvirt.virDomain, guests: Guests, told: queue.Queue[Happening]) -> None:
    uuid = domain.UUIDString()
    assert told.get(timeout=30)[:2] == (uuid, Event.RUNS)
    assert guests.presence(uuid) is Presence.RUNS
    assert guests.running() == [uuid]
    domain.suspend()
    domain.resume()
    domain.destroy()
    assert told.get(timeout=30)[:2] == (uuid, Event.GONE)
    assert guests.presence(uuid) is Presence.GONE
    domain.create()
    assert told.get(timeout=30)[:2] == (uuid, Event.RUNS)
    assert told.empty()


def test_tells_of_a_guest_that_loses_its_definition(
    domain: libvirt.virDomain, guests: Guests, told: queue.Queue[Happening]
) -> None:
    uuid, xml = domain.UUIDString(), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert told.get(timeout=30)[:2] == (uuid, Event.RUNS)
    assert not guests.transient(uuid)
    domain.undefine()
    try:
        assert told.get(timeout=30)[:2] == (uuid, Event.RUNS)
        assert guests.transient(uuid)
        # an agent that comes now sees it as well
        assert agent_guests._defined(guests._connection) == {}
        assert agent_guests._listed(guests._connection) == {uuid: Presence.RUNS}
    finally:
        domain.connect().defineXML(xml)
    assert eventually(lambda: not guests.transient(uuid))
    # a definition is enough while nothing runs
    domain.destroy()
    assert told.get(timeout=30)[:2] == (uuid, Event.GONE)
    domain.undefine()
    assert eventually(lambda: guests._defined[uuid] is False)
    assert not guests.transient(uuid)
    domain.connect().defineXML(xml)
    assert told.empty()


def test_nobody_knows_before_libvirt_is_there(told: queue.Queue[Happening]) -> None:
    guests = Guests("test:///none/such", told.put, Layout())
    assert guests.presence(OTHER) is Presence.UNSEEN
    assert guests.busy(OTHER)


def test_a_guest_is_busy_while_libvirt_is_at_work_on_it(domain: libvirt.virDomain, guests: Guests) -> None:
    assert not guests.busy(domain.UUIDString())
    assert guests.busy(OTHER)


@pytest.mark.parametrize("code", ["NO_CONNECT", "RPC", "OPERATION_TIMEOUT", "INTERNAL_ERROR", "OPERATION_INVALID"])
def test_a_guest_is_busy_while_libvirt_cannot_tell(
    domain: libvirt.virDomain, guests: Guests, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """A source that counted as running the guest then would take a migration for one that came to nothing."""

    def fail(domain: libvirt.virDomain) -> None:
        error = libvirt.libvirtError("as when libvirtd ends in between")
        error.err = (getattr(libvirt, f"VIR_ERR_{code}"), libvirt.VIR_FROM_RPC, "", libvirt.VIR_ERR_ERROR)
        raise error

    monkeypatch.setattr(libvirt.virDomain, "jobInfo", fail)
    assert guests.busy(domain.UUIDString())
    # and is stamped later, unless it has ended
    assert guests.stamp(domain.UUIDString(), to_xml(STAMP)) is (code == "OPERATION_INVALID")


@pytest.mark.parametrize("uuid", [None, OTHER], ids=["in custody nowhere", "not here"])
def test_no_guest_leaves_that_does_not_say_so(domain: libvirt.virDomain, guests: Guests, uuid: str | None) -> None:
    with pytest.raises(TransferError) as refused:
        guests.check_leaves(uuid or domain.UUIDString())
    assert refused.value.id == ("transfer.unseen" if uuid else "migration.not-allowed")


def test_no_job_but_a_migration_takes_a_guest_away() -> None:
    jobs = {name: getattr(libvirt, name) for name in dir(libvirt) if name.startswith("VIR_DOMAIN_JOB_OPERATION_")}
    leaving = [name for name, job in jobs.items() if job_leaves({libvirt.VIR_DOMAIN_JOB_OPERATION: job})]
    assert leaving == ["VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT"]
    # what libvirt says of a guest without a job
    assert not job_leaves({"type": libvirt.VIR_DOMAIN_JOB_NONE})


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.guest_status(NAME).parent.mkdir(parents=True)
    return made


def note(layout: Layout, job: str, uuid: str = OTHER) -> None:
    layout.guest_status(NAME).write_text(STATUS.format(job=job, uuid=uuid), "utf-8")


# as seen under libvirt 9.0: with --p2p, without it, each with --live and not; then tunnelled, and an older client's
@pytest.mark.parametrize("flags", ["0x21b", "0x21a", "0x319", "0x318", "0x21f", "0x1"])
def test_a_guest_that_moves_itself_may_leave(layout: Layout, flags: str) -> None:
    note(layout, f"<job type='none' async='migration out' phase='begin3' flags='{flags}' asyncStarted='1'/>")
    check_moves(layout, OTHER, NAME)


# with --p2p, without it, each with --undefinesource and not
@pytest.mark.parametrize("flags", ["0x60a", "0x61a", "0x708", "0x718"])
def test_no_key_leaves_by_an_offline_migration(layout: Layout, flags: str) -> None:
    note(layout, f"<job type='none' async='migration out' phase='begin3' flags='{flags}' asyncStarted='1'/>")
    with pytest.raises(TransferError) as refused:
        check_moves(layout, OTHER, NAME)
    assert refused.value.id == "transfer.offline"


@pytest.mark.parametrize(
    "job",
    [
        "",
        "<job type='none' async='migration out'/>",
        # before its flags are known
        "<job type='none' async='migration out' flags='0x0' asyncStarted='1'/>",
        "<job type='none' async='migration out' phase='begin3' flags='many'/>",
        "<job type='none' async='save' flags='0x1' asyncStarted='1'/>",
        "<job type='destroy' async='none'/>",
        "<job",
    ],
)
def test_no_key_leaves_where_libvirt_does_not_say_how(layout: Layout, job: str) -> None:
    note(layout, job)
    assert refused_unnoted(layout, NAME)


def test_no_key_leaves_by_another_guests_status(layout: Layout, tmp_path: Path) -> None:
    job = "<job type='none' async='migration out' phase='begin3' flags='0x21b' asyncStarted='1'/>"
    assert refused_unnoted(layout, NAME)
    layout.guest_status(NAME).write_text(STATUS.format(job=job, uuid=OTHER).replace("domstatus", "domain"))
    assert refused_unnoted(layout, NAME)
    note(layout, job, uuid="1" + OTHER[1:])
    assert refused_unnoted(layout, NAME)
    note(layout, job)
    (tmp_path / "run/libvirt/below").mkdir()
    layout.guest_status(NAME).rename(layout.guest_status("../below/guest"))
    assert refused_unnoted(layout, "../below/guest")


def refused_unnoted(layout: Layout, name: str) -> bool:
    with pytest.raises(TransferError) as refused:
        check_moves(layout, OTHER, name)
    return refused.value.id == "transfer.unnoted"


def test_halts_a_guest(domain: libvirt.virDomain, guests: Guests, told: queue.Queue[Happening]) -> None:
    guests.halt(domain.UUIDString())
    guests.halt(domain.UUIDString())
    assert domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert guests.presence(domain.UUIDString()) is Presence.RUNS
    domain.resume()
    guests.halt(OTHER)
    guests._presence[domain.UUIDString()] = Presence.PRESENT
    guests.halt(domain.UUIDString())
    assert not domain.isActive()


def test_goes_on_after_libvirt_was_away(
    domain: libvirt.virDomain, guests: Guests, told: queue.Queue[Happening]
) -> None:
    told.get(timeout=30)
    guests._lost.set()
    assert told.get(timeout=30)[:2] == (domain.UUIDString(), Event.RUNS)
    assert eventually(lambda: guests.presence(domain.UUIDString()) is Presence.RUNS)


def test_stamps_live_metadata(domain: libvirt.virDomain, guests: Guests) -> None:
    assert guests.stamp(domain.UUIDString(), to_xml(STAMP))
    identity = identify(domain.XMLDesc().encode())
    assert read(identity) == STAMP
    assert not identity.concerned
    # a guest that has ended needs none
    assert guests.stamp(OTHER, to_xml(STAMP))


@pytest.mark.parametrize(
    ("event", "says"),
    [
        # a migration as libvirt 9.0 tells of it: here the destination ...
        ("STARTED_MIGRATED", Presence.PRESENT),
        ("RESUMED_MIGRATED", Presence.RUNS),
        # ... of a guest that a person had paused
        ("SUSPENDED_PAUSED", Presence.RUNS),
        # ... in post-copy mode
        ("RESUMED_POSTCOPY", Presence.RUNS),
        # ... and here the source
        ("SUSPENDED_MIGRATED", Presence.PRESENT),
        ("SUSPENDED_POSTCOPY", Presence.PRESENT),
        ("SUSPENDED_POSTCOPY_FAILED", Presence.PRESENT),
        ("STOPPED_MIGRATED", Presence.GONE),
        ("STOPPED_FAILED", Presence.GONE),
        ("STOPPED_CRASHED", Presence.GONE),
        ("CRASHED_PANICKED", Presence.GONE),
        ("STARTED_BOOTED", Presence.RUNS),
        ("STARTED_RESTORED", Presence.RUNS),
    ],
)
def test_lifecycle_events_say_where_a_guest_is(event: str, says: Presence) -> None:
    kind = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event.split('_')[0]}")
    assert presence_after(kind, getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}")) is says


@pytest.mark.parametrize("event", ["DEFINED", "UNDEFINED", "SHUTDOWN", "PMSUSPENDED"])
def test_others_say_nothing(event: str) -> None:
    assert presence_after(getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), 0) is None


def test_a_list_says_where_guests_are() -> None:
    assert presence_of(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED) is Presence.RUNS
    assert presence_of(libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER) is Presence.RUNS
    assert presence_of(libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION) is Presence.PRESENT
    # reasons of other states have the same numbers
    assert presence_of(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED_MIGRATION) is Presence.RUNS


class Named:
    """A libvirt domain of which only the UUID is asked."""

    def UUIDString(self) -> str:  # noqa: N802  (libvirt's name)
        return OTHER


@pytest.mark.parametrize(
    ("events", "told_of"),
    [
        # as seen on two hosts under libvirt 9.0: at the destination, the source, and a destination that gave up
        (["STARTED_MIGRATED", "RESUMED_MIGRATED"], [Event.RUNS]),
        (["STARTED_MIGRATED", "SUSPENDED_PAUSED"], [Event.RUNS]),
        (["STARTED_BOOTED", "SUSPENDED_MIGRATED", "STOPPED_MIGRATED"], [Event.RUNS, Event.MIGRATED]),
        (["STARTED_BOOTED", "SUSPENDED_MIGRATED", "RESUMED_MIGRATED"], [Event.RUNS, Event.RUNS]),
        (["STARTED_MIGRATED", "STOPPED_FAILED"], [Event.NEVER_RAN]),
        (["STARTED_MIGRATED", "STOPPED_DESTROYED"], [Event.NEVER_RAN]),
        (["STARTED_MIGRATED", "RESUMED_MIGRATED", "STOPPED_FAILED"], [Event.RUNS, Event.GONE]),
        # nobody was looking when it came
        (["SUSPENDED_MIGRATED", "STOPPED_FAILED"], [Event.GONE]),
        (["STARTED_MIGRATED", None, "SUSPENDED_MIGRATED", "STOPPED_FAILED"], [Event.GONE]),
        (["STARTED_BOOTED", "SUSPENDED_PAUSED", "RESUMED_UNPAUSED", "STOPPED_SHUTDOWN"], [Event.RUNS, Event.GONE]),
    ],
)
def test_events_become_what_transfers_learn(events: list[str | None], told_of: list[Event]) -> None:
    told: list[Happening] = []
    guests = Guests(URI, told.append, Layout())
    for event in events:
        if event is None:
            guests._forget()
            continue
        kind = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event.split('_')[0]}")
        guests._lifecycle(None, Named(), kind, getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), None)
    assert [happening.event for happening in told] == told_of
