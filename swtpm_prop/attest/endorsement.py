"""Who vouches for a TPM: the chain of its endorsement key's certificate, up to a maker that the fleet trusts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtensionOID
from tpm2_pytss.types import TPMT_PUBLIC

from swtpm_prop.attest.certificates import MALFORMED
from swtpm_prop.errors import AttestError
from swtpm_prop.limits import EK_CHAIN, MAKERS_BYTES
from swtpm_prop.trust.files import read_file

_EK_USAGE = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate (TCG EK Credential Profile 2.5, section 3.2.16)."""

_UNDERSTOOD = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
"""Critical extensions that may be there. The alternative name holds the TPM's maker and model, the policies whose rules
the maker kept; whoever trusts the maker's root has accepted both."""


def load_makers(paths: Sequence[Path]) -> tuple[x509.Certificate, ...]:
    """Makers' certificates, roots and intermediates, from PEM files with one or more each.

    Raises:
        TrustError: as `read_file`.
        AttestError: ``attest.makers``.
    """
    return tuple(certificate for path in paths for certificate in _bundle(path))


def verify(ek: TPMT_PUBLIC, certificate: bytes | None, makers: Sequence[x509.Certificate], now: int) -> str:
    """Check that a maker vouches for an endorsement key.

    1. There is a certificate of the endorsement key, for that use and no other.
    2. It is of this very key.
    3. A chain of the given certificates leads from it to one of them that signs itself.
    4. Each is in its window, has no critical extension that is not understood, and all but the first are CAs.

    Args:
        ek: its public area, of the RSA template.
        certificate: DER, as the TPM has it in NV; None if it has none.
        makers: roots, which are trusted, and intermediates, which are not by themselves.
        now: seconds since the epoch.

    Returns:
        The root's name, for people.

    Raises:
        AttestError: (1) ``attest.ek-certificate-missing``, ``attest.ek-certificate``; (2) ``attest.ek-foreign``;
            (3, 4) ``attest.ek-chain``.
    """
    # 1
    if certificate is None:
        raise AttestError("attest.ek-certificate-missing", "the TPM has no endorsement certificate", _BY_HAND)
    leaf = _leaf(certificate)
    # 2
    public = leaf.public_key()
    if not isinstance(public, rsa.RSAPublicKey) or public.public_numbers() != _numbers(ek):
        raise AttestError(
            "attest.ek-foreign", "the endorsement certificate is another TPM's", "refuse this host: it is no mistake"
        )
    # 3, 4
    return _root(leaf, makers, datetime.fromtimestamp(now, UTC)).subject.rfc4514_string()


_BY_HAND = "see the key's fingerprint on the host itself ('host init' prints it), then admit it with --trust-ek-by-hand"


def _leaf(data: bytes) -> x509.Certificate:
    try:
        leaf = x509.load_der_x509_certificate(data)
        usages = tuple(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if usages != (_EK_USAGE,) or _is_ca(leaf):
            raise ValueError
        leaf.public_key()
    except MALFORMED:
        raise AttestError(
            "attest.ek-certificate", "the TPM's endorsement certificate is not one of an endorsement key", _BY_HAND
        ) from None
    return leaf


def _root(leaf: x509.Certificate, makers: Sequence[x509.Certificate], now: datetime) -> x509.Certificate:
    """Breadth first: makers have several CAs of one name; the signature says which it was."""
    reached = [leaf] if _acceptable(leaf, now) else []
    for _ in range(EK_CHAIN):
        above = [maker for maker in makers if _acceptable(maker, now) and any(_issued(low, maker) for low in reached)]
        root = next((maker for maker in above if maker.subject == maker.issuer), None)
        if root is not None:
            return root
        reached = above
    raise AttestError(
        "attest.ek-chain",
        f"no trusted maker vouches for the TPM: its certificate is of '{leaf.issuer.rfc4514_string()[:200]}'",
        "give that maker's root and intermediates with --ek-roots; " + _BY_HAND,
    )


def _issued(low: x509.Certificate, maker: x509.Certificate) -> bool:
    try:
        low.verify_directly_issued_by(maker)
        return _is_ca(maker)
    except MALFORMED:
        return False


def _acceptable(certificate: x509.Certificate, now: datetime) -> bool:
    try:
        critical = {extension.oid for extension in certificate.extensions if extension.critical}
    except MALFORMED:
        return False
    return critical <= _UNDERSTOOD and certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            return False
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return False


def _numbers(ek: TPMT_PUBLIC) -> rsa.RSAPublicNumbers:
    # The template has 0 for the default exponent (TPM 2.0 Library, part 2 section 12.2.3.5).
    return rsa.RSAPublicNumbers(ek.parameters.rsaDetail.exponent or 65537, int.from_bytes(bytes(ek.unique.rsa), "big"))


def _bundle(path: Path) -> Iterator[x509.Certificate]:
    try:
        yield from x509.load_pem_x509_certificates(read_file(path, MAKERS_BYTES))
    except MALFORMED:
        raise AttestError("attest.makers", f"'{path}' holds no certificates in PEM", "name makers' PEM files") from None
