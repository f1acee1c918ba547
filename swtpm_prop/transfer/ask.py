"""The destination's side of handing on a key: messages in, messages out; what it needs of the host is given to it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

from swtpm_prop.errors import TransferError
from swtpm_prop.transfer.answer import Ends, out_of_turn
from swtpm_prop.transfer.handover import Arrival
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.machine import Side, State
from swtpm_prop.transfer.messages import NONCE_BYTES, Ask, Challenge, Key, Message, Proof, Refused, binding
from swtpm_prop.transfer.settle import Settler
from swtpm_prop.trust.strict_json import Object

M = TypeVar("M", bound=Message)

ID_BYTES = 16


class Destination(NamedTuple):
    """What the conversation needs of this host.

    Attributes:
        parent_name: Name of the host's storage parent, 34 bytes.
        prove: evidence over this binding, for what demands this property; as `evidence.to_object`.
        take: a guest's key that came in this message, opened; raises an Error if this host cannot open it.
    """

    parent_name: Callable[[], bytes]
    prove: Callable[[bytes, str], Object]
    take: Callable[[str, Challenge, Key], Arrival]


def new(uuid: str, endpoint: str) -> Ask:
    """An ask for the guest's key.

    Args:
        uuid: of the guest.
        endpoint: ``host:port`` of this host's agent.
    """
    return Ask(os.urandom(ID_BYTES).hex(), uuid, os.urandom(NONCE_BYTES), endpoint)


def fetch(
    ask: Ask, property: str, source: str, ends: Ends, destination: Destination, settler: Settler
) -> Generator[Ask | Proof, Message, Transfer]:
    """Ask a host for a guest's key.

    1. No earlier attempt is open here. That this one begins is written down: the source may write it down, too.
    2. The source challenges, with the property that the guest's metadata demands.
    3. Evidence is made over this conversation.
    4. The key comes; this host's TPM takes it, and that is written down.

    Args:
        ask: from `new`.
        property: URI of the host property in the guest's metadata.
        source: ``host:port`` of the source's agent, for reports.
        ends: of the connection to it.
        destination: see `Destination`.
        settler: of this host.

    Yields:
        The ask, is sent the challenge; the proof, is sent the key. A refusal may come instead.

    Returns:
        The transfer, in the state imported.

    Raises:
        TransferError: (1) as `Settler.ask`; (2) ``transfer.property``; (2, 4) ``transfer.out-of-turn``; the source's
            refusal, under its own id.
        Error: (3, 4) whatever `Destination` raises.
    """
    offered = False
    # 1
    settler.ask(Transfer(ask.id, Side.DESTINATION, State.ASKED, ask.uuid, 0, ends.peer, source))
    try:
        # 2
        challenge = _expected(Challenge, (yield ask), ends.peer)
        _check_property(ask.uuid, challenge, property, ends.peer)
        # 3
        bound = binding(ask, challenge, ends.peer_key, ends.own_key, destination.parent_name())
        proof = Proof(destination.prove(bound, property))
        offered = True
        answered = yield proof
        offered = not isinstance(answered, Refused)
        key = _expected(Key, answered, ends.peer)
        # 4
        return settler.imported(ask.id, destination.take(ask.uuid, challenge, key))
    except BaseException:
        settler.give_up(ask.id, offered)
        raise


def _expected(kind: type[M], message: Message, peer: str) -> M:
    if isinstance(message, Refused):
        raise TransferError(message.id, f"host '{peer}' refuses: {message.what}", message.mend)
    if not isinstance(message, kind):
        raise out_of_turn(message)
    return message


def _check_property(uuid: str, challenge: Challenge, property: str, peer: str) -> None:
    if challenge.property != property:
        raise TransferError(
            "transfer.property",
            f"the guest's key on '{peer}' demands '{challenge.property}', its metadata '{property}'",
            f"migrate again after this on that host: swtpm-prop key rebind {uuid} --property {shlex.quote(property)}",
        )
