"""Property certificates: what is issued verifies, and every forgery is refused with its own id."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifier
import pytest
from certifier import BOOT, ED25519, NOW, P256, issue, signed, statement, subject, trust, trust_text
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from jsonschema import Draft202012Validator

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import ANNOTATION_CHARS, ANNOTATIONS, CERTIFICATE_PROPERTIES
from swtpm_prop.trust import certificate, dsse, issuers
from swtpm_prop.trust.certificate import read, verify
from swtpm_prop.trust.sources import Subject

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas/certificate.schema.json").read_text())
Change = Callable[[dict[str, Any]], object]


def refused_id(data: bytes, now: int | None = NOW) -> str:
    with pytest.raises(TrustError) as refused:
        verify(data, trust(), now)
    assert refused.value.line().isprintable()
    return refused.value.id


def test_what_is_issued_verifies_and_says_what_was_claimed() -> None:
    subjects = (subject(b"kernel"), subject(b"initrd", "sha256"), subject(b"grub", "sha384", "sha512"))
    data = issue(*subjects, properties=(BOOT, BOOT + "/x"), signers=(ED25519, P256))
    checked = verify(data, trust(ED25519, P256, threshold=2), NOW)
    assert checked == read(data)
    assert checked.subjects == subjects
    assert checked.properties == (BOOT, BOOT + "/x")
    assert (checked.issuer, checked.created) == (certifier.ISSUER, NOW)
    assert (checked.not_before, checked.not_after) == (NOW - 10, NOW + 10)


def test_annotations_are_carried_as_they_are() -> None:
    annotated = subject(b"kernel")._replace(annotations={"component": "linux", "version": "6.1.153-1"})
    data = issue(annotated, subject(b"initrd"))
    assert verify(data, trust(), NOW).subjects == (annotated, subject(b"initrd"))
    first, second = statement(data)["subject"]
    assert first["annotations"] == {"component": "linux", "version": "6.1.153-1"}
    assert "annotations" not in second
    Draft202012Validator(SCHEMA).validate(statement(data))


def test_the_id_is_of_the_payload_not_of_the_signatures() -> None:
    by_one, by_both = (issue_same((ED25519,)), issue_same((ED25519, P256)))
    assert by_one != by_both
    assert read(by_one).id == read(by_both).id


def issue_same(signers: tuple[Any, ...]) -> bytes:
    claim = certificate.Claim(certifier.ISSUER, (BOOT,), (subject(b"kernel"),), NOW, NOW)
    return certificate._issue(claim, signers, NOW, "00")


def test_what_is_issued_is_what_the_schema_says() -> None:
    validator = Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(statement(issue(subject(b"a"), subject(b"b", "sha512"))))


def test_what_is_issued_is_a_statement_to_the_reference_implementation() -> None:
    """Every field is one that in-toto's own definition knows: json_format refuses any other."""
    envelope = json.loads(issue(subject(b"a"), subject(b"b", "sha512")._replace(annotations={"component": "linux"})))
    message = json_format.Parse(base64.b64decode(envelope["payload"]), StatementMessage())
    Statement.copy_from_pb(message).validate()
    assert [dict(each.digest).keys() for each in message.subject] == [{"sha256", "sha384", "sha512"}, {"sha512"}]
    assert message.subject[1].annotations["component"] == "linux"
    assert message.predicate_type == "https://in-toto.io/attestation/svr/v0.2"
    # The predicate's own definition is prose (in-toto/attestation, spec/predicates/svr.md): required fields and types.
    predicate = json_format.MessageToDict(message.predicate)
    assert isinstance(predicate["verifier"]["id"], str)
    assert predicate["verifier"]["policies"] == []
    assert isinstance(predicate["timeCreated"], str)
    assert all(isinstance(each, str) for each in predicate["properties"])


def edit(**to: Any) -> Change:
    return lambda s: s.update(to)


def edit_predicate(**to: Any) -> Change:
    return lambda s: s["predicate"].update(to)


def edit_digest(**to: Any) -> Change:
    return lambda s: s["subject"][0].update(digest=to)


def annotate(annotations: Any) -> Change:
    return lambda s: s["subject"][0].update(annotations=annotations)


def add_subject(**digest: Any) -> Change:
    return lambda s: s["subject"].append({"name": "more", "digest": digest})


def window(before: str, after: str) -> Change:
    return edit_predicate(validity={"notBefore": before, "notAfter": after})


KERNEL = {name: digest.hex() for name, digest in certifier.digests_of(b"kernel").items()}
EARLY, LATE = "2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z"

FORGERIES = [
    (edit(_type="https://in-toto.io/Statement/v0.1"), "trust.statement-type"),
    (edit(_type=1), "trust.field"),
    (edit(predicateType="https://in-toto.io/attestation/svr/v0.1"), "trust.predicate-type"),
    (edit(predicate=[]), "trust.field"),
    (edit_predicate(verifier={"id": "https://example.org/issuers/other", "policies": []}), "trust.issuer-unknown"),
    (edit_predicate(verifier={"id": "https://EXAMPLE.org/issuers/debian", "policies": []}), "trust.uri"),
    (edit_predicate(verifier={}), "trust.field"),
    (edit_predicate(verifier={"id": certifier.ISSUER}), "trust.field"),
    (edit_predicate(verifier={"id": certifier.ISSUER, "policies": {}}), "trust.field"),
    (edit_predicate(properties=["https://example.org/elsewhere"]), "trust.prefix"),
    (edit_predicate(properties=["https://example.org/propertiesx"]), "trust.prefix"),
    (edit_predicate(properties=["https://example.org/properties?x"]), "trust.prefix"),
    (edit_predicate(properties=[BOOT, "https://example.com/properties/boot"]), "trust.prefix"),
    (edit_predicate(properties=["https://example.org/properties/../elsewhere"]), "trust.uri"),
    (edit_predicate(properties=["https://example.org/properties/%2e%2e/elsewhere"]), "trust.uri"),
    (edit_predicate(properties=["HTTPS://example.org/properties/boot"]), "trust.uri"),
    (edit_predicate(properties=["https://example.org/properties/b\u043e\u043et"]), "trust.uri"),
    (edit_predicate(properties=[BOOT + "\n" + BOOT + "/x"]), "trust.uri"),
    (edit_predicate(properties=[BOOT + "\ud800"]), "trust.uri"),
    (edit_predicate(properties=[BOOT + "x" * 512]), "trust.uri"),
    (edit_predicate(properties=[]), "trust.properties"),
    (edit_predicate(properties=[BOOT, BOOT]), "trust.properties"),
    (edit_predicate(properties=[f"{BOOT}/{n}" for n in range(CERTIFICATE_PROPERTIES + 1)]), "trust.properties"),
    (edit_predicate(properties=[1]), "trust.field"),
    (edit_predicate(properties=BOOT), "trust.field"),
    (edit_predicate(timeCreated="yesterday"), "trust.time"),
    (window("2026-01-01T00:00:00", LATE), "trust.time"),
    (window("2026-01-01T00:00:00+01:00", LATE), "trust.time"),
    (window("2026-02-30T00:00:00Z", LATE), "trust.time"),
    (window("2026-01-01T00:00:60Z", LATE), "trust.time"),
    (window("0000-01-01T00:00:00Z", LATE), "trust.time"),
    (window("\u0662026-01-01T00:00:00Z", LATE), "trust.time"),
    (window(LATE, EARLY), "trust.validity"),
    (window(EARLY, "2026-01-02T00:00:00Z"), "trust.expired"),
    (window("2098-01-01T00:00:00Z", LATE), "trust.not-yet-valid"),
    (edit_predicate(validity={"notBefore": EARLY}), "trust.field"),
    (edit_predicate(serial="XYZ"), "trust.serial"),
    (edit_predicate(serial=7), "trust.field"),
    (edit(subject=[]), "trust.subjects"),
    (edit(subject={}), "trust.field"),
    (edit(subject=["kernel"]), "trust.field"),
    (edit(subject=[{"name": 1, "digest": KERNEL}]), "trust.field"),
    (edit(subject=[{"name": "kernel"}]), "trust.field"),
    (edit_digest(), "trust.weak-digest"),
    (edit_digest(sha1="00" * 20), "trust.weak-digest"),
    (edit_digest(md5="00" * 16, gitCommit="00" * 20), "trust.weak-digest"),
    (edit_digest(sha256="00" * 31), "trust.digest-length"),
    (edit_digest(sha256="00" * 32 + "0"), "trust.digest-length"),
    (edit_digest(sha384="00" * 32), "trust.digest-length"),
    (edit_digest(sha256="00" * 32, sha1="00" * 32), "trust.digest-length"),
    (edit_digest(sha256="AB" * 32), "trust.digest-form"),
    (edit_digest(sha256="0x" + "ab" * 31), "trust.digest-form"),
    (edit_digest(sha256=" " + "a" * 63), "trust.digest-form"),
    (edit_digest(sha256=None), "trust.digest-form"),
    (annotate(["linux"]), "trust.field"),
    (annotate({"version": 6}), "trust.annotations"),
    (annotate({"version": {"major": "6"}}), "trust.annotations"),
    (annotate({"version": None}), "trust.annotations"),
    (annotate({"version": "6" * (ANNOTATION_CHARS + 1)}), "trust.annotations"),
    (annotate({"v" * (ANNOTATION_CHARS + 1): "6"}), "trust.annotations"),
    (annotate({str(n): "" for n in range(ANNOTATIONS + 1)}), "trust.annotations"),
    (add_subject(sha256=KERNEL["sha256"], sha384="00" * 48), "trust.contradiction"),
    (add_subject(sha256="00" * 32, sha512=KERNEL["sha512"]), "trust.contradiction"),
]


@pytest.mark.parametrize(("change", "id"), FORGERIES)
def test_bad_contents_are_refused_though_well_signed(change: Change, id: str) -> None:
    forged = statement(issue())
    change(forged)
    assert refused_id(signed(forged)) == id


EXPRESSIBLE = {
    "trust.statement-type",
    "trust.predicate-type",
    "trust.field",
    "trust.properties",
    "trust.serial",
    "trust.subjects",
    "trust.weak-digest",
    "trust.digest-length",
    "trust.digest-form",
    "trust.annotations",
}
"""What a JSON Schema can say; prefixes, calendars and contradictions it cannot."""


@pytest.mark.parametrize("change", [change for change, id in FORGERIES if id in EXPRESSIBLE])
def test_the_schema_refuses_what_the_parser_refuses(change: Change) -> None:
    forged = statement(issue())
    change(forged)
    assert not Draft202012Validator(SCHEMA).is_valid(forged)


def test_the_three_subjects_of_a_hidden_contradiction_are_seen() -> None:
    """The first agrees with each of the others, which do not agree with each other."""
    forged = statement(issue(subject(b"kernel", "sha256")))
    add_subject(sha256=KERNEL["sha256"], sha384="00" * 48)(forged)
    add_subject(sha256=KERNEL["sha256"], sha384="11" * 48)(forged)
    assert refused_id(signed(forged)) == "trust.contradiction"


def test_the_same_thing_named_twice_is_no_contradiction() -> None:
    again = statement(issue())
    add_subject(sha256=KERNEL["sha256"])(again)
    add_subject(**KERNEL)(again)
    assert len(verify(signed(again), trust(), NOW).subjects) == 3


def test_wrong_signatures_and_types_are_refused() -> None:
    good = statement(issue())
    assert refused_id(signed(good, "application/vnd.in-toto+xml")) == "trust.payload-type"
    assert refused_id(signed(good, signer=P256)) == "trust.signature"
    envelope = json.loads(issue())
    envelope["signatures"] = json.loads(issue())["signatures"]
    assert refused_id(json.dumps(envelope).encode()) == "trust.signature"
    # The signature is looked at before the contents: an unsigned forgery learns nothing of them.
    good["subject"] = []
    assert refused_id(signed(good, signer=P256)) == "trust.signature"


def test_signed_under_another_type_does_not_count() -> None:
    """The same bytes signed as something else must not become a certificate."""
    payload = json.dumps(statement(issue())).encode()
    envelope = json.loads(dsse.sign("text/plain", payload, [ED25519]))
    envelope["payloadType"] = certificate.PAYLOAD_TYPE
    assert refused_id(json.dumps(envelope).encode()) == "trust.signature"


def test_duplicate_names_inside_the_payload_are_refused() -> None:
    payload = json.dumps(statement(issue()))
    assert refused_id(signed(payload.replace('"_type"', '"predicateType": "x", "_type"', 1).encode())) == "trust.json"


def test_both_ends_of_the_window_belong_to_it() -> None:
    data = issue(begins=NOW, ends=NOW + 1)
    assert refused_id(data, NOW - 1) == "trust.not-yet-valid"
    verify(data, trust(), NOW)
    verify(data, trust(), NOW + 1)
    assert refused_id(data, NOW + 2) == "trust.expired"
    verify(data, trust(), None)


def test_unknown_fields_are_ignored_and_sha1_counts_for_nothing() -> None:
    more = statement(issue())
    more["future"] = more["predicate"]["future"] = {"x": [1.5, None]}
    more["subject"][0]["digest"] |= {"sha1": "00" * 20, "sha3_256": "?"}
    assert verify(signed(more), trust(), NOW).subjects[0].digests == certifier.digests_of(b"kernel")


@pytest.mark.parametrize(
    "claim",
    [
        {"properties": ("https://example.org/a/../b",)},
        {"begins": NOW, "ends": NOW - 1},
    ],
)
def test_nothing_is_issued_that_would_not_be_read(claim: dict[str, Any]) -> None:
    with pytest.raises(TrustError):
        issue(**claim)
    with pytest.raises(TrustError):
        issue(Subject("empty", {}))


def test_other_curves_are_no_keys_of_ours() -> None:
    with pytest.raises(TrustError) as refused:
        trust(ec.derive_private_key(77, ec.SECP384R1()))
    assert refused.value.id == "trust.key"


def test_two_issuers_do_not_speak_for_each_other() -> None:
    """Neither under the prefix of the other nor in its name, though a host trusts both."""
    other, elsewhere = "https://example.org/issuers/other", "https://example.org/elsewhere"
    second = trust_text(P256, prefix=elsewhere).replace(certifier.ISSUER, other)
    both = issuers.parse((trust_text(ED25519) + second).encode(), Path())
    own = issue(subject(b"kernel"))
    verify(own, both, NOW)
    verify(renamed(own, other, elsewhere, P256), both, NOW)
    for forged, id in (
        (issue(subject(b"kernel"), properties=(elsewhere,)), "trust.prefix"),
        (issue(subject(b"kernel"), properties=(elsewhere,), signers=(ED25519, P256)), "trust.prefix"),
        (renamed(own, other, elsewhere, ED25519), "trust.signature"),
        (renamed(own, other, BOOT, P256), "trust.prefix"),
    ):
        with pytest.raises(TrustError) as refused:
            verify(forged, both, NOW)
        assert refused.value.id == id


def renamed(data: bytes, issuer: str, uri: str, key: Any) -> bytes:
    """The same statement in the name of another issuer, for another property, signed by this key."""
    said = statement(data)
    said["predicate"].update(verifier={"id": issuer, "policies": []}, properties=[uri])
    return dsse.sign(certificate.PAYLOAD_TYPE, json.dumps(said).encode(), [key])
