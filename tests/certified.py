"""An index made as a host makes it: a certificate issued, verified and built in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust import build, certificate
from swtpm_prop.trust.issuers import Issuer
from swtpm_prop.trust.sources import Subject

ISSUER = "https://example.org/images"
PROPERTY = "https://example.org/properties/boot"
GOOD = b"this is certified"


def subject(data: bytes) -> Subject:
    """A subject for the content ``data``."""
    return Subject("data", {a.name: hashlib.new(a.name, data).digest() for a in STRONG})


def build_index(path: Path, contents: Iterable[bytes], properties: Sequence[str] = (PROPERTY,)) -> None:
    """Build an index at ``path`` that certifies the digests of ``contents``; an empty one certifies something else."""
    key = Ed25519PrivateKey.generate()
    trust = {ISSUER: Issuer(ISSUER, (key.public_key(),), ("https://example.org/properties/",), 1)}
    now = int(time.time())
    subjects = [subject(data) for data in contents] or [subject(b"something else")]
    claim = certificate.Claim(ISSUER, properties, subjects, now - 60, now + 86400)
    verified = certificate.verify(certificate.issue(claim, [key], now), trust, now)
    build.build(path, [verified], None, lambda doing, done: None)
    path.chmod(0o644)
