"""An issuer for tests: keys, a trust file, certificates good and bad."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust import certificate, dsse, issuers
from swtpm_prop.trust.certificate import Certificate, Claim
from swtpm_prop.trust.keys import PrivateKey
from swtpm_prop.trust.sources import Subject

ISSUER = "https://example.org/issuers/debian"
PREFIX = "https://example.org/properties"
BOOT = "https://example.org/properties/boot"
NOW = 1_800_000_000
ED25519: PrivateKey = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
P256: PrivateKey = ec.derive_private_key(0x1234567, ec.SECP256R1())


def public_pem(key: PrivateKey) -> str:
    encoding = serialization.Encoding.PEM
    return key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def private_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


APPROVES = "approves-hosts = true\n"
"""Behind `trust_text`: makes that issuer the authority of its host properties as well."""


def trust_text(*keys: PrivateKey, threshold: int = 1, prefix: str = PREFIX) -> str:
    listed = ", ".join(f'"""{public_pem(key)}"""' for key in keys or (ED25519,))
    return f'[[issuer]]\nid = "{ISSUER}"\nkeys = [{listed}]\nprefixes = ["{prefix}"]\nthreshold = {threshold}\n'


def trust(*keys: PrivateKey, threshold: int = 1) -> issuers.Trust:
    return issuers.parse(trust_text(*keys, threshold=threshold).encode(), Path())


def digests_of(thing: bytes, *names: str) -> dict[str, bytes]:
    return {name: hashlib.new(name, thing).digest() for name in names or [algorithm.name for algorithm in STRONG]}


def subject(thing: bytes, *names: str) -> Subject:
    return Subject(thing.decode(), digests_of(thing, *names))


def issue(
    *subjects: Subject,
    properties: tuple[str, ...] = (BOOT,),
    begins: int = NOW - 10,
    ends: int = NOW + 10,
    signers: tuple[PrivateKey, ...] = (ED25519,),
) -> bytes:
    claim = Claim(ISSUER, properties, subjects or (subject(b"kernel"),), begins, ends)
    return certificate.issue(claim, signers, NOW)


def issued(*subjects: Subject, **more: Any) -> Certificate:
    return certificate.read(issue(*subjects, **more))


def statement(data: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(base64.b64decode(json.loads(data)["payload"]))
    return loaded


def signed(value: Any, payload_type: str = certificate.PAYLOAD_TYPE, signer: PrivateKey = ED25519) -> bytes:
    """Anything, signed by a key the issuer really has."""
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return dsse.sign(payload_type, payload, [signer])


def names(directory: Path) -> list[str]:
    """What is in a directory, hidden files too."""
    return sorted(entry.name for entry in directory.iterdir())


def with_date(index: Path) -> list[str]:
    """An index, and the file that says until when it is good."""
    return [index.name, f"{index.name}.until"]
