"""A guest's key changes hosts between real TPMs; and everything that somebody might try to get at it is refused."""

from __future__ import annotations

import shlex
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from custodian import domain
from fleet_ca import NOW, Ca, sign_in_software
from hardware import HardwareTpm
from members import PROPERTY, UUID, Authority, Member, doorway
from waiting import eventually

from swtpm_prop.attest import certificates, evidence
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.evidence import Evidence
from swtpm_prop.cli.main import cli
from swtpm_prop.custody import approvals, keys, opening, policy
from swtpm_prop.custody.objects import ImportBlob, Sealed
from swtpm_prop.errors import Error
from swtpm_prop.hook.migrate import let_in
from swtpm_prop.transfer import ask as asking
from swtpm_prop.transfer import channel, messages
from swtpm_prop.transfer.answer import Ends, answer
from swtpm_prop.transfer.ask import Destination
from swtpm_prop.transfer.machine import Event, Presence, State
from swtpm_prop.transfer.messages import Ask, Challenge, Key, Proof, Report
from swtpm_prop.trust.strict_json import Object

pytestmark = pytest.mark.root

DAY = 86400


class Fleet:
    """Three hosts: a has the guest, b may have it, c is enrolled and approved too."""

    def __init__(self, directory: Path, tpms: list[HardwareTpm]) -> None:
        self.ca = Ca()
        self.authority = Authority()
        self.members = [
            Member(name, directory, tpm, self.ca, self.authority)
            for name, tpm in zip(("a.example", "b.example", "c.example"), tpms, strict=True)
        ]
        self.a, self.b, self.c = self.members
        for member in self.members:
            self.authority.approve(member, member.name)
        self.approve()
        self.key = self.a.create()

    def approve(self) -> None:
        for member in self.members:
            member.approve(self.authority)

    def ends(self, source: Member, destination: Member) -> Ends:
        own, peer = (spki(member) for member in (source, destination))
        return Ends(destination.name, peer, own)


def spki(member: Member) -> bytes:
    return channel._spki(member.identity().key.public_key())


@pytest.fixture(scope="module")
def tpms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[HardwareTpm]]:
    directory = tmp_path_factory.mktemp("tpms")
    running = [HardwareTpm(directory / name).start() for name in "abc"]
    yield running
    for tpm in running:
        tpm.stop()


@pytest.fixture
def fleet(tmp_path: Path, tpms: list[HardwareTpm]) -> Iterator[Fleet]:
    made = Fleet(tmp_path, tpms)
    with made.a.serving(), made.b.serving(), made.c.serving():
        yield made


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(Error) as caught:
        attempt()
    return caught.value.id


def nothing_is_left(fleet: Fleet) -> None:
    """Of a refused request; and the guest's key is where it was."""
    assert [member.states() for member in fleet.members] == [[], [], []]
    assert fleet.a.open() == fleet.key


# -- as it should be ----------------------------------------------------------------------------


def test_the_key_moves_and_only_there_it_opens(fleet: Fleet) -> None:
    a, b = fleet.a, fleet.b
    transfer = b.fetch(a.endpoint)
    assert transfer.state is State.IMPORTED
    assert (a.states(), b.states()) == (["offered"], ["imported"])
    assert a.open() == fleet.key
    arrival = b.hook.arrive(UUID)
    assert arrival is not None
    record = arrival.record
    assert (record.epoch, record.property) == (1, PROPERTY)
    with opening.hardware(b.layout) as tpm:
        assert opening.open_(record, tpm, b.layout) == fleet.key
    a.seen, b.seen = Presence.GONE, Presence.RUNS
    b.agent.observe(UUID, Event.RUNS)
    b.agent.settle(UUID)
    assert (a.states(), b.states()) == (["released"], ["settled"])
    assert b.open() == fleet.key
    assert keys.load(UUID, a.layout) is None


def test_to_and_fro(fleet: Fleet) -> None:
    for here, there in ((fleet.a, fleet.b), (fleet.b, fleet.a), (fleet.a, fleet.c)):
        there.fetch(here.endpoint)
        there.hook.arrive(UUID)
        here.seen, there.seen = Presence.GONE, Presence.RUNS
        there.agent.observe(UUID, Event.RUNS)
        there.agent.settle(UUID)
        assert there.open() == fleet.key
        assert keys.load(UUID, here.layout) is None


def test_recovery_copies_travel(fleet: Fleet) -> None:
    record = keys.load(UUID, fleet.a.layout)
    assert record is not None
    wraps = (keys.Wrap("ab" * 32, bytes(113)),)
    keys.store(record._replace(recovery=wraps), fleet.a.layout)
    fleet.b.fetch(fleet.a.endpoint)
    arrived = fleet.b.hook.arrive(UUID)
    assert arrived is not None
    assert arrived.record.recovery == wraps


# -- what must be refused before anything is given away -----------------------------------------


@pytest.mark.parametrize(
    ("presence", "id"),
    [(Presence.GONE, "transfer.not-running"), (Presence.UNSEEN, "transfer.unseen")],
)
def test_a_guest_that_does_not_run(fleet: Fleet, presence: Presence, id: str) -> None:
    fleet.a.seen = presence
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == id
    nothing_is_left(fleet)


def test_a_guest_that_is_not_there(fleet: Fleet) -> None:
    other = UUID.replace("6", "7", 1)
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint, uuid=other)) == "transfer.no-key"
    nothing_is_left(fleet)


def test_a_guest_whose_custody_is_off(fleet: Fleet) -> None:
    record = keys.load(UUID, fleet.a.layout)
    assert record is not None
    keys.store(record._replace(encrypted=False), fleet.a.layout)
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "transfer.no-key"
    nothing_is_left(fleet)


def test_oneself(fleet: Fleet) -> None:
    assert refusal(lambda: fleet.a.fetch(fleet.a.endpoint)) == "transfer.self"
    nothing_is_left(fleet)


def test_a_destination_in_no_approved_state(fleet: Fleet) -> None:
    fleet.b.tpm.extend(4)
    try:
        assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "transfer.state-not-approved"
        nothing_is_left(fleet)
    finally:
        fleet.b.tpm.reboot()


def test_a_source_in_no_approved_state(fleet: Fleet) -> None:
    fleet.a.tpm.extend(4)
    try:
        assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "host.state-not-approved"
        assert [member.states() for member in fleet.members] == [[], [], []]
    finally:
        fleet.a.tpm.reboot()


def test_a_destination_whose_approval_is_revoked(fleet: Fleet) -> None:
    """It does not know yet, but the source does."""
    fleet.b.tpm.extend(4)
    try:
        fleet.authority.approve(fleet.b, "extended")
        fleet.approve()
        fleet.b.fetch(fleet.a.endpoint)
        fleet.b.hook.give_up(fleet.b.journal.of(UUID)[0].id, offered=True)
        fleet.b.agent.settle(UUID)
        fleet.authority.list = approvals.revoke(fleet.authority.list, fleet.authority.key, "extended")
        fleet.a.approve(fleet.authority)
        assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "transfer.epoch-behind"
        # And when it knows it is refused for what it is.
        fleet.b.approve(fleet.authority)
        assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "transfer.state-not-approved"
    finally:
        fleet.b.tpm.reboot()


def test_another_property_than_the_metadata_demands(fleet: Fleet) -> None:
    b = fleet.b

    def fetch() -> object:
        with channel.connect(fleet.a.endpoint, b.identity(), 5, 5) as opened:
            ends = Ends(opened.peer, opened.peer_key, opened.own_key)
            talk = asking.fetch(asking.new(UUID, b.endpoint), PROPERTY + "-2", "a:1", ends, b.destination(), b.hook)
            opened.send(next(talk))
            return talk.send(opened.receive())

    with pytest.raises(Error) as caught:
        fetch()
    assert caught.value.id == "transfer.property"
    nothing_is_left(fleet)
    # What it says to do there makes the key demand what the metadata do.
    argv = shlex.split(caught.value.mend.partition("swtpm-prop ")[2])
    of = fleet.authority
    with fleet.a.tpm.open() as tpm:
        of.list = approvals.approve(of.list, of.key, "for the other", PROPERTY + "-2", tpm.pcrs(range(8)))
    fleet.approve()
    done = CliRunner().invoke(cli, argv, obj=fleet.a.layout)
    assert done.exit_code == 0, done.output
    record = keys.load(UUID, fleet.a.layout)
    assert record is not None
    assert record.property == PROPERTY + "-2"


# -- evidence that is not of this host, this conversation, this boot ----------------------------


def tampered(member: Member, change: Callable[[Evidence, bytes], Evidence]) -> Destination:
    """A destination that changes its evidence before it sends it."""
    honest = member.destination()

    def prove(binding: bytes, property: str) -> Object:
        return evidence.to_object(change(evidence.from_object(honest.prove(binding, property)), binding))

    return honest._replace(prove=prove)


def shown(member: Member, binding: bytes) -> Evidence:
    return evidence.from_object(member.destination().prove(binding, PROPERTY))


def in_software(fleet: Fleet, found: Evidence) -> Evidence:
    key = fleet.authority.key
    return found._replace(quote=sign_in_software(key, found.quote.attest))


def unrestricted(found: Evidence) -> Evidence:
    public = bytearray(found.parent_public)
    attributes = int.from_bytes(public[6:10], "big")
    public[6:10] = (attributes & ~(1 << 16)).to_bytes(4, "big")
    return found._replace(parent_public=bytes(public))


def movable(found: Evidence) -> Evidence:
    public = bytearray(found.parent_public)
    public[6:10] = (int.from_bytes(public[6:10], "big") & ~2).to_bytes(4, "big")
    return found._replace(parent_public=bytes(public))


ATTACKS: dict[str, tuple[Callable[[Fleet, Evidence, bytes], Evidence], str]] = {
    "all of another host": (lambda fleet, found, binding: shown(fleet.c, binding), "attest.other-host"),
    "quote of another TPM": (
        lambda fleet, found, binding: found._replace(quote=shown(fleet.c, binding).quote),
        "attest.quote-signature",
    ),
    "epoch of another TPM": (
        lambda fleet, found, binding: found._replace(epoch=shown(fleet.c, binding).epoch),
        "attest.epoch-signature",
    ),
    "parent of another TPM": (
        # The binding is over the parent's name, so this is refused whatever certify says.
        lambda fleet, found, binding: found._replace(parent_public=shown(fleet.c, binding).parent_public),
        "attest.certify-binding",
    ),
    "quote signed in software": (lambda fleet, found, binding: in_software(fleet, found), "attest.quote-signature"),
    "parent that is not restricted": (lambda fleet, found, binding: unrestricted(found), "attest.parent-restricted"),
    "parent that can leave its TPM": (lambda fleet, found, binding: movable(found), "attest.parent-fixed-tpm"),
    "evidence for another conversation": (
        lambda fleet, found, binding: shown(fleet.b, bytes(32)),
        "attest.certify-binding",
    ),
    "values of other PCRs": (
        lambda fleet, found, binding: found._replace(pcrs=found.pcrs | {0: bytes(31) + b"\1"}),
        "attest.quote-pcrs",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_wrong_evidence(fleet: Fleet, attack: str) -> None:
    change, id = ATTACKS[attack]
    destination = tampered(fleet.b, lambda found, binding: change(fleet, found, binding))
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint, destination)) == id
    nothing_is_left(fleet)


def test_evidence_of_two_boots(fleet: Fleet) -> None:
    def rebooted(found: Evidence, binding: bytes) -> Evidence:
        fleet.b.tpm.reboot()
        return found._replace(quote=shown(fleet.b, binding).quote)

    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint, tampered(fleet.b, rebooted))) == "attest.reset-count"
    nothing_is_left(fleet)


# -- what was said once, said again -------------------------------------------------------------


def opened_answer(fleet: Fleet, ask: Ask, member: Member) -> tuple[object, Challenge]:
    talk = answer(ask, fleet.ends(fleet.a, member), fleet.a.source(), fleet.a.agent)
    return talk, next(talk)


def proof_for(fleet: Fleet, ask: Ask, challenge: Challenge, member: Member, **changed: object) -> Proof:
    ends = fleet.ends(fleet.a, member)
    given = {"source_key": ends.own_key, "destination_key": ends.peer_key} | changed
    bound = messages.binding(
        ask,
        challenge,
        given["source_key"],
        given["destination_key"],
        member.destination().parent_name(),  # type: ignore[arg-type]
    )
    return Proof(member.destination().prove(bound, PROPERTY))


def test_an_answer_is_as_the_conversation_has_it(fleet: Fleet) -> None:
    ask = asking.new(UUID, "b:1")
    talk, challenge = opened_answer(fleet, ask, fleet.b)
    with pytest.raises(StopIteration) as end:
        talk.send(proof_for(fleet, ask, challenge, fleet.b))  # type: ignore[attr-defined]
    assert isinstance(end.value.value, Key)


def test_a_replayed_request(fleet: Fleet) -> None:
    ask = asking.new(UUID, "b:1")
    talk, challenge = opened_answer(fleet, ask, fleet.b)
    proof = proof_for(fleet, ask, challenge, fleet.b)
    with pytest.raises(StopIteration):
        talk.send(proof)  # type: ignore[attr-defined]
    again, other = opened_answer(fleet, ask, fleet.b)
    assert other.nonce != challenge.nonce
    assert refusal(lambda: again.send(proof)) == "attest.certify-binding"  # type: ignore[attr-defined]
    # Even with fresh evidence an id is good for one transfer.
    again, other = opened_answer(fleet, ask, fleet.b)
    fresh = proof_for(fleet, ask, other, fleet.b)
    assert refusal(lambda: again.send(fresh)) == "transfer.repeated"  # type: ignore[attr-defined]


def test_a_source_that_uses_a_nonce_twice_gets_other_evidence(fleet: Fleet) -> None:
    """The destination's own nonce is in the binding: its evidence cannot be collected and used again."""
    challenge = Challenge(bytes(32), 0, PROPERTY)
    ends = (b"source", b"destination", fleet.b.destination().parent_name())
    asks = [asking.new(UUID, "b:1") for _ in range(2)]
    same_id = [ask._replace(id=asks[0].id) for ask in asks]
    assert len({messages.binding(ask, challenge, *ends) for ask in same_id}) == 2


@pytest.mark.parametrize(
    "wrong", ["uuid", "epoch", "property", "id", "nonce", "challenge", "source_key", "destination_key"]
)
def test_a_proof_for_something_else(fleet: Fleet, wrong: str) -> None:
    ask = asking.new(UUID, "b:1")
    talk, challenge = opened_answer(fleet, ask, fleet.b)
    meant, demanded = {
        "uuid": (ask._replace(uuid=UUID.replace("6", "7", 1)), challenge),
        "id": (ask._replace(id="0" * 32), challenge),
        "nonce": (ask._replace(nonce=bytes(32)), challenge),
        "epoch": (ask, challenge._replace(epoch=challenge.epoch + 1)),
        "property": (ask, challenge._replace(property=PROPERTY + "-2")),
        "challenge": (ask, challenge._replace(nonce=bytes(32))),
    }.get(wrong, (ask, challenge))
    keys = {wrong: spki(fleet.c)} if wrong.endswith("_key") else {}
    proof = proof_for(fleet, meant, demanded, fleet.b, **keys)
    assert refusal(lambda: talk.send(proof)) == "attest.certify-binding"  # type: ignore[attr-defined]
    nothing_is_left(fleet)


def test_a_host_between_relays(fleet: Fleet) -> None:
    """c talks to a in its own name and lets b make the evidence, b believing that c is the source."""
    ask = asking.new(UUID, "b:1")
    talk, challenge = opened_answer(fleet, ask, fleet.c)
    between = {"source_key": spki(fleet.c), "destination_key": spki(fleet.b)}
    relayed = proof_for(fleet, ask, challenge, fleet.b, **between)
    assert refusal(lambda: talk.send(relayed)) == "attest.other-host"  # type: ignore[attr-defined]
    # Even if b were to make it for the conversation of a and c.
    talk, challenge = opened_answer(fleet, ask, fleet.c)
    forged = proof_for(fleet, ask, challenge, fleet.b, destination_key=spki(fleet.c))
    assert refusal(lambda: talk.send(forged)) == "attest.other-host"  # type: ignore[attr-defined]
    nothing_is_left(fleet)


def test_a_captured_key_opens_nowhere_else(fleet: Fleet) -> None:
    """Neither on another host, nor as it travels, nor does the destination's object open on a third one."""
    ask = asking.new(UUID, "b:1")
    talk, challenge = opened_answer(fleet, ask, fleet.b)
    with pytest.raises(StopIteration) as end:
        talk.send(proof_for(fleet, ask, challenge, fleet.b))  # type: ignore[attr-defined]
    captured: Key = end.value.value
    assert fleet.key not in b"".join(captured.blob)
    assert refusal(lambda: fleet.c.destination().take(UUID, challenge, captured)) == "tpm.foreign-object"
    assert refusal(lambda: fleet.a.destination().take(UUID, challenge, captured)) == "tpm.foreign-object"
    record, key = fleet.b.destination().take(UUID, challenge, captured)
    assert key == fleet.key
    with opening.hardware(fleet.c.layout) as tpm:
        assert refusal(lambda: opening.open_(record, tpm, fleet.c.layout)) == "tpm.foreign-object"


def test_a_key_under_another_policy_is_not_taken(fleet: Fleet) -> None:
    """A source that gives what opens without the property, or by another authority's word."""
    a, b = fleet.a, fleet.b
    record = keys.load(UUID, a.layout)
    assert record is not None
    other = Authority()
    demanded = policy.key_policy(policy.authority_name(other.key.public_key()), PROPERTY).digest
    with opening.hardware(a.layout) as tpm:
        foreign: Sealed = tpm.seal(bytes(32), demanded)
    challenge = Challenge(bytes(32), 0, PROPERTY)
    blob = ImportBlob(foreign.public, bytes(2), bytes(2))
    assert refusal(lambda: b.destination().take(UUID, challenge, Key(blob, ()))) == "tpm.import-policy"


@pytest.mark.parametrize("part", range(3))
def test_a_damaged_key_is_one_error(fleet: Fleet, part: int) -> None:
    blob = ImportBlob(*(b"\x00\x03abc" if index == part else b"\x00\x00" for index in range(3)))
    with pytest.raises(Error):
        fleet.b.destination().take(UUID, Challenge(bytes(32), 0, PROPERTY), Key(blob, ()))


# -- who may connect at all ---------------------------------------------------------------------


def test_a_host_of_another_fleet(fleet: Fleet) -> None:
    stranger = Ca()
    fleet.b.enrol(stranger)
    fleet.b.layout.fleet_ca.write_bytes(fleet.ca.ca)
    fleet.b.layout.fleet_crl.write_bytes(fleet.ca.crl)
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) in ("transfer.tls", "transfer.connection")
    nothing_is_left(fleet)


def test_a_host_that_has_expired(fleet: Fleet) -> None:
    fleet.b.enrol(fleet.ca, now=NOW - 3 * 365 * DAY)
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) in ("transfer.tls", "transfer.connection")
    nothing_is_left(fleet)


@pytest.mark.parametrize(("kind", "id"), [("tls.crt", "fleet.revoked"), ("ak.crt", "fleet.revoked")])
def test_a_host_that_is_revoked(fleet: Fleet, kind: str, id: str) -> None:
    revoked = certificates.der((fleet.b.layout.host_keys / kind).read_bytes())
    fleet.a.layout.fleet_crl.write_bytes(fleet.ca.revoking(revoked, number=2))
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == id
    nothing_is_left(fleet)


def test_a_source_that_is_revoked(fleet: Fleet) -> None:
    revoked = certificates.der((fleet.a.layout.host_keys / "tls.crt").read_bytes())
    fleet.b.layout.fleet_crl.write_bytes(fleet.ca.revoking(revoked, number=2))
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) == "fleet.revoked"
    nothing_is_left(fleet)


def test_an_attestation_certificate_does_not_speak_tls(fleet: Fleet) -> None:
    identity = fleet.b.identity()
    public = identity.key.public_key()
    wrong = fleet.ca.issue(public, Kind.AK, fleet.b.name)
    (fleet.b.layout.host_keys / "tls.crt").write_bytes(certificates.pem(wrong))
    assert refusal(lambda: fleet.b.fetch(fleet.a.endpoint)) in ("transfer.tls", "fleet.purpose", "transfer.connection")
    nothing_is_left(fleet)


# -- peers that are rude ------------------------------------------------------------------------


def rude(fleet: Fleet, act: Callable[[ssl.SSLSocket], None]) -> None:
    """Connect to a as b, do something, and wait until a ends it."""
    identity = fleet.b.identity()
    host, _, port = fleet.a.endpoint.partition(":")
    context = channel._context(identity, server=False)
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as connection:
        act(connection)
        try:
            while connection.recv(65536):
                pass
        except OSError:
            pass


def wait_for_failure(member: Member) -> str:
    assert eventually(lambda: bool(member.failures))
    return member.failures[-1].id


def test_an_oversized_message(fleet: Fleet) -> None:
    """It is refused by its length alone, before a byte of it is read."""
    rude(fleet, lambda connection: connection.sendall(struct.pack(">I", 0xFFFFFFFF)))
    assert wait_for_failure(fleet.a) == "transfer.message-size"
    nothing_is_left(fleet)


@pytest.mark.parametrize("body", [b"", b"{}", b"\0", b'{"type":"key"}', b'{"type":"report","id":1,"state":null}'])
def test_rubbish(fleet: Fleet, body: bytes) -> None:
    rude(fleet, lambda connection: connection.sendall(struct.pack(">I", len(body)) + body))
    assert wait_for_failure(fleet.a) == "transfer.message"


def test_a_message_out_of_turn(fleet: Fleet) -> None:
    data = messages.dump(Challenge(bytes(32), 0, PROPERTY))
    rude(fleet, lambda connection: connection.sendall(struct.pack(">I", len(data)) + data))
    assert wait_for_failure(fleet.a) == "transfer.out-of-turn"


def test_a_slow_peer(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gains no time: with it, all of the message would be read, and found to be nonsense."""
    monkeypatch.setattr("swtpm_prop.transfer.talk.AGENT_TALK_SECONDS", 2)

    def trickle(connection: ssl.SSLSocket) -> None:
        connection.sendall(struct.pack(">I", 100))
        try:
            for _ in range(100):
                connection.sendall(b"{")
                time.sleep(0.05)
        except OSError:
            return  # the other side has ended it

    rude(fleet, trickle)
    assert wait_for_failure(fleet.a) == "transfer.timeout"
    nothing_is_left(fleet)


def test_a_peer_that_says_nothing_at_all(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the beginning of TLS."""
    monkeypatch.setattr("swtpm_prop.transfer.talk.AGENT_TALK_SECONDS", 0.5)
    host, _, port = fleet.a.endpoint.partition(":")
    with socket.create_connection((host, int(port))):
        assert wait_for_failure(fleet.a) == "transfer.timeout"


def test_a_source_that_is_slow(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("members.FETCH_SECONDS", 0.5)
    over = threading.Event()
    with doorway(lambda plain: over.wait(60)) as endpoint:
        assert refusal(lambda: fleet.b.fetch(endpoint)) == "transfer.timeout"
    over.set()
    nothing_is_left(fleet)


def test_dead_hosts_and_such_without_the_guest_before_the_one_that_has_it(fleet: Fleet) -> None:
    """The hook, given four peers: to the first no packet comes through, for its queue is full; the second hangs."""
    b = fleet.b
    hung = socket.create_server(("127.0.0.1", 0))
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    with hung, full, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        dead = [f"127.0.0.1:{each.getsockname()[1]}" for each in (full, hung)]
        peers = [*dead, fleet.c.endpoint, fleet.a.endpoint]
        with b.layout.host.open("a") as file:
            file.write(f'[agent]\nendpoint = "{b.endpoint}"\npeers = {peers}\n')
        began = time.monotonic()
        noted = let_in(domain(PROPERTY, migration=True, uuid=UUID), b.layout, b.speaker)
    assert 4 < time.monotonic() - began < 15
    assert b.states() == ["imported"]
    assert b.journal.of(UUID)[0].id.encode() in noted


def test_nobody_there(fleet: Fleet) -> None:
    with doorway(lambda plain: plain.close()) as endpoint:
        assert refusal(lambda: fleet.b.fetch(endpoint)) in ("transfer.connection", "transfer.tls")
    assert refusal(lambda: fleet.b.fetch(endpoint)) == "transfer.unreachable"
    nothing_is_left(fleet)


def test_tls_1_2_is_not_spoken(fleet: Fleet) -> None:
    context = channel._context(fleet.b.identity(), server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, _, port = fleet.a.endpoint.partition(":")
    with socket.create_connection((host, int(port))) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)


def test_the_answer_is_lost_after_it_was_written_down(fleet: Fleet) -> None:
    """The source offered, the destination's hook got nothing: both come to rest, and the guest stays."""

    ask = asking.new(UUID, fleet.b.endpoint)
    talk, challenge = opened_answer(fleet, ask, fleet.b)
    with pytest.raises(StopIteration):
        talk.send(proof_for(fleet, ask, challenge, fleet.b))  # type: ignore[attr-defined]
    assert fleet.a.states() == ["offered"]
    fleet.a.agent.settle(UUID)
    assert fleet.a.states() == ["closed"]
    fleet.b.fetch(fleet.a.endpoint)
    assert fleet.a.states() == ["offered", "closed"]


def test_reports_between_real_hosts(fleet: Fleet) -> None:
    fleet.b.fetch(fleet.a.endpoint)
    (transfer,) = fleet.b.journal.of(UUID)
    assert fleet.b.speaker.report(transfer, Report(transfer.id, State.IMPORTED)) == Report(transfer.id, State.OFFERED)
    # Another member gets no word of it.
    assert fleet.c.speaker.report(transfer, Report(transfer.id, State.IMPORTED)) == Report(transfer.id, None)
