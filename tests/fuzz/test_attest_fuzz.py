"""What other hosts and strangers send: any bytes are read or refused by our own errors, and nothing forged passes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fleet_ca import BINDING, HOST, NOW, Ca, enrolled, made
from hardware import HardwareTpm, manufacture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swtpm_prop.attest import certificates, endorsement, enrolment, evidence, news, report, structures, tpm_keys, wire
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.evidence import Evidence
from swtpm_prop.custody.objects import Attestation
from swtpm_prop.errors import AttestError, Error

CA = Ca()
TLS = ec.generate_private_key(ec.SECP256R1())
ISSUED = CA.issue(TLS.public_key(), Kind.TLS)
REVOKING = CA.revoking(ISSUED)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Samples:
    """What a host really sends; made once."""

    def __init__(self, directory: Path) -> None:
        tpm = HardwareTpm(directory)
        self.makers = endorsement.load_makers([manufacture(tpm, directory / "maker")])
        with tpm:
            keys = enrolled(CA, tpm)
            self.evidence = made(tpm, keys)
            with tpm.open() as hardware:
                self.request = enrolment.ask(hardware, HOST, TLS)
                self.report = report.make(hardware, keys, (0, 4, 7), b"")
                self.ek_certificate = hardware.ek_certificate() or b""
                self.ek = tpm_keys.check_endorsement_key(hardware.ek_public)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("fuzz"))


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    edit = st.tuples(st.integers(0, len(good)), st.integers(0, 8), st.binary(max_size=8))

    def apply(chosen: list[tuple[int, int, bytes]]) -> bytes:
        data = good
        for at, gone, new in chosen:
            data = data[:at] + new + data[at + gone :]
        return data

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def read_or_refused(use: Callable[[], Any]) -> None:
    with contextlib.suppress(Error):
        use()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON."""


@given(st.binary(max_size=300))
@QUICK
def test_any_bytes(data: bytes) -> None:
    for use in (
        lambda: certificates.verify(data, CA.ca, CA.crl, Kind.TLS, NOW),
        lambda: certificates.load_ca(data),
        lambda: certificates.load_crl(data, CA.authority.certificate),
        lambda: certificates.der(data),
        lambda: structures.public(data, "parent"),
        lambda: structures.attest(data, "quote"),
        lambda: structures.check_signature(TLS.public_key(), data, b"", "quote"),
        lambda: structures.check_credential(data, data, "answer"),
        lambda: tpm_keys.check_parent(data),
        lambda: tpm_keys.check_attestation_key(data),
        lambda: tpm_keys.check_endorsement_key(data),
        lambda: enrolment.examine(data, None, NOW),
        lambda: report.verify(data, CA.ca, CA.crl, NOW),
        lambda: news.is_crl(data),
    ):
        read_or_refused(use)


@given(st.data())
@QUICK
def test_nothing_changed_is_accepted_as_another(good: Samples, data: st.DataObject) -> None:
    """Each part of good evidence, changed in its bytes: refused, or the very same."""
    name = data.draw(st.sampled_from(["ak_certificate", "parent_public", "certify", "quote", "epoch"]))
    part = getattr(good.evidence, name)
    if isinstance(part, Attestation):
        half = data.draw(st.sampled_from(["attest", "signature"]))
        changed: Any = part._replace(**{half: data.draw(mutated(getattr(part, half)))})
    else:
        changed = data.draw(mutated(part))
    if changed != part:
        with pytest.raises(AttestError):
            verify(good.evidence._replace(**{name: changed}))


@given(st.dictionaries(st.integers(-1, 30), st.binary(max_size=33), max_size=4))
@QUICK
def test_no_other_pcrs_are_accepted(good: Samples, pcrs: dict[int, bytes]) -> None:
    if pcrs != good.evidence.pcrs:
        with pytest.raises(AttestError):
            verify(good.evidence._replace(pcrs=pcrs))


def verify(shown: Evidence) -> object:
    return evidence.verify(shown, BINDING, CA.ca, CA.crl, HOST, NOW)


@given(st.sampled_from(sorted(evidence._MEMBERS)), VALUES)
@QUICK
def test_any_json_as_evidence(good: Samples, name: str, value: Any) -> None:
    read_or_refused(lambda: evidence.from_object({**evidence.to_object(good.evidence), name: value}))
    if isinstance(value, dict):
        read_or_refused(lambda: evidence.from_object(value))


@given(st.data())
@QUICK
def test_changed_request_gets_nothing(good: Samples, data: st.DataObject) -> None:
    """Unless it means the same, or a certificate of the maker's own that says the same in other bytes."""
    changed = data.draw(mutated(good.request))
    try:
        asked, _ = enrolment.examine(changed, good.makers, NOW + 86400)
    except Error:
        return
    assert asked == enrolment._read(good.request)


@given(st.sampled_from(sorted(enrolment._REQUEST)), VALUES)
@QUICK
def test_any_json_as_request(good: Samples, name: str, value: Any) -> None:
    asked = json.dumps({**json.loads(good.request), name: value}).encode()
    read_or_refused(lambda: enrolment.examine(asked, good.makers, NOW + 86400))


@given(st.data())
@QUICK
def test_changed_certificates(good: Samples, data: st.DataObject) -> None:
    changed = data.draw(mutated(ISSUED))
    if changed != ISSUED:
        with pytest.raises(AttestError):
            certificates.verify(changed, CA.ca, CA.crl, Kind.TLS, NOW)
    read_or_refused(lambda: certificates.read(changed))
    crl = data.draw(mutated(REVOKING))
    read_or_refused(lambda: certificates.load_crl(crl, CA.authority.certificate))
    ek = data.draw(mutated(good.ek_certificate))
    read_or_refused(lambda: endorsement.verify(good.ek, ek, good.makers, NOW + 86400))


@given(st.data())
@QUICK
def test_changed_report(good: Samples, data: st.DataObject) -> None:
    read_or_refused(lambda: report.verify(data.draw(mutated(good.report)), CA.ca, CA.crl, NOW))


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
@QUICK
def test_any_json_in_a_member(value: dict[str, Any]) -> None:
    for use in (wire.pcrs, wire.attestation, wire.decode):

        def read(use: Callable[..., Any] = use) -> None:
            with wire.reading("request"):
                use({"it": value}, "it")
                for inside in value:
                    use(value, inside)

        read_or_refused(read)
