"""The keys that a host is known by: in its TPM at their handles, and in files from which a lost handle comes back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_PRIVATE, TPM2B_PUBLIC

from swtpm_prop import durable
from swtpm_prop.custody import refusals, tss2
from swtpm_prop.custody.hardware import AK_HANDLE, PARENT_HANDLE
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.custody.tss2 import OWNER, KeyFile
from swtpm_prop.errors import HostError, TrustError, WireError
from swtpm_prop.limits import KEY_BYTES
from swtpm_prop.trust.files import read_file

_GENUINE = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted"

_STORAGE: bytes = TPM2B_PUBLIC.parse("ecc:aes128cfb", objectAttributes=f"{_GENUINE}|decrypt").marshal()
"""Template H-2 of the TCG EK Credential Profile 2.5, section B.4.5: of the primary key that a key file means when it
names the owner hierarchy for its parent. A storage key below it has to be like it."""

_ATTESTATION: bytes = TPM2B_PUBLIC.parse("ecc:ecdsa-sha256:null", objectAttributes=f"{_GENUINE}|sign").marshal()


class HostKey(NamedTuple):
    """One of them.

    Attributes:
        what: in words.
        file: its name in the directory of the host's keys, TSS2 PEM.
        handle: persistent, in the owner's range.
        template: TPM2B_PUBLIC; the TPM chooses the point, whose two coordinates are empty here.
    """

    what: str
    file: str
    handle: int
    template: bytes

    def fits(self, public: bytes) -> bool:
        """Whether a TPM2B_PUBLIC is of the template, whatever its point, which is last."""
        return public[2:].startswith(self.template[2:-4])


PARENT = HostKey("storage parent", "parent.pem", PARENT_HANDLE, _STORAGE)
AK = HostKey("attestation key", "ak.pem", AK_HANDLE, _ATTESTATION)


def settle(tpm: ESAPI, directory: Path) -> None:
    """See that both keys are at their handles: new ones, or those of the files.

    A key is in its file, on the disk, before it gets its handle: what depends on it can never outlive its only copy. So
    a handle without its file is a file that was lost. Its key goes on; there is no way to make the file again.

    Raises:
        HostError: ``tpm.handle-taken``, ``tpm.cleared``, ``host.key-file``, ``host.keys-unwritable``.
        TrustError: as `read_file`.
    """
    missing = {directory / key.file: key for key in (PARENT, AK) if not _is_there(tpm, key, directory / key.file)}
    if not missing:
        return
    with tpm.create_primary(None, _template(PARENT), ESYS_TR.OWNER)[0] as primary:
        # Nothing new is made beside a file that this TPM refuses.
        for path, key in sorted(missing.items(), key=lambda item: not item[0].exists()):
            private, public = _blobs(_read(path, key) or _make(tpm, primary, key, path))
            with refusals.of_key_file(path):
                loaded = tpm.load(primary, private, public)
            with loaded:
                tpm.evict_control(ESYS_TR.OWNER, loaded, key.handle)


def parent_changed(tpm: ESAPI, directory: Path) -> bool | None:
    """Whether this TPM has another storage parent than that of the file; None if that cannot be told."""
    try:
        kept = _read(directory / PARENT.file, PARENT)
    except (HostError, TrustError):
        return None
    return None if kept is None else kept.public != _public(tpm, PARENT.handle)


def _is_there(tpm: ESAPI, key: HostKey, path: Path) -> bool:
    found, kept = _public(tpm, key.handle), _read(path, key)
    if found is None:
        return False
    if kept is not None and kept.public != found:
        raise HostError(
            "tpm.handle-taken",
            f"at the TPM's handle {key.handle:#x} lies another key than that of '{path}'",
            "see whether this is the disk of another host, or its TPM; "
            f"if nothing needs that key, 'tpm2_evictcontrol -c {key.handle:#x}' removes it",
        )
    if not key.fits(found):
        raise HostError(
            "tpm.handle-taken",
            f"at the TPM's handle {key.handle:#x} lies something else than a {key.what}",
            f"if nothing needs it, 'tpm2_evictcontrol -c {key.handle:#x}' removes it",
        )
    return True


def _make(tpm: ESAPI, primary: ESYS_TR, key: HostKey, path: Path) -> Sealed:
    private, public, *_ = tpm.create(primary, None, _template(key))
    made = Sealed(public.marshal(), private.marshal())
    try:
        durable.write(path, tss2.to_pem(KeyFile(made, OWNER)))
    except OSError as error:
        raise HostError(
            "host.keys-unwritable", f"'{path}' cannot be written: {error.strerror}", "be root; free space on its disk"
        ) from error
    return made


def _read(path: Path, key: HostKey) -> Sealed | None:
    """The key in the file; None if there is no file."""
    try:
        file = tss2.from_pem(read_file(path, KEY_BYTES))
    except TrustError as error:
        if error.id == "trust.file-missing":
            return None
        raise
    except WireError as error:
        raise _unusable(path, key, error.what) from None
    if not isinstance(file.item, Sealed) or file.secret or file.parent != OWNER or not key.fits(file.item.public):
        raise _unusable(path, key, "it holds another kind of key")
    return file.item


def _unusable(path: Path, key: HostKey, why: str) -> HostError:
    return HostError(
        "host.key-file",
        f"'{path}' is not the file of this host's {key.what}: {why}",
        "put it back from a backup; or move it away: as long as the TPM has the key, the file is a copy",
    )


def _template(key: HostKey) -> TPM2B_PUBLIC:
    return TPM2B_PUBLIC.unmarshal(key.template)[0]


def _blobs(key: Sealed) -> tuple[TPM2B_PRIVATE, TPM2B_PUBLIC]:
    return TPM2B_PRIVATE.unmarshal(key.private)[0], TPM2B_PUBLIC.unmarshal(key.public)[0]


def _public(tpm: ESAPI, handle: int) -> bytes | None:
    """The TPM2B_PUBLIC of what lies at the handle."""
    try:
        public, _, _ = tpm.read_public(tpm.tr_from_tpmpublic(handle))
    except TSS2_Exception as error:
        if refusals.is_missing(error):
            return None
        raise
    return bytes(public.marshal())
