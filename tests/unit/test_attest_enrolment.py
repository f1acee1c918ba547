"""Joining a fleet with real TPMs, and everything that must not get a certificate or must not be taken for one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import load_pem_x509_certificates
from fleet_ca import HOST, NOW, Ca, sign_in_software
from hardware import HardwareTpm, manufacture
from tpm2_pytss.types import TPM2B_PUBLIC, TPMS_ATTEST, TPMS_ECC_POINT, TPMT_PUBLIC

from swtpm_prop.attest import certificates, enrolment, evidence, membership
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.enrolment import Applicant, Request
from swtpm_prop.custody.objects import Attestation
from swtpm_prop.errors import AttestError, Error, HostError
from swtpm_prop.layout import Layout

CA = Ca()
TLS = ec.generate_private_key(ec.SECP256R1())
DAY = 86400
LATER = NOW + DAY
"""When what a maker's tools make while the tests run is good already."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enrolment")


@pytest.fixture(scope="module")
def maker(directory: Path) -> Path:
    return directory / "maker"


def running(directory: Path, maker: Path) -> Iterator[HardwareTpm]:
    tpm = HardwareTpm(directory)
    manufacture(tpm, maker)
    with tpm:
        with tpm.open() as hardware:
            hardware.initialise()
        yield tpm


@pytest.fixture(scope="module")
def tpm(directory: Path, maker: Path) -> Iterator[HardwareTpm]:
    yield from running(directory / "a", maker)


@pytest.fixture(scope="module")
def other(directory: Path, maker: Path) -> Iterator[HardwareTpm]:
    yield from running(directory / "b", maker)


def makers(maker: Path) -> Any:
    return load_pem_x509_certificates((maker / "roots.pem").read_bytes())


@pytest.fixture(scope="module")
def request_(tpm: HardwareTpm) -> bytes:
    with tpm.open() as hardware:
        return enrolment.ask(hardware, HOST, TLS)


@pytest.fixture(scope="module")
def other_request(other: HardwareTpm) -> bytes:
    with other.open() as hardware:
        return enrolment.ask(hardware, "b.example.org", TLS)


def examined(request: bytes) -> tuple[Request, Applicant]:
    return enrolment.examine(request, None, NOW)


def answered(request: bytes, ca: Ca = CA) -> bytes:
    return enrolment.admit(*examined(request), ca.authority, ca.crl, NOW).answer


def accepted(tpm: HardwareTpm, answer: bytes, ca: Ca = CA, key: Any = TLS) -> enrolment.Membership:
    with tpm.open() as hardware:
        return enrolment.accept(hardware, answer, ca.ca, key.public_key(), NOW)


def changed(request: bytes, **members: Any) -> bytes:
    return json.dumps({**json.loads(request), **members}).encode()


def refused(request: bytes, maker: Path | None = None) -> str:
    with pytest.raises(AttestError) as caught:
        enrolment.examine(request, makers(maker) if maker else None, LATER)
    assert caught.value.mend
    return caught.value.id


# -- as it should be ----------------------------------------------------------------------------


def test_one_round_trip(tpm: HardwareTpm, maker: Path, request_: bytes) -> None:
    asked, applicant = enrolment.examine(request_, makers(maker), LATER)
    assert (applicant.host, applicant.vouched_by) == (HOST, "CN=swtpm-localca-rootca")
    admission = enrolment.admit(asked, applicant, CA.authority, CA.crl, NOW)
    joined = accepted(tpm, admission.answer)
    assert joined.host == HOST
    assert certificates.verify(joined.ak_certificate, CA.ca, joined.crl, Kind.AK, NOW) == HOST
    assert certificates.verify(joined.tls_certificate, CA.ca, joined.crl, Kind.TLS, NOW) == HOST
    serials = tuple(certificates.read(each).serial for each in (joined.ak_certificate, joined.tls_certificate))
    assert serials == admission.serials


def test_the_answer_shows_nothing(request_: bytes) -> None:
    """Not even the certificates: who opens it has the TPM."""
    assert set(json.loads(answered(request_))) == {"version", "credential", "secret", "sealed"}


# -- requests that get nothing ------------------------------------------------------------------


def test_maker_that_nobody_trusts(directory: Path, request_: bytes) -> None:
    stranger = directory / "stranger"
    manufacture(HardwareTpm(directory / "c"), stranger)
    assert refused(request_, stranger) == "attest.ek-chain"


def test_only_the_intermediate_is_no_root(directory: Path, maker: Path, request_: bytes) -> None:
    lone = directory / "lone"
    lone.mkdir()
    (lone / "roots.pem").write_bytes((maker / "issuercert.pem").read_bytes())
    assert refused(request_, lone) == "attest.ek-chain"


def test_makers_of_the_future(maker: Path, request_: bytes) -> None:
    with pytest.raises(AttestError) as caught:
        enrolment.examine(request_, makers(maker), NOW - DAY)
    assert caught.value.id == "attest.ek-chain"


def test_tpm_without_certificate(maker: Path, request_: bytes) -> None:
    assert refused(changed(request_, ekCertificate=""), maker) == "attest.ek-certificate-missing"


def test_certificate_of_another_tpm(maker: Path, request_: bytes, other_request: bytes) -> None:
    foreign = json.loads(other_request)["ekCertificate"]
    assert refused(changed(request_, ekCertificate=foreign), maker) == "attest.ek-foreign"


def test_certificate_that_is_none(maker: Path, request_: bytes) -> None:
    ak = enrolment.wire.encode(CA.issue(TLS.public_key()))
    for bad in ("AAAA", ak):
        assert refused(changed(request_, ekCertificate=bad), maker) == "attest.ek-certificate"


@pytest.mark.parametrize("name", ["host", "ek", "ekCertificate", "ak", "parent", "tls"])
def test_request_put_together_of_two(name: str, request_: bytes, other_request: bytes) -> None:
    """The attestation key signed the whole: another name, another TLS key or another TPM's part does not fit."""
    foreign = request_for(ec.generate_private_key(ec.SECP256R1())) if name == "tls" else json.loads(other_request)[name]
    id = "attest.certify-signature" if name == "ak" else "attest.certify-binding"
    assert refused(changed(request_, **{name: foreign})) == id


def test_keys_of_other_templates(request_: bytes) -> None:
    asked = json.loads(request_)
    assert refused(changed(request_, ek=asked["ak"])) == "attest.ek-template"
    assert refused(changed(request_, ak=asked["parent"])) == "attest.ak-sign"
    assert refused(changed(request_, parent=asked["ak"])) == "attest.parent-decrypt"
    for attribute, id in ((0x02, "fixed-tpm"), (0x10, "fixed-parent"), (0x20, "origin"), (0x10000, "restricted")):
        assert refused(changed(request_, ak=without(asked["ak"], attribute))) == f"attest.ak-{id}"


def test_tls_key_that_the_host_does_not_have(tpm: HardwareTpm) -> None:
    """A request for somebody's public key, signed by another."""
    stolen = bytearray(base64.b64decode(request_for(TLS)))
    stolen[-1] ^= 1
    asked = _asked(tpm, bytes(stolen))
    assert refused(asked) == "attest.request-tls"
    rsa_key = rsa.generate_private_key(65537, 2048)
    assert refused(_asked(tpm, base64.b64decode(request_for(rsa_key)))) == "attest.request-tls"


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"host": 7}, {"more": 1}, {"ek": "!"}, {"ek": "AA=="}, {"certify": {}}, {"ak": "A" * 9000}],
)
def test_other_forms(change: dict[str, Any], request_: bytes) -> None:
    assert refused(changed(request_, **change)).removeprefix("attest.") in ("request-malformed", "ek-malformed")


def test_names_that_are_none(request_: bytes) -> None:
    assert refused(changed(request_, host="*.example.org")) == "fleet.host-name"


# -- answers that do not open, and answers that are refused -------------------------------------


def test_answer_for_another_host(tpm: HardwareTpm, other_request: bytes) -> None:
    with pytest.raises(HostError) as caught:
        accepted(tpm, answered(other_request))
    assert caught.value.id == "tpm.foreign-credential"


def test_software_attestation_key_opens_nothing(tpm: HardwareTpm, request_: bytes) -> None:
    """A perfect request: a genuine TPM's endorsement key, and an attestation key in software that signs anything. The
    fleet answers it, but the endorsement key's TPM does not have that attestation key, so nobody gets certificates."""
    software = ec.generate_private_key(ec.SECP256R1())
    asked, _ = examined(request_)
    attest, _ = TPMS_ATTEST.unmarshal(asked.certify.attest)
    asked = asked._replace(ak_public=as_attestation_key(software))
    attest.extraData = enrolment._digest(asked)
    asked = asked._replace(certify=sign_in_software(software, attest.marshal()))
    with pytest.raises(HostError) as caught:
        accepted(tpm, answered(enrolment._written(asked)))
    assert caught.value.id == "tpm.foreign-credential"


def test_answer_of_another_fleet(tpm: HardwareTpm, request_: bytes) -> None:
    """Anybody can encrypt to a TPM; only the fleet that this host was told to trust counts."""
    stranger = Ca()
    answer = answered(request_, stranger)
    assert accepted(tpm, answer, stranger).host == HOST
    with pytest.raises(AttestError) as caught:
        accepted(tpm, answer)
    assert caught.value.id == "fleet.crl-foreign"


def test_answer_to_an_older_request(tpm: HardwareTpm, request_: bytes) -> None:
    with pytest.raises(AttestError) as caught:
        accepted(tpm, answered(request_), key=ec.generate_private_key(ec.SECP256R1()))
    assert caught.value.id == "attest.answer-tls"


@pytest.mark.parametrize("name", ["credential", "secret", "sealed"])
def test_damaged_answer(name: str, tpm: HardwareTpm, request_: bytes) -> None:
    answer = json.loads(answered(request_))
    data = bytearray(base64.b64decode(answer[name]))
    data[-1] ^= 1
    with pytest.raises(Error) as caught:
        accepted(tpm, changed(answered(request_), **{name: enrolment.wire.encode(bytes(data))}))
    assert caught.value.id in ("tpm.foreign-credential", "attest.answer-unopened")
    with pytest.raises(AttestError) as short:
        accepted(tpm, changed(answered(request_), **{name: "!"}))
    assert short.value.id == "attest.answer-malformed"


def test_answer_with_two_hosts_or_keys(tpm: HardwareTpm, request_: bytes) -> None:
    """A fleet that errs, or is not what it was."""
    asked, applicant = examined(request_)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()

    good = {Kind.AK: (HOST, applicant.ak.key), Kind.TLS: (HOST, applicant.tls)}
    for id, wrong in (
        ("attest.answer-host", {Kind.TLS: ("b.example.org", applicant.tls)}),
        ("attest.answer-ak", {Kind.AK: (HOST, stranger)}),
        ("attest.answer-tls", {Kind.TLS: (HOST, stranger)}),
    ):
        issued = {kind: CA.issue(key, kind, host) for kind, (host, key) in {**good, **wrong}.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certificates, "issue", lambda *given, issued=issued: issued[given[3]])
            answer = enrolment.admit(asked, applicant, CA.authority, CA.crl, NOW).answer
        with pytest.raises(AttestError) as caught:
            accepted(tpm, answer)
        assert caught.value.id == id


# -- in files -----------------------------------------------------------------------------------


def test_join_renew_and_rejoin(tpm: HardwareTpm, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with tpm.open() as hardware:
        answer = answered(membership.request(hardware, layout.host_keys, HOST))
        joined = membership.join(hardware, layout, answer, CA.ca, NOW)
        files = membership.load(layout)
        first = membership.tls_key(hardware, layout.host_keys)
        assert certificates.read(files.tls_certificate).key == first.public_key()
        assert (files.ca, files.ak_certificate) == (CA.ca, joined.ak_certificate)
        # Once more, as after a power failure: nothing changes.
        assert membership.join(hardware, layout, answer, CA.ca, NOW) == joined
        # A new request leaves the present key in place until its answer has come.
        asked = membership.request(hardware, layout.host_keys, HOST)
        assert membership.tls_key(hardware, layout.host_keys).private_numbers() == first.private_numbers()
        membership.join(hardware, layout, answered(asked), CA.ca, NOW)
        second = membership.tls_key(hardware, layout.host_keys)
        assert second.private_numbers() != first.private_numbers()
        assert certificates.read(membership.load(layout).tls_certificate).key == second.public_key()
        assert {path.name for path in layout.host_keys.iterdir()} == {"ak.crt", "tls.crt", "tls.key"}
        assert {path.stat().st_mode & 0o777 for path in layout.host_keys.iterdir()} == {0o600}


def test_an_answer_may_be_older_than_the_newest_revocations(tpm: HardwareTpm, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with tpm.open() as hardware:
        membership.join(hardware, layout, answered(membership.request(hardware, layout.host_keys, HOST)), CA.ca, NOW)
        present = membership.load(layout).tls_certificate
        renewed = answered(membership.request(hardware, layout.host_keys, HOST))
        membership.install_crl(layout, CA.revoking(present, number=2))
        joined = membership.join(hardware, layout, renewed, CA.ca, NOW)
        assert membership.load(layout).tls_certificate == joined.tls_certificate
        # but not if they speak of what is in it
        late = answered(membership.request(hardware, layout.host_keys, HOST))
        opened = enrolment.accept(hardware, late, CA.ca, _pending(hardware, layout), NOW)
        for number, gone in ((3, opened.ak_certificate), (4, opened.tls_certificate)):
            membership.install_crl(layout, CA.revoking(gone, number=number))
            with pytest.raises(AttestError) as caught:
                membership.join(hardware, layout, late, CA.ca, NOW)
            assert caught.value.id == "fleet.revoked"
    assert membership.load(layout).tls_certificate == joined.tls_certificate


def test_another_fleet_needs_the_operator(tpm: HardwareTpm, tmp_path: Path) -> None:
    layout, stranger = Layout(tmp_path), Ca()
    with tpm.open() as hardware:
        asked = membership.request(hardware, layout.host_keys, HOST)
        membership.join(hardware, layout, answered(asked), CA.ca, NOW)
        with pytest.raises(AttestError) as caught:
            membership.join(hardware, layout, answered(asked, stranger), stranger.ca, NOW)
    assert caught.value.id == "fleet.other"


def test_the_tls_key_opens_in_its_tpm_only(tpm: HardwareTpm, other: HardwareTpm, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with tpm.open() as hardware:
        membership.join(hardware, layout, answered(membership.request(hardware, layout.host_keys, HOST)), CA.ca, NOW)
    with other.open() as hardware, pytest.raises(HostError) as caught:
        membership.tls_key(hardware, layout.host_keys)
    assert caught.value.id == "tpm.foreign-object"


def test_not_enrolled(tpm: HardwareTpm, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with tpm.open() as hardware:
        for use in (
            lambda: membership.load(layout),
            lambda: membership.tls_key(hardware, layout.host_keys),
            lambda: evidence.make(hardware, layout.host_keys, bytes(32), (0,)),
        ):
            with pytest.raises(HostError) as caught:
                use()
            assert caught.value.id == "host.not-enrolled"
        with pytest.raises(HostError) as caught:
            membership.join(hardware, layout, b"", CA.ca, NOW)
    assert caught.value.id == "host.nothing-asked"


def test_revocations_never_go_back(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.state.mkdir(parents=True)
    membership.install_fleet(layout, CA.ca)
    assert membership.install_crl(layout, CA.revoking(number=2))
    assert not membership.install_crl(layout, CA.revoking(number=2))
    assert membership.install_crl(layout, CA.revoking(number=3))
    for crl, id in ((CA.revoking(number=2), "fleet.crl-rollback"), (Ca().crl, "fleet.crl-foreign")):
        with pytest.raises(AttestError) as caught:
            membership.install_crl(layout, crl)
        assert caught.value.id == id


# -- the parts ----------------------------------------------------------------------------------


def _pending(hardware: Any, layout: Layout) -> ec.EllipticCurvePublicKey:
    """The TLS key of a request that has no answer yet."""
    return membership._opened(hardware, layout.host_keys / "tls.key.new").public_key()


def request_for(key: Any) -> str:
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return enrolment.wire.encode(csr.public_bytes(serialization.Encoding.DER))


def _asked(tpm: HardwareTpm, csr: bytes) -> bytes:
    """A request with a TLS part of somebody's making, certified as it is."""
    with tpm.open() as hardware:
        unsigned = Request(
            HOST, hardware.ek_public, None, hardware.ak_public, hardware.parent_public, csr, Attestation(b"", b"")
        )
        certify = hardware.certify_parent(enrolment._digest(unsigned))
    return enrolment._written(unsigned._replace(certify=certify))


def without(public: str, attribute: int) -> str:
    area, _ = TPM2B_PUBLIC.unmarshal(base64.b64decode(public))
    area.publicArea.objectAttributes &= ~attribute
    return enrolment.wire.encode(area.marshal())


def as_attestation_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"
    area = TPMT_PUBLIC.parse("ecc:ecdsa-sha256:null", objectAttributes=attributes)
    area.unique.ecc = TPMS_ECC_POINT(x=numbers.x.to_bytes(32, "big"), y=numbers.y.to_bytes(32, "big"))
    public: bytes = TPM2B_PUBLIC(publicArea=area).marshal()
    return public
