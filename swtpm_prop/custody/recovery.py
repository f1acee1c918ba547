"""A guest's key for the day its host is lost: encrypted to the operator's recovery keys, which stay offline.

HPKE (RFC 9180) in its base mode with DHKEM(P-256, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from swtpm_prop.errors import HostError, TrustError
from swtpm_prop.limits import KEY_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hpke import Suite

_INFO = b"swtpm-prop/v1/recovery\0"


class Wrap(NamedTuple):
    """A guest's key, encrypted to one recovery key.

    Attributes:
        keyid: of the recovery key (`trust.keys.keyid`).
        ciphertext: the encapsulated key, 65 bytes, and the key encrypted, 48 bytes.
    """

    keyid: str
    ciphertext: bytes


def load_keys(paths: Iterable[Path]) -> list[EllipticCurvePublicKey]:
    """The operator's recovery keys, as host.toml names them.

    Raises:
        HostError: ``custody.recovery-key``: one is missing, or is no P-256 public key.
    """
    return [_load(path) for path in paths]


def wrap(key: bytes, uuid: str, recovery: Iterable[EllipticCurvePublicKey]) -> tuple[Wrap, ...]:
    """Encrypt the guest's key to each of the recovery keys."""
    from swtpm_prop.trust.keys import keyid

    return tuple(Wrap(keyid(public), _suite().encrypt(key, public, info=_info(uuid))) for public in recovery)


def unwrap(wraps: Sequence[Wrap], uuid: str, private: EllipticCurvePrivateKey) -> bytes:
    """The guest's key, by a recovery key.

    Raises:
        HostError: ``custody.recovery-key``: it is none that this guest's key was encrypted to;
            ``custody.recovery-damaged``.
    """
    from cryptography.exceptions import InvalidTag

    from swtpm_prop.trust.keys import keyid

    mine = keyid(private.public_key())
    found = next((wrapped for wrapped in wraps if wrapped.keyid == mine), None)
    if found is None:
        known = ", ".join(wrapped.keyid[:16] for wrapped in wraps) or "none"
        raise HostError(
            "custody.recovery-key",
            f"the guest's key is not encrypted to recovery key {mine[:16]}, but to {known}",
            "name the private key of one of these",
        )
    try:
        return _suite().decrypt(found.ciphertext, private, info=_info(uuid))
    except InvalidTag as error:
        raise HostError(
            "custody.recovery-damaged",
            "what the recovery key should open is damaged, or belongs to another guest",
            "take swtpm-prop-recovery.json from another backup of this guest's TPM state",
        ) from error


def to_json(wraps: Iterable[Wrap]) -> dict[str, str]:
    """For a file: recovery key to ciphertext in hexadecimal digits."""
    return {wrapped.keyid: wrapped.ciphertext.hex() for wrapped in wraps}


def from_json(value: Mapping[str, object]) -> tuple[Wrap, ...]:
    """What `to_json` made.

    Raises:
        ValueError: it did not make this.
    """
    return tuple(Wrap(keyid, bytes.fromhex(str(ciphertext))) for keyid, ciphertext in value.items())


def _load(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    from swtpm_prop.trust.files import read_file
    from swtpm_prop.trust.keys import load_public

    mend = "correct custody.recovery in host.toml; it names the public keys in PEM"
    try:
        key = load_public(read_file(path, KEY_BYTES))
    except TrustError as error:
        raise HostError("custody.recovery-key", f"recovery key '{path}': {error.what}", mend) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise HostError("custody.recovery-key", f"recovery key '{path}' is not one on P-256", mend)
    return key


def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(uuid: str) -> bytes:
    return _INFO + uuid.encode("ascii")
