"""The hash algorithms that libtpms keeps PCR banks for."""

from __future__ import annotations

from typing import NamedTuple


class HashAlgorithm(NamedTuple):
    """One PCR hash algorithm.

    Attributes:
        id: TPM_ALG_ID (TCG algorithm registry).
        name: as hashlib spells it.
        size: length of its digests in bytes.
        wire: ``id`` as a command has it, 2 bytes.
    """

    id: int
    name: str
    size: int
    wire: bytes


SHA1 = HashAlgorithm(0x0004, "sha1", 20, b"\x00\x04")
SHA256 = HashAlgorithm(0x000B, "sha256", 32, b"\x00\x0b")
SHA384 = HashAlgorithm(0x000C, "sha384", 48, b"\x00\x0c")
SHA512 = HashAlgorithm(0x000D, "sha512", 64, b"\x00\x0d")

ALGORITHMS = (SHA1, SHA256, SHA384, SHA512)
"""In the order in which libtpms answers TPM2_PCR_Event."""

BY_ID = {algorithm.id: algorithm for algorithm in ALGORITHMS}
BY_WIRE = {algorithm.wire: algorithm for algorithm in ALGORITHMS}
BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}

STRONG = (SHA256, SHA384, SHA512)
"""Algorithms a certificate may rest on: SHA-1 never counts."""


class Digest(NamedTuple):
    """One TPMT_HA: an algorithm and its digest, ``algorithm.size`` bytes."""

    algorithm: HashAlgorithm
    value: bytes


Digests = tuple[tuple[HashAlgorithm, bytes], ...]
"""The digests of a command, each a pair as `Digest` is one."""
