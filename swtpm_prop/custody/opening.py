"""Opening, making and re-sealing a guest's key with this host's TPM, by the word of its property's authority."""

from __future__ import annotations

import os

from swtpm_prop import host_config
from swtpm_prop.custody import approvals, keys, policy, recovery
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.custody.keys import KEY_BYTES, KeyRecord
from swtpm_prop.custody.policy import Authorization
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout
from swtpm_prop.trust import issuers


def hardware(layout: Layout) -> Hardware:
    """The host's TPM, as host.toml names it; a context manager."""
    return Hardware(host_config.load(layout.host).tpm.tcti, layout.tpm_lock, layout.host_keys)


def open_(record: KeyRecord, tpm: Hardware, layout: Layout) -> bytes:
    """The guest's key, KEY_BYTES.

    Raises:
        HostError, TrustError: as `authorization` and `Hardware.unseal`.
    """
    return tpm.unseal(record.sealed, authorization(record, tpm, layout))


def authorization(record: KeyRecord, tpm: Hardware, layout: Layout) -> Authorization:
    """What opens the guest's key here and now: the authority that the trust file names, and its approval of this state.

    Raises:
        HostError: ``custody.authority-changed``; ``host.nothing-approved``, ``host.state-not-approved``.
        TrustError: as `approvals.load`.
    """
    authorized = _authorization(record.property, tpm, layout)
    if authorized.authority != record.authority_key():
        raise HostError(
            "custody.authority-changed",
            f"the trust file names another authority for '{record.property}' than the guest's key was sealed to",
            f"if that is right, 'swtpm-prop key rebind {record.uuid}'",
        )
    return authorized


def create(uuid: str, property: str, tpm: Hardware, layout: Layout) -> tuple[KeyRecord, bytes]:
    """A new key for the guest, and the record that its caller has to keep.

    It is opened once before anything depends on it: on a host in no approved state nothing is made.

    Raises:
        HostError, TrustError: as `authorization`; ``custody.recovery-key``.
    """
    key = os.urandom(KEY_BYTES)
    return seal(key, uuid, property, tpm, layout), key


def seal(key: bytes, uuid: str, property: str, tpm: Hardware, layout: Layout, epoch: int = 0) -> KeyRecord:
    """Seal a guest's key for this host and the property, wrap it to the recovery keys that host.toml names now.

    Raises:
        HostError, TrustError: as `create`.
    """
    authorized = _authorization(property, tpm, layout)
    wraps = recovery.wrap(key, uuid, recovery.load_keys(host_config.load(layout.host).custody.recovery))
    name = policy.authority_name(authorized.authority)
    sealed = tpm.seal(key, policy.key_policy(name, property).digest)
    if tpm.unseal(sealed, authorized) != key:
        raise HostError("tpm.failed", "the TPM opens another key than it sealed", "do not rely on this TPM")
    return KeyRecord(uuid, epoch, property, keys.pem(authorized.authority), sealed, wraps, encrypted=False)


def _authorization(property: str, tpm: Hardware, layout: Layout) -> Authorization:
    public, approved = approvals.load(layout, issuers.load(layout.trust), property)
    # The list may have come while the TPM could not be asked. From here on it bites in the TPM.
    tpm.raise_epoch(approved.epoch)
    return approvals.authorize(approved, public, property, tpm.pcrs(approved.pcrs(property)))
