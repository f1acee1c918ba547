"""DSSE envelopes, compared both ways with securesystemslib."""

from __future__ import annotations

import base64
import json

import pytest
from certifier import ED25519, P256
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as ReferenceEnvelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import JSON_DEPTH, SIGNATURES
from swtpm_prop.trust import dsse, keys
from swtpm_prop.trust.keys import PrivateKey

TYPE = "application/vnd.example+json"
both = pytest.mark.parametrize("key", [ED25519, P256], ids=["ed25519", "p256"])


@both
@given(payload=st.binary(max_size=200), kind=st.text(st.characters(codec="utf-8"), max_size=20))
def test_another_implementation_accepts_ours(key: PrivateKey, payload: bytes, kind: str) -> None:
    envelope = ReferenceEnvelope.from_dict(json.loads(dsse.sign(kind, payload, [key])))
    public = SSlibKey.from_crypto(key.public_key())
    # It looks keys up by the key id, which is its own affair.
    envelope.signatures = {public.keyid: next(iter(envelope.signatures.values()))}
    envelope.signatures[public.keyid].keyid = public.keyid
    assert envelope.verify([public], 1)
    assert envelope.payload == payload


@both
@given(payload=st.binary(max_size=200), kind=st.text(st.characters(codec="utf-8"), max_size=20))
def test_ours_accepts_another_implementation(key: PrivateKey, payload: bytes, kind: str) -> None:
    reference = ReferenceEnvelope(payload, kind, {})
    reference.sign(CryptoSigner(key))
    parsed = dsse.parse(json.dumps(reference.to_dict()).encode())
    assert parsed.payload == payload
    assert dsse.verify(parsed, [key.public_key()], 1) == (keys.keyid(key.public_key()),)
    assert dsse.pae(kind, payload) == reference.pae()


def test_threshold_counts_keys_not_signatures() -> None:
    twice = dsse.parse(dsse.sign(TYPE, b"x", [ED25519, ED25519]))
    public = [ED25519.public_key(), P256.public_key()]
    with pytest.raises(TrustError) as refused:
        dsse.verify(twice, public, 2)
    assert refused.value.id == "trust.signature"
    # The same key listed twice by a careless caller is one key, too.
    with pytest.raises(TrustError):
        dsse.verify(twice, [ED25519.public_key(), ED25519.public_key()], 2)
    assert len(dsse.verify(dsse.parse(dsse.sign(TYPE, b"x", [P256, ED25519])), public, 2)) == 2


def test_key_ids_decide_nothing() -> None:
    envelope = json.loads(dsse.sign(TYPE, b"x", [ED25519]))
    envelope["signatures"][0]["keyid"] = keys.keyid(P256.public_key())
    dsse.verify(dsse.parse(json.dumps(envelope).encode()), [ED25519.public_key()], 1)
    del envelope["signatures"][0]["keyid"]
    parsed = dsse.parse(json.dumps(envelope).encode())
    dsse.verify(parsed, [ED25519.public_key()], 1)
    with pytest.raises(TrustError):
        dsse.verify(parsed, [P256.public_key()], 1)


def test_the_type_is_signed_too() -> None:
    envelope = dsse.parse(dsse.sign(TYPE, b"x", [ED25519]))
    with pytest.raises(TrustError):
        dsse.verify(envelope._replace(payload_type=TYPE + " "), [ED25519.public_key()], 1)
    with pytest.raises(TrustError):
        dsse.verify(envelope._replace(payload=b"y"), [ED25519.public_key()], 1)


def test_url_safe_base64_and_unknown_fields_are_accepted() -> None:
    payload = bytes(range(251, 256)) * 3
    envelope = json.loads(dsse.sign(TYPE, payload, [ED25519]))
    envelope["payload"] = base64.urlsafe_b64encode(payload).decode()
    envelope["note"] = {"since": 1.5}
    assert dsse.parse(json.dumps(envelope).encode()).payload == payload


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("data", "id"),
    [
        (b"", "trust.json"),
        (b"\xff{}", "trust.json"),
        (b"\xef\xbb\xbf{}", "trust.json"),
        ('{"payload":""}'.encode("utf-16"), "trust.json"),
        (b"[]", "trust.json"),
        (b"{} {}", "trust.json"),
        (b'{"payload":"","payload":"","payloadType":"","signatures":[{"sig":""}]}', "trust.json"),
        (b'{"a":{"b":1,"b":1}}', "trust.json"),
        (b'{"a":NaN}', "trust.json"),
        (b'{"a":-Infinity}', "trust.json"),
        (b'{"a":' + b"1" * 5000 + b"}", "trust.json"),
        (deep(JSON_DEPTH + 1), "trust.json"),
        (deep(100_000), "trust.json"),
        (b"[" * 100_000, "trust.json"),
        (b"{}", "trust.field"),
        (b'{"payload":1,"payloadType":"","signatures":[{"sig":""}]}', "trust.field"),
        (b'{"payload":"","payloadType":null,"signatures":[{"sig":""}]}', "trust.field"),
        (b'{"payload":"","payloadType":"","signatures":{}}', "trust.field"),
        (b'{"payload":"","payloadType":"","signatures":[1]}', "trust.field"),
        (b'{"payload":"","payloadType":"","signatures":[{}]}', "trust.field"),
        (b'{"payload":"","payloadType":"","signatures":[]}', "trust.signatures"),
        (b'{"payload":"","payloadType":"","signatures":[' + b"0," * SIGNATURES + b"0]}", "trust.signatures"),
        (b'{"payload":"eA","payloadType":"","signatures":[{"sig":""}]}', "trust.base64"),
        (b'{"payload":"eB==","payloadType":"","signatures":[{"sig":""}]}', "trust.base64"),
        (b'{"payload":"eA==\\n","payloadType":"","signatures":[{"sig":""}]}', "trust.base64"),
        (b'{"payload":"-_+/","payloadType":"","signatures":[{"sig":""}]}', "trust.base64"),
        ('{"payload":"\u00e9A==","payloadType":"","signatures":[{"sig":""}]}'.encode(), "trust.base64"),
    ],
)
def test_what_is_no_envelope_is_refused(data: bytes, id: str) -> None:
    with pytest.raises(TrustError) as refused:
        dsse.parse(data)
    assert refused.value.id == id
    assert refused.value.line().isprintable()
