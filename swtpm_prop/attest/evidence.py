"""Evidence of a host's state: that one TPM of the fleet holds this storage key, these PCRs and this epoch, now.

Who judges it gives a fresh ``binding`` first. Three attestations answer, all by the host's attestation key over that
binding: TPM2_Certify of the storage parent, TPM2_Quote of the PCRs, TPM2_NV_Certify of the epoch counter.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss.constants import TPM2_GENERATED, TPM2_ST
from tpm2_pytss.types import TPMS_ATTEST

from swtpm_prop.attest import certificates, structures, tpm_keys, wire
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.structures import FOREIGN
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.custody.objects import Attestation
from swtpm_prop.custody.policy import COUNTER_BYTES, COUNTER_NAME, pcr_digest
from swtpm_prop.errors import AttestError, HostError, TrustError
from swtpm_prop.limits import FLEET_CERTIFICATE_BYTES, PCRS, QUOTE_TRIES
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.pcr import build_selection
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.strict_json import Object

_MEMBERS = frozenset({"akCertificate", "parent", "certify", "quote", "epoch", "pcrs"})


class Evidence(NamedTuple):
    """What a host shows; nothing of it is verified.

    Attributes:
        ak_certificate: of the attestation key, DER.
        parent_public: the storage parent, TPM2B_PUBLIC.
        certify: TPM2_Certify of the parent.
        quote: TPM2_Quote of ``pcrs``.
        epoch: TPM2_NV_Certify of the epoch counter.
        pcrs: PCR to its SHA-256 value, 32 bytes each.
    """

    ak_certificate: bytes
    parent_public: bytes
    certify: Attestation
    quote: Attestation
    epoch: Attestation
    pcrs: Mapping[int, bytes]


class Verified(NamedTuple):
    """What of a host may be relied on.

    Attributes:
        host: its name in the fleet.
        parent_name: Name of its storage parent, 34 bytes.
        parent_public: TPM2B_PUBLIC; what is duplicated to this parent opens in that TPM only.
        pcrs: PCR to its SHA-256 value, 32 bytes each.
        epoch: of its counter. Approvals of earlier epochs are dead in its TPM; later ones that are revoked by now are
            not, so who gives a key away must see that it has come as far as the authority.
    """

    host: str
    parent_name: bytes
    parent_public: bytes
    pcrs: Mapping[int, bytes]
    epoch: int


def make(hardware: Hardware, host_keys: Path, binding: bytes, pcrs: Sequence[int]) -> Evidence:
    """This host's evidence.

    Args:
        hardware: its TPM.
        host_keys: the directory with ``ak.crt``.
        binding: the 32 bytes of who will judge it.
        pcrs: which to show.

    Raises:
        HostError: ``host.not-enrolled``, ``host.pcrs-changing``; what the TPM refuses.
        AttestError: ``fleet.certificate``.
    """
    certificate = _own_certificate(host_keys)
    certify = hardware.certify_parent(binding)
    epoch = hardware.certify_epoch(binding)
    # The values do not come with the quote: something may be measured between the two commands.
    for _ in range(QUOTE_TRIES):
        values = hardware.pcrs(pcrs)
        quote = hardware.quote(pcrs, binding)
        if _quoted_digest(structures.attest(quote.attest, "quote")) == pcr_digest(values):
            return Evidence(certificate, hardware.parent_public, certify, quote, epoch, values)
    raise HostError("host.pcrs-changing", "this host's PCRs change while they are quoted", "try again in a moment")


def verify(evidence: Evidence, binding: bytes, ca: bytes, crl: bytes, host_name: str, now: int) -> Verified:
    """Check evidence; what is returned may be relied on.

    1. The attestation key's certificate is the fleet's, for attestation, in its window and not revoked. The fleet
       issued it only against the TPM's endorsement key, for a restricted key: what it signs as made by a TPM is.
    2. It is of the host we talk to: otherwise a host could relay another one's evidence.
    3. The storage parent is of our template: it cannot leave its TPM, and protects what lies below it.
    4. The parent is in the TPM of the attestation key: certified under its Name, over this binding.
    5. The PCRs are those of that TPM: quoted all, in the SHA-256 bank, over this binding.
    6. The epoch is that TPM's: its counter certified whole, over this binding.
    7. All three come of one boot: no reset or restart between them.

    Args:
        evidence: what the host shows.
        binding: the 32 bytes that we demanded.
        ca: the fleet's certificate, PEM.
        crl: what the fleet revoked, PEM.
        host_name: of the peer's TLS certificate.
        now: seconds since the epoch.

    Raises:
        AttestError: (1) as `certificates.verify`; (2) ``attest.other-host``; (3) as `tpm_keys.check_parent`;
            (4, 5, 6) with W of ``certify``, ``quote``, ``epoch``: ``attest.W-malformed``, ``attest.W-signature``,
            ``attest.W-magic``, ``attest.W-type``, ``attest.W-binding``; (4) ``attest.certify-name``;
            (5) ``attest.pcrs``, ``attest.quote-selection``, ``attest.quote-pcrs``; (6) ``attest.epoch-index``;
            (7) ``attest.reset-count``, ``attest.restart-count``, ``attest.clock-safe``, ``attest.firmware``.
    """
    # 1
    host = certificates.verify(evidence.ak_certificate, ca, crl, Kind.AK, now)
    # 2
    if host != host_name:
        raise AttestError("attest.other-host", f"'{host_name}' shows evidence of '{host}'", FOREIGN)
    # 3
    parent = tpm_keys.check_parent(evidence.parent_public)
    # 4
    key = certificates.read(evidence.ak_certificate).key
    certify = _attested(evidence.certify, "certify", TPM2_ST.ATTEST_CERTIFY, key, binding)
    _check_certified(certify, parent.name)
    # 5
    quote = _attested(evidence.quote, "quote", TPM2_ST.ATTEST_QUOTE, key, binding)
    _check_quoted(quote, evidence.pcrs)
    # 6
    counted = _attested(evidence.epoch, "epoch", TPM2_ST.ATTEST_NV, key, binding)
    epoch = _counter(counted)
    # 7
    _check_one_boot(certify, quote)
    _check_one_boot(certify, counted)
    return Verified(host, parent.name, evidence.parent_public, dict(evidence.pcrs), epoch)


def verify_certify(certify: Attestation, parent_name: bytes, key: ec.EllipticCurvePublicKey, qualifying: bytes) -> None:
    """Step 4 of `verify` alone, for an attestation key that has no certificate yet.

    Raises:
        AttestError: as step 4.
    """
    _check_certified(_attested(certify, "certify", TPM2_ST.ATTEST_CERTIFY, key, qualifying), parent_name)


def parent_name(parent_public: bytes) -> bytes:
    """The Name of a storage parent, 34 bytes: what a binding holds before anything is verified.

    Raises:
        AttestError: ``attest.parent-malformed``.
    """
    return structures.name(structures.public(parent_public, "parent"))


def to_object(evidence: Evidence) -> Object:
    """As `json.dumps` takes it."""
    return {
        "akCertificate": wire.encode(evidence.ak_certificate),
        "parent": wire.encode(evidence.parent_public),
        "certify": wire.attestation_to_object(evidence.certify),
        "quote": wire.attestation_to_object(evidence.quote),
        "epoch": wire.attestation_to_object(evidence.epoch),
        "pcrs": wire.pcrs_to_object(evidence.pcrs),
    }


def from_object(found: Object) -> Evidence:
    """Evidence from what `strict_json.parse` gave: the form of everything is checked, nothing is verified.

    Raises:
        AttestError: ``attest.evidence-malformed``.
    """
    with wire.reading("evidence"):
        wire.only(found, _MEMBERS)
        return Evidence(
            wire.decode(found, "akCertificate", FLEET_CERTIFICATE_BYTES),
            wire.decode(found, "parent"),
            wire.attestation(found, "certify"),
            wire.attestation(found, "quote"),
            wire.attestation(found, "epoch"),
            wire.pcrs(found, "pcrs"),
        )


# -- the steps ----------------------------------------------------------------------------------


def _attested(
    attestation: Attestation, what: str, kind: int, key: ec.EllipticCurvePublicKey, binding: bytes
) -> TPMS_ATTEST:
    """What the key's TPM attested, of one kind, over the binding (TPM 2.0 Library, part 2 section 10.12)."""
    # Before it is read: then what is read comes from a TPM of the fleet.
    structures.check_signature(key, attestation.signature, attestation.attest, what)
    attest = structures.attest(attestation.attest, what)
    if attest.magic != TPM2_GENERATED.VALUE:
        raise AttestError(f"attest.{what}-magic", f"the {what} was not made by a TPM", FOREIGN)
    if attest.type != kind:
        raise AttestError(f"attest.{what}-type", f"the {what} is an attestation of another kind", FOREIGN)
    if not hmac.compare_digest(bytes(attest.extraData), binding):
        raise AttestError(
            f"attest.{what}-binding",
            f"the {what} answers another question than ours",
            "try again; do not replay answers",
        )
    return attest


def _check_certified(certify: TPMS_ATTEST, name: bytes) -> None:
    if bytes(certify.attested.certify.name) != name:
        raise AttestError("attest.certify-name", "the storage parent is not the key that its TPM certified", FOREIGN)


def _check_quoted(quote: TPMS_ATTEST, pcrs: Mapping[int, bytes]) -> None:
    # Their values are hashed as one string, so a shorter one could lend bytes to the next.
    if not pcrs or not all(0 <= number < PCRS and len(value) == SHA256.size for number, value in pcrs.items()):
        raise AttestError("attest.pcrs", "the PCRs shown are none, or not of 32 bytes each", FOREIGN)
    if quote.attested.quote.pcrSelect.marshal() != build_selection(((SHA256, tuple(sorted(pcrs))),)):
        raise AttestError("attest.quote-selection", "the quote is of other PCRs than those shown", FOREIGN)
    if _quoted_digest(quote) != pcr_digest(pcrs):
        raise AttestError("attest.quote-pcrs", "the PCRs shown are not those that its TPM quoted", FOREIGN)


def _quoted_digest(quote: TPMS_ATTEST) -> bytes:
    digest: bytes = bytes(quote.attested.quote.pcrDigest)
    return digest


def _counter(counted: TPMS_ATTEST) -> int:
    nv = counted.attested.nv
    if bytes(nv.indexName) != COUNTER_NAME or nv.offset != 0 or len(bytes(nv.nvContents)) != COUNTER_BYTES:
        raise AttestError("attest.epoch-index", "what its TPM certified is not the epoch counter", FOREIGN)
    return int.from_bytes(bytes(nv.nvContents), "big")


_ONE_BOOT = (
    ("resetCount", "reset-count", "was reset"),
    ("restartCount", "restart-count", "was restarted or resumed"),
    ("safe", "clock-safe", "lost its clock"),
)


def _check_one_boot(one: TPMS_ATTEST, other: TPMS_ATTEST) -> None:
    """A TPM tells its boots apart by these (part 1 section 36)."""
    again = "try again; if it stays so, that host mixes answers of several boots"
    for field, id, happened in _ONE_BOOT:
        if getattr(one.clockInfo, field) != getattr(other.clockInfo, field):
            raise AttestError(f"attest.{id}", f"its TPM {happened} between two of its answers", again)
    if one.firmwareVersion != other.firmwareVersion:
        raise AttestError("attest.firmware", "its TPM got other firmware between two of its answers", again)


def _own_certificate(host_keys: Path) -> bytes:
    try:
        return certificates.der(read_file(host_keys / "ak.crt", FLEET_CERTIFICATE_BYTES))
    except TrustError:
        raise HostError(
            "host.not-enrolled", "this host has no certificate of a fleet", "enrol it: swtpm-prop host enroll"
        ) from None
