"""How a host joins a fleet, in one round trip: a request, and an answer that only its TPM can open.

The answer holds certificates for the attestation key and the TLS key. It is encrypted under a secret that
TPM2_ActivateCredential gives to one TPM only: the one that has the endorsement key *and* the attestation key. So the
fleet never needs to see a host prove anything: certificates for keys that are not there open for nobody.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tpm2_pytss.types import TPM2B_NAME, TPM2B_PUBLIC
from tpm2_pytss.utils import make_credential

from swtpm_prop.attest import certificates, endorsement, evidence, structures, tpm_keys, wire
from swtpm_prop.attest.certificates import MALFORMED, Authority, Kind
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.custody.objects import Attestation
from swtpm_prop.errors import AttestError
from swtpm_prop.limits import ENROLMENT_BYTES, FLEET_CERTIFICATE_BYTES, REVOCATIONS_BYTES
from swtpm_prop.trust import strict_json
from swtpm_prop.trust.strict_json import Object, member

_VERSION = 1
_REQUEST = frozenset({"version", "host", "ek", "ekCertificate", "ak", "parent", "tls", "certify"})
_ANSWER = frozenset({"version", "credential", "secret", "sealed"})
_CONTENTS = frozenset({"akCertificate", "tlsCertificate", "revoked"})
_REQUEST_DOMAIN = b"swtpm-prop/v1/enrolment-request\0"
_ANSWER_DOMAIN = b"swtpm-prop/v1/enrolment-answer\0"
_SECRET_BYTES = 32
_NONCE = bytes(12)
"""Each secret encrypts one answer."""


class Request(NamedTuple):
    """What a host asks with; nothing of it is verified.

    Attributes:
        host: the name it wants.
        ek_public: TPM2B_PUBLIC.
        ek_certificate: DER; None if its TPM has none.
        ak_public: TPM2B_PUBLIC.
        parent_public: TPM2B_PUBLIC.
        tls: PKCS #10 request for the TLS key (RFC 2986), DER; only its key counts.
        certify: TPM2_Certify of the parent by the attestation key, over all of the above.
    """

    host: str
    ek_public: bytes
    ek_certificate: bytes | None
    ak_public: bytes
    parent_public: bytes
    tls: bytes
    certify: Attestation


class Applicant(NamedTuple):
    """What of a request may be relied on, once its answer is opened.

    Attributes:
        host: the name it wants; whether it is its name, the fleet's keeper must know.
        ek_name: Name of its endorsement key, 34 bytes.
        vouched_by: the maker's root that vouches for the TPM; empty: nobody, its keeper must know the Name.
        ak: the attestation key.
        tls: the TLS key.
    """

    host: str
    ek_name: bytes
    vouched_by: str
    ak: tpm_keys.HostKey
    tls: ec.EllipticCurvePublicKey


class Admission(NamedTuple):
    """What the fleet gives a host.

    Attributes:
        answer: for the host, JSON.
        serials: of the certificates in it.
        not_after: when they end, seconds since the epoch.
    """

    answer: bytes
    serials: tuple[int, int]
    not_after: int


class Membership(NamedTuple):
    """What a host has got, verified.

    Attributes:
        host: its name.
        ak_certificate: DER.
        tls_certificate: DER.
        crl: what the fleet has revoked, PEM.
        not_after: when the certificates end, seconds since the epoch.
    """

    host: str
    ak_certificate: bytes
    tls_certificate: bytes
    crl: bytes
    not_after: int


# -- at the host --------------------------------------------------------------------------------


def ask(hardware: Hardware, host: str, tls: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for the fleet's keeper, JSON.

    Args:
        hardware: the host's TPM, initialised.
        host: the name it wants.
        tls: its TLS key.

    Raises:
        AttestError: ``fleet.host-name``.
        HostError: what the TPM refuses.
    """
    certificates.check_host(host)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(tls, hashes.SHA256())
    csr = request.public_bytes(serialization.Encoding.DER)
    unsigned = Request(
        host,
        hardware.ek_public,
        hardware.ek_certificate(),
        hardware.ak_public,
        hardware.parent_public,
        csr,
        Attestation(b"", b""),
    )
    return _written(unsigned._replace(certify=hardware.certify_parent(_digest(unsigned))))


def accept(hardware: Hardware, answer: bytes, ca: bytes, tls: ec.EllipticCurvePublicKey, now: int) -> Membership:
    """Open and check the fleet's answer.

    1. This TPM opens it.
    2. Both certificates are of the fleet that this host was told to trust: anybody can encrypt to a TPM.
    3. They are for one host, and for the keys that this host has.

    Args:
        hardware: the host's TPM.
        answer: JSON.
        ca: the fleet's certificate, PEM, got in a way that is trusted.
        tls: the TLS key of the request.
        now: seconds since the epoch.

    Raises:
        AttestError: ``attest.answer-malformed``; (1) ``attest.answer-unopened``; (2) as `certificates.verify`;
            (3) ``attest.answer-host``, ``attest.answer-ak``, ``attest.answer-tls``.
        HostError: (1) ``tpm.foreign-credential``.
    """
    # 1
    with wire.reading("answer"):
        found = _object(answer, _ANSWER)
        credential, secret = wire.decode(found, "credential"), wire.decode(found, "secret")
        sealed = wire.decode(found, "sealed", ENROLMENT_BYTES + REVOCATIONS_BYTES)
    structures.check_credential(credential, secret, "answer")
    inside = _opened(hardware.activate(credential, secret), sealed)
    with wire.reading("answer"):
        found = strict_json.parse(inside)
        wire.only(found, _CONTENTS)
        ak, tls_certificate = (
            wire.decode(found, name, FLEET_CERTIFICATE_BYTES) for name in ("akCertificate", "tlsCertificate")
        )
        crl = member(found, "revoked", str).encode()
    # 2
    host = certificates.verify(ak, ca, crl, Kind.AK, now)
    other = certificates.verify(tls_certificate, ca, crl, Kind.TLS, now)
    # 3
    if host != other:
        raise _mismatch("host", "its certificates are for two hosts")
    if certificates.read(ak).key != tpm_keys.check_attestation_key(hardware.ak_public).key:
        raise _mismatch("ak", "it is for another attestation key")
    if certificates.read(tls_certificate).key != tls:
        raise _mismatch("tls", "it is for another TLS key")
    return Membership(host, ak, tls_certificate, crl, certificates.read(ak).not_after)


# -- at the fleet's CA --------------------------------------------------------------------------


def examine(request: bytes, makers: Sequence[x509.Certificate] | None, now: int) -> tuple[Request, Applicant]:
    """Check a request.

    1. Its form.
    2. The endorsement key is of the default template, and a maker vouches for it.
    3. The attestation key is restricted and fixed to its TPM: what it signs as made by a TPM is.
    4. The storage parent is of our template.
    5. The attestation key certified the parent over the whole request: nobody put in a TLS key or a name of his own.
    6. The TLS key signed its own request.

    That attestation key and endorsement key are in one TPM shows when the answer opens.

    Args:
        request: JSON.
        makers: certificates that may vouch for a TPM; None: the keeper vouches, by the endorsement key's Name.
        now: seconds since the epoch.

    Raises:
        AttestError: (1) ``attest.request-malformed``, ``fleet.host-name``; (2) as `tpm_keys.check_endorsement_key` and
            `endorsement.verify`; (3) as `tpm_keys.check_attestation_key`; (4) as `tpm_keys.check_parent`; (5) as
            `evidence.verify_certify`; (6) ``attest.request-tls``.
    """
    # 1
    asked = _read(request)
    certificates.check_host(asked.host)
    # 2
    ek = tpm_keys.check_endorsement_key(asked.ek_public)
    vouched_by = "" if makers is None else endorsement.verify(ek, asked.ek_certificate, makers, now)
    # 3
    ak = tpm_keys.check_attestation_key(asked.ak_public)
    # 4
    parent = tpm_keys.check_parent(asked.parent_public)
    # 5
    evidence.verify_certify(asked.certify, parent.name, ak.key, _digest(asked))
    # 6
    tls = _tls_key(asked.tls)
    return asked, Applicant(asked.host, structures.name(ek), vouched_by, ak, tls)


def admit(asked: Request, applicant: Applicant, authority: Authority, crl: bytes, now: int) -> Admission:
    """Issue a host's certificates, in an answer that only its TPM opens.

    Args:
        asked: as `examine` gave it, with ``applicant``.
        authority: the fleet's CA.
        crl: what the fleet has revoked so far, PEM.
        now: seconds since the epoch.
    """
    ak = certificates.issue(authority, applicant.host, applicant.ak.key, Kind.AK, now)
    tls = certificates.issue(authority, applicant.host, applicant.tls, Kind.TLS, now)
    contents = {"akCertificate": wire.encode(ak), "tlsCertificate": wire.encode(tls), "revoked": crl.decode("ascii")}
    secret = secrets.token_bytes(_SECRET_BYTES)
    ek, _ = TPM2B_PUBLIC.unmarshal(asked.ek_public)
    credential, encrypted = make_credential(ek, secret, TPM2B_NAME(applicant.ak.name))
    answer = {
        "version": _VERSION,
        "credential": wire.encode(credential.marshal()),
        "secret": wire.encode(encrypted.marshal()),
        "sealed": wire.encode(AESGCM(secret).encrypt(_NONCE, json.dumps(contents).encode(), _ANSWER_DOMAIN)),
    }
    issued = certificates.read(ak), certificates.read(tls)
    return Admission(_json(answer), (issued[0].serial, issued[1].serial), issued[0].not_after)


# -- form ---------------------------------------------------------------------------------------


def _digest(request: Request) -> bytes:
    """What the attestation key signs of a request, 32 bytes: each field with its length before it (8 bytes)."""
    fields = (
        request.host.encode(),
        request.ek_public,
        request.ek_certificate or b"",
        request.ak_public,
        request.parent_public,
        request.tls,
    )
    digest = hashlib.sha256(_REQUEST_DOMAIN)
    for field in fields:
        digest.update(struct.pack(">Q", len(field)) + field)
    return digest.digest()


def _written(request: Request) -> bytes:
    return _json(
        {
            "version": _VERSION,
            "host": request.host,
            "ek": wire.encode(request.ek_public),
            "ekCertificate": wire.encode(request.ek_certificate or b""),
            "ak": wire.encode(request.ak_public),
            "parent": wire.encode(request.parent_public),
            "tls": wire.encode(request.tls),
            "certify": wire.attestation_to_object(request.certify),
        }
    )


def _read(data: bytes) -> Request:
    with wire.reading("request"):
        found = _object(data, _REQUEST)
        return Request(
            member(found, "host", str),
            wire.decode(found, "ek"),
            wire.decode(found, "ekCertificate", FLEET_CERTIFICATE_BYTES) or None,
            wire.decode(found, "ak"),
            wire.decode(found, "parent"),
            wire.decode(found, "tls"),
            wire.attestation(found, "certify"),
        )


def _object(data: bytes, names: frozenset[str]) -> Object:
    found = strict_json.parse(data)
    wire.only(found, names)
    if found.get("version") != _VERSION:
        raise ValueError(f"its version is not {_VERSION}")
    return found


def _json(value: Object) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _tls_key(csr: bytes) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        if request.is_signature_valid and isinstance(key, ec.EllipticCurvePublicKey) and certificates.is_p256(key):
            return key
    except MALFORMED:
        pass
    raise AttestError("attest.request-tls", "the request for the TLS key is not signed by a P-256 key", "ask anew")


def _opened(secret: bytes, sealed: bytes) -> bytes:
    try:
        return AESGCM(secret).decrypt(_NONCE, sealed, _ANSWER_DOMAIN)
    except (InvalidTag, ValueError):
        raise AttestError(
            "attest.answer-unopened", "the fleet's answer is damaged", "have it sent again, or ask the fleet anew"
        ) from None


def _mismatch(what: str, why: str) -> AttestError:
    return AttestError(f"attest.answer-{what}", f"the fleet's answer does not fit: {why}", "ask the fleet anew")
