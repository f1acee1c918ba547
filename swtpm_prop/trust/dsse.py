"""DSSE envelopes (Dead Simple Signing Envelope, version 1.0): a payload, its type, and signatures over both."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import NamedTuple

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import SIGNATURES
from swtpm_prop.trust import keys, strict_json
from swtpm_prop.trust.keys import PublicKey, SigningKey


class Envelope(NamedTuple):
    """A parsed envelope; nothing in it is verified.

    Attributes:
        payload_type: how to read the payload; authenticated by the signatures.
        payload: the signed bytes.
        signatures: raw signatures. Their key ids are unauthenticated hints and are not kept.
    """

    payload_type: str
    payload: bytes
    signatures: tuple[bytes, ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding, which is what is signed (DSSE protocol, "Signature Definition")."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def parse(data: bytes) -> Envelope:
    """Read a JSON envelope; unknown fields are ignored, as the specification demands.

    Raises:
        TrustError: ``trust.too-large``, ``trust.json``, ``trust.field``, ``trust.base64``, ``trust.signatures``.
    """
    envelope = strict_json.parse(data)
    entries = strict_json.member(envelope, "signatures", list)
    if not 1 <= len(entries) <= SIGNATURES:
        raise TrustError(
            "trust.signatures", f"it has {len(entries)} signatures, allowed are 1 to {SIGNATURES}", strict_json.ANEW
        )
    kind = strict_json.member(envelope, "payloadType", str)
    payload = _decode(strict_json.member(envelope, "payload", str))
    return Envelope(kind, payload, tuple(_signature(entry) for entry in entries))


def sign(payload_type: str, payload: bytes, signers: Sequence[SigningKey]) -> bytes:
    """An envelope in JSON with one signature of each signer."""
    message = pae(payload_type, payload)
    signatures = [{"keyid": keys.keyid(key.public_key()), "sig": _encode(keys.sign(key, message))} for key in signers]
    envelope = {"payload": _encode(payload), "payloadType": payload_type, "signatures": signatures}
    return json.dumps(envelope).encode() + b"\n"


def verify(envelope: Envelope, trusted: Sequence[PublicKey], threshold: int) -> tuple[str, ...]:
    """Check that at least ``threshold`` of the trusted keys signed; a key counts once however often it signed.

    Args:
        trusted: distinct keys.
        threshold: 1 or more.

    Returns:
        The key ids of those that did.

    Raises:
        TrustError: ``trust.signature``.
    """
    message = pae(envelope.payload_type, envelope.payload)
    signed = tuple(keys.keyid(key) for key in trusted if _signed(key, envelope.signatures, message))
    if len(set(signed)) < max(threshold, 1):
        raise TrustError(
            "trust.signature",
            f"{len(set(signed))} of the issuer's keys signed it, needed are {threshold}",
            "get it again from the issuer, or check the issuer's keys in the trust file",
        )
    return signed


def _signed(key: PublicKey, signatures: Sequence[bytes], message: bytes) -> bool:
    for signature in signatures:
        try:
            keys.verify(key, signature, message)
        except TrustError:
            continue
        return True
    return False


def _signature(entry: object) -> bytes:
    if not isinstance(entry, dict):
        raise TrustError("trust.field", "a signature is no object", strict_json.ANEW)
    return _decode(strict_json.member(entry, "sig", str))


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    """Standard or URL-safe base64 (RFC 4648, sections 4 and 5), padded, and only the one canonical spelling."""
    altchars = b"-_" if "-" in text or "_" in text else b"+/"
    try:
        data = base64.b64decode(text, altchars, validate=True)
    except (binascii.Error, ValueError):
        raise TrustError("trust.base64", "its payload or a signature is no base64", strict_json.ANEW) from None
    if base64.b64encode(data, altchars) != text.encode("ascii"):
        raise TrustError("trust.base64", "its payload or a signature is no canonical base64", strict_json.ANEW)
    return data
