"""Approval lists: who may say what about which states, and that no list goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certifier import ED25519, P256, public_pem
from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop.custody import approvals
from swtpm_prop.custody.approvals import ApprovalList, Difference
from swtpm_prop.custody.policy import approved, to_sign
from swtpm_prop.errors import HostError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import APPROVAL_LIST_BYTES, EPOCH_STEPS
from swtpm_prop.trust import dsse, issuers, keys
from swtpm_prop.trust.certificate import PAYLOAD_TYPE

APPROVED = "https://example.org/properties/approved-host"
OTHER = "https://example.org/properties/other-host"
AUTHORITY = ec.derive_private_key(0x5EED, ec.SECP256R1())
PUBLIC = AUTHORITY.public_key()
STRANGER = ec.derive_private_key(0xBAD, ec.SECP256R1())


def state(*changed: int) -> dict[int, bytes]:
    return {pcr: bytes([pcr, pcr in changed]) * 16 for pcr in range(8)}


def one() -> ApprovalList:
    return approvals.approve(approvals.begin(AUTHORITY), AUTHORITY, "first", APPROVED, state())


def two() -> ApprovalList:
    return approvals.approve(one(), AUTHORITY, "second", APPROVED, state(4, 5))


def refused(id: str, do: Callable[[], object]) -> None:
    with pytest.raises((TrustError, HostError)) as error:
        do()
    assert error.value.id == id, error.value


def test_what_is_signed_is_what_is_read() -> None:
    for made in (one(), approvals.revoke(one(), AUTHORITY, "first"), two()):
        data = approvals.sign(made, AUTHORITY)
        assert approvals.verify(data, PUBLIC) == approvals.read(data) == made


def test_editions_count_from_one() -> None:
    assert [listed.sequence for listed in (one(), two())] == [1, 2]
    refused("approvals.count", lambda: approvals.verify(approvals.sign(approvals.begin(AUTHORITY), AUTHORITY), PUBLIC))


def test_an_approval_is_signed_for_the_tpm() -> None:
    (approval,) = one().approvals
    keys.verify(PUBLIC, approval.signature, to_sign(approved(state(), 1), APPROVED))


def test_to_revoke_is_to_sign_the_others_for_the_next_epoch() -> None:
    revoked = approvals.revoke(two(), AUTHORITY, "first")
    assert (revoked.epoch, revoked.sequence) == (2, two().sequence + 1)
    assert [(approval.label, approval.epoch) for approval in revoked.approvals] == [("second", 2)]
    assert approvals.verify(approvals.sign(revoked, AUTHORITY), PUBLIC) == revoked
    empty = approvals.revoke(revoked, AUTHORITY, "second")
    assert approvals.verify(approvals.sign(empty, AUTHORITY), PUBLIC).approvals == ()
    refused("approvals.label-unknown", lambda: approvals.revoke(empty, AUTHORITY, "second"))


def test_the_epoch_of_a_fleet_goes_up_to_that_of_a_used_tpm() -> None:
    raised = approvals.raise_to(two(), AUTHORITY, 40)
    assert approvals.verify(approvals.sign(raised, AUTHORITY), PUBLIC) == raised
    assert {approval.epoch for approval in raised.approvals} == {40}
    # a slip of the pen must not take the fleet where no TPM follows and nobody comes back from
    for epoch in (40, 39, -1, 40 + EPOCH_STEPS + 1, 2**63):
        refused("approvals.epoch", lambda epoch=epoch: approvals.raise_to(raised, AUTHORITY, epoch))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("id", "label", "property", "pcrs"),
    [
        ("approvals.present", "first", OTHER, state()),
        ("approvals.present", "again", APPROVED, state()),
        ("approvals.label", "", APPROVED, state(1)),
        ("approvals.label", "a\x1b[2J", APPROVED, state(1)),
        ("approvals.label", "a" * 129, APPROVED, state(1)),
        ("trust.uri", "a", "approved host", state(1)),
        ("approvals.pcrs", "a", APPROVED, {}),
        ("approvals.pcrs", "a", APPROVED, {0: b"short"}),
        ("approvals.pcrs", "a", APPROVED, {16: bytes(32)}),
        ("approvals.pcrs", "a", APPROVED, {24: bytes(32)}),
    ],
)
def test_what_is_not_approved(id: str, label: str, property: str, pcrs: dict[int, bytes]) -> None:
    refused(id, lambda: approvals.approve(one(), AUTHORITY, label, property, pcrs))


def test_a_list_is_one_key_s() -> None:
    refused("approvals.key", lambda: approvals.approve(one(), STRANGER, "a", APPROVED, state(1)))
    refused("approvals.key", lambda: approvals.revoke(one(), STRANGER, "first"))
    refused("approvals.key", lambda: approvals.sign(one(), STRANGER))
    refused("approvals.key", lambda: approvals.begin(ED25519))


def test_a_list_of_somebody_else_is_nothing_worth() -> None:
    refused("trust.signature", lambda: approvals.verify(approvals.sign(one(), AUTHORITY), STRANGER.public_key()))
    # Signed by the key, but said to be another's.
    theirs = one()._replace(authority=keys.keyid(STRANGER.public_key()))
    refused("approvals.key", lambda: approvals.verify(forged(theirs), PUBLIC))


def forged(content: ApprovalList, change: Callable[[Any], object] = lambda statement: None) -> bytes:
    """Signed by the authority's key, whatever it says."""
    statement = approvals._statement(content)
    change(statement)
    return dsse.sign(PAYLOAD_TYPE, json.dumps(statement).encode(), [AUTHORITY])


def entry(**values: object) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"]["approvals"][0].update(values)


def predicate(**values: object) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"].update(values)


@pytest.mark.parametrize(
    ("id", "change"),
    [
        ("approvals.type", lambda statement: statement.update(predicateType="https://in-toto.io/attestation/svr/v0.2")),
        ("approvals.type", lambda statement: statement.update(_type="https://in-toto.io/Statement/v0.1")),
        ("trust.field", lambda statement: statement.pop("predicate")),
        ("approvals.count", predicate(epoch=0)),
        ("approvals.count", predicate(epoch=True)),
        ("approvals.count", predicate(sequence="1")),
        ("approvals.count", predicate(sequence=2**63)),
        ("approvals.pcrs", predicate(epoch=2)),
        ("trust.field", predicate(approvals=["first"])),
        ("trust.field", predicate(authority=7)),
        ("approvals.too-many", lambda statement: predicate(approvals=[{}] * 1025)(statement)),
        ("approvals.label", lambda statement: statement["predicate"].update(approvals=_twice(statement))),
        ("approvals.label", entry(label="a\nb")),
        ("trust.uri", entry(property="x y")),
        ("trust.signature", entry(property=OTHER)),
        ("approvals.pcrs", entry(pcrs={"0": "00" * 32})),
        ("approvals.pcrs", entry(pcrs={"00": "00" * 32})),
        ("approvals.pcrs", entry(pcrs={"0": 0})),
        ("approvals.pcrs", entry(pcrs={"23": "00" * 32})),
        ("approvals.pcrs", entry(pcrs={})),
        ("approvals.pcrs", entry(policy="00" * 32)),
        ("trust.base64", entry(signature="!")),
        ("trust.signature", entry(signature="AAAA")),
    ],
)
def test_a_list_that_is_signed_and_wrong(id: str, change: Callable[[Any], object]) -> None:
    refused(id, lambda: approvals.verify(forged(one(), change), PUBLIC))


def _twice(statement: Any) -> list[Any]:
    return [*statement["predicate"]["approvals"], *statement["predicate"]["approvals"]]


def test_a_list_is_not_taken_for_something_else() -> None:
    made = one()
    assert approvals.verify(forged(made), PUBLIC) == made
    refused("approvals.type", lambda: approvals.read(dsse.sign("text/plain", b"{}", [AUTHORITY])))
    refused("approvals.too-large", lambda: approvals.read(b" " * (APPROVAL_LIST_BYTES + 1)))


def test_a_state_is_found_or_the_nearest_is() -> None:
    found = approvals.find(two(), APPROVED, state(4, 5) | {14: bytes(32)})
    assert found == two().approvals[1]._replace(signature=getattr(found, "signature", b""))
    differing = approvals.find(two(), APPROVED, state(4))
    assert differing == Difference("first", {4: (state()[4], state(4)[4])})
    assert two().pcrs(APPROVED) == set(range(8))
    assert two().pcrs(OTHER) == set()
    refused("host.nothing-approved", lambda: approvals.find(two(), OTHER, state()))


def test_who_is_authorized() -> None:
    authorization = approvals.authorize(two(), PUBLIC, APPROVED, state())
    assert (authorization.authority, authorization.approval.label) == (PUBLIC, "first")
    with pytest.raises(HostError, match="PCRs 4, 7 differ from 'first'") as error:
        approvals.authorize(two(), PUBLIC, APPROVED, state(4, 7))
    assert error.value.id == "host.state-not-approved"
    with pytest.raises(HostError, match="PCR 4 differs from 'first'"):
        approvals.authorize(two(), PUBLIC, APPROVED, state(4))


def trust(*entries: tuple[str, tuple[Any, ...], bool]) -> issuers.Trust:
    text = ""
    for number, (prefix, listed, approves) in enumerate(entries):
        pems = ", ".join(f'"""{public_pem(key)}"""' for key in listed)
        text += f'[[issuer]]\nid = "https://example.org/issuers/{number}"\nkeys = [{pems}]\n'
        text += f'prefixes = ["{prefix}"]\napproves-hosts = {str(approves).lower()}\n'
    return issuers.parse(text.encode(), Path())


ABOVE = "https://example.org/properties"


def test_the_authority_is_the_one_issuer_with_a_key_that_tpms_check() -> None:
    boot = ("https://example.org/boot", (STRANGER,), True)
    certifier = (ABOVE, (STRANGER,), False)
    assert approvals.authority(trust((ABOVE, (ED25519, AUTHORITY, P256), True), boot), APPROVED) == PUBLIC
    assert approvals.authority(trust(certifier, (APPROVED, (AUTHORITY,), True)), APPROVED) == PUBLIC
    for none in (trust(boot), trust(certifier), trust(boot, certifier)):
        refused("approvals.no-authority", lambda none=none: approvals.authority(none, APPROVED))  # type: ignore[misc]
    both = trust((ABOVE, (AUTHORITY,), True), (APPROVED, (P256,), True))
    refused("approvals.several-authorities", lambda: approvals.authority(both, APPROVED))


def test_who_only_certifies_gives_no_lists() -> None:
    whole = trust((ABOVE, (ED25519, AUTHORITY, P256), True), ("https://example.org/boot", (STRANGER,), False))
    assert approvals.authorities(whole) == {keys.keyid(PUBLIC): PUBLIC}


def test_an_installed_list_never_goes_back(tmp_path: Path) -> None:
    layout, whole = Layout(tmp_path), trust((ABOVE, (AUTHORITY,), True))
    refused("approvals.missing", lambda: approvals.load(layout, whole, APPROVED))
    revoked = approvals.revoke(two(), AUTHORITY, "first")
    for edition in (one(), two(), revoked, revoked):
        data = approvals.sign(edition, AUTHORITY)
        assert approvals.install(layout, data, PUBLIC) == edition
        assert approvals.load(layout, whole, APPROVED) == (PUBLIC, edition)
    for edition in (one(), two(), two()._replace(sequence=9), revoked._replace(sequence=1)):
        older = forged(edition)
        refused("approvals.older", lambda older=older: approvals.install(layout, older, PUBLIC))  # type: ignore[misc]
    assert approvals.load(layout, whole, APPROVED) == (PUBLIC, revoked)


def test_there_are_no_two_editions_with_one_number(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    approvals.install(layout, approvals.sign(two(), AUTHORITY), PUBLIC)
    again = two()
    assert again.approvals[0].signature != two().approvals[0].signature
    approvals.install(layout, approvals.sign(again, AUTHORITY), PUBLIC)
    far = approvals.raise_to(approvals.raise_to(one(), AUTHORITY, 2), AUTHORITY, 2 + EPOCH_STEPS)
    refused("approvals.epoch", lambda: approvals.install(layout, approvals.sign(far, AUTHORITY), PUBLIC))
    fork = approvals.approve(one(), AUTHORITY, "another", APPROVED, state(6))
    refused("approvals.fork", lambda: approvals.install(layout, approvals.sign(fork, AUTHORITY), PUBLIC))


def test_a_list_somebody_put_there_does_not_count(tmp_path: Path) -> None:
    layout, whole = Layout(tmp_path), trust((ABOVE, (AUTHORITY,), True))
    approvals.install(layout, approvals.sign(one(), AUTHORITY), PUBLIC)
    (path,) = layout.approvals.iterdir()
    foreign = approvals.approve(approvals.begin(STRANGER), STRANGER, "mine", APPROVED, state(1))
    path.write_bytes(approvals.sign(foreign, STRANGER))
    refused("trust.signature", lambda: approvals.load(layout, whole, APPROVED))
