"""What the two conversations need of a real host: its TPM, its key records, its fleet, its authorities."""

from __future__ import annotations

import time
from collections.abc import Callable

from swtpm_prop.attest import evidence, membership
from swtpm_prop.attest.evidence import Evidence, Verified
from swtpm_prop.custody import approvals, keys, opening, policy
from swtpm_prop.custody.approvals import ApprovalList, Difference
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.errors import TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.answer import Source
from swtpm_prop.transfer.ask import Destination
from swtpm_prop.transfer.handover import Arrival
from swtpm_prop.transfer.machine import Presence
from swtpm_prop.transfer.messages import Challenge, Key
from swtpm_prop.trust import issuers
from swtpm_prop.trust.strict_json import Object


def source(layout: Layout, presence: Callable[[str], Presence], clock: Callable[[], float] = time.time) -> Source:
    """This host as a source.

    Args:
        layout: of this host.
        presence: of the guest with a UUID.
        clock: seconds since the epoch.
    """

    def judge(record: KeyRecord, shown: Evidence, binding: bytes, host: str) -> bytes:
        ca, crl = membership.load_fleet(layout)
        verified = evidence.verify(shown, binding, ca, crl, host, int(clock()))
        check_host(verified, _approvals(record, layout), record.property)
        return verified.parent_public

    def wrap(record: KeyRecord, parent_public: bytes) -> ImportBlob:
        with opening.hardware(layout) as tpm:
            return tpm.duplicate(record.sealed, opening.authorization(record, tpm, layout), parent_public)

    return Source(lambda uuid: keys.load(uuid, layout), presence, judge, wrap)


def destination(layout: Layout) -> Destination:
    """This host as a destination."""

    def parent_name() -> bytes:
        with opening.hardware(layout) as tpm:
            return evidence.parent_name(tpm.parent_public)

    def prove(binding: bytes, property: str) -> Object:
        _, approved = approvals.load(layout, issuers.load(layout.trust), property)
        with opening.hardware(layout) as tpm:
            # The list may have come while the TPM could not be asked; the source demands that it bites here.
            tpm.raise_epoch(approved.epoch)
            return evidence.to_object(evidence.make(tpm, layout.host_keys, binding, sorted(approved.pcrs(property))))

    def take(uuid: str, challenge: Challenge, key: Key) -> Arrival:
        public = approvals.authority(issuers.load(layout.trust), challenge.property)
        demanded = policy.key_policy(policy.authority_name(public), challenge.property).digest
        with opening.hardware(layout) as tpm:
            sealed = tpm.import_(key.blob, demanded)
            record = KeyRecord(
                uuid, challenge.epoch + 1, challenge.property, keys.pem(public), sealed, key.recovery, encrypted=True
            )
            # Said here, a refusal leaves the migration as if it had never been asked for.
            return Arrival(record, opening.open_(record, tpm, layout))

    return Destination(parent_name, prove, take)


def check_host(verified: Verified, approved: ApprovalList, property: str) -> None:
    """Check that a host, as its evidence shows it, may get a key that demands the property.

    1. Its TPM has heard of the epoch of the list: what was revoked before is dead there.
    2. The PCRs that are approved are shown, and their values are an approved state.

    Raises:
        TransferError: (1) ``transfer.epoch-behind``; (2) ``transfer.pcrs-not-shown``, ``transfer.state-not-approved``.
        HostError: (2) ``host.nothing-approved``.
    """
    # 1
    if verified.epoch < approved.epoch:
        raise TransferError(
            "transfer.epoch-behind",
            f"the TPM of '{verified.host}' is at epoch {verified.epoch}, the approvals at {approved.epoch}",
            f"bring the newest approvals to '{verified.host}': 'swtpm-prop store sync' there",
        )
    # 2
    missing = sorted(set(approved.pcrs(property)) - verified.pcrs.keys())
    if missing:
        raise TransferError(
            "transfer.pcrs-not-shown",
            f"'{verified.host}' does not show PCR {', '.join(map(str, missing))}, which approvals here speak of",
            f"bring the same approvals to both hosts: 'swtpm-prop store sync' on '{verified.host}'",
        )
    found = approvals.find(approved, property, verified.pcrs)
    if isinstance(found, Difference):
        raise TransferError(
            "transfer.state-not-approved",
            f"the state of '{verified.host}' is not approved for '{property}': {found.says}",
            f"have it approved, or bring '{verified.host}' back into an approved state",
        )


def _approvals(record: KeyRecord, layout: Layout) -> ApprovalList:
    """Those of the authority that the guest's key was sealed to; that it is the trust file's, `wrap` sees."""
    return approvals.load(layout, issuers.load(layout.trust), record.property)[1]
