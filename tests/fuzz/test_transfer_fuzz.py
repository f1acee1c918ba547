"""Anything that comes from a peer or from a damaged disk is understood, or refused with the one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swtpm_prop.custody.objects import ImportBlob
from swtpm_prop.custody.recovery import Wrap
from swtpm_prop.errors import Error, TransferError, printable
from swtpm_prop.layout import Layout
from swtpm_prop.transfer import messages
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Side, State
from swtpm_prop.transfer.messages import Ask, Challenge, Key, Message, Proof, Refused, Report

UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
ID = "0123456789abcdef" * 2
URI = "https://example.org/properties/approved-host"

GENUINE: list[Message] = [
    Ask(ID, UUID, bytes(range(32)), "host.example.org:4879"),
    Ask(ID, UUID, bytes(range(32)), "[2001:db8::1]:4879"),
    Challenge(bytes(32), 7, URI),
    Proof({"pcrs": {"0": "00" * 32}, "quote": {"attest": "AA=="}}),
    Key(ImportBlob(b"public", b"duplicate", b"seed"), (Wrap("ab" * 32, bytes(113)),)),
    Key(ImportBlob(b"", b"", b""), ()),
    Refused("transfer.not-running", "the guest does not run here\x1b[31m", ""),
    Report(ID, State.ACTIVATED),
    Report(ID, None),
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=12), inside, max_size=4),
    max_leaves=12,
)


def understood_or_refused(data: bytes) -> None:
    try:
        message = messages.parse(data)
    except TransferError as error:
        assert printable(error.line()) == error.line()
        assert error.mend
        return
    assert messages.parse(messages.dump(message)) == message


@pytest.mark.parametrize("message", GENUINE, ids=lambda message: type(message).__name__)
def test_what_is_said_is_what_is_heard(message: Message) -> None:
    assert messages.parse(messages.dump(message)) == message


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    understood_or_refused(data)


@given(st.sampled_from(["ask", "challenge", "proof", "key", "refused", "report", "other"]), JSON)
def test_any_json(word: str, value: Any) -> None:
    found = value if isinstance(value, dict) else {"id": value}
    understood_or_refused(json.dumps(found).encode())
    understood_or_refused(json.dumps({**found, "type": word}).encode())


@given(st.sampled_from(GENUINE), st.data())
def test_a_genuine_message_with_one_thing_wrong(message: Message, data: st.DataObject) -> None:
    value = json.loads(messages.dump(message))
    name = data.draw(st.sampled_from([*value, "another"]))
    value[name] = data.draw(JSON | st.sampled_from([True, -1, 2**63, "\ud800", "0" * 70000, UUID.upper()]))
    understood_or_refused(json.dumps(value).encode())
    del value[name]
    understood_or_refused(json.dumps(value).encode())


@given(st.sampled_from(GENUINE), st.data())
def test_a_genuine_message_with_bytes_changed(message: Message, data: st.DataObject) -> None:
    found = bytearray(messages.dump(message))
    for _ in range(data.draw(st.integers(1, 3))):
        found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
    understood_or_refused(bytes(found[: data.draw(st.integers(0, len(found)))]))
    understood_or_refused(bytes(found))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 60000,
        b'{"type":' + b'{"a":' * 10000,
        b'{"type":"report","id":"' + ID.encode() + b'","id":"' + ID.encode() + b'","state":null}',
        b'{"type":"challenge","nonce":"' + b"0" * 64 + b'","epoch":' + b"9" * 5000 + b',"property":"a:b"}',
        b'{"type":"challenge","nonce":"' + b"0" * 64 + b'","epoch":true,"property":"a:b"}',
        b'{"type":"challenge","nonce":"' + b"0" * 64 + b'","epoch":-1,"property":"a:b"}',
        b'{"type":"challenge","nonce":"' + b"0" * 64 + b'","epoch":1,"property":"\\ud800"}',
        b'{"type":"report","id":"' + ID.encode() + b'"}',
        b'{"type":"report","id":"' + ID.encode() + b'\\n","state":null}',
        b'{"type":"ask","protocol":2}',
        b" " * 65537,
        "\ufeff{}".encode(),
    ],
    ids=range(12),
)
def test_what_has_broken_others(data: bytes) -> None:
    with pytest.raises(TransferError):
        messages.parse(data)


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(TransferError, match="allowed are 65536"):
        messages.dump(Proof({"a": "b" * 65536}))


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_journal_is_refused_loudly(tmp_path: Path, data: bytes) -> None:
    journal = Journal(Layout(tmp_path))
    written = journal.save(Transfer(ID, Side.SOURCE, State.OFFERED, UUID, 0, "b", "b:1", 1, 1.0))
    path = Layout(tmp_path).transfers / UUID / f"{ID}.json"
    assert journal.of(UUID) == [written]
    path.write_bytes(data)
    for look in (lambda: journal.of(UUID), lambda: journal.find(ID), lambda: journal.gate(UUID)):
        with pytest.raises(Error) as caught:
            look()
        assert caught.value.id == "transfer.journal-damaged"


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_journal_with_one_thing_wrong(tmp_path: Path, data: st.DataObject) -> None:
    journal = Journal(Layout(tmp_path))
    journal.save(Transfer(ID, Side.SOURCE, State.OFFERED, UUID, 0, "b", "b:1", 1, 1.0))
    path = Layout(tmp_path).transfers / UUID / f"{ID}.json"
    value = json.loads(path.read_bytes())
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(JSON)
    path.write_text(json.dumps(value))
    try:
        (found,) = journal.of(UUID)
    except TransferError as error:
        assert error.id == "transfer.journal-damaged"
    else:
        assert (found.id, found.uuid) == (ID, UUID)
        assert type(found.side) is Side
        assert type(found.state) is State
