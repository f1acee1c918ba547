"""Property certificates: an issuer's signed statement that what has these digests has these properties.

An in-toto Statement v1 with a Simple Verification Result v0.2 as predicate, in a DSSE envelope. As in-toto demands,
fields that are not known are ignored; what is known must be exactly right.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import ANNOTATION_CHARS, ANNOTATIONS, CERTIFICATE_PROPERTIES, SUBJECTS
from swtpm_prop.tpm.algorithms import BY_NAME, STRONG
from swtpm_prop.trust import dsse, strict_json
from swtpm_prop.trust.issuers import Trust
from swtpm_prop.trust.keys import SigningKey
from swtpm_prop.trust.sources import NO_ANNOTATIONS, Subject
from swtpm_prop.trust.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from swtpm_prop.trust.strict_json import Object, member
from swtpm_prop.trust.uri import check_property

PREDICATE_TYPE = "https://in-toto.io/attestation/svr/v0.2"

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_FORM = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-5][0-9]Z")
_SERIAL_FORM = re.compile(r"[0-9a-f]{2,64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX_FORM = re.compile(r"[0-9a-f]*")


class Certificate(NamedTuple):
    """What a certificate says. Times are seconds since the epoch, UTC; the window includes both ends.

    Attributes:
        id: ``sha256:`` and the SHA-256 of the payload in hex; the signatures do not change it.
        issuer: ``verifier.id``, a URI.
        properties: URIs in normal form, at least one.
        serial: the issuer's number for it, hex.
        subjects: what it speaks of, at least one, each with at least one digest.
    """

    id: str
    issuer: str
    created: int
    properties: tuple[str, ...]
    not_before: int
    not_after: int
    serial: str
    subjects: tuple[Subject, ...]


class Claim(NamedTuple):
    """What an issuer is about to certify; see `Certificate`."""

    issuer: str
    properties: Sequence[str]
    subjects: Sequence[Subject]
    not_before: int
    not_after: int


def issue(claim: Claim, signers: Sequence[SigningKey], created: int) -> bytes:
    """A signed certificate, ready to be written to a file.

    Raises:
        TrustError: the claim is one that `read` would refuse.
    """
    return _issue(claim, signers, created, secrets.token_hex(16))


def _issue(claim: Claim, signers: Sequence[SigningKey], created: int, serial: str) -> bytes:
    payload = json.dumps(_statement(claim, created, serial)).encode()
    _contents(payload, _typed(payload))
    return dsse.sign(PAYLOAD_TYPE, payload, signers)


def read(data: bytes) -> Certificate:
    """What a certificate says, whoever signed it: steps 1 to 4 and 7 of `verify`. To look at, never to rely on.

    Raises:
        TrustError: as `verify`.
    """
    envelope = _envelope(data)
    return _contents(envelope.payload, _typed(envelope.payload))


def verify(data: bytes, trust: Trust, now: int | None) -> Certificate:
    """Check a certificate; what is returned may be relied on.

    1. It is a DSSE envelope.
    2. The payload type is in-toto's.
    3. The statement type is in-toto's Statement v1.
    4. The predicate type is Simple Verification Result v0.2.
    5. The issuer is known.
    6. At least a threshold of distinct keys of the issuer signed it.
    7. Its contents are well-formed: properties, times, serial; each subject has a SHA-256, SHA-384 or SHA-512 digest
       of the right length, and no two subjects contradict each other.
    8. The issuer may speak for each property.
    9. ``now`` is in the validity window.

    Args:
        data: the envelope.
        trust: the issuers this host believes.
        now: seconds since the epoch; None leaves step 9 to who uses the certificate: the index keeps the window and
            judges each measurement by it.

    Raises:
        TrustError: (1) ``trust.too-large``, ``trust.json``, ``trust.field``, ``trust.base64``, ``trust.signatures``;
            (2) ``trust.payload-type``; (3) ``trust.statement-type``; (4) ``trust.predicate-type``;
            (5) ``trust.issuer-unknown``; (6) ``trust.signature``; (7) ``trust.uri``, ``trust.properties``,
            ``trust.time``, ``trust.validity``, ``trust.serial``, ``trust.subjects``, ``trust.weak-digest``,
            ``trust.digest-length``, ``trust.digest-form``, ``trust.annotations``,
            ``trust.contradiction``; (8) ``trust.prefix``; (9) ``trust.expired``, ``trust.not-yet-valid``.
    """
    # 1, 2
    envelope = _envelope(data)
    # 3, 4
    statement = _typed(envelope.payload)
    # 5
    name = _issuer(statement)
    issuer = trust.get(name)
    if issuer is None:
        raise TrustError("trust.issuer-unknown", f"issuer '{name}' is not known here", "add it to the trust file")
    # 6
    dsse.verify(envelope, issuer.keys, issuer.threshold)
    # 7
    certificate = _contents(envelope.payload, statement)
    # 8
    for uri in certificate.properties:
        if not issuer.may_certify(uri):
            raise TrustError(
                "trust.prefix", f"issuer '{name}' may not certify '{uri}'", "see its prefixes in the trust file"
            )
    # 9
    if now is not None:
        check_window(certificate, now)
    return certificate


def check_window(certificate: Certificate, now: int) -> None:
    """Step 9 of `verify`.

    Raises:
        TrustError: ``trust.expired``, ``trust.not-yet-valid``.
    """
    if now < certificate.not_before:
        raise TrustError(
            "trust.not-yet-valid",
            f"it is valid from {format_time(certificate.not_before)} on",
            "wait until then, or set this machine's clock right",
        )
    if now > certificate.not_after:
        raise TrustError("trust.expired", f"it expired at {format_time(certificate.not_after)}", "get a newer one")


def format_time(seconds: int) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return time.strftime(_TIME, time.gmtime(seconds))


def parse_time(text: str) -> int:
    """Seconds since the epoch; only the one form that `format_time` writes.

    Raises:
        TrustError: ``trust.time``.
    """
    try:
        if _TIME_FORM.fullmatch(text) is None:
            raise ValueError
        return calendar.timegm(time.strptime(text, _TIME))
    except ValueError:
        raise TrustError(
            "trust.time", f"'{text[:40]}' is no time like 2026-01-31T00:00:00Z", "write it so, in UTC and whole seconds"
        ) from None


# -- writing ------------------------------------------------------------------------------------


def _statement(claim: Claim, created: int, serial: str) -> Object:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_descriptor(subject) for subject in claim.subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            # Version 0.2 asks for the list; an empty one says that no policy outside the statement can be named.
            "verifier": {"id": claim.issuer, "policies": []},
            "timeCreated": format_time(created),
            "properties": list(claim.properties),
            "validity": {"notBefore": format_time(claim.not_before), "notAfter": format_time(claim.not_after)},
            "serial": serial,
        },
    }


def _descriptor(subject: Subject) -> Object:
    """The subject as in-toto's ResourceDescriptor."""
    digests = {name: value.hex() for name, value in subject.digests.items()}
    annotations = {"annotations": dict(subject.annotations)} if subject.annotations else {}
    return {"name": subject.name, "digest": digests, **annotations}


# -- reading ------------------------------------------------------------------------------------


def _envelope(data: bytes) -> dsse.Envelope:
    envelope = dsse.parse(data)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise TrustError(
            "trust.payload-type", f"its payload is '{envelope.payload_type[:80]}', not {PAYLOAD_TYPE}", strict_json.ANEW
        )
    return envelope


def _typed(payload: bytes) -> Object:
    statement = strict_json.parse(payload)
    for name, id, expected in (
        ("_type", "trust.statement-type", STATEMENT_TYPE),
        ("predicateType", "trust.predicate-type", PREDICATE_TYPE),
    ):
        found = member(statement, name, str)
        if found != expected:
            raise TrustError(id, f"its {name} is '{found[:80]}', not {expected}", strict_json.ANEW)
    return statement


def _issuer(statement: Object) -> str:
    verifier = member(member(statement, "predicate", dict), "verifier", dict)
    member(verifier, "policies", list)
    name = member(verifier, "id", str)
    check_property(name)
    return name


def _contents(payload: bytes, statement: Object) -> Certificate:
    predicate = member(statement, "predicate", dict)
    validity = member(predicate, "validity", dict)
    not_before = parse_time(member(validity, "notBefore", str))
    not_after = parse_time(member(validity, "notAfter", str))
    if not_before > not_after:
        raise TrustError("trust.validity", "its validity ends before it begins", strict_json.ANEW)
    serial = member(predicate, "serial", str)
    if _SERIAL_FORM.fullmatch(serial) is None:
        raise TrustError("trust.serial", "its serial is not 2 to 64 lower-case hex digits", strict_json.ANEW)
    return Certificate(
        id="sha256:" + hashlib.sha256(payload).hexdigest(),
        issuer=_issuer(statement),
        created=parse_time(member(predicate, "timeCreated", str)),
        properties=_properties(predicate),
        not_before=not_before,
        not_after=not_after,
        serial=serial,
        subjects=_subjects(statement),
    )


def _properties(predicate: Object) -> tuple[str, ...]:
    properties = strict_json.strings(predicate, "properties")
    if not 1 <= len(properties) <= CERTIFICATE_PROPERTIES or len(set(properties)) != len(properties):
        raise TrustError(
            "trust.properties", f"it needs 1 to {CERTIFICATE_PROPERTIES} properties, all different", strict_json.ANEW
        )
    for uri in properties:
        check_property(uri)
    return tuple(properties)


def _subjects(statement: Object) -> tuple[Subject, ...]:
    entries = member(statement, "subject", list)
    if not 1 <= len(entries) <= SUBJECTS:
        raise TrustError(
            "trust.subjects", f"it has {len(entries)} subjects, allowed are 1 to {SUBJECTS}", strict_json.ANEW
        )
    subjects = tuple(_subject(entry) for entry in entries)
    _check_consistent(subjects)
    return subjects


def _subject(entry: object) -> Subject:
    if not isinstance(entry, dict):
        raise TrustError("trust.field", "a subject is no object", strict_json.ANEW)
    name = member(entry, "name", str) if "name" in entry else ""
    digests = member(entry, "digest", dict)
    known = {algorithm: _digest(algorithm, text, name) for algorithm, text in digests.items() if algorithm in BY_NAME}
    strong = {algorithm.name: known[algorithm.name] for algorithm in STRONG if algorithm.name in known}
    if not strong:
        raise TrustError(
            "trust.weak-digest", f"subject '{name[:80]}' has no SHA-256, SHA-384 or SHA-512 digest", strict_json.ANEW
        )
    return Subject(name, strong, _annotations(entry) if "annotations" in entry else NO_ANNOTATIONS)


def _annotations(entry: Object) -> dict[str, str]:
    annotations = member(entry, "annotations", dict)
    texts = [*annotations, *annotations.values()]
    if len(annotations) > ANNOTATIONS or not all(map(_is_annotation, texts)):
        raise TrustError(
            "trust.annotations",
            f"a subject may have {ANNOTATIONS} annotations, each a string of at most {ANNOTATION_CHARS} characters",
            strict_json.ANEW,
        )
    return annotations


def _is_annotation(text: object) -> bool:
    """JSON can write half a character (a lone surrogate); the index could not keep it."""
    return isinstance(text, str) and len(text) <= ANNOTATION_CHARS and not _SURROGATE.search(text)


def _digest(algorithm: str, text: object, name: str) -> bytes:
    if not isinstance(text, str) or _HEX_FORM.fullmatch(text) is None:
        raise TrustError(
            "trust.digest-form", f"the {algorithm} of subject '{name[:80]}' is no lower-case hex", strict_json.ANEW
        )
    size = BY_NAME[algorithm].size
    if len(text) != 2 * size:
        raise TrustError(
            "trust.digest-length",
            f"the {algorithm} of subject '{name[:80]}' has {len(text)} hex digits, not {2 * size}",
            strict_json.ANEW,
        )
    return bytes.fromhex(text)


def _check_consistent(subjects: Sequence[Subject]) -> None:
    """One digest is one thing: subjects that share a digest agree on every digest of the same algorithm."""
    seen: dict[bytes, dict[str, bytes]] = {}
    for name, digests, _ in subjects:
        for value in digests.values():
            others = seen.setdefault(value, {})
            if any(others.setdefault(algorithm, digest) != digest for algorithm, digest in digests.items()):
                raise TrustError(
                    "trust.contradiction",
                    f"subject '{name[:80]}' contradicts another with the same digest",
                    strict_json.ANEW,
                )
