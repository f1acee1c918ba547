"""What two hosts say to each other about a guest's key: strict JSON, one object a message.

An ask is answered by a challenge, that by evidence, that by the key; or each by a refusal. Apart from that either host
may report the state of a transfer at any time, and is answered with the other's.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from swtpm_prop.attest import wire
from swtpm_prop.custody import recovery
from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.custody.recovery import Wrap
from swtpm_prop.domain.identity import UUID
from swtpm_prop.domain.stamp import ENDPOINT
from swtpm_prop.errors import Error, TransferError, TrustError
from swtpm_prop.limits import (
    ENDPOINT_CHARS,
    MESSAGE_BYTES,
    RECOVERY_KEYS,
    REFUSAL_CHARS,
    URI_CHARS,
)
from swtpm_prop.transfer.machine import State
from swtpm_prop.trust import strict_json
from swtpm_prop.trust.strict_json import Object, member

PROTOCOL = 1
"""Of these messages and of `binding`; hosts of different protocols refuse each other."""

NONCE_BYTES = 32

_ID = re.compile(r"[0-9a-f]{32}")
_ERROR_ID = re.compile(r"[a-z0-9\-]{1,32}\.[a-z0-9\-]{1,64}")


class Ask(NamedTuple):
    """The destination asks for a guest's key. It does so only when it has given up every earlier attempt.

    Attributes:
        id: of the transfer, 32 hexadecimal digits, chosen by the destination at random.
        uuid: of the guest, lower case.
        nonce: 32 random bytes.
        endpoint: ``host:port`` of the destination's agent, for reports.
    """

    id: str
    uuid: str
    nonce: bytes
    endpoint: str


class Challenge(NamedTuple):
    """The source demands evidence.

    Attributes:
        nonce: 32 random bytes.
        epoch: of the guest's key at the source: how often it has changed hosts.
        property: URI of the host property that the key demands.
    """

    nonce: bytes
    epoch: int
    property: str


class Proof(NamedTuple):
    """The destination's evidence, over `binding`; its form is attest.evidence's to check."""

    evidence: Object


class Key(NamedTuple):
    """The guest's key, for the proven parent only.

    Attributes:
        blob: what that parent's TPM imports.
        recovery: the key, encrypted to the operator's recovery keys.
    """

    blob: ImportBlob
    recovery: tuple[Wrap, ...]


class Refused(NamedTuple):
    """The source says no; an error's id and text, written by the peer."""

    id: str
    what: str
    mend: str


class Report(NamedTuple):
    """How far a transfer is with who says it; None: no such transfer there."""

    id: str
    state: State | None


Message = Ask | Challenge | Proof | Key | Refused | Report


def dump(message: Message) -> bytes:
    """The message as it travels, without its length.

    Raises:
        TransferError: ``transfer.message-size``: it would not be accepted.
    """
    word = _WORDS[type(message)]
    data = json.dumps({"type": word, **_DUMPERS[word](message)}, separators=(",", ":")).encode()
    if len(data) > MESSAGE_BYTES:
        raise too_large(len(data))
    return data


def parse(data: bytes) -> Message:
    """The message in ``data``.

    Raises:
        TransferError: ``transfer.message-size``, ``transfer.message``, ``transfer.protocol``.
    """
    if len(data) > MESSAGE_BYTES:
        raise too_large(len(data))
    try:
        found = strict_json.parse(data)
        word = member(found, "type", str)
        if word not in _PARSERS:
            raise ValueError(f"'{word[:40]}' is not known")
        members, parser = _PARSERS[word]
        if word == "ask" and found.get("protocol") != PROTOCOL:
            raise _other_protocol()
        wire.only(found, {"type", *members})
        return parser(found)
    except (TrustError, ValueError) as error:
        why = error.what if isinstance(error, TrustError) else str(error)
        raise TransferError(
            "transfer.message",
            f"the peer's message has no meaning: {why}",
            "install the same version of swtpm-prop on both hosts",
        ) from None


def refusal(error: Error) -> Refused:
    """An error as the peer hears it."""
    return Refused(error.id, error.what[:REFUSAL_CHARS], error.mend[:REFUSAL_CHARS])


def is_uuid(text: str) -> bool:
    """Whether it is a UUID as libvirt writes it (RFC 4122, section 3), 36 characters in lower case."""
    return UUID.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether it is a transfer's id."""
    return _ID.fullmatch(text) is not None


def binding(ask: Ask, challenge: Challenge, source_key: bytes, destination_key: bytes, parent_name: bytes) -> bytes:
    """What the destination's attestations are over, 32 bytes: this conversation between these hosts about this guest.

    Evidence made for one binding proves nothing in any other: not later, not to another host, not from another host,
    not for another guest or epoch, not with another parent.

    Args:
        ask: the destination's.
        challenge: the source's.
        source_key: SubjectPublicKeyInfo of the source's TLS certificate, DER.
        destination_key: the same of the destination's.
        parent_name: Name of the destination's storage parent, 34 bytes.
    """
    parts = (
        struct.pack(">I", PROTOCOL),
        bytes.fromhex(ask.id),
        ask.nonce,
        challenge.nonce,
        source_key,
        destination_key,
        bytes.fromhex(ask.uuid.replace("-", "")),
        struct.pack(">Q", challenge.epoch),
        challenge.property.encode(),
        parent_name,
    )
    digest = hashlib.sha256(b"swtpm-prop/v1/transfer\0")
    for part in parts:
        digest.update(struct.pack(">I", len(part)) + part)
    return digest.digest()


# -- form ---------------------------------------------------------------------------------------


def _dump_ask(ask: Ask) -> Object:
    return {
        "protocol": PROTOCOL,
        "id": ask.id,
        "uuid": ask.uuid,
        "nonce": ask.nonce.hex(),
        "endpoint": ask.endpoint,
    }


def _parse_ask(found: Object) -> Ask:
    endpoint = _text(found, "endpoint", ENDPOINT_CHARS)
    return Ask(_id(found), _matching(found, "uuid", UUID), _nonce(found), _checked(endpoint, "endpoint", ENDPOINT))


def _dump_challenge(challenge: Challenge) -> Object:
    return {"nonce": challenge.nonce.hex(), "epoch": challenge.epoch, "property": challenge.property}


def _parse_challenge(found: Object) -> Challenge:
    epoch = found.get("epoch")
    # A JSON true is an int in Python.
    if type(epoch) is not int or not 0 <= epoch < 1 << 63:
        raise ValueError("its field 'epoch' is no count")
    return Challenge(_nonce(found), epoch, _text(found, "property", URI_CHARS))


def _dump_proof(proof: Proof) -> Object:
    return {"evidence": proof.evidence}


def _parse_proof(found: Object) -> Proof:
    return Proof(member(found, "evidence", dict))


def _dump_key(key: Key) -> Object:
    blob = {name: wire.encode(part) for name, part in key.blob._asdict().items()}
    return {**blob, "recovery": recovery.to_json(key.recovery)}


def _parse_key(found: Object) -> Key:
    wraps = member(found, "recovery", dict)
    if len(wraps) > RECOVERY_KEYS:
        raise ValueError("its field 'recovery' has too many keys")
    for name in wraps:
        _checked(name, "recovery", _KEYID)
        _matching(wraps, name, _WRAP)
    return Key(ImportBlob(*(wire.decode(found, name) for name in ImportBlob._fields)), recovery.from_json(wraps))


def _dump_refused(refused: Refused) -> Object:
    return refused._asdict()


def _parse_refused(found: Object) -> Refused:
    texts = (_text(found, name, REFUSAL_CHARS) for name in ("what", "mend"))
    return Refused(_matching(found, "id", _ERROR_ID), *texts)


def _dump_report(report: Report) -> Object:
    return {"id": report.id, "state": report.state}


def _parse_report(found: Object) -> Report:
    # State() raises ValueError for a word it does not have; a missing state is not the same as null.
    state = None if found.get("state", "") is None else State(_text(found, "state", REFUSAL_CHARS))
    return Report(_id(found), state)


def _text(found: Object, name: str, most: int) -> str:
    text = member(found, name, str)
    if len(text) > most or (not text.isascii() and _has_surrogate(text)):
        raise ValueError(f"its field '{name}' is too long or no text")
    return text


def _has_surrogate(text: str) -> bool:
    """JSON can spell half a character (RFC 8259, section 8.2), which no encoding can write again."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _matching(found: Object, name: str, pattern: re.Pattern[str]) -> str:
    return _checked(member(found, name, str), name, pattern)


def _checked(text: str, name: str, pattern: re.Pattern[str]) -> str:
    if pattern.fullmatch(text) is None:
        raise ValueError(f"its field '{name}' is of another form")
    return text


def _id(found: Object) -> str:
    return _matching(found, "id", _ID)


def _nonce(found: Object) -> bytes:
    return bytes.fromhex(_matching(found, "nonce", _NONCE))


_NONCE = re.compile(rf"[0-9a-f]{{{2 * NONCE_BYTES}}}")
_KEYID = re.compile(r"[0-9a-f]{64}")
_WRAP = re.compile(r"(?:[0-9a-f]{2}){1,512}")

_WORDS: dict[type, str] = {
    Ask: "ask",
    Challenge: "challenge",
    Proof: "proof",
    Key: "key",
    Refused: "refused",
    Report: "report",
}

_DUMPERS: dict[str, Callable[[Any], Object]] = {
    "ask": _dump_ask,
    "challenge": _dump_challenge,
    "proof": _dump_proof,
    "key": _dump_key,
    "refused": _dump_refused,
    "report": _dump_report,
}

_PARSERS: dict[str, tuple[tuple[str, ...], Callable[[Object], Message]]] = {
    "ask": (("protocol", *Ask._fields), _parse_ask),
    "challenge": (Challenge._fields, _parse_challenge),
    "proof": (Proof._fields, _parse_proof),
    "key": ((*ImportBlob._fields, "recovery"), _parse_key),
    "refused": (Refused._fields, _parse_refused),
    "report": (Report._fields, _parse_report),
}


def too_large(size: int) -> TransferError:
    """The error for a message of this size."""
    return TransferError(
        "transfer.message-size",
        f"a message has {size} bytes, allowed are {MESSAGE_BYTES}",
        "install the same version of swtpm-prop on both hosts",
    )


def _other_protocol() -> TransferError:
    return TransferError(
        "transfer.protocol",
        f"the peer does not speak protocol {PROTOCOL}",
        "install the same version of swtpm-prop on both hosts",
    )
