"""Real members of a fleet for tests: each with a TPM of its own, certificates, approvals, and its door open."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fleet_ca import NOW, Ca, ak_key
from hardware import HardwareTpm

from swtpm_prop.attest import certificates
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.custody import approvals, keys, opening, tss2
from swtpm_prop.custody.approvals import ApprovalList
from swtpm_prop.custody.hardware import PARENT_HANDLE
from swtpm_prop.custody.tss2 import KeyFile
from swtpm_prop.errors import Error
from swtpm_prop.layout import Layout
from swtpm_prop.limits import FETCH_SECONDS
from swtpm_prop.transfer import host, talk
from swtpm_prop.transfer.answer import Source
from swtpm_prop.transfer.ask import Destination
from swtpm_prop.transfer.channel import Identity
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Presence
from swtpm_prop.transfer.settle import HOOK, Eyes, Settler
from swtpm_prop.transfer.speaker import Speaker

UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
PROPERTY = "https://example.org/properties/approved-host"
PCRS = (0, 1, 4, 7)


class Authority:
    """Who says which host states have the property."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.list: ApprovalList = approvals.begin(self.key)

    def trust_file(self) -> str:
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        prefix = PROPERTY.rpartition("/")[0]
        head = f'[[issuer]]\nid = "https://example.org/authority"\nprefixes = ["{prefix}"]\napproves-hosts = true\n'
        return f"{head}keys = ['''{pem}''']\n"

    def approve(self, member: Member, label: str) -> None:
        with member.tpm.open() as tpm:
            epoch, state = tpm.epoch(), tpm.pcrs(PCRS)
        if self.list.epoch < epoch:
            self.list = approvals.raise_to(self.list, self.key, epoch)
        if not any(known.pcrs == state for known in self.list.approvals):
            self.list = approvals.approve(self.list, self.key, label, PROPERTY, state)

    def signed(self) -> bytes:
        return approvals.sign(self.list, self.key)


class Member:
    """A host of a fleet; its agent's door is open on localhost while `serving`."""

    def __init__(self, name: str, directory: Path, tpm: HardwareTpm, ca: Ca, authority: Authority) -> None:
        self.name = name
        self.tpm = tpm
        self.ca = ca
        self.layout = Layout(directory / name)
        self.journal = Journal(self.layout)
        self.speaker = Speaker(self.layout)
        self.seen = Presence.GONE
        self.endpoint = ""
        self.failures: list[Error] = []
        self.agent = Settler(
            self.layout, self.journal, Eyes(lambda uuid: self.seen, lambda uuid: None), self.speaker.report
        )
        self.hook = Settler(self.layout, self.journal, HOOK, self.speaker.report)
        self.layout.etc.mkdir(parents=True)
        self.layout.host_keys.mkdir(parents=True)
        self.layout.host.write_text(f'[tpm]\ntcti = "{tpm.tcti}"\n')
        self.layout.trust.write_text(authority.trust_file())
        with tpm.open() as hardware:
            hardware.initialise()
        self.enrol(ca)

    def enrol(self, ca: Ca, *, host: str = "", now: int = NOW) -> None:
        """Give it certificates of this CA, and a TLS key that only its TPM opens."""
        key = ec.generate_private_key(ec.SECP256R1())
        with self.tpm.open() as hardware:
            ak = ak_key(hardware)
            sealed = hardware.seal(key.private_numbers().private_value.to_bytes(32, "big"))
        keys = self.layout.host_keys
        (keys / "tls.key").unlink(missing_ok=True)
        (keys / "tls.key").write_bytes(tss2.to_pem(KeyFile(sealed, PARENT_HANDLE, secret=True)))
        for name, public, kind in (("ak.crt", ak, Kind.AK), ("tls.crt", key.public_key(), Kind.TLS)):
            issued = ca.issue(public, kind, host or self.name, now)
            (keys / name).write_bytes(certificates.pem(issued))
        self.layout.fleet_ca.write_bytes(ca.ca)
        self.layout.fleet_crl.write_bytes(ca.crl)

    def approve(self, authority: Authority) -> None:
        """Install what the authority approves now."""
        approvals.install(self.layout, authority.signed(), authority.key.public_key())

    def create(self, uuid: str = UUID) -> bytes:
        """Make a guest with a key, and start it."""
        with opening.hardware(self.layout) as tpm:
            record, key = opening.create(uuid, PROPERTY, tpm, self.layout)
        keys.store(record._replace(encrypted=True), self.layout)
        self.seen = Presence.RUNS
        return key

    def open(self, uuid: str = UUID) -> bytes:
        """The guest's key, if this host opens it now."""
        record = keys.load(uuid, self.layout)
        assert record is not None
        with opening.hardware(self.layout) as tpm:
            return opening.open_(record, tpm, self.layout)

    def source(self) -> Source:
        return host.source(self.layout, lambda uuid: self.seen)

    def destination(self) -> Destination:
        return host.destination(self.layout)

    def identity(self) -> Identity:
        return self.speaker.identity()

    def fetch(self, endpoint: str, destination: Destination | None = None, uuid: str = UUID) -> Transfer:
        """What the migrate hook does."""
        taken, ends = destination or self.destination(), (endpoint, self.endpoint)
        return talk.fetch(
            uuid, PROPERTY, ends, self.identity(), taken, self.hook, seconds=FETCH_SECONDS, reaching=FETCH_SECONDS
        )

    def states(self) -> list[str]:
        return [known.state.value for known in self.journal.of(UUID)]

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer other hosts."""
        with doorway(self._talk) as self.endpoint:
            yield

    def _talk(self, plain: socket.socket) -> None:
        try:
            talk.serve(plain, self.identity(), self.source(), self.agent)
        except Error as error:
            self.failures.append(error)


@contextmanager
def doorway(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Accept connections, each in a thread; gives the endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(plain,), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
