"""A store as TUF metadata: which versions come next, what they say, who must sign. No file is read or written here.

The roles are those of the TUF specification: root names everybody's keys, targets names the certificates, snapshot and
timestamp let hosts see one consistent and recent state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, MetaFile, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import STORE_DAYS
from swtpm_prop.trust.floors import NONE, Floors

ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)

DAYS = "x-swtpm-prop-days"
"""Field of the root that says for how many days each role signs; the root's keys answer for it."""

FLOORS = "x-swtpm-prop-floors"
"""Field of the targets that has the store's floors, if there are any; see `trust.floors`."""

_TARGETS_FILE = f"{Targets.type}.json"


class Wanted(NamedTuple):
    """What shall be published: target path to length and hashes, and the floors."""

    targets: Mapping[str, TargetFile]
    floors: Floors = NONE

    def said_by(self, targets: Targets) -> bool:
        """Whether these targets say just that."""
        return targets.targets == self.targets and targets.unrecognized_fields.get(FLOORS, NONE) == self.floors

    def say(self, version: int, expires: datetime) -> Targets:
        """Targets that do."""
        more = {FLOORS: self.floors} if self.floors else {}
        return Targets(version, expires=expires, targets=dict(self.targets), unrecognized_fields=more)


class Change(NamedTuple):
    """What shall be different in the next root; nothing at all renews it.

    Attributes:
        add: (role, public key).
        remove: (role, key id or its beginning).
        thresholds: role to how many of its keys must sign.
        days: role to how long its signatures are good.
    """

    add: Sequence[tuple[str, Key]] = ()
    remove: Sequence[tuple[str, str]] = ()
    thresholds: Mapping[str, int] = {}
    days: Mapping[str, int] = {}


class State(NamedTuple):
    """Metadata of a store, published or waiting for signatures; None where a role has none."""

    root: Metadata[Root] | None = None
    targets: Metadata[Targets] | None = None
    snapshot: Metadata[Snapshot] | None = None
    timestamp: Metadata[Timestamp] | None = None


class Missing(NamedTuple):
    """Signatures that a role still needs: how many, and the ids of the keys of which any will do."""

    role: str
    needed: int
    keyids: tuple[str, ...]


class Step(NamedTuple):
    """What a publisher does next.

    Attributes:
        files: content by file name, in the order in which they must become visible; empty: nothing can be published.
        drafts: root and targets that still wait for signatures, theirs or those of other roles.
        missing: the signatures that are waited for.
    """

    files: dict[str, bytes]
    drafts: State
    missing: tuple[Missing, ...]


# -- root ---------------------------------------------------------------------------------------


def next_root(base: Metadata[Root] | None, version: int, change: Change, now: datetime) -> Metadata[Root]:
    """The root of this version, unsigned: ``base`` with the change; without ``base`` the change is all there is.

    Raises:
        StoreError: ``store.key-unknown``, ``store.threshold`` (a role would have fewer keys than must sign).
    """
    root = deepcopy(base.signed) if base else Root(roles={role: Role([], 1) for role in ROLES})
    root.version = version
    for role, beginning in change.remove:
        root.revoke_key(_keyid(root, role, beginning), role)
    for role, key in change.add:
        root.add_key(key, role)
    for role, threshold in change.thresholds.items():
        root.roles[role].threshold = threshold
    root.unrecognized_fields[DAYS] = {**days(root), **change.days}
    for role in ROLES:
        held, needed = len(root.roles[role].keyids), root.roles[role].threshold
        if held < needed:
            raise StoreError(
                "store.threshold", f"role {role} has {held} keys, and {needed} must sign", f"add a key for {role}"
            )
    root.expires = _end(root, Root.type, now)
    return Metadata(root)


def _keyid(root: Root, role: str, beginning: str) -> str:
    found = [keyid for keyid in root.roles[role].keyids if keyid.startswith(beginning)]
    if len(found) != 1:
        count = "no key" if not found else "more than one key"
        raise StoreError(
            "store.key-unknown",
            f"role {role} has {count} whose id begins with '{beginning}'",
            "write more of the key's id, as swtpm-prop store init or store root printed it",
        )
    return found[0]


def days(root: Root) -> dict[str, int]:
    """For how many days each role signs."""
    return {**STORE_DAYS, **root.unrecognized_fields.get(DAYS, {})}


def _end(root: Root, role: str, now: datetime) -> datetime:
    return (now + timedelta(days=days(root)[role])).replace(microsecond=0)


# -- publishing ---------------------------------------------------------------------------------


def advance(published: State, drafts: State, wanted: Wanted, signers: Sequence[Signer], now: datetime) -> Step:
    """Sign what the given keys may sign, and publish what has enough signatures.

    What lacks some stays a draft for the holders of the other keys. It does not hold up the rest: what is published
    already gets its new timestamp. A new root is published only together with all that its keys must have signed, or
    hosts would refuse everything under it.

    Args:
        published: what hosts get now.
        drafts: root and targets that wait for signatures; those that follow nothing published are dropped.
        wanted: what shall be published.
        signers: the keys at hand.
        now: with a time zone.
    """
    work = _Work(published, drafts.targets, wanted, signers, now)
    root = drafts.root if drafts.root and _version(drafts.root) == _version(published.root) + 1 else None
    missing = _sign_root(root, work) if root else []
    tried = []
    if root:
        # Also before the root has all its signatures, so that nobody has to come twice.
        attempt = _under(root, work)
        tried.append(attempt._replace(state=None) if missing else attempt)
    if published.root and not (tried and tried[0].state):
        tried.append(_under(published.root, work))
    reached = tried[-1].state if tried else None
    draft = next((attempt.draft for attempt in tried if attempt.draft), None)
    waiting = State(
        root=None if reached and reached.root is root else root,
        targets=None if reached and reached.targets and _version(draft) <= _version(reached.targets) else draft,
    )
    lacking = dict.fromkeys([*missing, *(one for attempt in tried for one in attempt.missing)])
    return Step(_files(published, reached) if reached else {}, waiting, tuple(lacking))


class _Work(NamedTuple):
    published: State
    draft: Metadata[Targets] | None
    wanted: Wanted
    signers: Sequence[Signer]
    now: datetime


class _Attempt(NamedTuple):
    """What can be published under a root, if anything; the draft of targets if one is needed; what is lacking."""

    state: State | None
    draft: Metadata[Targets] | None
    missing: list[Missing]


def _sign_root(root: Metadata[Root], work: _Work) -> list[Missing]:
    """A root needs enough keys of its own and of the root before it (TUF specification, section 5.3.4)."""
    _sign(root, Root.type, root.signed, work)
    before = work.published.root.signed if work.published.root else root.signed
    lacking = (_lacking(delegator, Root.type, root) for delegator in (before, root.signed))
    return [one for one in lacking if one]


def _under(root: Metadata[Root], work: _Work) -> _Attempt:
    current = work.published.targets
    targets = current if current and not _lacking(root.signed, Targets.type, current) else None
    missing = []
    draft = _next_targets(root.signed, targets, work)
    if draft:
        _sign(draft, Targets.type, root.signed, work)
        lacking = _lacking(root.signed, Targets.type, draft)
        missing += [lacking] if lacking else []
        targets = targets if lacking else draft
    if targets is None:
        return _Attempt(None, draft, missing)
    snapshot = _next_snapshot(root.signed, targets, work)
    timestamp = _next_timestamp(root.signed, snapshot, work)
    online = (_lacking(root.signed, Snapshot.type, snapshot), _lacking(root.signed, Timestamp.type, timestamp))
    missing += [one for one in online if one]
    return _Attempt(None if any(online) else State(root, targets, snapshot, timestamp), draft, missing)


def _next_targets(root: Root, usable: Metadata[Targets] | None, work: _Work) -> Metadata[Targets] | None:
    """The next targets where they are needed: the draft, if it says what is wanted, else a new one."""
    if usable and work.wanted.said_by(usable.signed):
        held = {signer.public_key.keyid for signer in work.signers} & set(root.roles[Targets.type].keyids)
        if not held or not _ageing(root, Targets.type, usable.signed.expires, work.now):
            return None
    draft, version = work.draft, _version(work.published.targets) + 1
    says = draft and draft.signed.version == version and work.wanted.said_by(draft.signed)
    if draft and says and draft.signed.expires > work.now:
        return draft
    return Metadata(work.wanted.say(version, _end(root, Targets.type, work.now)))


def _next_snapshot(root: Root, targets: Metadata[Targets], work: _Work) -> Metadata[Snapshot]:
    """The published one if it still says the truth; else the next one, signed."""
    current = work.published.snapshot
    if current and current.signed.meta[_TARGETS_FILE].version == targets.signed.version:
        file = current.signed.meta[_TARGETS_FILE]
        fresh = not _ageing(root, Snapshot.type, current.signed.expires, work.now)
        if fresh and not _lacking(root, Snapshot.type, current):
            return current
    else:
        file = MetaFile.from_data(targets.signed.version, targets.to_bytes(), ["sha256"])
    end = _end(root, Snapshot.type, work.now)
    snapshot = Metadata(Snapshot(_version(current) + 1, expires=end, meta={_TARGETS_FILE: file}))
    _sign(snapshot, Snapshot.type, root, work)
    return snapshot


def _next_timestamp(root: Root, snapshot: Metadata[Snapshot], work: _Work) -> Metadata[Timestamp]:
    current = work.published.timestamp
    if current and current.signed.snapshot_meta.version == snapshot.signed.version:
        file = current.signed.snapshot_meta
    else:
        file = MetaFile.from_data(snapshot.signed.version, snapshot.to_bytes(), ["sha256"])
    end = _end(root, Timestamp.type, work.now)
    timestamp = Metadata(Timestamp(_version(current) + 1, expires=end, snapshot_meta=file))
    _sign(timestamp, Timestamp.type, root, work)
    return timestamp


def _files(published: State, reached: State) -> dict[str, bytes]:
    """New files in an order in which hosts can follow after each: the timestamp makes the others count.

    While the keys at hand satisfy the old root too, the timestamp may precede the new root, and hosts notice nothing.
    If they do not, an interruption between the two leaves hosts with what they have until publishing is repeated.
    """
    files = {}
    for metadata, before in ((reached.targets, published.targets), (reached.snapshot, published.snapshot)):
        if metadata and metadata is not before:
            files[f"{metadata.signed.version}.{metadata.signed.type}.json"] = metadata.to_bytes()
    last = {"timestamp.json": reached.timestamp.to_bytes()} if reached.timestamp else {}
    if reached.root is None or reached.root is published.root:
        return files | last
    root = {f"{reached.root.signed.version}.root.json": reached.root.to_bytes()}
    if published.root and _all_signed(published.root.signed, reached):
        return files | last | root
    return files | root | last


def _all_signed(root: Root, state: State) -> bool:
    pairs = ((Targets.type, state.targets), (Snapshot.type, state.snapshot), (Timestamp.type, state.timestamp))
    return not any(metadata is None or _lacking(root, role, metadata) for role, metadata in pairs)


# -- signatures ---------------------------------------------------------------------------------


def _sign(metadata: Metadata[Any], role: str, root: Root, work: _Work) -> None:
    """Sign with every key at hand that has the role, under this root or the published one."""
    before = work.published.root.signed.roles[role].keyids if work.published.root else []
    entitled = {*root.roles[role].keyids, *before}
    for signer in work.signers:
        if signer.public_key.keyid in entitled and signer.public_key.keyid not in metadata.signatures:
            metadata.sign(signer, append=True)


def _lacking(root: Root, role: str, metadata: Metadata[Any]) -> Missing | None:
    result = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if result.verified:
        return None
    return Missing(role, result.threshold - len(result.signed), tuple(sorted(result.unsigned)))


def _ageing(root: Root, role: str, expires: datetime, now: datetime) -> bool:
    """Less than half of its time is left."""
    return now > expires - timedelta(days=days(root)[role]) / 2


def _version(metadata: Metadata[Any] | None) -> int:
    version: int = metadata.signed.version if metadata else 0
    return version
