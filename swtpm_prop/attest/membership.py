"""This host's place in its fleet, in files: its certificates, its TLS key, whom the fleet has revoked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop import durable
from swtpm_prop.attest import certificates, enrolment
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.enrolment import Membership
from swtpm_prop.custody import tss2
from swtpm_prop.custody.hardware import PARENT_HANDLE, Hardware
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.custody.tss2 import KeyFile
from swtpm_prop.errors import AttestError, HostError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import FLEET_CERTIFICATE_BYTES, KEY_BYTES, REVOCATIONS_BYTES
from swtpm_prop.trust.files import read_file, write_file

_KEY = "tls.key"
_PENDING = "tls.key.new"
_TLS = "tls.crt"
_AK = "ak.crt"
_SCALAR_BYTES = 32
_CURVE = ec.SECP256R1()


class Files(NamedTuple):
    """What speaking to other hosts needs, as it lies on the disk; DER and PEM.

    Attributes:
        ak_certificate: DER.
        tls_certificate: DER.
        ca: PEM.
        crl: PEM.
    """

    ak_certificate: bytes
    tls_certificate: bytes
    ca: bytes
    crl: bytes


def load(layout: Layout) -> Files:
    """This host's certificates and its fleet's.

    Raises:
        HostError: ``host.not-enrolled``.
        AttestError: ``fleet.certificate``.
    """
    try:
        ak, tls = (read_file(layout.host_keys / name, FLEET_CERTIFICATE_BYTES) for name in (_AK, _TLS))
        ca, crl = load_fleet(layout)
    except TrustError as error:
        raise HostError(
            "host.not-enrolled", f"this host is in no fleet: {error.what}", "enrol it: swtpm-prop host enroll"
        ) from None
    return Files(certificates.der(ak), certificates.der(tls), ca, crl)


def load_fleet(layout: Layout) -> tuple[bytes, bytes]:
    """The fleet's certificate and what it has revoked, PEM.

    Raises:
        TrustError: as `read_file`.
    """
    return read_file(layout.fleet_ca, FLEET_CERTIFICATE_BYTES), read_file(layout.fleet_crl, REVOCATIONS_BYTES)


def tls_key(hardware: Hardware, host_keys: Path) -> ec.EllipticCurvePrivateKey:
    """The TLS key; only this host's TPM opens it.

    Raises:
        HostError: ``host.not-enrolled``; ``tpm.foreign-object`` and what else the TPM refuses.
        WireError: ``wire.tss2``.
    """
    return _opened(hardware, host_keys / _KEY)


def request(hardware: Hardware, host_keys: Path, host: str) -> bytes:
    """A request to join a fleet, with a new TLS key that waits beside the present one.

    Raises:
        AttestError: ``fleet.host-name``.
        HostError: what the TPM refuses; ``host.keys-unwritable``.
    """
    key = ec.generate_private_key(_CURVE)
    asked = enrolment.ask(hardware, host, key)
    scalar = key.private_numbers().private_value.to_bytes(_SCALAR_BYTES, "big")
    file = KeyFile(hardware.seal(scalar), PARENT_HANDLE, secret=True)
    _write(host_keys / _PENDING, tss2.to_pem(file))
    return asked


def join(hardware: Hardware, layout: Layout, answer: bytes, ca: bytes, now: int) -> Membership:
    """Take the fleet's answer; repeating it does no harm.

    Args:
        hardware: this host's TPM.
        layout: where the files go.
        answer: JSON.
        ca: the fleet's certificate, PEM, got in a way that is trusted.
        now: seconds since the epoch.

    Raises:
        AttestError: as `enrolment.accept`; ``fleet.other``: this host is in another fleet; ``fleet.revoked``: since the
            answer was made, as this host has heard.
        HostError: ``host.nothing-asked``; what the TPM refuses; ``host.keys-unwritable``.
    """
    _check_fleet(layout, ca)
    keys = layout.host_keys
    # A power failure below leaves the answer's key in place and its certificate not: then the answer is taken again.
    path = keys / (_PENDING if (keys / _PENDING).exists() else _KEY)
    if not path.exists():
        raise HostError("host.nothing-asked", "this host has not asked to join a fleet", "run 'swtpm-prop host enroll'")
    member = enrolment.accept(hardware, answer, ca, _opened(hardware, path).public_key(), now)
    install_fleet(layout, ca)
    _take_crl(layout, member, ca, now)
    if path.name == _PENDING:
        _write(keys / _KEY, path.read_bytes())
    _write(keys / _TLS, certificates.pem(member.tls_certificate))
    _write(keys / _AK, certificates.pem(member.ak_certificate))
    durable.remove(keys / _PENDING)
    return member


def install_fleet(layout: Layout, ca: bytes) -> None:
    """Trust a fleet, which is for the operator to say.

    Raises:
        AttestError: ``fleet.ca``, ``fleet.other``.
        TrustError: ``trust.file-unwritable``.
    """
    certificates.load_ca(ca)
    _check_fleet(layout, ca)
    layout.etc.mkdir(parents=True, exist_ok=True)
    write_file(layout.fleet_ca, ca)


def install_crl(layout: Layout, crl: bytes) -> bool:
    """Take a list of what the fleet has revoked, unless this host knows a newer one.

    Returns:
        Whether it is newer than what was there.

    Raises:
        AttestError: ``fleet.ca``, ``fleet.crl``, ``fleet.crl-foreign``; ``fleet.crl-rollback``: it is older.
        TrustError: ``trust.file-missing`` (this host trusts no fleet), ``trust.file-unwritable``.
    """
    ca = certificates.load_ca(read_file(layout.fleet_ca, FLEET_CERTIFICATE_BYTES))
    new = certificates.crl_number(certificates.load_crl(crl, ca))
    known = -1
    if layout.fleet_crl.exists():
        known = certificates.crl_number(certificates.load_crl(read_file(layout.fleet_crl, REVOCATIONS_BYTES), ca))
    if new < known:
        raise AttestError(
            "fleet.crl-rollback",
            f"this list of revoked certificates has number {new}, this host knows {known} already",
            "get the newest one from the fleet's keeper",
        )
    if new > known:
        write_file(layout.fleet_crl, crl)
    return new > known


def _take_crl(layout: Layout, member: Membership, ca: bytes, now: int) -> None:
    """The answer's list of revoked certificates; or, if this host knows a newer one by now, that is what counts."""
    try:
        install_crl(layout, member.crl)
    except AttestError as error:
        if error.id != "fleet.crl-rollback":
            raise
        known = read_file(layout.fleet_crl, REVOCATIONS_BYTES)
        certificates.verify(member.ak_certificate, ca, known, Kind.AK, now)
        certificates.verify(member.tls_certificate, ca, known, Kind.TLS, now)


def _check_fleet(layout: Layout, ca: bytes) -> None:
    if layout.fleet_ca.exists() and read_file(layout.fleet_ca, FLEET_CERTIFICATE_BYTES) != ca:
        raise AttestError(
            "fleet.other",
            f"this host is told to trust another fleet in '{layout.fleet_ca}'",
            "if it is to change fleets, remove that file and fleet.crl first",
        )


def _opened(hardware: Hardware, path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        file = tss2.from_pem(read_file(path, KEY_BYTES))
    except TrustError as error:
        raise HostError(
            "host.not-enrolled", f"this host is in no fleet: {error.what}", "enrol it: swtpm-prop host enroll"
        ) from None
    if not isinstance(file.item, Sealed):
        raise HostError("host.tls-key", f"'{path}' is no sealed key", "enrol this host again: swtpm-prop host enroll")
    try:
        scalar = hardware.unseal(file.item)
    except HostError as error:
        if error.id != "tpm.foreign-object":
            raise
        raise HostError(
            error.id,
            f"this host's TLS key does not open: {error.what}",
            "make and enrol its keys anew: swtpm-prop host init, then swtpm-prop host enroll",
        ) from error
    return ec.derive_private_key(int.from_bytes(scalar, "big"), _CURVE)


def _write(path: Path, data: bytes) -> None:
    try:
        durable.write(path, data)
    except OSError as error:
        raise HostError(
            "host.keys-unwritable", f"'{path}' cannot be written: {error.strerror}", "be root; free space on its disk"
        ) from error
