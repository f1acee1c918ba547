"""Keys that sign: in files, or wherever securesystemslib has a signer for (HSM by PKCS #11, cloud services)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signature, Signer, SSlibKey

from swtpm_prop.errors import StoreError, TrustError
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
    """A signer of a store for each name.

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


def open_keys(names: Sequence[str], public: Iterable[Key], ask: Ask) -> list[keys.SigningKey]:
    """A key that signs certificates for each name.

    Args:
        names: as for `open_signers`.
        public: the public halves of those that are no files.
        ask: for passphrases and PINs.

    Raises:
        StoreError: ``store.signer``: it cannot be used.
        TrustError: ``trust.key-foreign``: its public half is not there; what `keys.load_private` and `read_file` raise.
    """
    candidates = {key.keyid: key for key in public}
    return [_open_key(name, candidates, ask) for name in names]


class _Device:
    """A `keys.Device` behind a signer."""

    def __init__(self, uri: str, signer: Signer) -> None:
        self._uri = uri
        self._signer = signer

    def public_key(self) -> keys.PublicKey:
        return keys.load_public(self._signer.public_key.keyval["public"].encode())

    def sign(self, data: bytes) -> bytes:
        with _working(self._uri):
            return bytes.fromhex(self._signer.sign(data).signature)


def _open(name: str, known: Mapping[str, Key], ask: Ask) -> Signer:
    path = _path(name)
    signer = CryptoSigner(_private(path, ask)) if path else _behind(name, known, ask)
    if signer is None or signer.public_key.keyid not in known:
        what = f"the key '{name}' is none of this store's"
        raise StoreError("store.key-foreign", what, "add it with 'store root'")
    return signer


def _open_key(name: str, public: Mapping[str, Key], ask: Ask) -> keys.SigningKey:
    path = _path(name)
    if path:
        return _private(path, ask)
    signer = _behind(name, public, ask) if public else None
    if signer is None:
        what = f"the public half of the key '{name}' is not given"
        raise TrustError("trust.key-foreign", what, "name its PEM file with --public-key")
    return _Device(name, signer)


def _path(name: str) -> Path | None:
    """The key's file; None if it is elsewhere."""
    scheme, _, rest = name.partition(":")
    if scheme in SIGNER_FOR_URI_SCHEME and scheme != CryptoSigner.SCHEME:
        return None
    return Path(rest if scheme in ("file", CryptoSigner.SCHEME) else name)


def _private(path: Path, ask: Ask) -> keys.PrivateKey:
    pem = read_file(path, KEY_BYTES)
    return keys.load_private(pem, ask(f"passphrase of {path}").encode() if b"ENCRYPTED" in pem else None)


def _behind(uri: str, known: Mapping[str, Key], ask: Ask) -> Signer | None:
    """Which of the known keys it is shows in a signature: one only, for a token counts wrong PINs."""
    ask_once = cache(lambda secret: ask(f"{secret} of {uri}"))
    with _working(uri):
        signature = _any_signer(uri, known, ask_once).sign(_PROBE)
        for key in known.values():
            with suppress(UnverifiedSignatureError, VerificationError):
                key.verify_signature(Signature(key.keyid, signature.signature), _PROBE)
                return Signer.from_priv_key_uri(uri, key, ask_once)
    return None


@contextmanager
def _working(uri: str) -> Iterator[None]:
    """Signers let through whatever the libraries behind them raise, with or without words."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__} {error}".strip()
        raise StoreError("store.signer", f"'{uri}' does not sign: {why}", "see its token, label and PIN") from error


def _any_signer(uri: str, known: Mapping[str, Key], ask: Ask) -> Signer:
    """One for any of the keys that is of the kind this signer has."""
    failure = ValueError("the store has no keys")
    for key in known.values():
        try:
            return Signer.from_priv_key_uri(uri, key, ask)
        except ValueError as error:
            failure = error
    raise failure
