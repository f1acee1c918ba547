"""What passes between the host's TPM, files and other hosts: marshalled TPM structures, opaque here."""

from __future__ import annotations

from typing import NamedTuple


class Sealed(NamedTuple):
    """A sealed secret, or a key; loads only under the parent in the TPM that made it.

    Attributes:
        public: TPM2B_PUBLIC, its two bytes of size included (TPM 2.0 Library, part 2 section 12.2.5).
        private: TPM2B_PRIVATE, likewise (part 2 section 12.3.7).
    """

    public: bytes
    private: bytes


class ImportBlob(NamedTuple):
    """A sealed secret on its way to one other TPM, encrypted to that TPM's parent (part 1 section 23.3.2).

    Attributes:
        public: TPM2B_PUBLIC.
        duplicate: TPM2B_PRIVATE, with the outer wrap.
        seed: TPM2B_ENCRYPTED_SECRET, what the outer wrap is made from.
    """

    public: bytes
    duplicate: bytes
    seed: bytes


class Attestation(NamedTuple):
    """What an attestation key signed.

    Attributes:
        attest: TPMS_ATTEST, the signed bytes (part 2 section 10.12.12).
        signature: TPMT_SIGNATURE (part 2 section 11.3.4).
    """

    attest: bytes
    signature: bytes
