"""Keys that sign certificates: Ed25519 (RFC 8032) and ECDSA on P-256 with SHA-256 (FIPS 186-5), in PEM."""

from __future__ import annotations

import hashlib
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256

from swtpm_prop.errors import TrustError

PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


class Device(Protocol):
    """A private key that only signs, wherever it is."""

    def public_key(self) -> PublicKey:
        """Its public half."""

    def sign(self, data: bytes) -> bytes:
        """As `sign` makes it for a key of this kind."""


SigningKey = PrivateKey | Device


def load_public(pem: bytes) -> PublicKey:
    """A SubjectPublicKeyInfo in PEM (RFC 7468, section 13).

    Raises:
        TrustError: ``trust.key``.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError("trust.key", "it holds no public key in PEM", "begin with '-----BEGIN PUBLIC KEY'") from error
    if isinstance(key, ed25519.Ed25519PublicKey) or (isinstance(key, ec.EllipticCurvePublicKey) and _is_p256(key)):
        return key
    raise _unfit()


def load_private(pem: bytes, passphrase: bytes | None) -> PrivateKey:
    """A PKCS #8 private key in PEM (RFC 7468, sections 10 and 11).

    Raises:
        TrustError: ``trust.key``, ``trust.key-passphrase`` (it needs one, has none, or this is the wrong one).
    """
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError as error:
        what = "the key needs a passphrase" if passphrase is None else "a passphrase is given, but the key has none"
        raise TrustError(
            "trust.key-passphrase", what, "give the passphrase if the key has one, and none otherwise"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise TrustError(
                "trust.key-passphrase", "the key does not open with this passphrase", "type it again"
            ) from error
        raise TrustError(
            "trust.key",
            "the file holds no private key in PEM",
            "name the private key's PEM file, which begins with -----BEGIN",
        ) from error
    if isinstance(key, ed25519.Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and _is_p256(key)):
        return key
    raise _unfit()


def keyid(key: PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo in hex; names a key for people, never decides anything."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def sign(key: SigningKey, data: bytes) -> bytes:
    """The signature: 64 bytes for Ed25519, a DER Ecdsa-Sig-Value (RFC 3279, section 2.2.3) for P-256."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(SHA256()))
    return key.sign(data)


def verify(key: PublicKey, signature: bytes, data: bytes) -> None:
    """Check one signature.

    Raises:
        TrustError: ``trust.signature``.
    """
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise TrustError(
            "trust.signature",
            f"the signature is not one of key {keyid(key)}",
            "see that the right key is named and the file came whole",
        ) from None


def _is_p256(key: ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)


def _unfit() -> TrustError:
    return TrustError("trust.key", "the key is neither Ed25519 nor ECDSA on P-256", "make one of these kinds")
