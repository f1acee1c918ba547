"""A guest's key as this host keeps it: sealed in the host's TPM, wrapped for recovery; the keys made from it."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from swtpm_prop import durable
from swtpm_prop.custody import recovery
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.custody.recovery import Wrap
from swtpm_prop.errors import HostError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import KEY_RECORD_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

T = TypeVar("T")

KEY_BYTES = 32
"""Of a guest's key: one for AES-256, and what swtpm takes in 64 hexadecimal digits."""

RECORD_VERSION = 1
"""Of the record's file; another is refused."""

_MIGRATION = b"swtpm-prop/v1/migration"


class RecoveryCopy(NamedTuple):
    """What lies beside a guest's TPM state for the day its host is lost.

    Attributes:
        epoch: of the key, when this was written.
        property: URI of the host property that it demanded then.
        recovery: the key, encrypted to the operator's recovery keys. Only this is proven, by being opened.
    """

    epoch: int
    property: str
    recovery: tuple[Wrap, ...]


class KeyRecord(NamedTuple):
    """A guest's key on this host.

    Attributes:
        uuid: the guest's.
        epoch: how often the key has moved from host to host.
        property: URI of the host property without which it does not open.
        authority: public key of who says which host states have it, PEM.
        sealed: the key, in this host's TPM.
        recovery: the key, encrypted to the operator's recovery keys.
        encrypted: whether the TPM state at rest is encrypted under it, as far as this host has come: False while
            custody is being switched on, and once it has been switched off. The key stays for saved images and
            snapshots. Where True, a plain state is somebody else's.
    """

    uuid: str
    epoch: int
    property: str
    authority: str
    sealed: Sealed
    recovery: tuple[Wrap, ...]
    encrypted: bool

    def authority_key(self) -> EllipticCurvePublicKey:
        """The authority's key, checked when the record was made."""
        from cryptography.hazmat.primitives.asymmetric import ec

        from swtpm_prop.trust.keys import load_public

        key = load_public(self.authority.encode("ascii"))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _damaged(self.uuid, "its authority's key is not on P-256")
        return key


def migration_key(key: bytes) -> bytes:
    """What the TPM's part of a migration stream or a saved image is encrypted under, 32 bytes.

    HKDF-SHA256 (RFC 5869) without salt, one block; in the standard library, for every start computes it.
    """
    extracted = hmac.digest(bytes(32), key, hashlib.sha256)
    return hmac.digest(extracted, _MIGRATION + b"\x01", hashlib.sha256)


def pem(key: EllipticCurvePublicKey) -> str:
    """An authority's key as a record has it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


# -- the record -----------------------------------------------------------------------------------


def load(uuid: str, layout: Layout) -> KeyRecord | None:
    """The guest's record; None if this host has none.

    Raises:
        HostError: ``custody.record-damaged``.
    """
    from swtpm_prop.trust.files import read_file

    try:
        return parse(read_file(layout.guest_key(uuid), KEY_RECORD_BYTES), uuid)
    except TrustError as error:
        if error.id == "trust.file-missing":
            return None
        raise _damaged(uuid, error.what) from error


def store(record: KeyRecord, layout: Layout) -> None:
    """Keep the record, instead of an earlier one; on the disk when this returns.

    What a recovery key opens is put beside the guest's TPM state too, so that a backup of the one has the other;
    libvirt removes it with the state.
    """
    durable.write(layout.guest_key(record.uuid), serialise(record))
    if record.recovery:
        _store_recovery_copy(record, layout)


def destroy(uuid: str, layout: Layout) -> None:
    """Forget the guest's key; silent if there is none.

    A disk may keep the blocks, and overwriting them proves nothing. What is left there opens in this host's TPM alone,
    in an approved state: whoever could read it there could have read it before.
    """
    durable.remove(layout.guest_key(uuid))


def serialise(record: KeyRecord) -> bytes:
    """The record's file."""
    value = {
        "version": RECORD_VERSION,
        "uuid": record.uuid,
        "epoch": record.epoch,
        "property": record.property,
        "authority": record.authority,
        "sealed": {name: part.hex() for name, part in record.sealed._asdict().items()},
        "recovery": recovery.to_json(record.recovery),
        "encrypted": record.encrypted,
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def parse(data: bytes, uuid: str) -> KeyRecord:
    """Read what `serialise` made of this guest's record.

    Raises:
        HostError: ``custody.record-damaged``.
    """
    try:
        value: Any = json.loads(data)
        if value["version"] != RECORD_VERSION or value["uuid"] != uuid:
            raise ValueError("it is another version's or another guest's")
        return KeyRecord(
            uuid=uuid,
            epoch=_typed(value["epoch"], int),
            property=_typed(value["property"], str),
            authority=_typed(value["authority"], str),
            sealed=Sealed(bytes.fromhex(value["sealed"]["public"]), bytes.fromhex(value["sealed"]["private"])),
            recovery=recovery.from_json(value["recovery"]),
            encrypted=_typed(value["encrypted"], bool),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(uuid, f"{type(error).__name__} {error}") from error


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return value


def _damaged(uuid: str, why: str) -> HostError:
    return HostError(
        "custody.record-damaged",
        f"the record of the key of guest {uuid} is damaged: {why}",
        f"put it back from a backup, or 'swtpm-prop key recover {uuid} --key RECOVERY.pem'",
    )


# -- the copy for a lost host ---------------------------------------------------------------------


def _store_recovery_copy(record: KeyRecord, layout: Layout) -> None:
    path = recovery_copy(record.uuid, layout)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o711)  # as libvirt makes it (src/qemu/qemu_tpm.c, qemuTPMEmulatorInitStorage)
    value = {
        "version": RECORD_VERSION,
        "uuid": record.uuid,
        "epoch": record.epoch,
        "property": record.property,
        "recovery": recovery.to_json(record.recovery),
    }
    durable.write(path, json.dumps(value, indent=1).encode() + b"\n")


def load_recovery_copy(path: Path, uuid: str) -> RecoveryCopy:
    """Read it.

    Raises:
        HostError: ``custody.recovery-damaged``; TrustError: as `trust.files.read_file`.
    """
    from swtpm_prop.trust.files import read_file

    data = read_file(path, KEY_RECORD_BYTES)
    try:
        value: Any = json.loads(data)
        if value["version"] != RECORD_VERSION or value["uuid"] != uuid:
            raise ValueError("it is another version's or another guest's")
        wraps = recovery.from_json(value["recovery"])
        return RecoveryCopy(_typed(value["epoch"], int), _typed(value["property"], str), wraps)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HostError(
            "custody.recovery-damaged",
            f"'{path}' does not hold the wrapped key of guest {uuid}: {type(error).__name__} {error}",
            "name the swtpm-prop-recovery.json that lay beside this guest's TPM state",
        ) from error


def recovery_copy(uuid: str, layout: Layout) -> Path:
    """Where it lies."""
    return layout.guest_tpm(uuid).parent / "swtpm-prop-recovery.json"
