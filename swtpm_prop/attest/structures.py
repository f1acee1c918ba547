"""TPM structures that come from elsewhere: read strictly, so that one meaning has one spelling.

The unmarshalling is tpm2-tss's; what it returns is marshalled again and must be the bytes that came. So nothing can
hide in trailing bytes or in a size that does not fit (TPM 2.0 Library, part 2; all integers big endian).
"""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC
from tpm2_pytss.TSS2_Exception import TSS2_Exception
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPMS_ATTEST,
    TPMT_PUBLIC,
    TPMT_SIGNATURE,
)

from swtpm_prop.errors import AttestError
from swtpm_prop.limits import TPM_STRUCTURE_BYTES

FOREIGN = "do not trust the host that shows this until its keeper knows why: this never comes of a fault"
"""What to do about evidence that a host does not make by mistake."""

_P256_BYTES = 32


def public(data: bytes, what: str) -> TPMT_PUBLIC:
    """The public area in a TPM2B_PUBLIC.

    Args:
        data: 2 bytes of length and the area.
        what: names it in the error's id and text.

    Raises:
        AttestError: ``attest.<what>-malformed``.
    """
    area: TPMT_PUBLIC = _unmarshal(TPM2B_PUBLIC, data, what).publicArea
    return area


def attest(data: bytes, what: str) -> TPMS_ATTEST:
    """What a TPM attested.

    Raises:
        AttestError: ``attest.<what>-malformed``.
    """
    return _unmarshal(TPMS_ATTEST, data, what)


def check_credential(credential: bytes, secret: bytes, what: str) -> None:
    """Check the form of a TPM2B_ID_OBJECT and its TPM2B_ENCRYPTED_SECRET.

    Raises:
        AttestError: ``attest.<what>-malformed``.
    """
    _unmarshal(TPM2B_ID_OBJECT, credential, what)
    _unmarshal(TPM2B_ENCRYPTED_SECRET, secret, what)


def name(public_area: TPMT_PUBLIC) -> bytes:
    """The Name: nameAlg (2 bytes) and the hash of the area (part 1, section 16)."""
    return bytes(public_area.get_name())


def p256(public_area: TPMT_PUBLIC) -> ec.EllipticCurvePublicKey | None:
    """The key in the area; None if it is no point of P-256."""
    if public_area.type != TPM2_ALG.ECC or public_area.parameters.eccDetail.curveID != TPM2_ECC.NIST_P256:
        return None
    x, y = bytes(public_area.unique.ecc.x), bytes(public_area.unique.ecc.y)
    if len(x) != _P256_BYTES or len(y) != _P256_BYTES:
        return None
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + x + y)
    except ValueError:
        return None


def check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes, what: str) -> None:
    """Check a TPMT_SIGNATURE, ECDSA with SHA-256.

    Raises:
        AttestError: ``attest.<what>-malformed``; ``attest.<what>-signature``: it is not this key's, or of another kind.
    """
    parsed = _unmarshal(TPMT_SIGNATURE, signature, what)
    try:
        if parsed.sigAlg != TPM2_ALG.ECDSA or parsed.signature.ecdsa.hash != TPM2_ALG.SHA256:
            raise InvalidSignature
        halves = (parsed.signature.ecdsa.signatureR, parsed.signature.ecdsa.signatureS)
        r, s = (int.from_bytes(bytes(half), "big") for half in halves)
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise AttestError(
            f"attest.{what}-signature", f"the {what} is not signed by the certified attestation key", FOREIGN
        ) from None


def _unmarshal(kind: Any, data: bytes, what: str) -> Any:
    try:
        if len(data) > TPM_STRUCTURE_BYTES:
            raise ValueError
        parsed, used = kind.unmarshal(data)
        if used != len(data) or parsed.marshal() != data:
            raise ValueError
    except (TSS2_Exception, ValueError, TypeError):
        raise AttestError(
            f"attest.{what}-malformed", f"the {what} is not the TPM structure it should be", FOREIGN
        ) from None
    return parsed
