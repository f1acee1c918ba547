"""What this host remembers of every transfer: written before it is acted on, read after every crash."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from swtpm_prop import durable
from swtpm_prop.custody import locks
from swtpm_prop.errors import TransferError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import JOURNAL_BYTES, JOURNAL_DAYS, JOURNAL_LOCK_SECONDS
from swtpm_prop.transfer.machine import GATES, TABLE, UNFINISHED, Gate, Side, State, left, speaks
from swtpm_prop.transfer.messages import is_id, is_uuid
from swtpm_prop.trust.files import read_file

T = TypeVar("T")

VERSION = 1
"""Of a transfer's file; another is refused."""


class Transfer(NamedTuple):
    """One transfer as this host knows it.

    Attributes:
        id: 32 hexadecimal digits, the same at both hosts.
        side: of this host.
        state: see `machine`.
        uuid: the guest's.
        epoch: of the guest's key at the source.
        peer: name of the other host in the fleet.
        endpoint: ``host:port`` of its agent.
        order: the guest's transfers on this host in the order they began, from 1.
        since: when the state was entered, seconds since the epoch.
        due: whether the state's actions may still have to be done.
        key: the guest's key record as it came, until it is the guest's or forgotten; at the destination.
        adopted: whether it is the guest's.
    """

    id: str
    side: Side
    state: State
    uuid: str
    epoch: int
    peer: str
    endpoint: str
    order: int = 0
    since: float = 0.0
    due: bool = False
    key: str = ""
    adopted: bool = False

    @property
    def unfinished(self) -> bool:
        """Whether there is something to learn, to tell or to do."""
        return self.due or self.state in UNFINISHED[self.side]


class Journal:
    """The host's transfers, a directory for each guest and a file for each transfer.

    Every method that takes a UUID but `locked` is called with that guest locked, or only to look.

    Raises:
        TransferError: in every method ``transfer.journal-damaged``, ``transfer.journal-unwritable``.
    """

    def __init__(self, layout: Layout, clock: Callable[[], float] = time.time) -> None:
        self._directory = layout.transfers
        self._clock = clock

    @contextmanager
    def locked(self, uuid: str) -> Iterator[None]:
        """Keep other processes and threads from this guest's transfers; never held while talking to a peer.

        Raises:
            TransferError: ``transfer.busy``.
        """
        with _naming(self._directory):
            directory = self._guest(uuid)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not locks.take(descriptor, JOURNAL_LOCK_SECONDS):
                raise TransferError(
                    "transfer.busy",
                    f"another process works on the transfers of guest {uuid} for {JOURNAL_LOCK_SECONDS} seconds",
                    "see what swtpm-prop does there, and try again",
                )
            yield
        finally:
            os.close(descriptor)

    def guests(self) -> list[str]:
        """UUIDs of all guests with transfers."""
        return sorted(found.name for found in _listed(self._directory) if is_uuid(found.name))

    def of(self, uuid: str) -> list[Transfer]:
        """The guest's transfers, the newest first."""
        files = [found for found in _listed(self._guest(uuid)) if found.suffix == ".json"]
        return sorted(_existing(files), key=lambda transfer: transfer.order, reverse=True)

    def find(self, id: str) -> Transfer | None:
        """The transfer with this id."""
        if not is_id(id):
            return None
        return next(_existing(self._directory.glob(f"*/{id}.json")), None)

    def begin(self, transfer: Transfer) -> Transfer:
        """Write down a new transfer.

        Raises:
            TransferError: ``transfer.repeated``: there is one with its id.
        """
        if self.find(transfer.id) is not None:
            raise TransferError("transfer.repeated", "there is a transfer with this id already", "migrate again")
        order = max((known.order for known in self.of(transfer.uuid)), default=0) + 1
        return self.save(transfer._replace(order=order, since=self.now()))

    def enter(self, transfer: Transfer, state: State, due: bool) -> Transfer:
        """Write down that a transfer is in a state now, and whether the state's actions are due."""
        return self.save(transfer._replace(state=state, due=due, since=self.now()))

    def save(self, transfer: Transfer) -> Transfer:
        """Write down a transfer; on the disk when this returns."""
        path = self._path(transfer)
        with _naming(path):
            durable.write(path, json.dumps({"version": VERSION, **transfer._asdict()}).encode() + b"\n")
        return transfer

    def remove(self, transfer: Transfer) -> None:
        """Forget a transfer that came to nothing on both sides."""
        with _naming(self._directory):
            durable.remove(self._path(transfer))

    def prune(self, uuid: str) -> None:
        """Forget what was finished long ago, the oldest first, but for the sign of where a guest went."""
        sign = self.counting(uuid)
        # In this order: an older one that stayed would speak for the guest again.
        for transfer in reversed(self.of(uuid)):
            old = self.now() - transfer.since > JOURNAL_DAYS * 86400
            if transfer.unfinished or not old or (transfer == sign and left(transfer.state)):
                return
            self.remove(transfer)

    def forget(self, uuid: str) -> None:
        """Forget all transfers of a guest that was here and is gone for good; none of them is unfinished.

        The sign of where a guest went stays: without it the definition that was left behind would start it anew.
        """
        sign = self.counting(uuid)
        if sign is None or not left(sign.state):
            for transfer in reversed(self.of(uuid)):
                self.remove(transfer)

    def counting(self, uuid: str) -> Transfer | None:
        """The transfer that says where the guest is; None: it never left or came."""
        return next((known for known in self.of(uuid) if speaks(known.side, known.state)), None)

    def gate(self, uuid: str) -> Gate:
        """Whether an ordinary start of the guest is allowed here."""
        counting = self.counting(uuid)
        return GATES[counting.side][counting.state] if counting else Gate.START

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def _guest(self, uuid: str) -> Path:
        if not is_uuid(uuid):
            raise TransferError("transfer.uuid", f"'{uuid}' is no UUID", "write it as virsh domuuid does")
        return self._directory / uuid

    def _path(self, transfer: Transfer) -> Path:
        return self._guest(transfer.uuid) / f"{transfer.id}.json"


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _damaged(directory, str(error)) from error


def _existing(files: Iterable[Path]) -> Iterator[Transfer]:
    """Who looks without the lock may find a name whose file somebody has removed meanwhile."""
    return (transfer for transfer in map(_read, files) if transfer is not None)


def _read(path: Path) -> Transfer | None:
    """The transfer in a file; None: it is gone."""
    try:
        value: Any = json.loads(read_file(path, JOURNAL_BYTES))
        if value.pop("version") != VERSION or value.keys() != _KINDS.keys():
            raise ValueError("it is of another version")
        for name, kind in _KINDS.items():
            if type(value[name]) is not kind:
                raise ValueError(f"its '{name}' is no {kind.__name__}")
        transfer = Transfer(**value)._replace(side=Side(value["side"]), state=State(value["state"]))
        if (transfer.uuid, transfer.id) != (path.parent.name, path.stem) or transfer.state not in TABLE[transfer.side]:
            raise ValueError("it is another one's")
    except TrustError as error:
        if error.id == "trust.file-missing":
            return None
        raise _damaged(path, error.what) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return transfer


_KINDS: dict[str, type] = {
    "id": str,
    "side": str,
    "state": str,
    "uuid": str,
    "epoch": int,
    "peer": str,
    "endpoint": str,
    "order": int,
    "since": float,
    "due": bool,
    "key": str,
    "adopted": bool,
}
"""The members of a transfer's file, as `json` reads them."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(
            "transfer.journal-unwritable",
            f"'{path}' cannot be written: {error.strerror}",
            "be root; free space on its disk",
        ) from error


def _damaged(path: Path, why: str) -> TransferError:
    return TransferError(
        "transfer.journal-damaged",
        f"'{path}' is damaged: {why}",
        "put it back from a backup; or find out on which host the guest is, remove the file, and start it there only",
    )
