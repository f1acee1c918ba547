"""The source's side of handing on a key: messages in, messages out; what it needs of the host is given to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import NamedTuple

from swtpm_prop.attest import evidence
from swtpm_prop.attest.evidence import Evidence
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.errors import TransferError
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.machine import Presence, Side, State
from swtpm_prop.transfer.messages import NONCE_BYTES, Ask, Challenge, Key, Message, Proof, binding
from swtpm_prop.transfer.settle import Settler


class Ends(NamedTuple):
    """Whose conversation it is, as TLS proves it.

    Attributes:
        peer: name of the other host.
        peer_key: SubjectPublicKeyInfo of its TLS certificate, DER.
        own_key: the same of this host's.
    """

    peer: str
    peer_key: bytes
    own_key: bytes


class Source(NamedTuple):
    """What the conversation needs of this host.

    Attributes:
        record: the guest's key record; None if this host has none.
        presence: of the guest.
        judge: the storage parent, TPM2B_PUBLIC, that may get the key, from the evidence of the host with this name over
            this binding; raises an Error if none may.
        wrap: encrypts the key to that parent.
    """

    record: Callable[[str], KeyRecord | None]
    presence: Callable[[str], Presence]
    judge: Callable[[KeyRecord, Evidence, bytes, str], bytes]
    wrap: Callable[[KeyRecord, bytes], ImportBlob]


def answer(ask: Ask, ends: Ends, source: Source, settler: Settler) -> Generator[Challenge, Message, Key]:
    """Answer a host that asks for a guest's key. Of a refusal nothing stays here.

    1. No earlier transfer leaves it open where the guest is.
    2. The guest has a key here, and runs here: an offline migration moves no TPM state.
    3. The host is challenged with a nonce that was never used before and that no other conversation knows.
    4. Its evidence is over this conversation, and the state it shows has the property that the guest demands.
    5. All of 1 and 2 still holds; the key is encrypted to the proven parent, and that is written down.

    Yields:
        The challenge; is sent the proof.

    Returns:
        The message with the key.

    Raises:
        TransferError: (1) as `Settler.make_room`; (2) ``transfer.no-key``, ``transfer.not-running``; (3)
            ``transfer.out-of-turn``; (5) ``transfer.repeated``.
        Error: (4) whatever `Source.judge` raises; (5) whatever `Source.wrap` raises.
    """
    # 1
    settler.make_room(ask.uuid, ends.peer)
    # 2
    record = _kept(ask.uuid, source)
    # 3
    challenge = Challenge(os.urandom(NONCE_BYTES), record.epoch, record.property)
    proof = yield challenge
    if not isinstance(proof, Proof):
        raise out_of_turn(proof)
    # 4
    shown = evidence.from_object(proof.evidence)
    bound = binding(ask, challenge, ends.own_key, ends.peer_key, evidence.parent_name(shown.parent_public))
    parent = source.judge(record, shown, bound, ends.peer)
    # 5
    offered = Transfer(ask.id, Side.SOURCE, State.OFFERED, ask.uuid, record.epoch, ends.peer, ask.endpoint)
    blob = settler.offer(offered, lambda: source.wrap(_unchanged(record, source), parent))
    return Key(blob, record.recovery)


def out_of_turn(message: Message) -> TransferError:
    """The peer said something else than was its turn."""
    return TransferError(
        "transfer.out-of-turn",
        f"the peer sent '{type(message).__name__.lower()}' where that means nothing",
        "install the same version of swtpm-prop on both hosts",
    )


def unseen(why: str) -> TransferError:
    """Nobody can say here whether the guest is on this host."""
    return TransferError("transfer.unseen", f"this host cannot see its guests, {why}", "see that libvirt runs there")


def _kept(uuid: str, source: Source) -> KeyRecord:
    record = source.record(uuid)
    # A record of a guest whose custody is off is kept for its old images.
    if record is None or not record.encrypted:
        raise TransferError("transfer.no-key", f"this host keeps no key of guest {uuid}", "ask the host where it runs")
    presence = source.presence(uuid)
    if presence is Presence.UNSEEN:
        raise unseen("its agent has no connection to libvirt")
    if presence is not Presence.RUNS:
        raise TransferError(
            "transfer.not-running",
            "the guest does not run here",
            "migrate it --live: an offline migration would leave its TPM state behind and delete it",
        )
    return record


def _unchanged(record: KeyRecord, source: Source) -> KeyRecord:
    if _kept(record.uuid, source) != record:
        raise TransferError("transfer.key-changed", "the guest's key was made anew meanwhile", "migrate again")
    return record
