"""A connection between two hosts of one fleet: TLS 1.3, both sides known by name, bounded in size and time."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop.attest import certificates
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.membership import Files
from swtpm_prop.errors import Error, TransferError
from swtpm_prop.limits import MESSAGE_BYTES
from swtpm_prop.transfer.messages import Message, Refused, dump, parse, refusal, too_large
from swtpm_prop.transfer.reach import reach

_LENGTH = struct.Struct(">I")


class Identity(NamedTuple):
    """Who this host is to others, and whom it takes for one of its fleet.

    Attributes:
        files: certificates, as they lie on the disk now.
        key: of the TLS certificate.
    """

    files: Files
    key: ec.EllipticCurvePrivateKey


class Channel:
    """An open connection.

    Attributes:
        peer: name of the other host, as its certificate proves it.
        peer_key: SubjectPublicKeyInfo of its TLS certificate, DER.
        own_key: the same of this host's.

    Raises:
        TransferError: in both methods ``transfer.timeout``, ``transfer.connection``.
    """

    def __init__(self, connection: ssl.SSLSocket, identity: Identity, deadline: float, now: int) -> None:
        self._connection = connection
        self._deadline = deadline
        shown = connection.getpeercert(binary_form=True) or b""
        files = identity.files
        self.peer = certificates.verify(shown, files.ca, files.crl, Kind.TLS, now)
        self.peer_key = _spki(certificates.read(shown).key)
        self.own_key = _spki(identity.key.public_key())

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            TransferError: ``transfer.message-size``.
        """
        data = dump(message)
        with _talking():
            self._connection.settimeout(_rest(self._deadline))
            self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Message:
        """Receive one message.

        Raises:
            TransferError: as `messages.parse`.
        """
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        # Before it is read: a peer may say that four gigabytes come.
        if size > MESSAGE_BYTES:
            raise too_large(size)
        return parse(self._read(size))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            with _talking():
                self._connection.settimeout(_rest(self._deadline))
                part = self._connection.recv(size - len(data))
            if not part:
                raise _lost("the peer has ended it")
            data += part
        return data


@contextmanager
def connect(
    endpoint: str, identity: Identity, seconds: float, reaching: float, clock: Callable[[], float] = time.time
) -> Iterator[Channel]:
    """Connect to another host's agent.

    Args:
        endpoint: ``host:port``.
        identity: of this host.
        seconds: that all of it may take.
        reaching: seconds of these after which a host that does not even speak TLS is taken for dead.
        clock: seconds since the epoch.

    Raises:
        TransferError: ``transfer.unreachable``, ``transfer.tls``, ``transfer.timeout``, ``transfer.connection``.
        AttestError: the peer's certificate, as `certificates.verify`.
    """
    began = time.monotonic()
    deadline = began + seconds
    plain = reach(endpoint, min(seconds, reaching))
    with _speak_tls(plain, identity, min(deadline, began + reaching), server=False) as connection:
        yield Channel(connection, identity, deadline, int(clock()))


@contextmanager
def accept(
    plain: socket.socket, identity: Identity, seconds: float, clock: Callable[[], float] = time.time
) -> Iterator[Channel]:
    """Speak with a host that has connected; it is told why if it is not one of ours.

    Args:
        plain: the connection; it is closed at the end.
        identity: of this host.
        seconds: that all of it may take.
        clock: seconds since the epoch.

    Raises:
        TransferError: ``transfer.tls``, ``transfer.timeout``, ``transfer.connection``.
        AttestError: the peer's certificate, as `certificates.verify`.
    """
    deadline = time.monotonic() + seconds
    with _speak_tls(plain, identity, deadline, server=True) as connection:
        try:
            channel = Channel(connection, identity, deadline, int(clock()))
        except Error as error:
            _say(connection, refusal(error), deadline)
            raise
        yield channel


@contextmanager
def _speak_tls(plain: socket.socket, identity: Identity, deadline: float, server: bool) -> Iterator[ssl.SSLSocket]:
    with plain:
        with _talking():
            plain.settimeout(_rest(deadline))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _context(identity, server).wrap_socket(plain, server_side=server)
        with connection:
            yield connection


def _context(identity: Identity, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names are those of the fleet; they are read, and everything else is checked, by attest.certificates.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.files.ca.decode("ascii"))
    with _in_memory(_key_and_certificate(identity)) as path:
        context.load_cert_chain(path)
    if server:
        # A resumed session would bring no certificate of now.
        context.num_tickets = 0
    return context


def _key_and_certificate(identity: Identity) -> bytes:
    private = identity.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificates.pem(identity.files.tls_certificate)


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file that is on no disk: the ssl module takes keys from files only."""
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise _late() from error
    except ssl.SSLError as error:
        raise TransferError(
            "transfer.tls",
            f"the hosts do not accept each other: {error.reason or error}",
            "see that both are enrolled in one fleet, with certificates that are valid now",
        ) from error
    except OSError as error:
        raise _lost(str(error)) from error


def _say(connection: ssl.SSLSocket, refused: Refused, deadline: float) -> None:
    data = dump(refused)
    try:
        connection.settimeout(_rest(deadline))
        connection.sendall(_LENGTH.pack(len(data)) + data)
    except (OSError, TransferError):
        return  # whom it does not reach it need not reach


def _rest(deadline: float) -> float:
    """What is left of the time; each single wait has no more, so that a trickle of bytes gains nothing."""
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise _late()
    return rest


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _late() -> TransferError:
    return TransferError("transfer.timeout", "the peer takes too long", "see how busy that host and its TPM are")


def _lost(why: str) -> TransferError:
    return TransferError("transfer.connection", f"the connection to the peer is lost: {why}", "try again")
