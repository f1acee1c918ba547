"""A publisher's directory: the certificates that shall be in the store, drafts to sign, the plain files that hosts get.

- ``certificates/<sha256>.json``: what the next publication holds, named by content
- ``revoked.json``: what must never come in again
- ``draft/``: root and targets that wait for signatures
- ``public/``: the store; copy it to any web server, ``metadata/timestamp.json`` last
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile

from swtpm_prop.errors import StoreError, TrustError
from swtpm_prop.limits import CERTIFICATE_BYTES, METADATA_BYTES_MOST, METADATA_KEPT
from swtpm_prop.trust import certificate, repository
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.files import exclusive, read_file, write_file
from swtpm_prop.trust.repository import Change, Missing, State, Wanted
from swtpm_prop.trust.signers import Ask, open_signers
from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject
from swtpm_prop.trust.version import sort_key

T = TypeVar("T")
Running = Callable[[Sequence[T], str], Any]
"""Wraps long work to show progress, as `cli.output.progress`; a context manager of an iterator."""

_MARK = 32
"""Hex digits that are remembered of a revoked digest. Other digests that begin so would be refused, no more."""

_SIMILAR = 10
"""Components that are suggested for one that is not there."""

_VERSIONED = re.compile(r"([1-9][0-9]{0,9})\.(root|targets|snapshot)\.json")


class Revocation(NamedTuple):
    """Ids of the certificates that were revoked: as asked, and because they cover some of the same as well."""

    revoked: tuple[str, ...]
    covering: tuple[str, ...]


class Publication(NamedTuple):
    """What was published: names of new metadata, the certificates in it, and the signatures still waited for.

    ``expires`` says for each role that is published how long hosts believe it, seconds since the epoch.
    """

    written: tuple[str, ...]
    certificates: int
    added: int
    removed: int
    missing: tuple[Missing, ...]
    expires: Mapping[str, int]


class Publisher:
    """A publisher's directory. One process at a time works in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.certificates = directory / "certificates"
        self.drafts = directory / "draft"
        self.metadata = directory / "public/metadata"
        self.targets = directory / "public/targets"
        self._revoked_file = directory / "revoked.json"

    def init(self, change: Change, now: datetime) -> Metadata[Root]:
        """Make the directory with a first root, which its keys must sign before anything is published.

        Raises:
            StoreError: ``store.exists``, and what `repository.next_root` raises.
        """
        if self.metadata.exists() or self.drafts.exists():
            raise StoreError("store.exists", f"there is a store in '{self.directory}'", "change it with 'store root'")
        root = repository.next_root(None, 1, change, now)
        try:
            for path in (self.certificates, self.metadata, self.targets / "certificates", self.drafts):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                "store.directory",
                f"'{error.filename}' cannot be made: {error.strerror}",
                "choose a directory that this user may write to",
            ) from error
        write_file(self.drafts / "root.json", root.to_bytes())
        return root

    def rotate(self, change: Change, now: datetime) -> Metadata[Root]:
        """Draft the next root: other keys, thresholds or periods, or just a new end. Changes add up in one draft.

        Raises:
            StoreError: what `repository.next_root` raises; ``store.busy``, ``store.absent``.
        """
        with self._alone():
            published, draft = self._published().root, self._waiting().root
            version = published.signed.version + 1 if published else 1
            base = draft if draft and draft.signed.version == version else published
            root = repository.next_root(base, version, change, now)
            write_file(self.drafts / "root.json", root.to_bytes())
        return root

    def add(self, files: Sequence[Path], running: Running[Path]) -> int:
        """Take in certificates; all of them or, if one is malformed or revoked, none. Returns how many are new.

        Raises:
            TrustError: as `certificate.read`. StoreError: ``store.revoked``, ``store.busy``, ``store.absent``.
        """
        with self._alone():
            revoked = _Revoked.load(self._revoked_file)
            taken = {}
            with running(files, "reading") as each:
                for file in each:
                    data = read_file(file, CERTIFICATE_BYTES)
                    revoked.refuse(certificate.read(data), file)
                    taken[_name(data)] = data
            new = [name for name in taken if not (self.certificates / name).exists()]
            for name in new:
                write_file(self.certificates / name, taken[name])
        return len(new)

    def revoke(self, named: Collection[str], below: tuple[str, str] | None, running: Running[Path]) -> Revocation:
        """Take certificates out of the next publication, and never let them or what they cover in again.

        Others that cover some of it go, too. What a newer version of the same component in the store has as well is
        not condemned.

        Args:
            named: ids of certificates (``sha256:`` and the hash of the payload).
            below: a component and a version; older versions of it are condemned, nothing else in their certificates.
            running: shows progress.

        Raises:
            StoreError: ``store.certificate-unknown``, ``store.busy``, ``store.absent``, ``store.revoked-full``.
            TrustError: ``trust.version``, ``trust.component``: nothing is older.
        """
        with self._alone():
            record = _Revoked.load(self._revoked_file)
            held = self._held(running)
            going = _named(held, named)
            bad = [subject for file in going for subject in held[file].subjects]
            older: dict[Path, list[Subject]] = {}
            if below:
                older = _all_older(held, *below)
                record.components[below[0]] = _later(record.components.get(below[0]), below[1])
                going |= {file for file, old in older.items() if len(old) == len(_of(held[file], below[0]))}
                bad += [subject for old in older.values() for subject in old]
            staying = held.keys() - going - older.keys()
            record.condemn(bad, (subject for file in staying for subject in held[file].subjects))
            covering = older.keys() - going | {file for file in staying if record.condemned(held[file])}
            record.certificates |= {file.name: held[file].id for file in going | covering}
            record.save(self._revoked_file)
            # From here on a publication leaves them out, files or not.
            for file in going | covering:
                file.unlink()
        return Revocation(*(tuple(sorted({held[file].id for file in files})) for files in (going, covering)))

    def publish(self, names: Sequence[str], ask: Ask, now: datetime) -> Publication:
        """Sign with the named keys, and publish what then has enough signatures; see `repository.advance`.

        Hosts see a whole store at every moment: the file that makes the new ones count is the last to be replaced.

        Raises:
            StoreError: ``store.busy``, ``store.absent``, ``store.metadata``, ``store.changed``, ``store.revoked``, and
                what `open_signers` raises.
            TrustError: as `certificate.read`.
        """
        with self._alone():
            published, drafts = self._published(), self._waiting()
            self._sweep()
            before = published.targets.signed.targets if published.targets else {}
            wanted = self._wanted(before)
            signers = open_signers(names, self._known_keys(published, drafts), ask)
            step = repository.advance(published, drafts, wanted, signers, now)
            if step.files:
                self._copy_certificates(wanted)
                for name, content in step.files.items():
                    write_file(self.metadata / name, content)
            self._keep(step.drafts)
            after = self._published()
            listed = after.targets.signed.targets if after.targets else {}
            if step.files:
                self._prune(after, {*before, *listed})
        added, removed = len(listed.keys() - before.keys()), len(before.keys() - listed.keys())
        return Publication(tuple(step.files), len(listed), added, removed, step.missing, _ends(after))

    # -- files ----------------------------------------------------------------------------------

    def _alone(self) -> AbstractContextManager[int]:
        if not self.drafts.is_dir():
            raise StoreError("store.absent", f"'{self.directory}' is no store", "make one with 'store init'")
        return exclusive(self.directory, "the store")

    def _published(self) -> State:
        """What hosts get: the timestamp says which snapshot counts, and that one which targets."""
        roots = [int(found[1]) for found in self._versioned() if found[2] == Root.type]
        if not roots:
            return State()
        root: Metadata[Root] = _load(self.metadata / f"{max(roots)}.root.json")
        if not (self.metadata / "timestamp.json").exists():
            return State(root)
        timestamp = _load(self.metadata / "timestamp.json")
        snapshot = _load(self.metadata / f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        version = snapshot.signed.meta["targets.json"].version
        return State(root, _load(self.metadata / f"{version}.targets.json"), snapshot, timestamp)

    def _known_keys(self, published: State, drafts: State) -> list[Key]:
        """Those of the root before, too: an interrupted rotation is repeated with the same keys."""
        before = self.metadata / f"{published.root.signed.version - 1 if published.root else 0}.root.json"
        roots = (published.root, drafts.root, _load(before) if before.exists() else None)
        return [key for root in roots if root for key in root.signed.keys.values()]

    def _versioned(self) -> list[re.Match[str]]:
        return [found for path in self.metadata.iterdir() if (found := _VERSIONED.fullmatch(path.name))]

    def _waiting(self) -> State:
        paths = [self.drafts / "root.json", self.drafts / "targets.json"]
        root, targets = (_load(path) if path.exists() else None for path in paths)
        return State(root, targets)

    def _keep(self, drafts: State) -> None:
        for name, draft in (("root.json", drafts.root), ("targets.json", drafts.targets)):
            if draft is not None:
                write_file(self.drafts / name, draft.to_bytes())
            else:
                (self.drafts / name).unlink(missing_ok=True)

    def _held(self, running: Running[Path]) -> dict[Path, Certificate]:
        with running(sorted(self.certificates.glob("*.json")), "reading") as each:
            return {file: certificate.read(read_file(file, CERTIFICATE_BYTES)) for file in each}

    def _wanted(self, before: Collection[str]) -> dict[str, TargetFile]:
        """What shall be published. What was before, `revoke` has looked at; what is new may have come past `add`."""
        revoked = _Revoked.load(self._revoked_file)
        wanted = {}
        for file in sorted(self.certificates.glob("*.json")):
            if file.name in revoked.certificates:
                continue
            target = f"certificates/{file.name}"
            if revoked.certificates and target not in before:
                revoked.refuse(certificate.read(read_file(file, CERTIFICATE_BYTES)), file)
            wanted[target] = TargetFile(file.stat().st_size, {"sha256": file.stem}, target)
        return wanted

    def _copy_certificates(self, wanted: Wanted) -> None:
        for target, listed in wanted.items():
            (to,) = (self.targets / path for path in listed.get_prefixed_paths())
            if to.exists():
                continue
            data = read_file(self.directory / target, CERTIFICATE_BYTES)
            if _name(data) != to.name.partition(".")[2]:
                raise StoreError("store.changed", f"'{target}' is not what its name says", "remove it and add it again")
            write_file(to, data)

    def _sweep(self) -> None:
        """Remove what a killed process left of files it was writing."""
        for place in (self.directory, self.certificates, self.drafts, self.metadata, self.targets / "certificates"):
            for left in place.glob(".*.json.*"):
                left.unlink()

    def _prune(self, now: State, targets: Collection[str]) -> None:
        """Forget old metadata and certificates, but for those that a host may just be fetching."""
        current = {md.signed.type: md.signed.version for md in (now.targets, now.snapshot) if md}
        for found in self._versioned():
            if found[2] in current and int(found[1]) <= current[found[2]] - METADATA_KEPT:
                (self.metadata / found[0]).unlink()
        names = {Path(target).name for target in targets}
        for path in (self.targets / "certificates").iterdir():
            if path.name.partition(".")[2] not in names:
                path.unlink()


class _Revoked:
    """What must not come in again.

    Attributes:
        certificates: files and their certificates' ids.
        components: their first good version.
        digests: by component and version of what was revoked, each "" if it had none: how its digests begin. A newer
            version of the component may have them still, nothing else.
    """

    def __init__(
        self, certificates: dict[str, str], components: dict[str, str], digests: dict[str, dict[str, set[str]]]
    ) -> None:
        self.certificates = certificates
        self.components = components
        self.digests = digests

    @classmethod
    def load(cls, path: Path) -> _Revoked:
        if not path.exists():
            return cls({}, {}, {})
        try:
            value = json.loads(read_file(path, METADATA_BYTES_MOST))
            digests = {
                component: {version: set(marks) for version, marks in versions.items()}
                # Files of before digests were remembered have none.
                for component, versions in value.get("digests", {}).items()
            }
            return cls(dict(value["certificates"]), dict(value["components"]), digests)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError("store.revoked-unreadable", f"'{path}' makes no sense: {error}", "restore it") from error

    def save(self, path: Path) -> None:
        value = {"certificates": self.certificates, "components": self.components, "digests": self.digests}
        data = json.dumps(value, indent=1, sort_keys=True, default=sorted).encode() + b"\n"
        if len(data) > METADATA_BYTES_MOST:
            what = f"'{path}' would have more than {METADATA_BYTES_MOST} bytes"
            raise StoreError("store.revoked-full", what, "make a new store, with what is good")
        write_file(path, data)

    def condemn(self, bad: Iterable[Subject], staying: Iterable[Subject]) -> None:
        """Remember the digests of what is bad, and forget those that a newer version which stays has, too."""
        for subject in bad:
            component, version = (subject.annotations.get(name, "") for name in (COMPONENT, VERSION))
            self.digests.setdefault(component, {}).setdefault(version, set()).update(_marks(subject))
        for subject in staying:
            component = subject.annotations.get(COMPONENT, "")
            for version, marks in self.digests.get(component, {}).items():
                if _newer(subject, component, version):
                    marks -= _marks(subject)

    def condemned(self, one: Certificate) -> Subject | None:
        """The first of its subjects that has a digest which was revoked, and is no newer version."""
        groups = [(name, *group) for name, versions in self.digests.items() for group in versions.items()]
        for subject in one.subjects:
            own = _marks(subject)
            if any(marks & own and not _newer(subject, component, version) for component, version, marks in groups):
                return subject
        return None

    def refuse(self, one: Certificate, file: Path) -> None:
        """Raise ``store.revoked`` if it was revoked, or speaks of a version or of a digest that was."""
        if one.id in self.certificates.values():
            raise StoreError("store.revoked", f"'{file}' was revoked", "certify what replaces the things in it")
        for component, version in self.components.items():
            if _older(one, component, version):
                what = f"'{file}' has {component} below {version}, which was revoked"
                raise StoreError("store.revoked", what, "issue one without it")
        if subject := self.condemned(one):
            what = f"'{file}' covers '{subject.name}', and one of its digests was revoked"
            raise StoreError("store.revoked", what, "issue one without it")


def _named(held: Mapping[Path, Certificate], named: Collection[str]) -> set[Path]:
    unknown = set(named) - {one.id for one in held.values()}
    if unknown:
        raise StoreError(
            "store.certificate-unknown",
            f"the store has no certificate '{min(unknown)}'",
            "check the id with swtpm-prop cert show FILE",
        )
    return {file for file, one in held.items() if one.id in named}


def _all_older(held: Mapping[Path, Certificate], component: str, version: str) -> dict[Path, list[Subject]]:
    """The certificates that speak of older versions, with these subjects; that there are none is a misspelt name."""
    found = {file: old for file, one in held.items() if (old := _older(one, component, version))}
    if not found:
        there = {subject.annotations.get(COMPONENT, "") for one in held.values() for subject in one.subjects} - {""}
        similar = difflib.get_close_matches(component, sorted(there), _SIMILAR, cutoff=0)
        raise TrustError(
            "trust.component",
            f"the store has nothing of {component} below {version}; nothing was revoked",
            f"of its {len(there)} components name one: {', '.join(similar)}" if there else "name certificates instead",
        )
    return found


def _older(one: Certificate, component: str, version: str) -> list[Subject]:
    """Those of its subjects that are of the component and older. One without a version counts as older."""
    good = sort_key(version)
    return [
        subject
        for subject in _of(one, component)
        if VERSION not in subject.annotations or sort_key(subject.annotations[VERSION]) < good
    ]


def _of(one: Certificate, component: str) -> list[Subject]:
    return [subject for subject in one.subjects if subject.annotations.get(COMPONENT) == component]


def _newer(subject: Subject, component: str, version: str) -> bool:
    """Whether it is of this component, and newer; no version is older than any, and none is newer than what is none."""
    own = subject.annotations.get(VERSION)
    if not component or own is None or subject.annotations.get(COMPONENT) != component:
        return False
    return not version or _exceeds(own, version)


@lru_cache(maxsize=1024)  # Thousands of subjects have the same few versions.
def _exceeds(one: str, other: str) -> bool:
    try:
        return sort_key(one) > sort_key(other)
    except TrustError:
        return False


def _marks(subject: Subject) -> set[str]:
    return {digest.hex()[:_MARK] for digest in subject.digests.values()}


def _later(one: str | None, other: str) -> str:
    return one if one is not None and sort_key(one) > sort_key(other) else other


def _ends(state: State) -> dict[str, int]:
    return {metadata.signed.type: int(metadata.signed.expires.timestamp()) for metadata in state if metadata}


def _load(path: Path) -> Metadata[Any]:
    try:
        return Metadata.from_bytes(read_file(path, METADATA_BYTES_MOST))
    except RepositoryError as error:
        raise StoreError("store.metadata", f"'{path}' is damaged: {error}", "restore the store from a copy") from error


def _name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.json"
