"""Conversations over connections: what the agent says to a host that connects, and how a hook fetches a key."""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import TypeVar

from swtpm_prop.errors import Error, TransferError
from swtpm_prop.limits import AGENT_TALK_SECONDS
from swtpm_prop.transfer import ask as asking
from swtpm_prop.transfer.answer import Ends, Source, answer, out_of_turn
from swtpm_prop.transfer.ask import Destination
from swtpm_prop.transfer.channel import Channel, Identity, accept, connect
from swtpm_prop.transfer.journal import Transfer
from swtpm_prop.transfer.messages import Ask, Message, Report, refusal
from swtpm_prop.transfer.settle import Settler

Said = TypeVar("Said", bound=Message)
Result = TypeVar("Result")


def serve(plain: socket.socket, identity: Identity, source: Source, settler: Settler) -> str:
    """Say all that is to be said to a host that has connected.

    Args:
        plain: the connection; it is closed at the end.
        identity: of this host.
        source: this host's.
        settler: this host's.

    Returns:
        The name of the peer.

    Raises:
        Error: it was refused, and has been told why; or the connection failed.
    """
    with accept(plain, identity, AGENT_TALK_SECONDS) as channel:
        try:
            reply = _reply(channel, source, settler)
        except Error as error:
            _tell(channel, error)
            raise
        # If this fails the peer must not hear of a refusal: a key that was not sent is written down as offered.
        channel.send(reply)
        return channel.peer


def fetch(
    uuid: str,
    property: str,
    endpoints: tuple[str, str],
    identity: Identity,
    destination: Destination,
    settler: Settler,
    *,
    seconds: float,
    reaching: float,
) -> Transfer:
    """Fetch a guest's key from the host where it runs, for the guest that libvirt is about to receive.

    Args:
        uuid: of the guest.
        property: URI of the host property in its metadata.
        endpoints: ``host:port`` of the source's agent, and of this host's.
        identity: of this host.
        destination: this host's.
        settler: this host's.
        seconds: that all of it may take.
        reaching: seconds of these after which a host that does not even speak TLS is taken for dead.

    Returns:
        The transfer, imported; `Settler.arrive` gives its key within ARRIVAL_SECONDS.

    Raises:
        Error: there is no key, and nothing stays of the attempt but what the source has to be told.
    """
    there, here = endpoints
    with connect(there, identity, seconds, reaching) as channel:
        ends = _ends(channel)
        if ends.peer_key == ends.own_key:
            raise TransferError("transfer.self", f"'{there}' is this host itself", "see where the guest runs")
        return _lead(channel, asking.fetch(asking.new(uuid, here), property, there, ends, destination, settler))


def _reply(channel: Channel, source: Source, settler: Settler) -> Message:
    message = channel.receive()
    if isinstance(message, Report):
        return settler.hear(channel.peer, message)
    if isinstance(message, Ask):
        return _lead(channel, answer(message, _ends(channel), source, settler))
    raise out_of_turn(message)


def _lead(channel: Channel, talk: Generator[Said, Message, Result]) -> Result:
    """Send what the conversation says, give it what is answered; what fails on the way, fails inside it."""
    try:
        said = next(talk)
        while True:
            try:
                channel.send(said)
                heard = channel.receive()
            except Error as error:
                said = talk.throw(error)
            else:
                said = talk.send(heard)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        talk.close()


def _ends(channel: Channel) -> Ends:
    return Ends(channel.peer, channel.peer_key, channel.own_key)


def _tell(channel: Channel, error: Error) -> None:
    try:
        channel.send(refusal(error))
    except Error:
        return  # whom it does not reach sees the connection end
