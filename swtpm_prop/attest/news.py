"""What fleet and authorities send to hosts: approval lists and the list of revoked certificates, put in force."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from swtpm_prop.attest import certificates, membership
from swtpm_prop.custody import approvals, opening
from swtpm_prop.errors import TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.trust import issuers
from swtpm_prop.trust.files import exclusive
from swtpm_prop.trust.news import PREFIX

_CRL = b"-----BEGIN X509 CRL-----"
_KEYID = re.compile(r"[0-9a-f]{64}")


class Edition(NamedTuple):
    """Which edition a list is, whoever signed it: to keep lists apart, never to rely on.

    Attributes:
        name: of its file in a store; of all editions of who speaks.
        number: a later edition has a higher one.
    """

    name: str
    number: int


class Installed(NamedTuple):
    """What counts on this host now.

    Attributes:
        what: in words for people.
        epoch: of an approval list; 0 of anything else.
    """

    what: str
    epoch: int


def is_crl(data: bytes) -> bool:
    """Whether this is the list of revoked certificates, and no approval list."""
    return data.lstrip().startswith(_CRL)


def identify(data: bytes) -> Edition:
    """What a file is for a store that carries it.

    Raises:
        AttestError: ``fleet.crl``.
        TrustError: as `approvals.read`; ``approvals.key``.
    """
    if is_crl(data):
        signer, number = certificates.read_crl(data)
        return Edition(f"{PREFIX}fleet-{signer.hex()}.crl", number)
    listed = approvals.read(data)
    if _KEYID.fullmatch(listed.authority) is None:
        raise TrustError("approvals.key", "the list does not name its authority by a key id", "take another list")
    return Edition(f"{PREFIX}approvals-{listed.authority}.json", listed.sequence)


def install(layout: Layout, data: bytes) -> Installed:
    """Take one approval list or list of revoked certificates; an older one than is there is refused.

    Raises:
        TrustError: as `approvals.install`; ``approvals.authority-unknown``; of the trust file.
        AttestError: as `membership.install_crl`.
        StoreError: ``store.busy``: another process does so, and what it puts there may be newer; ``store.directory``.
    """
    with exclusive(layout.state, "what the fleet says"):
        return _install(layout, data)


def _install(layout: Layout, data: bytes) -> Installed:
    if is_crl(data):
        newer = membership.install_crl(layout, data)
        return Installed("the fleet's list of revoked certificates" + ("" if newer else ", known already"), 0)
    keyid = approvals.read(data).authority
    public = approvals.authorities(issuers.load(layout.trust)).get(keyid)
    if public is None:
        raise TrustError(
            "approvals.authority-unknown",
            f"no issuer of the trust file approves states with key {keyid[:16]}",
            "add the authority, with approves-hosts = true, if you trust it",
        )
    found = approvals.install(layout, data, public)
    return Installed(
        f"edition {found.sequence} of authority {keyid[:16]}: epoch {found.epoch}, states: {len(found.approvals)}",
        found.epoch,
    )


def raise_epoch(layout: Layout, installed: Iterable[Installed]) -> int | None:
    """Tell this host's TPM the newest epoch: approvals of earlier ones are dead in it from now on.

    Returns:
        The epoch that the TPM has; None if this host has no TPM of ours or there is no approval list.

    Raises:
        HostError: as `opening.hardware`; ``tpm.epoch-far``.
    """
    epoch = max((each.epoch for each in installed), default=0)
    if not epoch or not layout.host_keys.is_dir():
        return None
    with opening.hardware(layout) as hardware:
        hardware.raise_epoch(epoch)
        return hardware.epoch()
