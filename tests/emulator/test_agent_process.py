"""The agent as a process: real TPMs, real TLS, libvirt's test driver; polite, rude and many peers; and its ends."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path

import pytest
from fleet_ca import Ca
from hardware import HardwareTpm, two_ports
from members import PROPERTY, UUID, Authority, Member
from waiting import eventually

from swtpm_prop.domain.metadata import Vtpm, to_xml
from swtpm_prop.errors import Error
from swtpm_prop.hook.operations import run
from swtpm_prop.limits import AGENT_PEERS_EACH, MESSAGE_BYTES
from swtpm_prop.tpm.algorithms import SHA384
from swtpm_prop.transfer import channel
from swtpm_prop.transfer.machine import Event, Presence
from swtpm_prop.translate.policy import Bank

pytestmark = pytest.mark.root

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
DOMAIN = f"""<domain type='test'><name>guest</name><uuid>{UUID}</uuid><metadata>{{}}</metadata><memory>8192</memory>
<os><type>hvm</type></os><devices>{TPM}</devices></domain>"""
NODE = f"<node>{DOMAIN}</node>"
PROGRAM = """import sys; from pathlib import Path
from swtpm_prop.cli.main import cli; from swtpm_prop.errors import Error; from swtpm_prop.layout import Layout
try: cli.main(["agent", "--connect", sys.argv[2]], obj=Layout(Path(sys.argv[1])), standalone_mode=False)
except Error as error: sys.exit(error.line())
"""
REPOSITORY = Path(__file__).parents[2]
BANK = Bank(SHA384, frozenset({4}), True, ("https://example.org/properties/boot",))
TRAVELS = Vtpm((BANK,), PROPERTY, "attested")


class Agent:
    """The agent of a member; its libvirt has the guest running, or is not there."""

    def __init__(self, member: Member, directory: Path) -> None:
        self.member = member
        self.uri = f"test://{directory}/{member.name}.xml"
        (directory / f"{member.name}.xml").write_text(NODE.format(to_xml(TRAVELS)))
        self.log = directory / f"{member.name}.log"
        self.port = two_ports()
        self.metrics = self.port + 1
        member.endpoint = f"127.0.0.1:{self.port}"
        with member.layout.host.open("a") as file:
            file.write(f'[agent]\nlisten = "{member.endpoint}"\nendpoint = "{member.endpoint}"\n')
            file.write(f'metrics = "127.0.0.1:{self.metrics}"\n')
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, notify: str = "") -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", PROGRAM, str(self.member.layout.root), self.uri]
        environment = {**os.environ, "NOTIFY_SOCKET": notify}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, stderr=log, cwd=REPOSITORY, env=environment)
        return self.process

    def start(self) -> None:
        """Run it, and wait until it says that it is ready."""
        ready = self.log.with_suffix(".ready")
        ready.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(ready))
            manager.settimeout(20)
            self.run(str(ready))
            assert manager.recv(100) == b"READY=1", self.log.read_text()

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(10)
        self.process = None
        return status

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}{path}", timeout=5) as page:
            return page.read().decode()


@pytest.fixture(scope="module")
def tpms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[HardwareTpm]]:
    directory = tmp_path_factory.mktemp("tpms")
    with ExitStack() as stack:
        yield [stack.enter_context(HardwareTpm(directory / name)) for name in "ab"]


class Hosts:
    """Host a, whose agent is a process and which has the guest; host b, which may have it."""

    def __init__(self, directory: Path, tpms: list[HardwareTpm]) -> None:
        self.ca, authority = Ca(), Authority()
        self.a, self.b = (
            Member(name, directory, tpm, self.ca, authority)
            for name, tpm in zip(("a.example", "b.example"), tpms, strict=True)
        )
        for member in (self.a, self.b):
            authority.approve(member, member.name)
        for member in (self.a, self.b):
            member.approve(authority)
        self.key = self.a.create()
        self.agent = Agent(self.a, directory)

    def fetch(self) -> None:
        self.b.fetch(self.a.endpoint)


@pytest.fixture
def hosts(tmp_path: Path, tpms: list[HardwareTpm]) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, tpms)
    with hosts.b.serving():
        hosts.agent.start()
        try:
            assert eventually(lambda: "swtpm_prop_guests_running 1" in hosts.agent.page("/metrics"))
            yield hosts
        finally:
            if hosts.agent.process:
                hosts.agent.end(signal.SIGKILL)


@pytest.mark.parametrize("metadata", ["", to_xml(TRAVELS._replace(migration=None))], ids=["none", "custody alone"])
def test_keeps_the_key_of_a_guest_whose_own_metadata_do_not_let_it_go(
    tmp_path: Path, tpms: list[HardwareTpm], metadata: str
) -> None:
    hosts = Hosts(tmp_path, tpms)
    (tmp_path / "a.example.xml").write_text(NODE.format(metadata))
    with hosts.b.serving():
        hosts.agent.start()
        try:
            assert eventually(lambda: "swtpm_prop_guests_running 1" in hosts.agent.page("/metrics"))
            with pytest.raises(Error) as refused:
                hosts.fetch()
        finally:
            hosts.agent.end(signal.SIGKILL)
    assert refused.value.id == "migration.not-allowed", refused.value.line()
    assert hosts.a.states() == hosts.b.states() == []


def test_hands_a_key_on_and_lets_go_of_it(hosts: Hosts) -> None:
    hosts.fetch()
    assert hosts.b.hook.arrive(UUID) is not None
    hosts.b.agent.observe(UUID, Event.RUNS)
    hosts.b.agent.settle(UUID)
    # libvirt's test driver cannot migrate, so the guest is still there: paused, for it runs elsewhere
    assert eventually(lambda: hosts.a.states() == ["yielded"])
    assert eventually(lambda: "swtpm_prop_halts_total 1" in hosts.agent.page("/metrics"))
    assert hosts.b.open() == hosts.key
    assert "host b.example has proved" in hosts.agent.log.read_text()
    assert 'outcome="given"' in hosts.agent.page("/metrics")


def xml(hosts: Hosts, vtpm: Vtpm = TRAVELS, stamped: bool = True) -> bytes:
    """What libvirt gives the migrate hook of host b."""
    stamp = f"<a:agent xmlns:a='urn:swtpm-prop:agent:1' endpoint='{hosts.a.endpoint}' host='a.example'/>"
    return DOMAIN.format(to_xml(vtpm) + (stamp if stamped else "")).encode()


def hook(hosts: Hosts, document: bytes) -> str:
    """What the migrate hook of host b says; empty if it lets the guest in."""
    said = io.StringIO()
    with redirect_stderr(said):
        status = run(["guest", "migrate", "begin", "-"], document, hosts.b.layout)
    assert bool(status) is bool(said.getvalue())
    assert said.getvalue().count("\n") <= 1
    return said.getvalue()


def test_the_hook_finds_the_source_by_the_stamp(hosts: Hosts) -> None:
    assert hook(hosts, xml(hosts)) == ""
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["imported"])


def test_the_hook_finds_the_source_among_static_peers(hosts: Hosts) -> None:
    assert "[transfer.no-source]" in hook(hosts, xml(hosts, stamped=False))
    closed = two_ports()
    with hosts.b.layout.host.open("a") as file:
        file.write(f'[agent]\npeers = ["127.0.0.1:{closed}", "{hosts.b.endpoint}", "{hosts.a.endpoint}"]\n')
    assert hook(hosts, xml(hosts, stamped=False)) == ""
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["imported"])


def test_the_hook_lets_no_guest_in_that_may_not_move(hosts: Hosts) -> None:
    assert "[migration.not-allowed]" in hook(hosts, xml(hosts, TRAVELS._replace(migration=None)))
    assert hosts.b.states() == []


def test_the_hook_says_what_the_source_says(hosts: Hosts) -> None:
    hosts.b.tpm.extend(4)
    try:
        said = hook(hosts, xml(hosts))
    finally:
        hosts.b.tpm.reboot()
    assert "host 'a.example' refuses: the state of 'b.example' is not approved" in said
    assert "PCR 4 differ" in said
    hosts.agent.end(signal.SIGTERM)
    assert "[transfer.unreachable]" in hook(hosts, xml(hosts))
    assert (hosts.a.states(), hosts.b.states()) == ([], [])


@pytest.fixture
def beside(hosts: Hosts, tmp_path: Path) -> Iterator[Agent]:
    """The agent of host b, where no guest is."""
    agent = Agent(hosts.b, tmp_path)
    (tmp_path / "b.example.xml").write_text("<node/>")
    agent.start()
    yield agent
    if agent.process:
        agent.end(signal.SIGKILL)


def test_the_hook_has_the_agent_beside_it_let_the_guest_in(
    hosts: Hosts, beside: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swtpm_prop.hook.door.GREETING_SECONDS", 30)  # others may be at work on the machine
    hosts.b.tpm.extend(4)
    try:
        refused = hook(hosts, xml(hosts))
    finally:
        hosts.b.tpm.reboot()
    assert "host 'a.example' refuses: the state of 'b.example' is not approved" in refused
    assert hook(hosts, xml(hosts)) == ""
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["imported"])
    page = beside.page("/metrics")
    assert 'swtpm_prop_arrivals_total{outcome="let in"} 1' in page
    assert 'swtpm_prop_arrivals_total{outcome="transfer.state-not-approved"} 1' in page
    assert "[transfer.state-not-approved]" in beside.log.read_text()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM])
def test_the_hook_works_alone_where_that_agent_does_not(hosts: Hosts, beside: Agent, how: signal.Signals) -> None:
    assert beside.process is not None
    if how is signal.SIGSTOP:
        beside.process.send_signal(how)
    else:
        beside.end(how)
    assert hook(hosts, xml(hosts)) == ""
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["imported"])
    assert hosts.b.layout.agent_socket.exists() is (how is not signal.SIGTERM)


def test_is_well_and_ends_cleanly(hosts: Hosts) -> None:
    assert hosts.agent.page("/health") == "well\n"
    assert hosts.agent.end(signal.SIGTERM) == 0
    hosts.agent.start()
    assert hosts.agent.end(signal.SIGINT) == 0
    assert "Traceback" not in hosts.agent.log.read_text()


def test_an_expired_certificate_makes_it_unwell(hosts: Hosts) -> None:
    hosts.a.enrol(hosts.ca, now=int(time.time()) - 800 * 86400)
    with pytest.raises(urllib.error.HTTPError) as unwell:
        hosts.agent.page("/health")
    assert unwell.value.code == 503
    assert "[fleet." in unwell.value.read().decode()
    hosts.a.enrol(hosts.ca)
    assert hosts.agent.page("/health") == "well\n"


def test_a_killed_agent_goes_on_where_it_was(hosts: Hosts) -> None:
    hosts.fetch()
    assert hosts.agent.end(signal.SIGKILL) == -signal.SIGKILL
    hosts.b.hook.observe(UUID, Event.ABANDON)
    hosts.b.hook.settle(UUID)
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["cancelled"])
    hosts.agent.start()
    assert eventually(lambda: hosts.a.states() == ["closed"])
    hosts.b.hook.settle(UUID)
    assert hosts.b.states() == ["closed"]
    assert hosts.a.open() == hosts.key


def test_an_agent_without_libvirt_gives_nothing_away(hosts: Hosts) -> None:
    hosts.agent.end(signal.SIGTERM)
    hosts.agent.uri = "test:///none/such"
    hosts.agent.start()
    with pytest.raises(Error) as refused:
        hosts.fetch()
    assert refused.value.id == "transfer.unseen"
    with pytest.raises(urllib.error.HTTPError):
        hosts.agent.page("/health")


def test_without_a_fleet_it_says_so(hosts: Hosts) -> None:
    hosts.agent.end(signal.SIGTERM)
    hosts.a.layout.fleet_ca.unlink()
    assert hosts.agent.run().wait(10) == 1
    assert "[host.not-enrolled]" in hosts.agent.log.read_text()


# -- rude peers ---------------------------------------------------------------------------------


@contextmanager
def connected(hosts: Hosts) -> Iterator[ssl.SSLSocket]:
    """A member that speaks TLS, but not our messages."""
    context = channel._context(hosts.b.identity(), server=False)
    with socket.create_connection(("127.0.0.1", hosts.agent.port), 5) as plain, context.wrap_socket(plain) as peer:
        yield peer


def everything(peer: socket.socket) -> bytes:
    data = b""
    try:
        while part := peer.recv(4096):
            data += part
    except OSError:
        pass
    return data


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b"\0" * 70000])
def test_what_is_no_tls_is_cut_off(hosts: Hosts, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hosts.agent.port), 5) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        everything(peer)
    hosts.fetch()


@pytest.mark.parametrize(
    ("data", "id"),
    [
        (struct.pack(">I", MESSAGE_BYTES + 1), "transfer.message-size"),
        (struct.pack(">I", 0xFFFFFFFF) + b"x" * 1000, "transfer.message-size"),
        (struct.pack(">I", 2) + b"{}", "transfer.message"),
        (struct.pack(">I", 4) + b"\xff\xff\xff\xff", "transfer.message"),
        (struct.pack(">I", 40000) + b"[" * 40000, "transfer.message"),
    ],
)
def test_a_member_that_talks_nonsense_is_told_so(hosts: Hosts, data: bytes, id: str) -> None:
    with connected(hosts) as peer:
        peer.sendall(data)
        answer = everything(peer)
    assert json.loads(answer[4:])["id"] == id
    hosts.fetch()


def test_silent_peers_keep_nobody_out(hosts: Hosts) -> None:
    with ExitStack() as stack:
        for _ in range(2 * AGENT_PEERS_EACH):
            silent = stack.enter_context(socket.socket())
            silent.bind(("127.0.0.2", 0))
            silent.connect(("127.0.0.1", hosts.agent.port))
        assert eventually(lambda: f'{{outcome="turned away"}} {AGENT_PEERS_EACH}' in hosts.agent.page("/metrics"))
        hosts.fetch()
        begin = time.monotonic()
        assert hosts.agent.end(signal.SIGTERM) == 0
        assert time.monotonic() - begin < 10
    assert (hosts.a.states(), hosts.b.states()) == (["offered"], ["imported"])


def test_ten_guests_at_once_wait_for_the_tpm_and_are_served(hosts: Hosts) -> None:
    hosts.b.seen = Presence.GONE
    ids: list[str] = []

    def fetch(uuid: str) -> None:
        try:
            hosts.b.fetch(hosts.a.endpoint, uuid=uuid)
        except Error as error:
            ids.append(error.id)

    # one has a key, the others are asked for in vain
    uuids = [UUID, *(UUID[:-2] + f"{number:02x}" for number in range(9))]
    threads = [threading.Thread(target=fetch, args=(uuid,)) for uuid in uuids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids == ["transfer.no-key"] * 9
    assert hosts.b.states() == ["imported"]
