"""Approvals: which states of hosts an authority says have a host property, all in one signed list.

The list is an in-toto Statement v1 in a DSSE envelope, signed by the authority's P-256 key; each approval in it has a
second signature by that key, in the form that a TPM checks (TPM2_PolicyAuthorize). Revoking is signing the next list
without the state and with the next epoch: see `policy`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from swtpm_prop.custody.policy import Approval, Authorization, approved, to_sign
from swtpm_prop.errors import HostError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import APPROVAL_LIST_BYTES, APPROVALS, EPOCH_STEPS, LABEL_CHARS, PCRS
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.trust import dsse, files, keys, strict_json
from swtpm_prop.trust.issuers import Issuer, Trust
from swtpm_prop.trust.keys import SigningKey
from swtpm_prop.trust.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from swtpm_prop.trust.strict_json import Object, member
from swtpm_prop.trust.uri import check_property

PREDICATE_TYPE = "urn:swtpm-prop:host-approvals:1"

_PCR_FORM = re.compile(r"0|[1-9][0-9]?")
_VALUE_FORM = re.compile(rf"[0-9a-f]{{{2 * SHA256.size}}}")
_COUNT_MOST = 2**63 - 1
_RESETTABLE = {16, 23}


class ApprovalList(NamedTuple):
    """What an authority approves at one time.

    Attributes:
        authority: key id of its key.
        epoch: of all its approvals; grows when one is revoked. At least 1: a TPM's counter begins there.
        sequence: grows with every edition.
        approvals: with their signatures, each label once.
    """

    authority: str
    epoch: int
    sequence: int
    approvals: tuple[Approval, ...]

    def of(self, property: str) -> tuple[Approval, ...]:
        """Those of a host property."""
        return tuple(approval for approval in self.approvals if approval.property == property)

    def pcrs(self, property: str) -> frozenset[int]:
        """The PCRs that any of them looks at."""
        return frozenset[int]().union(*(approval.pcrs for approval in self.of(property)))


class Difference(NamedTuple):
    """How a state differs from the approved one that is nearest to it.

    Attributes:
        label: the approved state.
        pcrs: PCR to its approved value and the one it has, for those that differ.
    """

    label: str
    pcrs: Mapping[int, tuple[bytes, bytes]]

    @property
    def says(self) -> str:
        """Which PCRs differ from what."""
        numbers = ", ".join(map(str, sorted(self.pcrs)))
        subject = f"PCRs {numbers} differ" if len(self.pcrs) > 1 else f"PCR {numbers} differs"
        return f"{subject} from '{self.label}'"


# -- the authority's side -----------------------------------------------------------------------


def begin(key: SigningKey) -> ApprovalList:
    """The list of an authority that has approved nothing yet; its first edition is the next."""
    return ApprovalList(keys.keyid(_public(key)), 1, 0, ())


def approve(
    approvals: ApprovalList, key: SigningKey, label: str, property: str, pcrs: Mapping[int, bytes]
) -> ApprovalList:
    """The next edition, with one more state.

    Args:
        approvals: the newest edition.
        label: what people call the state; new in the list.
        pcrs: PCR to value in the SHA-256 bank.

    Raises:
        TrustError: ``approvals.key`` (the list is another key's), ``approvals.label``, ``approvals.pcrs``,
            ``approvals.too-many``, ``approvals.present``, ``trust.uri``.
    """
    check_property(property)
    _check_label(label)
    _check_pcrs(pcrs)
    for known in approvals.approvals:
        if known.label == label or (known.property == property and known.pcrs == pcrs):
            raise TrustError(
                "approvals.present",
                f"the list has '{known.label}' for '{known.property}' already",
                "give another label, or leave the list as it is if it is the same state",
            )
    if len(approvals.approvals) >= APPROVALS:
        raise TrustError("approvals.too-many", f"the list has {APPROVALS} states", "revoke those no host is in")
    added = Approval(label, property, dict(sorted(pcrs.items())), approvals.epoch, b"")
    return _edition(approvals, key, approvals.epoch, (*approvals.approvals, added))


def revoke(approvals: ApprovalList, key: SigningKey, label: str) -> ApprovalList:
    """The next edition, without this state and in the next epoch.

    Raises:
        TrustError: ``approvals.key``, ``approvals.label-unknown``.
    """
    rest = tuple(approval for approval in approvals.approvals if approval.label != label)
    if len(rest) == len(approvals.approvals):
        raise TrustError(
            "approvals.label-unknown", f"the list has no state '{label}'", "see its labels; nothing was revoked"
        )
    return _edition(approvals, key, approvals.epoch + 1, rest)


def raise_to(approvals: ApprovalList, key: SigningKey, epoch: int) -> ApprovalList:
    """The next edition, the same states in a later epoch: for a host whose TPM counts from further on.

    Raises:
        TrustError: ``approvals.key``, ``approvals.epoch``.
    """
    furthest = min(approvals.epoch + EPOCH_STEPS, _COUNT_MOST)
    if not approvals.epoch < epoch <= furthest:
        # No host would go further at once, and none ever goes back.
        raise TrustError(
            "approvals.epoch",
            f"epoch {epoch} is not one from {approvals.epoch + 1} to {furthest}",
            "name one of these; to go further, bring each edition to all hosts before the next",
        )
    return _edition(approvals, key, epoch, approvals.approvals)


def sign(approvals: ApprovalList, key: SigningKey) -> bytes:
    """The signed list, ready to be written to a file.

    Raises:
        TrustError: ``approvals.key``.
    """
    _check_authority(approvals, _public(key))
    return dsse.sign(PAYLOAD_TYPE, json.dumps(_statement(approvals)).encode(), [key])


# -- everybody's side ---------------------------------------------------------------------------


def read(data: bytes) -> ApprovalList:
    """What a list says, whoever signed it: steps 1 and 3 of `verify`. To look at, never to rely on.

    Raises:
        TrustError: as `verify`.
    """
    return _contents(_envelope(data).payload)


def verify(data: bytes, public: EllipticCurvePublicKey) -> ApprovalList:
    """Check a list; what is returned may be relied on.

    1. It is a DSSE envelope with in-toto's payload type.
    2. The authority's key signed it.
    3. It is a Statement v1 with our predicate type; epoch, sequence, labels, PCRs and signatures are well-formed.
    4. It names this key as its authority.
    5. Each approval's policy is that of its PCRs in the list's epoch, and is signed by the key for the TPM.

    Raises:
        TrustError: ``approvals.too-large``; (1) ``trust.json``, ``trust.field``, ``trust.base64``,
            ``trust.signatures``, ``approvals.type``; (2) ``trust.signature``; (3) ``approvals.type``,
            ``approvals.count``, ``approvals.label``, ``approvals.pcrs``, ``approvals.too-many``, ``trust.uri``;
            (4) ``approvals.key``; (5) ``trust.signature``.
    """
    # 1
    envelope = _envelope(data)
    # 2
    dsse.verify(envelope, [public], 1)
    # 3, and 5: that the policy is the one
    approvals = _contents(envelope.payload)
    # 4
    _check_authority(approvals, public)
    # 5
    for approval in approvals.approvals:
        keys.verify(public, approval.signature, to_sign(approval.policy(), approval.property))
    return approvals


def find(approvals: ApprovalList, property: str, pcrs: Mapping[int, bytes]) -> Approval | Difference:
    """The approval of this state for the property, or how it differs from the nearest.

    Args:
        pcrs: at least those of ``approvals.pcrs(property)``.

    Raises:
        HostError: ``host.nothing-approved``.
    """
    differences = []
    for approval in approvals.of(property):
        differing = {pcr: (value, pcrs[pcr]) for pcr, value in approval.pcrs.items() if pcrs[pcr] != value}
        if not differing:
            return approval
        differences.append(Difference(approval.label, differing))
    if not differences:
        raise HostError(
            "host.nothing-approved",
            f"no state is approved for '{property}'",
            "let its authority approve one: 'swtpm-prop host approve'",
        )
    return min(differences, key=lambda difference: len(difference.pcrs))


def authorize(
    approvals: ApprovalList, public: EllipticCurvePublicKey, property: str, pcrs: Mapping[int, bytes]
) -> Authorization:
    """What opens a key while the TPM's PCRs are these.

    Raises:
        HostError: ``host.nothing-approved``, ``host.state-not-approved``.
    """
    found = find(approvals, property, pcrs)
    if isinstance(found, Difference):
        raise HostError(
            "host.state-not-approved",
            f"the host's state is not approved for '{property}': {found.says}",
            "'swtpm-prop host check' shows more; have this state approved, or go back to an approved one",
        )
    return Authorization(public, property, found)


# -- on a host ----------------------------------------------------------------------------------


def authority(trust: Trust, property: str) -> EllipticCurvePublicKey:
    """The key that says which hosts have the property: that of the one issuer which approves hosts and may certify it.

    Raises:
        TrustError: ``approvals.no-authority``, ``approvals.several-authorities``.
    """
    fit = {
        issuer.id: _key(issuer) for issuer in trust.values() if issuer.approves_hosts and issuer.may_certify(property)
    }
    if not fit:
        raise TrustError(
            "approvals.no-authority",
            f"no issuer of the trust file with 'approves-hosts = true' may certify '{property}'",
            "add the authority of this host property, or correct its prefixes",
        )
    if len(fit) > 1:
        raise TrustError(
            "approvals.several-authorities",
            f"several issuers may approve hosts for '{property}': {', '.join(sorted(fit))}",
            "leave its prefix to one of them, for a key is bound to one authority",
        )
    return fit.popitem()[1]


def authorities(trust: Trust) -> dict[str, EllipticCurvePublicKey]:
    """All keys whose approval lists this host may take, by key id."""
    every = (_key(issuer) for issuer in trust.values() if issuer.approves_hosts)
    return {keys.keyid(key): key for key in every}


def _key(issuer: Issuer) -> EllipticCurvePublicKey:
    return next(key for key in issuer.keys if isinstance(key, EllipticCurvePublicKey))


def install(layout: Layout, data: bytes, public: EllipticCurvePublicKey) -> ApprovalList:
    """Take a list as the one that counts on this host; the same one again changes nothing.

    The caller raises the TPM's epoch counter to the list's epoch.

    Raises:
        TrustError: as `verify`; ``approvals.older``, ``approvals.epoch``, ``approvals.fork``;
            ``trust.file-unwritable``.
    """
    new = verify(data, public)
    path = layout.approvals / f"{new.authority}.json"
    old = installed(layout, public)
    if old is not None and (new.epoch < old.epoch or new.sequence < old.sequence):
        raise TrustError(
            "approvals.older",
            f"edition {new.sequence} of epoch {new.epoch} is older than the installed {old.sequence} of {old.epoch}",
            "get the authority's newest list",
        )
    if old is not None and new.epoch - old.epoch > EPOCH_STEPS:
        # Its TPM would not follow, and this host could never take a list with a sounder epoch.
        raise TrustError(
            "approvals.epoch",
            f"epoch {new.epoch} is more than {EPOCH_STEPS} after the installed list's, {old.epoch}",
            "ask the authority whether it is a mistake; if not, take the editions between first",
        )
    if old is not None and new.sequence == old.sequence and new[:3] + _signed(new) != old[:3] + _signed(old):
        raise TrustError(
            "approvals.fork",
            f"there are two different editions {new.sequence} of the authority {new.authority[:16]}",
            "ask the authority which one is right, and for a next one",
        )
    if old is None or new.sequence > old.sequence:
        layout.approvals.mkdir(parents=True, exist_ok=True)
        files.write_file(path, data)
    return new


def load(layout: Layout, trust: Trust, property: str) -> tuple[EllipticCurvePublicKey, ApprovalList]:
    """The authority of a property and its installed list.

    Raises:
        TrustError: as `authority` and `verify`; ``approvals.missing``.
    """
    public = authority(trust, property)
    approvals = installed(layout, public)
    if approvals is None:
        raise TrustError(
            "approvals.missing",
            f"this host has no approval list of the authority of '{property}'",
            "'swtpm-prop store sync' gets it, or 'swtpm-prop host update' takes it from its file",
        )
    return public, approvals


def installed(layout: Layout, public: EllipticCurvePublicKey) -> ApprovalList | None:
    """The list of an authority that counts on this host; None if there is none.

    Raises:
        TrustError: as `verify`.
    """
    path = layout.approvals / f"{keys.keyid(public)}.json"
    return verify(files.read_file(path, APPROVAL_LIST_BYTES), public) if path.exists() else None


# -- inside -------------------------------------------------------------------------------------


def _edition(approvals: ApprovalList, key: SigningKey, epoch: int, states: Iterable[Approval]) -> ApprovalList:
    """All states signed for the epoch."""
    _check_authority(approvals, _public(key))
    signed = tuple(
        state._replace(epoch=epoch, signature=keys.sign(key, to_sign(approved(state.pcrs, epoch), state.property)))
        for state in states
    )
    return approvals._replace(epoch=epoch, sequence=approvals.sequence + 1, approvals=signed)


def _statement(approvals: ApprovalList) -> Object:
    return {
        "_type": STATEMENT_TYPE,
        # A statement is about something with a digest, and a list may be empty: so it is about its authority's states.
        "subject": [{"name": "authority", "digest": {"sha256": approvals.authority}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "authority": approvals.authority,
            "epoch": approvals.epoch,
            "sequence": approvals.sequence,
            "approvals": [_entry(approval) for approval in approvals.approvals],
        },
    }


def _entry(approval: Approval) -> Object:
    return {
        "label": approval.label,
        "property": approval.property,
        "pcrs": {str(pcr): value.hex() for pcr, value in approval.pcrs.items()},
        "policy": approval.policy().hex(),
        "signature": base64.b64encode(approval.signature).decode("ascii"),
    }


def _envelope(data: bytes) -> dsse.Envelope:
    if len(data) > APPROVAL_LIST_BYTES:
        raise TrustError("approvals.too-large", f"the list has more than {APPROVAL_LIST_BYTES} bytes", strict_json.ANEW)
    envelope = dsse.parse(data)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise _foreign(envelope.payload_type)
    return envelope


def _contents(payload: bytes) -> ApprovalList:
    statement = strict_json.parse(payload)
    for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        found = member(statement, name, str)
        if found != expected:
            raise _foreign(found)
    predicate = member(statement, "predicate", dict)
    entries = member(predicate, "approvals", list)
    if len(entries) > APPROVALS:
        raise TrustError("approvals.too-many", f"the list has {len(entries)} states, allowed {APPROVALS}", _AGAIN)
    epoch = _count(predicate, "epoch")
    approvals = tuple(_approval(entry, epoch) for entry in entries)
    if len({approval.label for approval in approvals}) != len(approvals):
        raise TrustError("approvals.label", "two of its states have the same label", _AGAIN)
    return ApprovalList(member(predicate, "authority", str), epoch, _count(predicate, "sequence"), approvals)


def _approval(entry: object, epoch: int) -> Approval:
    if not isinstance(entry, dict):
        raise TrustError("trust.field", "an approval is no object", _AGAIN)
    label, property = member(entry, "label", str), member(entry, "property", str)
    _check_label(label)
    check_property(property)
    pcrs = _pcrs(member(entry, "pcrs", dict))
    if member(entry, "policy", str) != approved(pcrs, epoch).hex():
        raise TrustError("approvals.pcrs", f"the policy of '{label}' is not that of its PCRs and epoch", _AGAIN)
    try:
        signature = base64.b64decode(member(entry, "signature", str), validate=True)
    except ValueError:
        raise TrustError("trust.base64", f"the signature of '{label}' is no base64", _AGAIN) from None
    return Approval(label, property, pcrs, epoch, signature)


def _pcrs(entry: Object) -> dict[int, bytes]:
    pcrs = {}
    for number, value in entry.items():
        good = _PCR_FORM.fullmatch(number) and isinstance(value, str) and _VALUE_FORM.fullmatch(value)
        if not good:
            raise TrustError("approvals.pcrs", "it has a PCR that is none, or without a SHA-256 value", _AGAIN)
        pcrs[int(number)] = bytes.fromhex(value)
    _check_pcrs(pcrs)
    return dict(sorted(pcrs.items()))


def _check_pcrs(pcrs: Mapping[int, bytes]) -> None:
    if not pcrs or not pcrs.keys() <= set(range(PCRS)) - _RESETTABLE or any(len(pcrs[pcr]) != 32 for pcr in pcrs):
        raise TrustError(
            "approvals.pcrs", "a state is one or more of the PCRs 0 to 22 but 16, each with 32 bytes", "name some"
        )


def _check_label(label: str) -> None:
    if not 1 <= len(label) <= LABEL_CHARS or not label.isprintable():
        raise TrustError(
            "approvals.label", "a label is no printable text", f"give one of 1 to {LABEL_CHARS} characters"
        )


def _check_authority(approvals: ApprovalList, public: EllipticCurvePublicKey) -> None:
    if approvals.authority != keys.keyid(public):
        raise TrustError(
            "approvals.key",
            f"the list is of key {approvals.authority[:16]}, not of {keys.keyid(public)[:16]}",
            "use the list's own key, or begin another list",
        )


def _public(key: SigningKey) -> EllipticCurvePublicKey:
    public = key.public_key()
    if not isinstance(public, EllipticCurvePublicKey):
        raise TrustError("approvals.key", "an authority's key must be P-256, for TPMs check it", "use such a key")
    return public


def _count(of: Object, name: str) -> int:
    value = of.get(name)
    if type(value) is not int or not 1 <= value <= _COUNT_MOST:
        raise TrustError("approvals.count", f"its field '{name}' is no number from 1 on", _AGAIN)
    return value


def _signed(approvals: ApprovalList) -> tuple[Approval, ...]:
    """Without signatures: ECDSA makes another one each time."""
    return tuple(approval._replace(signature=b"") for approval in approvals.approvals)


def _foreign(found: str) -> TrustError:
    return TrustError("approvals.type", f"it is no approval list, but '{found[:80]}'", "check which file this is")


_AGAIN = "get the list again from its authority"
