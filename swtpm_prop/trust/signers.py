"""Keys that sign a store: in files, or wherever securesystemslib has a signer for (HSM by PKCS #11, cloud services)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signature, Signer, SSlibKey

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import KEY_BYTES
from swtpm_prop.trust import keys
from swtpm_prop.trust.files import read_file

Ask = Callable[[str], str]
"""Asks a person for the named secret."""

_PROBE = b"swtpm-prop: which key is this?"


def load_public(path: Path) -> Key:
    """A public key from a PEM file, Ed25519 or ECDSA on P-256.

    Raises:
        TrustError: ``trust.key``, and what `read_file` raises.
    """
    return SSlibKey.from_crypto(keys.load_public(read_file(path, KEY_BYTES)))


def open_signers(names: Sequence[str], known: Iterable[Key], ask: Ask) -> list[Signer]:
    """A signer for each name.

    Args:
        names: a PEM file's path, or the URI of a securesystemslib signer such as ``hsm:2?label=TOKEN``.
        known: public keys of the store; the key behind each name must be one of them.
        ask: for passphrases and PINs.

    Raises:
        StoreError: ``store.key-foreign``: the key is none of the store's. ``store.signer``: it cannot be used.
        TrustError: what `keys.load_private` and `read_file` raise.
    """
    candidates = {key.keyid: key for key in known}
    return [_open(name, candidates, ask) for name in names]


def _open(name: str, known: Mapping[str, Key], ask: Ask) -> Signer:
    scheme, _, rest = name.partition(":")
    if scheme in SIGNER_FOR_URI_SCHEME and scheme != CryptoSigner.SCHEME:
        return _behind(name, known, ask)
    path = rest if scheme in ("file", CryptoSigner.SCHEME) else name
    signer = CryptoSigner(_private(Path(path), ask))
    if signer.public_key.keyid not in known:
        raise _foreign(name)
    return signer


def _private(path: Path, ask: Ask) -> keys.PrivateKey:
    pem = read_file(path, KEY_BYTES)
    return keys.load_private(pem, ask(f"passphrase of {path}").encode() if b"ENCRYPTED" in pem else None)


def _behind(uri: str, known: Mapping[str, Key], ask: Ask) -> Signer:
    """Which of the store's keys it is shows in a signature: one only, for a token counts wrong PINs."""
    ask_once = cache(lambda secret: ask(f"{secret} of {uri}"))
    try:
        signature = _any_signer(uri, known, ask_once).sign(_PROBE)
        for key in known.values():
            with suppress(UnverifiedSignatureError, VerificationError):
                key.verify_signature(Signature(key.keyid, signature.signature), _PROBE)
                return Signer.from_priv_key_uri(uri, key, ask_once)
    except Exception as error:
        # Signers let through whatever the libraries behind them raise, with or without words.
        why = f"{type(error).__name__} {error}".strip()
        raise StoreError("store.signer", f"'{uri}' does not sign: {why}", "see its token, label and PIN") from error
    raise _foreign(uri)


def _any_signer(uri: str, known: Mapping[str, Key], ask: Ask) -> Signer:
    """One for any of the keys that is of the kind this signer has."""
    failure = ValueError("the store has no keys")
    for key in known.values():
        try:
            return Signer.from_priv_key_uri(uri, key, ask)
        except ValueError as error:
            failure = error
    raise failure


def _foreign(name: str) -> StoreError:
    return StoreError("store.key-foreign", f"the key '{name}' is none of this store's", "add it with 'store root'")
