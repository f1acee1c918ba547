"""A fleet for tests: a CA, hosts with TPMs of their own, and what goes wrong with each."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hardware import HardwareTpm
from tpm2_pytss.types import TPMT_SIGNATURE

from swtpm_prop.attest import certificates, evidence, tpm_keys
from swtpm_prop.attest.certificates import Authority, Kind, Revocation
from swtpm_prop.attest.evidence import Evidence
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.custody.objects import Attestation

NOW = int(time.time()) + 60
"""A little later than what programs of others make in the tests."""
HOST = "a.example.org"
BINDING = hashlib.sha256(b"a question").digest()
PCRS = (0, 4, 7)


class Ca:
    """A fleet's CA without files."""

    def __init__(self, now: int = NOW) -> None:
        self.authority: Authority = certificates.new_authority("Test", ec.generate_private_key(ec.SECP256R1()), now)
        self.ca = self.authority.certificate.public_bytes(serialization.Encoding.PEM)
        self.crl = self.revoking()

    def issue(self, public: ec.EllipticCurvePublicKey, kind: Kind = Kind.AK, host: str = HOST, now: int = NOW) -> bytes:
        return certificates.issue(self.authority, host, public, kind, now)

    def revoking(self, *gone: bytes, number: int = 1, now: int = NOW) -> bytes:
        revoked = [Revocation(certificates.read(der).serial, now) for der in gone]
        return certificates.revoke(self.authority, revoked, number, now)


def enrolled(ca: Ca, tpm: HardwareTpm, host: str = HOST, now: int = NOW) -> Path:
    """Initialise a TPM and give it a certificate; the directory of the host's keys."""
    keys = tpm.directory / "host"
    keys.mkdir(exist_ok=True)
    with tpm.open() as hardware:
        hardware.initialise()
        write_certificate(keys, ca.issue(ak_key(hardware), Kind.AK, host, now))
    return keys


def ak_key(hardware: Hardware) -> ec.EllipticCurvePublicKey:
    return tpm_keys.check_attestation_key(hardware.ak_public).key


def write_certificate(keys: Path, der: bytes) -> None:
    (keys / "ak.crt").write_bytes(certificates.pem(der))


def made(tpm: HardwareTpm, keys: Path, binding: bytes = BINDING) -> Evidence:
    with tpm.open() as hardware:
        return evidence.make(hardware, keys, binding, PCRS)


def sign_in_software(key: ec.EllipticCurvePrivateKey, attest: bytes) -> Attestation:
    """What a TPM's attestation key would never sign without having made it."""
    r, s = decode_dss_signature(key.sign(attest, ec.ECDSA(SHA256())))
    numbers = b"".join(b"\0\x20" + number.to_bytes(32, "big") for number in (r, s))
    return Attestation(attest, TPMT_SIGNATURE.unmarshal(b"\x00\x18\x00\x0b" + numbers)[0].marshal())
