"""Sealing a guest's key anew: for another property or authority, with other recovery keys, or on another host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swtpm_prop.account import Account
from swtpm_prop.custody import approvals, keys, opening, recovery, state
from swtpm_prop.custody.form import Form, form
from swtpm_prop.custody.hardware import Hardware
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.custody.state import Place
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout
from swtpm_prop.trust.keys import keyid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


def rebind(uuid: str, property: str | None, accept_plain: bool, layout: Layout) -> KeyRecord:
    """Open the guest's key as it was sealed, seal it as host.toml and the trust file say now; the key stays the same.

    Args:
        uuid: the guest's; it may run.
        property: URI of the host property that the key shall demand; None: the same.
        accept_plain: take the plain TPM state that is there for the guest's; its next start encrypts it.
        layout: of this host.

    Raises:
        HostError: ``custody.no-record``, ``custody.not-plain``, ``custody.authority-gone``; HostError, TrustError: as
            `opening.seal`.
    """
    record = keys.load(uuid, layout)
    if record is None:
        raise without_record(uuid)
    if accept_plain and form(layout.guest_tpm(uuid)) is not Form.PLAIN:
        # The key would not count as bound any more, and a guest whose key does not may not migrate.
        raise HostError(
            "custody.not-plain", "the guest has no plain TPM state here", "'key rebind' without --accept-plain"
        )
    with opening.hardware(layout) as tpm:
        key = _open_as_sealed(record, tpm, layout)
        sealed = opening.seal(key, uuid, property or record.property, tpm, layout, record.epoch)
    made = sealed._replace(encrypted=record.encrypted and not accept_plain)
    keys.store(made, layout)
    return made


def without_record(uuid: str) -> HostError:
    """This host has no key of the guest."""
    return HostError(
        "custody.no-record",
        f"this host has no key of guest {uuid}",
        "its first start with custody makes one; 'swtpm-prop transfer show' says where it went if it has left, "
        "'swtpm-prop key recover' brings back one that is lost",
    )


def recover(
    uuid: str, private: EllipticCurvePrivateKey, source: Path, property: str | None, account: Account, layout: Layout
) -> KeyRecord:
    """Open the guest's key with a recovery key, and seal it for this host.

    1. The recovery key opens what lies beside the TPM state.
    2. The key opens the TPM state that is here; without a state it is taken as it is.
    3. A key that this host has already, and that opens that state, is left alone.
    4. It is sealed as host.toml and the trust file say now, one epoch later than where it was lost.

    Args:
        uuid: the guest's; it does not run anywhere.
        private: the recovery key.
        source: the swtpm-prop-recovery.json of the guest.
        property: URI of the host property that the key shall demand; None: the one it demanded when it was made.
        account: swtpm's.
        layout: of this host.

    Raises:
        HostError: (1) ``custody.recovery-key``, ``custody.recovery-damaged``; (2) ``custody.state-foreign``,
            ``custody.state-busy``; (3) ``custody.key-present``; HostError, TrustError: (4) as `opening.seal`.
    """
    # 1
    copy = keys.load_recovery_copy(source, uuid)
    key = recovery.unwrap(copy.recovery, uuid, private)
    # 2
    where = state.place(uuid, account, layout)
    _check_state(where, key)
    with opening.hardware(layout) as tpm:
        # 3
        _check_absent(uuid, key, tpm, layout)
        # 4
        sealed = opening.seal(key, uuid, property or copy.property, tpm, layout, copy.epoch + 1)
    made = sealed._replace(encrypted=form(where.directory) is not Form.PLAIN)
    keys.store(made, layout)
    return made


def _open_as_sealed(record: KeyRecord, tpm: Hardware, layout: Layout) -> bytes:
    """By the authority it was sealed to, though the trust file may name another by now."""
    public = record.authority_key()
    approved = approvals.installed(layout, public)
    if approved is None:
        raise HostError(
            "custody.authority-gone",
            f"this host has no approval list of the authority {keyid(public)[:16]} that the guest's key was sealed to",
            f"'swtpm-prop key recover {record.uuid} --key RECOVERY.pem'",
        )
    now = tpm.pcrs(approved.pcrs(record.property))
    return tpm.unseal(record.sealed, approvals.authorize(approved, public, record.property, now))


def _check_state(where: Place, key: bytes) -> None:
    if form(where.directory) is Form.ENCRYPTED and not state.opens(where, key):
        raise HostError(
            "custody.state-foreign",
            "the TPM state is not encrypted under the key that the recovery key opens",
            "take state and swtpm-prop-recovery.json from one backup, made while the guest was shut off",
        )


def _check_absent(uuid: str, key: bytes, tpm: Hardware, layout: Layout) -> None:
    """What does not open here any more, or is another one, may be replaced: the new one was shown to fit."""
    try:
        record = keys.load(uuid, layout)
        same = record is not None and _open_as_sealed(record, tpm, layout) == key
    except HostError:
        return
    if same:
        raise HostError(
            "custody.key-present", f"this host has the key of guest {uuid}, and it opens", "just start the guest"
        )
