"""A publisher's directory: the certificates that shall be in the store, drafts to sign, the plain files that hosts get.

- ``certificates/<sha256>.json``: what the next publication holds, named by content
- ``news/``: approvals of hosts' states and lists of revoked hosts, which it holds too; see `trust.news`
- ``revoked.json``: what must never come in again
- ``draft/``: root and targets that wait for signatures
- ``public/``: the store; copy it to any web server, ``metadata/timestamp.json`` last
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile

from swtpm_prop.errors import StoreError, TrustError
from swtpm_prop.limits import CERTIFICATE_BYTES, METADATA_BYTES_MOST, METADATA_KEPT, NEWS_BYTES
from swtpm_prop.trust import certificate, news, repository
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.files import exclusive, read_file, write_file
from swtpm_prop.trust.floors import Floors
from swtpm_prop.trust.repository import Change, Missing, State, Wanted
from swtpm_prop.trust.revoked import Revoked
from swtpm_prop.trust.signers import Ask, open_signers
from swtpm_prop.trust.sources import COMPONENT

T = TypeVar("T")
Running = Callable[[Sequence[T], str], Any]
"""Wraps long work to show progress, as `cli.output.progress`; a context manager of an iterator."""

_SIMILAR = 10
"""Components that are suggested for one that is not there."""

_KINDS = ("certificates", "news")
"""Directories of targets."""

_VERSIONED = re.compile(r"([1-9][0-9]{0,9})\.(root|targets|snapshot)\.json")


class Revocation(NamedTuple):
    """Ids of certificates.

    Attributes:
        revoked: as asked.
        covering: revoked with them: they cover some of the same under another name, or other things besides.
        limited: they stay, but no longer count for all that they say.
    """

    revoked: tuple[str, ...]
    covering: tuple[str, ...]
    limited: tuple[str, ...]


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
            revoked = Revoked.load(self._revoked_file)
            taken = {}
            with running(files, "reading") as each:
                for file in each:
                    data, one = _read(file)
                    revoked.refuse(one, file)
                    taken[_name(data)] = data
            new = [name for name in taken if not (self.certificates / name).exists()]
            for name in new:
                write_file(self.certificates / name, taken[name])
        return len(new)

    def news(self, name: str) -> bytes | None:
        """The edition with this name that the next publication holds.

        Raises:
            TrustError: as `read_file`.
        """
        path = self.directory / name
        return read_file(path, NEWS_BYTES) if path.exists() else None

    def place(self, name: str, data: bytes) -> bool:
        """Take in an edition of news, in the place of the last; returns whether that changes anything.

        Raises:
            StoreError: ``store.busy``, ``store.absent``.
            TrustError: as `write_file`.
        """
        with self._alone():
            return news.place(self.directory, name, data)

    def revoke(self, named: Collection[str], floors: Floors, running: Running[Path]) -> Revocation:
        """Take certificates out of the next publication, and never let them or what they cover in again.

        Others that cover some of it go, too. What a newer version of the same component in the store has as well is
        not condemned. A certificate of which a floor leaves something stays, and hosts heed the floor.

        Args:
            named: ids of certificates (``sha256:`` and the hash of the payload).
            floors: of one component or none; what is below them is condemned, nothing else in its certificates.
            running: shows progress.

        Raises:
            StoreError: ``store.certificate-unknown``, ``store.certificate-malformed``, ``store.busy``,
                ``store.absent``, ``store.revoked-full``.
            TrustError: ``trust.component``: nothing is below.
        """
        with self._alone():
            record = Revoked.load(self._revoked_file)
            held = self._held(running)
            ids = {file: one.id for file, one in held.items()}
            going = {file for id in named for file in _find(ids, id)}
            record.condemn(subject for file in going for subject in held[file].subjects)
            low = {file: found for file, one in held.items() if floors and (found := record.low(one, floors))}
            if floors and not low:
                raise _absent(held.values(), floors)
            record.lower(floors, (one for found in low.values() for one in found))
            dead = {file: subjects for file in low if (subjects := record.dead(held[file]))}
            going |= {file for file, old in dead.items() if len(old) == len(held[file].subjects)}
            staying = held.keys() - going - dead.keys()
            record.forgive(subject for file in staying for subject in held[file].subjects)
            covering = dead.keys() - going | {file for file in staying if record.condemned(held[file])}
            record.certificates |= {file.name: held[file].id for file in going | covering}
            record.save(self._revoked_file)
            # From here on a publication leaves them out, files or not.
            for file in going | covering:
                file.unlink()
        limited = low.keys() - going - covering
        return Revocation(*(tuple(sorted({ids[file] for file in files})) for files in (going, covering, limited)))

    def remove(self, beginnings: Collection[str], files: Collection[Path], running: Running[Path]) -> tuple[str, ...]:
        """Take certificates out of the next publication that were issued in error; nothing is held against them.

        Args:
            beginnings: how the ids of certificates begin.
            files: certificates of which the store has a copy, or files below `certificates`, whatever is in them.
            running: shows progress.

        Returns:
            The names of the files that are gone.

        Raises:
            StoreError: ``store.certificate-unknown``, ``store.busy``, ``store.absent``.
            TrustError: what `read_file` raises.
        """
        with self._alone():
            going = {self._copy_of(file) for file in files}
            if beginnings:
                ids = {}
                with running(sorted(self.certificates.glob("*.json")), "reading") as each:
                    for file in each:
                        with suppress(TrustError):
                            ids[file] = _read(file)[1].id
                going |= {file for beginning in beginnings for file in _find(ids, beginning)}
            for file in going:
                file.unlink()
        return tuple(sorted(file.name for file in going))

    def _copy_of(self, file: Path) -> Path:
        if file.exists() and file.resolve().parent == self.certificates.resolve():
            return self.certificates / file.name
        copy = self.certificates / _name(read_file(file, CERTIFICATE_BYTES))
        if not copy.exists():
            raise StoreError(
                "store.certificate-unknown", f"the store has no copy of '{file}'", "name the id of the certificate"
            )
        return copy

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
                self._copy(wanted)
                for name, content in step.files.items():
                    write_file(self.metadata / name, content)
            self._keep(step.drafts)
            after = self._published()
            listed = after.targets.signed.targets if after.targets else {}
            if step.files:
                self._prune(after, (*before.values(), *listed.values()))
        old, new = _certificates(before), _certificates(listed)
        return Publication(tuple(step.files), len(new), len(new - old), len(old - new), step.missing, _ends(after))

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
            return {file: self._kept(file)[1] for file in each}

    def _kept(self, file: Path) -> tuple[bytes, Certificate]:
        """A certificate of the store. Something else there must not stop the next publication without saying why."""
        try:
            return _read(file)
        except TrustError as error:
            mend = f"take it out: swtpm-prop store remove {self.directory} {file}"
            raise StoreError("store.certificate-malformed", error.what, mend) from error

    def _wanted(self, before: Collection[str]) -> Wanted:
        """What shall be published. What was before has been looked at; what is new may have come past `add`."""
        revoked = Revoked.load(self._revoked_file)
        targets = {}
        for file in sorted(self.certificates.glob("*.json")):
            if file.name in revoked.certificates:
                continue
            target = f"certificates/{file.name}"
            if target not in before:
                data, one = self._kept(file)
                if _name(data) != file.name:
                    raise self._changed(file)
                revoked.refuse(one, file)
            targets[target] = TargetFile(file.stat().st_size, {"sha256": file.stem}, target)
        return Wanted(targets | news.targets(self.directory), revoked.floors)

    def _changed(self, file: Path) -> StoreError:
        mend = f"take it out, and add it anew: swtpm-prop store remove {self.directory} {file}"
        return StoreError("store.changed", f"'{file}' is not what its name says", mend)

    def _copy(self, wanted: Wanted) -> None:
        for target, listed in wanted.targets.items():
            (to,) = (self.targets / path for path in listed.get_prefixed_paths())
            if to.exists():
                continue
            data = read_file(self.directory / target, CERTIFICATE_BYTES)
            if listed.hashes != {"sha256": hashlib.sha256(data).hexdigest()}:
                raise self._changed(self.directory / target)
            to.parent.mkdir(exist_ok=True)
            write_file(to, data)

    def _sweep(self) -> None:
        """Remove what a killed process left of files it was writing."""
        inside = [self.targets / kind for kind in _KINDS]
        for place in (self.directory, self.certificates, self.drafts, self.metadata, *inside):
            for left in (*place.glob(".*.json.*"), *place.glob(".*.crl.*")):
                left.unlink()

    def _prune(self, now: State, targets: Iterable[TargetFile]) -> None:
        """Forget old metadata and certificates, but for those that a host may just be fetching."""
        current = {md.signed.type: md.signed.version for md in (now.targets, now.snapshot) if md}
        for found in self._versioned():
            if found[2] in current and int(found[1]) <= current[found[2]] - METADATA_KEPT:
                (self.metadata / found[0]).unlink()
        kept = {self.targets / path for target in targets for path in target.get_prefixed_paths()}
        for path in (path for kind in _KINDS for path in (self.targets / kind).glob("*")):
            if path not in kept:
                path.unlink()


def _certificates(targets: Iterable[str]) -> set[str]:
    return {target for target in targets if not target.startswith(news.PREFIX)}


def _find(ids: Mapping[Path, str], beginning: str) -> set[Path]:
    """The files of the one certificate whose id begins so."""
    found = {file for file, id in ids.items() if id.startswith(beginning)}
    if len({ids[file] for file in found}) != 1:
        count = "more than one certificate" if found else "no certificate"
        raise StoreError(
            "store.certificate-unknown",
            f"the store has {count} whose id begins with '{beginning}'",
            "check the id with swtpm-prop cert show FILE",
        )
    return found


def _absent(held: Iterable[Certificate], floors: Floors) -> TrustError:
    """Nothing is below the floors: that is a misspelt name."""
    component, limits = next(iter(floors.items()))
    there = {subject.annotations.get(COMPONENT, "") for one in held for subject in one.subjects} - {""}
    similar = difflib.get_close_matches(component, sorted(there), _SIMILAR, cutoff=0)
    return TrustError(
        "trust.component",
        f"the store has nothing of {component} below {next(iter(limits.values()))} with such properties;"
        " nothing was revoked",
        f"of its {len(there)} components name one: {', '.join(similar)}" if there else "name certificates instead",
    )


def _read(file: Path) -> tuple[bytes, Certificate]:
    """A certificate and its bytes; raises with the file's name."""
    try:
        data = read_file(file, CERTIFICATE_BYTES)
        return data, certificate.read(data)
    except TrustError as error:
        raise TrustError(error.id, f"'{file}': {error.what}", error.mend) from error


def _ends(state: State) -> dict[str, int]:
    return {metadata.signed.type: int(metadata.signed.expires.timestamp()) for metadata in state if metadata}


def _load(path: Path) -> Metadata[Any]:
    try:
        return Metadata.from_bytes(read_file(path, METADATA_BYTES_MOST))
    except RepositoryError as error:
        raise StoreError("store.metadata", f"'{path}' is damaged: {error}", "restore the store from a copy") from error


def _name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.json"
