"""The policy of a guest's key: it opens, and leaves for another host, only in a state that the authority approved now.

Everything here is computed without a TPM. All digests are SHA-256, 32 bytes; the formulas are those of TPM 2.0
Library, part 3 (23.7 PolicyPCR, 23.9 PolicyNV, 23.16 PolicyAuthorize, 23.11 PolicyCommandCode, 23.6 PolicyOR).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.pcr import build_selection

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

COUNTER_HANDLE = 0x01805350
"""The epoch counter's NV index, in the owner's range (TCG registry of reserved handles, section 2.2)."""

COUNTER_BYTES = 8
"""What it holds, big endian (part 1 section 37.2.4.2)."""

_COUNTER_ATTRIBUTES = 0x02060014
"""Of TPMA_NV: a counter (bits 7:4 = 1); read by owner and with the empty password, raised with the empty password; not
under dictionary attack protection (part 2 section 13.4). Raising needs no owner: more epoch only ever closes."""

_NV_WRITTEN = 0x20000000

_AUTHORITY_ATTRIBUTES = 0x00040040
"""Of TPMA_OBJECT: sign, userWithAuth (part 2 section 8.3)."""

_ALG_ECC = 0x0023
_ALG_NULL = 0x0010
_ECC_NIST_P256 = 0x0003
_EO_UNSIGNED_LE = 0x0009

_CC_DUPLICATE = 0x0000014B
_CC_POLICY_NV = 0x00000149
_CC_UNSEAL = 0x0000015E
_CC_POLICY_AUTHORIZE = 0x0000016A
_CC_POLICY_COMMAND_CODE = 0x0000016C
_CC_POLICY_OR = 0x00000171
_CC_POLICY_PCR = 0x0000017F

_START = bytes(32)


class Approval(NamedTuple):
    """An authority's word that a host in this state has a property, as long as no TPM knows a later epoch.

    Attributes:
        label: what people call the state.
        property: URI of the host property.
        pcrs: the state: PCR to value in the SHA-256 bank, 32 bytes.
        epoch: last epoch in which it holds.
        signature: DER Ecdsa-Sig-Value over `approved` followed by `policy_ref`, hashed with SHA-256.
    """

    label: str
    property: str
    pcrs: Mapping[int, bytes]
    epoch: int
    signature: bytes

    def policy(self) -> bytes:
        """The policy digest that is approved."""
        return approved(self.pcrs, self.epoch)


class Authorization(NamedTuple):
    """What opens a key: whose word it needs, about what, and that word."""

    authority: EllipticCurvePublicKey
    property: str
    approval: Approval


class KeyPolicy(NamedTuple):
    """The policy of a guest's key: PolicyOR of two branches.

    Attributes:
        digest: the key's authPolicy.
        branches: for TPM2_Unseal and for TPM2_Duplicate.
    """

    digest: bytes
    branches: tuple[bytes, bytes]


def counter_public(written: bool) -> bytes:
    """The epoch counter's TPMS_NV_PUBLIC (part 2 section 13.5): the same on every host."""
    attributes = _COUNTER_ATTRIBUTES | (_NV_WRITTEN if written else 0)
    return struct.pack(">IHIHH", COUNTER_HANDLE, SHA256.id, attributes, 0, COUNTER_BYTES)


def name(public: bytes) -> bytes:
    """The Name of an object or index: name algorithm and digest of its public area, 34 bytes (part 1 section 16)."""
    return SHA256.wire + hashlib.sha256(public).digest()


COUNTER_NAME = name(counter_public(written=True))
"""The Name of the epoch counter once it counts; hence approvals are made without asking a TPM."""


def authority_public(key: EllipticCurvePublicKey) -> bytes:
    """TPMT_PUBLIC of an authority's P-256 key as this software loads it (part 2 section 12.2.4)."""
    point = key.public_numbers()
    head = struct.pack(">HHIH", _ALG_ECC, SHA256.id, _AUTHORITY_ATTRIBUTES, 0)
    parameters = struct.pack(">HHHH", _ALG_NULL, _ALG_NULL, _ECC_NIST_P256, _ALG_NULL)
    return head + parameters + _sized(point.x.to_bytes(32, "big")) + _sized(point.y.to_bytes(32, "big"))


def authority_name(key: EllipticCurvePublicKey) -> bytes:
    """The Name by which a key's policy knows the authority, 34 bytes."""
    return name(authority_public(key))


def policy_ref(property: str) -> bytes:
    """What ties an approval to a host property."""
    return hashlib.sha256(b"swtpm-prop/v1/host-property\0" + property.encode("utf-8")).digest()


def approved(pcrs: Mapping[int, bytes], epoch: int) -> bytes:
    """The policy of one approved state: PolicyPCR, then PolicyNV(epoch counter <= ``epoch``)."""
    selection = build_selection(((SHA256, tuple(sorted(pcrs))),))
    state = _extended(_START, _CC_POLICY_PCR, selection, pcr_digest(pcrs))
    compared = hashlib.sha256(epoch_operand(epoch) + struct.pack(">HH", 0, _EO_UNSIGNED_LE)).digest()
    return _extended(state, _CC_POLICY_NV, compared, COUNTER_NAME)


def pcr_digest(pcrs: Mapping[int, bytes]) -> bytes:
    """The digest that TPM2_PolicyPCR and a quote have for these values: their hash in the order of the PCRs."""
    return hashlib.sha256(b"".join(pcrs[number] for number in sorted(pcrs))).digest()


def epoch_operand(epoch: int) -> bytes:
    """An epoch as the counter has it."""
    return epoch.to_bytes(COUNTER_BYTES, "big")


def to_sign(approval_policy: bytes, property: str) -> bytes:
    """The 64 bytes an authority signs; their SHA-256 is TPM2_PolicyAuthorize's aHash."""
    return approval_policy + policy_ref(property)


def key_policy(authority: bytes, property: str) -> KeyPolicy:
    """The policy of the key of a guest that demands the property.

    Args:
        authority: `authority_name` of who says which states have it.
    """
    authorized = hashlib.sha256(_extended(_START, _CC_POLICY_AUTHORIZE, authority) + policy_ref(property)).digest()
    unseal, duplicate = (
        _extended(authorized, _CC_POLICY_COMMAND_CODE, struct.pack(">I", code)) for code in (_CC_UNSEAL, _CC_DUPLICATE)
    )
    return KeyPolicy(_extended(_START, _CC_POLICY_OR, unseal, duplicate), (unseal, duplicate))


def _extended(digest: bytes, code: int, *parts: bytes) -> bytes:
    return hashlib.sha256(digest + struct.pack(">I", code) + b"".join(parts)).digest()


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
