"""What keys of a host's TPM must be: the storage parent that guests' keys go to, the attestation key, the EK."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss.constants import TPM2_ALG, TPMA_OBJECT
from tpm2_pytss.types import TPMT_PUBLIC

from swtpm_prop.attest import structures
from swtpm_prop.attest.structures import FOREIGN
from swtpm_prop.errors import AttestError

_FIXED = (
    (TPMA_OBJECT.FIXEDTPM, "fixed-tpm", "can leave its TPM"),
    (TPMA_OBJECT.FIXEDPARENT, "fixed-parent", "can be moved below another key"),
    (TPMA_OBJECT.SENSITIVEDATAORIGIN, "origin", "was not made by its TPM"),
    (TPMA_OBJECT.RESTRICTED, "restricted", "is not restricted to what a TPM structures"),
)
"""Attributes without which a key protects nothing (TPM 2.0 Library, part 2 section 8.3), each with its own refusal."""

_STORAGE = bytes.fromhex("0023 000b 00030472 0000 0006 0080 0043 0010 0003 0010")
"""Start of the storage parent's TPMT_PUBLIC, all but the point: ECC, SHA-256, fixedTPM fixedParent sensitiveDataOrigin
userWithAuth noDA restricted decrypt, no policy, AES-128-CFB, no scheme, P-256, no KDF (part 2 section 12.2.4)."""

_ATTESTATION = bytes.fromhex("0023 000b 00050472 0000 0010 0018 000b 0003 0010")
"""The same of the attestation key: sign instead of decrypt, no symmetric cipher, ECDSA with SHA-256."""

_EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(TPM_RH_ENDORSEMENT) (TCG EK Credential Profile 2.5, section B.6.2)."""

_EK = bytes.fromhex("0001 000b 000300b2 0020") + _EK_POLICY + bytes.fromhex("0006 0080 0043 0010 0800 00000000")
"""The same of the EK: template L-1 of RSA 2048 (TCG EK Credential Profile 2.5, section B.3.3)."""


class HostKey(NamedTuple):
    """A key in a host's TPM: its Name (34 bytes) and its public half."""

    name: bytes
    key: ec.EllipticCurvePublicKey


def check_parent(public: bytes) -> HostKey:
    """Check that what is encrypted to this key opens in its TPM only, and only as a key or secret below it.

    Args:
        public: TPM2B_PUBLIC.

    Raises:
        AttestError: ``attest.parent-malformed``; ``attest.parent-fixed-tpm``, ``attest.parent-fixed-parent``,
            ``attest.parent-origin``, ``attest.parent-restricted``, ``attest.parent-decrypt``: lacks that attribute;
            ``attest.parent-template``: is otherwise not as this software makes it.
    """
    return _check(public, "parent", (TPMA_OBJECT.DECRYPT, "decrypt", "does not decrypt"), _STORAGE)


def check_attestation_key(public: bytes) -> HostKey:
    """Check that what this key signs as made by a TPM was made by its TPM.

    Raises:
        AttestError: ``attest.ak-malformed``, ``attest.ak-fixed-tpm``, ``attest.ak-fixed-parent``,
            ``attest.ak-origin``, ``attest.ak-restricted``, ``attest.ak-sign``, ``attest.ak-template``; as above.
    """
    return _check(public, "ak", (TPMA_OBJECT.SIGN_ENCRYPT, "sign", "does not sign"), _ATTESTATION)


def check_endorsement_key(public: bytes) -> TPMT_PUBLIC:
    """Check that the public area is that of an RSA-2048 EK of the default template.

    That the key is in a TPM only its certificate or its keeper can say. The template must be this one: were the key
    not restricted, whoever had the TPM could decrypt a credential without activating it.

    Raises:
        AttestError: ``attest.ek-malformed``, ``attest.ek-template``.
    """
    area = structures.public(public, "ek")
    if not _has_start(public, _EK) or area.type != TPM2_ALG.RSA or len(bytes(area.unique.rsa)) != 256:
        raise AttestError(
            "attest.ek-template", "the endorsement key is not of the default RSA-2048 template", "take another host"
        )
    return area


def _check(public: bytes, what: str, use: tuple[int, str, str], start: bytes) -> HostKey:
    area = structures.public(public, what)
    for attribute, id, lacks in (*_FIXED, use):
        if not area.objectAttributes & attribute:
            raise AttestError(f"attest.{what}-{id}", f"{_NAMES[what]} {lacks}", FOREIGN)
    key = structures.p256(area)
    if key is None or not _has_start(public, start):
        raise AttestError(
            f"attest.{what}-template",
            f"{_NAMES[what]} is not as 'swtpm-prop host init' makes it",
            "run it on that host",
        )
    return HostKey(structures.name(area), key)


_NAMES = {"parent": "the storage parent", "ak": "the attestation key"}


def _has_start(public: bytes, start: bytes) -> bool:
    (size,) = struct.unpack_from(">H", public)
    return public[2 : 2 + len(start)] == start and size == len(public) - 2
