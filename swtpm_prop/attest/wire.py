"""How evidence and enrolments are written as JSON: bytes in base64, PCRs in hex, and nothing beside what is known."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from swtpm_prop.custody.objects import Attestation
from swtpm_prop.errors import AttestError, TrustError
from swtpm_prop.limits import PCRS, TPM_STRUCTURE_BYTES
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.trust.strict_json import Object, member

_PCR = re.compile(r"0|[1-9][0-9]?")
_DIGEST = re.compile(rf"[0-9a-f]{{{2 * SHA256.size}}}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever is wrong inside with the form of a document is one error.

    Args:
        what: names the document in the error's id and text.

    Raises:
        AttestError: ``attest.<what>-malformed``.
    """
    try:
        yield
    except (TrustError, ValueError) as error:
        why = error.what if isinstance(error, TrustError) else str(error)
        raise AttestError(
            f"attest.{what}-malformed", f"this is no {what} of this software: {why}", "have it made and sent again"
        ) from None


def only(found: Object, names: Set[str]) -> None:
    """Refuse members that are not known.

    Raises:
        ValueError: with the name of one.
    """
    unknown = sorted(found.keys() - names)
    if unknown:
        raise ValueError(f"'{unknown[0][:80]}' is not known")


def encode(data: bytes) -> str:
    """Base64 (RFC 4648, section 4)."""
    return base64.b64encode(data).decode("ascii")


def decode(found: Object, name: str, most: int = TPM_STRUCTURE_BYTES) -> bytes:
    """The bytes in a member.

    Raises:
        TrustError: it is missing or no string.
        ValueError: it is no base64, or decodes to more than ``most`` bytes.
    """
    text = member(found, name, str)
    if len(text) > most * 2:
        raise ValueError(f"'{name}' is too long")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"'{name}' is no base64") from None
    if len(data) > most or encode(data) != text:
        raise ValueError(f"'{name}' is too long or no canonical base64")
    return data


def attestation_to_object(attestation: Attestation) -> Object:
    """As `json.dumps` takes it."""
    return {"attest": encode(attestation.attest), "signature": encode(attestation.signature)}


def attestation(found: Object, name: str) -> Attestation:
    """The attestation in a member.

    Raises:
        TrustError: it is missing or of another form.
        ValueError: the same.
    """
    inside = member(found, name, dict)
    only(inside, {"attest", "signature"})
    return Attestation(decode(inside, "attest"), decode(inside, "signature"))


def pcrs_to_object(pcrs: Mapping[int, bytes]) -> Object:
    """As `json.dumps` takes it."""
    return {str(number): value.hex() for number, value in sorted(pcrs.items())}


def pcrs(found: Object, name: str) -> dict[int, bytes]:
    """PCRs and their SHA-256 values in a member.

    Raises:
        TrustError: it is missing or no object.
        ValueError: a number or a value is none.
    """
    values: dict[int, bytes] = {}
    for number, value in member(found, name, dict).items():
        if _PCR.fullmatch(number) is None or int(number) >= PCRS or not _is_digest(value):
            raise ValueError(f"'{name}' holds something else than PCRs")
        values[int(number)] = bytes.fromhex(value)
    return values


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
