"""A publisher with keys, a host that follows it, and an attacker who has some of the keys."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from certifier import BOOT, ED25519, digests_of, issue, private_pem, public_pem, subject, trust_text
from cryptography.hazmat.primitives.asymmetric import ed25519
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from swtpm_prop.errors import Error
from swtpm_prop.layout import Layout
from swtpm_prop.trust import follow, signers
from swtpm_prop.trust.fetch import Fetcher, address
from swtpm_prop.trust.follow import Outcome
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.publisher import Publication, Publisher
from swtpm_prop.trust.repository import Change

ALL = ("root", "targets", "online")
FOREVER = {"begins": 0, "ends": 4_000_000_000}


@contextmanager
def quiet(items: Sequence[Any], _label: str) -> Iterator[Iterator[Any]]:
    """No progress."""
    yield iter(items)


def no_secret(name: str) -> str:
    raise AssertionError(f"asked for {name}")


class Keeper:
    """A store in ``directory``/store, made by keys in ``directory``/keys."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.publisher = Publisher(directory / "store")
        self.public = directory / "store/public"
        (directory / "keys").mkdir()

    def key(self, name: str) -> str:
        """Path of a private key, made when first named; the public one lies beside it."""
        path = self.directory / f"keys/{name}.key"
        if not path.exists():
            key = ed25519.Ed25519PrivateKey.generate()
            path.write_bytes(private_pem(key))
            path.with_suffix(".pem").write_text(public_pem(key))
        return str(path)

    def public_key(self, name: str) -> Any:
        return signers.load_public(Path(self.key(name)).with_suffix(".pem"))

    def init(self, **thresholds: int) -> None:
        """Keys root, targets, online; with a threshold for root or targets also root-2, targets-2."""
        add = [(role, self.public_key(role)) for role in ("root", "targets")]
        add += [(role, self.public_key(f"{role}-2")) for role in thresholds]
        add += [(role, self.public_key("online")) for role in ("snapshot", "timestamp")]
        self.publisher.init(Change(add=add, thresholds=thresholds), datetime.now(UTC))

    def rotate(self, **change: Any) -> None:
        self.publisher.rotate(Change(**change), datetime.now(UTC))

    def add(self, *envelopes: bytes) -> None:
        files = []
        for number, envelope in enumerate(envelopes):
            files.append(self.directory / f"envelope-{number}")
            files[-1].write_bytes(envelope)
        self.publisher.add(files, quiet)

    def publish(self, *names: str, days: float = 0) -> Publication:
        """Publish with the named keys, ``days`` from now."""
        keys = [self.key(name) for name in names or ALL]
        return self.publisher.publish(keys, no_secret, datetime.now(UTC) + timedelta(days=days))

    # -- attacks --------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        return self.public / "metadata" / name

    def forge(self, name: str, change: Callable[[Any], None], *names: str, to: str = "") -> bytes:
        """Rewrite metadata as somebody with these keys can."""
        metadata: Metadata[Any] = Metadata.from_bytes(self.file(name).read_bytes())
        change(metadata.signed)
        metadata.signatures.clear()
        for key in names:
            metadata.sign(CryptoSigner(signers._private(Path(self.key(key)), no_secret)), append=True)
        self.file(to or name).write_bytes(metadata.to_bytes())
        return metadata.to_bytes()


def certificate(name: bytes, **more: Any) -> bytes:
    return issue(subject(name), **{**FOREVER, **more})


class Follower:
    """A host below ``root`` that follows a keeper's store."""

    def __init__(self, root: Path, keeper: Keeper) -> None:
        self.layout = Layout(root)
        self.url = address(str(keeper.public))
        self._keeper = keeper
        self.layout.etc.mkdir(parents=True)
        self.layout.index.parent.mkdir(parents=True)
        self.layout.trust.write_text(trust_text(ED25519))

    def pin(self) -> None:
        """Take the first root, as an operator does."""
        self.layout.store_root.write_bytes(self._keeper.file("1.root.json").read_bytes())

    def sync(self) -> Outcome:
        return follow.sync(self.layout, self.url, Fetcher(), quiet, lambda doing, done: None)

    def certified(self, *names: bytes, now: float | None = None) -> list[bytes]:
        """Which of these the index certifies now."""
        index = Index.open(str(self.layout.index))
        when = int(time.time() if now is None else now)
        try:
            return [name for name in names if index.judge((BOOT,), digests_of(name), when).certified]
        finally:
            index.close()


# -- interruptions ------------------------------------------------------------------------------

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "sqlite3.connect"}


def interrupt(action: Callable[[], Any], number: int, how: Callable[[], None]) -> int:
    """Run ``action`` in a child process in which the ``number``-th change to the file system does ``how`` instead.

    Returns the exit status: 0 when there were fewer changes, 7 when the action reported an error of ours, 1 when it
    did without that change.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or writes:
            seen += 1
            if seen == number:
                how()

    sys.addaudithook(watch)
    status = _status(action)
    os._exit(status or int(seen >= number > 0))


def _status(action: Callable[[], Any]) -> int:
    try:
        action()
    except Error:
        return 7
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 8
    return 0


def kill() -> None:
    os._exit(9)


def no_space() -> None:
    raise OSError(28, "No space left on device")
