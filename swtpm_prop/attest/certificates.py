"""X.509 of a fleet: one CA, two certificates for each host (attestation key, TLS), one list of what is revoked.

Everything here is bytes in, values out. The profile is narrow on purpose: P-256 with SHA-256 everywhere, one DNS name,
one extended key usage, and no extension beyond those that this module writes. So a certificate says one thing only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, SignatureAlgorithmOID

from swtpm_prop.errors import AttestError
from swtpm_prop.limits import (
    CLOCK_SKEW,
    FLEET_CERTIFICATE_BYTES,
    FLEET_DAYS,
    HOST_NAME_CHARS,
    REVOCATIONS_BYTES,
)

_LABEL = r"[a-z0-9](?:[a-z0-9\-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ENROL = "enrol this host again: swtpm-prop host enroll"


MALFORMED = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
"""What cryptography raises on X.509 that is none, or is of kinds it does not know."""


class Kind(Enum):
    """What a host's certificate is for, by its extended key usages.

    AK: signs attestations of a TPM (tcg-kp-AIKCertificate, TCG EK Credential Profile 2.x). TLS: speaks to other hosts.
    """

    AK = (x509.ObjectIdentifier("2.23.133.8.3"),)
    TLS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Authority(NamedTuple):
    """The fleet's CA with its private key: what can issue and revoke."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Revocation(NamedTuple):
    """One certificate that no longer counts.

    Attributes:
        serial: of the certificate.
        when: seconds since the epoch, UTC.
    """

    serial: int
    when: int


class Contents(NamedTuple):
    """What a host's certificate says; nothing of it is verified but its form.

    Attributes:
        host: its one name.
        key: P-256.
        serial: the CA's number for it.
        not_before: seconds since the epoch, UTC, included.
        not_after: the same.
    """

    host: str
    key: ec.EllipticCurvePublicKey
    serial: int
    not_before: int
    not_after: int


# -- issuing ------------------------------------------------------------------------------------


def new_authority(name: str, key: ec.EllipticCurvePrivateKey, now: int) -> Authority:
    """A CA that signs itself.

    Args:
        name: for people, the common name.
        key: P-256.
        now: seconds since the epoch; the CA is good from here for ``FLEET_DAYS["ca"]``.
    """
    public = key.public_key()
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(_name(name), _name(name), public, now, FLEET_DAYS["ca"])
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Authority, host: str, public: ec.EllipticCurvePublicKey, kind: Kind, now: int) -> bytes:
    """A certificate for a host's key, DER.

    Raises:
        AttestError: ``fleet.host-name``.
    """
    check_host(host)
    # Its subject is empty and its name stands in the critical alternative name (RFC 5280, section 4.1.2.6).
    builder = _builder(x509.Name([]), authority.certificate.subject, public, now, FLEET_DAYS["host"])
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(kind.value), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
    builder = builder.add_extension(_authority_key(authority), critical=False)
    return _der(builder.sign(authority.key, hashes.SHA256()))


def revoke(authority: Authority, revoked: Iterable[Revocation], number: int, now: int) -> bytes:
    """The list of all certificates that no longer count (RFC 5280, section 5), PEM.

    Args:
        authority: whose certificates they are.
        revoked: all of them, not only the new ones.
        number: greater than that of every earlier list; hosts never go back.
        now: seconds since the epoch; the list is good from here for ``FLEET_DAYS["revocations"]``.
    """
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    builder = builder.last_update(_moment(now - CLOCK_SKEW))
    builder = builder.next_update(_moment(now) + timedelta(FLEET_DAYS["revocations"]))
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    builder = builder.add_extension(_authority_key(authority), critical=False)
    for serial, when in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_moment(when))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_host(name: str) -> None:
    """Refuse what is no DNS name in lower case (RFC 1123, section 2.1).

    Raises:
        AttestError: ``fleet.host-name``.
    """
    if len(name) > HOST_NAME_CHARS or _HOST.fullmatch(name) is None:
        raise AttestError(
            "fleet.host-name", f"'{name[:80]}' is no host name", "write it like a.example.org, lower case"
        )


# -- verifying ----------------------------------------------------------------------------------


def verify(certificate: bytes, ca: bytes, crl: bytes, kind: Kind, now: int) -> str:
    """Check a host's certificate; the name that is returned may be relied on.

    1. The CA's certificate is one of this profile and in its window.
    2. The list of what is revoked is the CA's and in its window. Old lists do not count: who could hold back the new
       one could keep a revoked host alive.
    3. The CA issued the certificate.
    4. Its contents are of this profile.
    5. It is of the wanted kind: a TLS key is in software and must not pass for an attestation key.
    6. ``now`` is in its window.
    7. It is not revoked.

    Args:
        certificate: DER.
        ca: the fleet's certificate, PEM.
        crl: what the fleet revoked, PEM.
        kind: what it must be for.
        now: seconds since the epoch.

    Returns:
        The host's name.

    Raises:
        AttestError: (1) ``fleet.ca``, ``fleet.ca-expired``; (2) ``fleet.crl``, ``fleet.crl-foreign``,
            ``fleet.crl-expired``; (3) ``fleet.certificate``, ``fleet.foreign``; (4) ``fleet.profile``;
            (5) ``fleet.kind``; (6) ``fleet.expired``, ``fleet.not-yet-valid``; (7) ``fleet.revoked``.
    """
    # 1
    authority = load_ca(ca)
    _check_ca_window(authority, now)
    # 2
    revoked = load_crl(crl, authority)
    _check_crl_window(revoked, now)
    # 3
    found = _load(certificate)
    _check_issued(found, authority)
    # 4
    contents = _contents(found)
    # 5
    if _kind(found) is not kind:
        raise AttestError(
            "fleet.kind", f"the certificate of '{contents.host}' is not for {_PURPOSES[kind]}", "present the right one"
        )
    # 6
    _check_window(contents, now)
    # 7
    if revoked.get_revoked_certificate_by_serial_number(contents.serial) is not None:
        raise AttestError(
            "fleet.revoked", f"the certificate of '{contents.host}' is revoked", "ask who administers the fleet"
        )
    return contents.host


def read(certificate: bytes) -> Contents:
    """What a host's certificate says, whoever signed it: step 4 of `verify`. To look at, never to rely on.

    Raises:
        AttestError: ``fleet.certificate``, ``fleet.profile``.
    """
    return _contents(_load(certificate))


def load_ca(pem: bytes) -> x509.Certificate:
    """The fleet's certificate; that it is the right one is for who put it there to know.

    Raises:
        AttestError: ``fleet.ca``.
    """
    bad = AttestError("fleet.ca", "this is no certificate of a fleet", "take fleet.pem from 'swtpm-prop fleet init'")
    _check_size(pem, FLEET_CERTIFICATE_BYTES, bad)
    with _strict(bad):
        found = x509.load_pem_x509_certificate(pem)
        constraints = found.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
        _require(constraints.ca and usage.key_cert_sign and usage.crl_sign and is_p256(found.public_key()))
        found.verify_directly_issued_by(found)
    return found


def load_crl(pem: bytes, ca: x509.Certificate) -> x509.CertificateRevocationList:
    """A list of what is revoked, signed by the CA; its window is not looked at.

    Raises:
        AttestError: ``fleet.crl``, ``fleet.crl-foreign``.
    """
    bad = _malformed_crl()
    found = _crl(pem)
    with _strict(bad):
        own = found.issuer == ca.subject and found.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    if not own:
        raise AttestError(
            "fleet.crl-foreign", "the list of revoked certificates is not this fleet's", "take fleet.crl of this fleet"
        )
    return found


def read_crl(pem: bytes) -> tuple[bytes, int]:
    """Who a list says signed it (key identifier of the CA, 20 bytes), and its number; nothing is verified.

    Raises:
        AttestError: ``fleet.crl``.
    """
    found = _crl(pem)
    signer = found.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    if signer is None or len(signer) != _KEY_IDENTIFIER_BYTES:
        raise _malformed_crl()
    return signer, crl_number(found)


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """The list's number; a higher one replaces a lower one, never the other way round."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def crl_ends(crl: x509.CertificateRevocationList) -> int:
    """The last moment that the list counts, seconds since the epoch."""
    moment = crl.next_update_utc
    return int(moment.timestamp()) if moment else 0


def pem(der: bytes) -> bytes:
    """A certificate as files have it (RFC 7468, section 5)."""
    return _load(der).public_bytes(serialization.Encoding.PEM)


def der(pem: bytes) -> bytes:
    """A certificate as messages have it.

    Raises:
        AttestError: ``fleet.certificate``.
    """
    bad = _malformed()
    _check_size(pem, FLEET_CERTIFICATE_BYTES, bad)
    with _strict(bad):
        return _der(x509.load_pem_x509_certificate(pem))


# -- profile ------------------------------------------------------------------------------------

_PROFILE = frozenset(
    {
        (ExtensionOID.BASIC_CONSTRAINTS, True),
        (ExtensionOID.KEY_USAGE, True),
        (ExtensionOID.EXTENDED_KEY_USAGE, True),
        (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, True),
        (ExtensionOID.AUTHORITY_KEY_IDENTIFIER, False),
    }
)
"""The extensions of a host's certificate, and whether each is critical."""

_CRL_PROFILE = frozenset({(ExtensionOID.CRL_NUMBER, False), (ExtensionOID.AUTHORITY_KEY_IDENTIFIER, False)})

_KEY_IDENTIFIER_BYTES = 20
"""SHA-1 of the key (RFC 5280, section 4.2.1.2); it only finds, it never decides."""

_PURPOSES = {Kind.AK: "attestation", Kind.TLS: "TLS"}


def _contents(found: x509.Certificate) -> Contents:
    bad = AttestError("fleet.profile", "the certificate is not as a fleet issues it", _ENROL)
    with _strict(bad):
        extensions = found.extensions
        _require(_oids(extensions) == _PROFILE and not list(found.subject))
        _require(not extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
        _require(extensions.get_extension_for_class(x509.KeyUsage).value == _usage(digital_signature=True))
        _require(_kind(found) is not None)
        (name,) = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        _require(isinstance(name, x509.DNSName) and _HOST.fullmatch(name.value) is not None)
        _require(len(name.value) <= HOST_NAME_CHARS)
        key = found.public_key()
        _require(isinstance(key, ec.EllipticCurvePublicKey) and is_p256(key))
        window = (int(found.not_valid_before_utc.timestamp()), int(found.not_valid_after_utc.timestamp()))
    return Contents(name.value, key, found.serial_number, *window)  # type: ignore[arg-type]


def _kind(found: x509.Certificate) -> Kind | None:
    usages = tuple(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    return next((kind for kind in Kind if kind.value == usages), None)


def _oids(extensions: x509.Extensions) -> frozenset[tuple[x509.ObjectIdentifier, bool]]:
    return frozenset((extension.oid, extension.critical) for extension in extensions)


def _check_issued(found: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        if found.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
            raise ValueError
        found.verify_directly_issued_by(ca)
    except MALFORMED:
        raise AttestError("fleet.foreign", "the certificate is not of this fleet's CA", _ENROL) from None


def _check_window(contents: Contents, now: int) -> None:
    if now < contents.not_before:
        raise AttestError(
            "fleet.not-yet-valid",
            f"the certificate of '{contents.host}' is of the future",
            "set this host's clock right",
        )
    if now > contents.not_after:
        raise AttestError("fleet.expired", f"the certificate of '{contents.host}' has expired", _ENROL)


def _check_ca_window(ca: x509.Certificate, now: int) -> None:
    if not ca.not_valid_before_utc.timestamp() <= now <= ca.not_valid_after_utc.timestamp():
        raise AttestError(
            "fleet.ca-expired", "the fleet's own certificate is not valid now", "see the clock; or make a new fleet"
        )


def _check_crl_window(crl: x509.CertificateRevocationList, now: int) -> None:
    if now > crl_ends(crl):
        raise AttestError(
            "fleet.crl-expired",
            "the fleet's list of revoked certificates has expired",
            "sign it anew with 'swtpm-prop fleet renew' and bring it to the hosts with 'store sync' or 'host update'",
        )


def _crl(pem: bytes) -> x509.CertificateRevocationList:
    bad = _malformed_crl()
    _check_size(pem, REVOCATIONS_BYTES, bad)
    with _strict(bad):
        found = x509.load_pem_x509_crl(pem)
        _require(_oids(found.extensions) == _CRL_PROFILE and found.next_update_utc is not None)
        _require(found.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA256)
        # Reads every entry: a list that ends in rubbish would raise in the middle of a later look-up.
        _require(all(not len(entry.extensions) for entry in found))
    return found


def _malformed_crl() -> AttestError:
    return AttestError("fleet.crl", "this is no list of revoked certificates", "take fleet.crl from the fleet's keeper")


# -- small parts --------------------------------------------------------------------------------


def _load(data: bytes) -> x509.Certificate:
    bad = _malformed()
    _check_size(data, FLEET_CERTIFICATE_BYTES, bad)
    with _strict(bad):
        return x509.load_der_x509_certificate(data)


def _malformed() -> AttestError:
    return AttestError("fleet.certificate", "this is no X.509 certificate", _ENROL)


@contextmanager
def _strict(bad: AttestError) -> Iterator[None]:
    """Whatever is wrong inside is this one error."""
    try:
        yield
    except MALFORMED:
        raise bad from None


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _check_size(data: bytes, most: int, bad: AttestError) -> None:
    if len(data) > most:
        raise bad


def is_p256(key: object) -> bool:
    """Whether it is a public key on P-256."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: int, days: int
) -> x509.CertificateBuilder:
    begin = _moment(now)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(begin - timedelta(seconds=CLOCK_SKEW)).not_valid_after(begin + timedelta(days))


def _authority_key(authority: Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)
