"""Hostile approval lists and key files: accepted or refused with the one error, never anything else."""

from __future__ import annotations

import contextlib
import json

from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop.custody import approvals, tss2
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.errors import TrustError, WireError
from swtpm_prop.trust import dsse
from swtpm_prop.trust.certificate import PAYLOAD_TYPE, STATEMENT_TYPE

AUTHORITY = ec.derive_private_key(0x5EED, ec.SECP256R1())
APPROVED = "https://example.org/properties/approved-host"
LIST = approvals.approve(approvals.begin(AUTHORITY), AUTHORITY, "a", APPROVED, {0: bytes(32), 7: bytes(32)})
SIGNED = approvals.sign(LIST, AUTHORITY)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("00" * 32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "label": JSON | st.text(min_size=1, max_size=9),
        "property": JSON | st.just(APPROVED),
        "pcrs": JSON | st.dictionaries(st.sampled_from("0179") | st.text(max_size=3), JSON, max_size=3),
        "policy": JSON,
        "signature": JSON | st.just("AAAA"),
    },
)
PREDICATES = st.fixed_dictionaries(
    {},
    optional={
        "authority": JSON | st.just(LIST.authority),
        "epoch": JSON | st.integers(1, 9),
        "sequence": JSON | st.integers(1, 9),
        "approvals": JSON | st.lists(ENTRIES, max_size=3),
    },
)


@given(data=st.binary(max_size=400))
def test_bytes_are_no_list(data: bytes) -> None:
    with contextlib.suppress(TrustError):
        approvals.read(data)


@given(predicate=PREDICATES)
def test_what_an_authority_signs_is_good_or_refused(predicate: object) -> None:
    statement = {"_type": STATEMENT_TYPE, "predicateType": approvals.PREDICATE_TYPE, "predicate": predicate}
    data = dsse.sign(PAYLOAD_TYPE, json.dumps(statement).encode(), [AUTHORITY])
    with contextlib.suppress(TrustError):
        read = approvals.verify(data, AUTHORITY.public_key())
        # All that nobody signed for the TPM is an empty list.
        assert read.approvals == ()


@given(position=st.integers(0, len(SIGNED) - 1), byte=st.integers(0, 255))
def test_a_changed_list_says_the_same_or_nothing(position: int, byte: int) -> None:
    changed = SIGNED[:position] + bytes([byte]) + SIGNED[position + 1 :]
    with contextlib.suppress(TrustError):
        assert approvals.verify(changed, AUTHORITY.public_key()) == LIST


PEM = tss2.to_pem(tss2.KeyFile(Sealed(bytes(9), bytes(9)), 0x81005350))


@given(data=st.binary(max_size=200) | st.tuples(st.integers(33, len(PEM) - 34), st.binary(max_size=8)).map(
    lambda change: PEM[: change[0]] + change[1] + PEM[change[0] + len(change[1]) :]
))  # fmt: skip
def test_a_key_file_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        tss2.from_pem(data)
