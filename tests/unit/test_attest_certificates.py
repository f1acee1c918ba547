"""Certificates of a fleet: what is accepted, and each refusal."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID
from fleet_ca import HOST, NOW, Ca

from swtpm_prop.attest import certificates
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.errors import AttestError

DAY = 86400
CA = Ca()
KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key()


def refusal(certificate: bytes, kind: Kind = Kind.TLS, ca: Ca = CA, crl: bytes | None = None, now: int = NOW) -> str:
    with pytest.raises(AttestError) as caught:
        certificates.verify(certificate, ca.ca, crl or ca.crl, kind, now)
    assert caught.value.mend
    return caught.value.id


@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_is_taken_for_itself_only(kind: Kind) -> None:
    issued = CA.issue(PUBLIC, kind)
    assert certificates.verify(issued, CA.ca, CA.crl, kind, NOW) == HOST
    (other,) = set(Kind) - {kind}
    assert refusal(issued, other) == "fleet.kind"
    assert certificates.read(issued).key == PUBLIC


def test_windows() -> None:
    issued = CA.issue(PUBLIC, Kind.TLS)
    ends = certificates.read(issued).not_after
    fresh = CA.revoking(now=ends - DAY)
    assert certificates.verify(issued, CA.ca, fresh, Kind.TLS, ends) == HOST
    assert refusal(issued, crl=fresh, now=ends + 1) == "fleet.expired"
    assert refusal(CA.issue(PUBLIC, Kind.TLS, now=NOW + DAY)) == "fleet.not-yet-valid"
    # The clock of a host may be behind by an hour.
    assert certificates.verify(CA.issue(PUBLIC, Kind.TLS, now=NOW + 3599), CA.ca, CA.crl, Kind.TLS, NOW) == HOST


def test_expired_ca() -> None:
    old = Ca(NOW - 11 * 365 * DAY)
    assert refusal(old.issue(PUBLIC, Kind.TLS), ca=old, crl=old.revoking()) == "fleet.ca-expired"


def test_revocations() -> None:
    issued, other = CA.issue(PUBLIC, Kind.TLS), CA.issue(PUBLIC, Kind.TLS)
    assert refusal(issued, crl=CA.revoking(issued)) == "fleet.revoked"
    assert certificates.verify(issued, CA.ca, CA.revoking(other), Kind.TLS, NOW) == HOST
    assert refusal(issued, crl=Ca().crl) == "fleet.crl-foreign"
    assert refusal(issued, crl=CA.revoking(now=NOW - 121 * DAY)) == "fleet.crl-expired"
    assert refusal(issued, crl=CA.ca) == "fleet.crl"
    assert refusal(issued, crl=b"-----BEGIN X509 CRL-----\n") == "fleet.crl"
    assert refusal(issued, crl=bytes(5 * 1024 * 1024)) == "fleet.crl"


def test_another_ca_of_the_same_name() -> None:
    assert refusal(Ca().issue(PUBLIC, Kind.TLS)) == "fleet.foreign"


def test_no_certificate_at_all() -> None:
    for bad in (b"", b"\x30\x00", CA.ca, CA.issue(PUBLIC, Kind.TLS) + b"\0", bytes(20000)):
        assert refusal(bad) == "fleet.certificate"


def test_what_is_no_ca() -> None:
    issued = CA.issue(PUBLIC, Kind.TLS)
    for bad in (b"", certificates.pem(issued), bytes(20000)):
        with pytest.raises(AttestError) as caught:
            certificates.verify(issued, bad, CA.crl, Kind.TLS, NOW)
        assert caught.value.id == "fleet.ca"


@pytest.mark.parametrize(
    "name",
    ["", "A.example.org", "a..b", "-a", "a-", "a b", "*.example.org", "a" * 64, "a.\n", "é.org", "a." * 127 + "a"],
)
def test_what_is_no_host_name(name: str) -> None:
    with pytest.raises(AttestError) as caught:
        CA.issue(PUBLIC, Kind.TLS, name)
    assert caught.value.id == "fleet.host-name"


def signed(change: Callable[[dict[str, Any]], None], key: Any = PUBLIC, subject: x509.Name | None = None) -> bytes:
    """A certificate that this CA signed, with other contents than it ever signs."""
    extensions: dict[str, Any] = {
        "constraints": (x509.BasicConstraints(ca=False, path_length=None), True),
        "usage": (usage(digital_signature=True), True),
        "purpose": (x509.ExtendedKeyUsage(Kind.TLS.value), True),
        "name": (x509.SubjectAlternativeName([x509.DNSName(HOST)]), True),
        "authority": (x509.AuthorityKeyIdentifier.from_issuer_public_key(CA.authority.key.public_key()), False),
    }
    change(extensions)
    begin = datetime.fromtimestamp(NOW, UTC)
    builder = x509.CertificateBuilder().subject_name(subject or x509.Name([])).serial_number(7).public_key(key)
    builder = builder.issuer_name(CA.authority.certificate.subject)
    builder = builder.not_valid_before(begin).not_valid_after(begin + timedelta(1))
    for extension, critical in extensions.values():
        builder = builder.add_extension(extension, critical)
    return builder.sign(CA.authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def usage(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


NAMES = {
    "two names": [x509.DNSName(HOST), x509.DNSName("b.example.org")],
    "an address": [x509.IPAddress(IPv4Address("192.0.2.1"))],
    "a wildcard": [x509.DNSName("*.example.org")],
    "upper case": [x509.DNSName("A.example.org")],
}
CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a ca": lambda e: e.update(constraints=(x509.BasicConstraints(ca=True, path_length=None), True)),
    "no constraints": lambda e: e.pop("constraints"),
    "signs certificates": lambda e: e.update(usage=(usage(digital_signature=True, key_cert_sign=True), True)),
    "not critical": lambda e: e.update(usage=(usage(digital_signature=True), False)),
    "client only": lambda e: e.update(purpose=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), True)),
    "both kinds": lambda e: e.update(purpose=(x509.ExtendedKeyUsage([*Kind.TLS.value, *Kind.AK.value]), True)),
    "more": lambda e: e.update(more=(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\5\0"), False)),
    **{what: lambda e, n=names: e.update(name=(x509.SubjectAlternativeName(n), True)) for what, names in NAMES.items()},
}


def test_the_profile_itself() -> None:
    assert certificates.verify(signed(lambda _: None), CA.ca, CA.crl, Kind.TLS, NOW) == HOST


@pytest.mark.parametrize("what", CONTENTS)
def test_other_contents(what: str) -> None:
    assert refusal(signed(CONTENTS[what])) == "fleet.profile"


def test_other_keys_and_a_subject() -> None:
    assert refusal(signed(lambda _: None, ed25519.Ed25519PrivateKey.generate().public_key())) == "fleet.profile"
    assert refusal(signed(lambda _: None, ec.generate_private_key(ec.SECP384R1()).public_key())) == "fleet.profile"
    assert refusal(signed(lambda _: None, subject=CA.authority.certificate.subject)) == "fleet.profile"


def test_openssl_agrees(tmp_path: Path) -> None:
    """As a server and as a client, revocations heeded; and takes no attestation certificate for either."""
    tls, ak = CA.issue(PUBLIC, Kind.TLS), CA.issue(PUBLIC, Kind.AK)
    for name, data in (
        ("ca", CA.ca),
        ("crl", CA.revoking(ak)),
        ("tls", certificates.pem(tls)),
        ("ak", certificates.pem(ak)),
    ):
        (tmp_path / name).write_bytes(data)

    def openssl(name: str, purpose: str) -> int:
        words = ["openssl", "verify", "-x509_strict", "-CAfile", "ca", "-CRLfile", "crl", "-crl_check"]
        given = [*words, "-purpose", purpose, "-verify_hostname", HOST, name]
        return subprocess.run(given, cwd=tmp_path, capture_output=True).returncode

    assert (openssl("tls", "sslserver"), openssl("tls", "sslclient")) == (0, 0)
    assert openssl("ak", "sslserver") != 0
    assert (
        b"Revoked" in subprocess.run(["openssl", "crl", "-in", tmp_path / "crl", "-text"], capture_output=True).stdout
    )
