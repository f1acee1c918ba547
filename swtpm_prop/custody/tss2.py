"""Keys of a TPM in files: "TSS2 PRIVATE KEY" in PEM, which tpm2-tools, OpenSSL's tpm2 provider and others read.

The form is that of draft-woodhouse-cert-best-practice and "ASN.1 Specification for TPM 2.0 Key Files".
"""

from __future__ import annotations

import base64
import re
from typing import Annotated, NamedTuple

from cryptography.hazmat import asn1
from cryptography.x509 import ObjectIdentifier

from swtpm_prop.custody.objects import ImportBlob, Sealed
from swtpm_prop.errors import WireError

_LOADABLE = ObjectIdentifier("2.23.133.10.1.3")
_IMPORTABLE = ObjectIdentifier("2.23.133.10.1.4")
_SEALED = ObjectIdentifier("2.23.133.10.1.5")

_BEGIN = "-----BEGIN TSS2 PRIVATE KEY-----"
_END = "-----END TSS2 PRIVATE KEY-----"
_FORM = re.compile(rf"{_BEGIN}\s+([A-Za-z0-9+/=\s]+?)\s+{_END}\s*")


OWNER = 0x40000001
"""TPM_RH_OWNER as a parent: the standard P-256 storage key of the owner hierarchy, which every TPM can make."""


class KeyFile(NamedTuple):
    """What a key file holds.

    Attributes:
        item: a key or a sealed secret as its parent's TPM loads it, or one that TPM has yet to import.
        parent: handle of the parent, persistent; or of a hierarchy, whose standard storage key is meant then.
        secret: whether it is sealed data and no key; of what is to be imported the file does not say.
    """

    item: Sealed | ImportBlob
    parent: int
    secret: bool = False


@asn1.sequence
class _Key:
    """A key whose file holds a policy in words has further fields, and is refused: no key here has one."""

    kind: ObjectIdentifier
    empty_auth: Annotated[bool | None, asn1.Explicit(0)] = None
    secret: Annotated[bytes | None, asn1.Explicit(2)] = None
    description: Annotated[str | None, asn1.Explicit(4)] = None
    rsa_parent: Annotated[bool | None, asn1.Explicit(5)] = None
    parent: int
    public: bytes
    private: bytes


def to_pem(key: KeyFile) -> bytes:
    """The file's contents; the object has an empty password."""
    if isinstance(key.item, ImportBlob):
        kind, (public, private, seed) = _IMPORTABLE, key.item
    else:
        kind, (public, private), seed = _SEALED if key.secret else _LOADABLE, key.item, None
    written = _Key(kind=kind, empty_auth=True, secret=seed, parent=key.parent, public=public, private=private)
    text = base64.b64encode(asn1.encode_der(written)).decode("ascii")
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join([_BEGIN, *lines, _END, ""]).encode("ascii")


def from_pem(data: bytes) -> KeyFile:
    """Read a file that this or another program wrote.

    Raises:
        WireError: ``wire.tss2``.
    """
    match = _FORM.fullmatch(data.decode("ascii", "replace"))
    if match is None:
        raise _refused("it is no 'TSS2 PRIVATE KEY' in PEM")
    try:
        key = asn1.decode_der(_Key, base64.b64decode("".join(match[1].split()), validate=True))
    except ValueError as error:
        raise _refused(str(error)) from None
    return KeyFile(_item(key), key.parent, key.kind == _SEALED)


def _item(key: _Key) -> Sealed | ImportBlob:
    if key.kind == _IMPORTABLE and key.secret is not None:
        return ImportBlob(key.public, key.private, key.secret)
    if key.kind in (_LOADABLE, _SEALED) and key.secret is None:
        return Sealed(key.public, key.private)
    raise _refused("it is of no known kind")


def _refused(why: str) -> WireError:
    return WireError("wire.tss2", f"the TPM key file is not usable: {why}", "put the right file there, or make it anew")
