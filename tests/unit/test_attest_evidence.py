"""Evidence of real TPMs: accepted as it is, and refused for one reason each when anything about it is wrong."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fleet_ca import BINDING, HOST, NOW, PCRS, Ca, ak_key, enrolled, made, sign_in_software
from hardware import HardwareTpm
from tpm2_pytss import ESAPI, ESYS_TR
from tpm2_pytss.constants import TPM2_ALG
from tpm2_pytss.types import (
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPML_PCR_SELECTION,
    TPMS_ATTEST,
    TPMS_ECC_POINT,
    TPMS_NV_PUBLIC,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
)

from swtpm_prop.attest import certificates, evidence, tpm_keys
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.evidence import Evidence, Verified
from swtpm_prop.custody.hardware import AK_HANDLE, Hardware
from swtpm_prop.custody.objects import Attestation
from swtpm_prop.custody.policy import COUNTER_HANDLE
from swtpm_prop.errors import AttestError
from swtpm_prop.tpm.algorithms import SHA1
from swtpm_prop.tpm.pcr import build_selection

CA = Ca()
DAY = 86400
NO_SCHEME = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attest")


@pytest.fixture(scope="module")
def tpm(directory: Path) -> Iterator[HardwareTpm]:
    with HardwareTpm(directory / "a") as running:
        yield running


@pytest.fixture(scope="module")
def other(directory: Path) -> Iterator[HardwareTpm]:
    with HardwareTpm(directory / "b") as running:
        yield running


@pytest.fixture(scope="module")
def keys(tpm: HardwareTpm) -> Path:
    return enrolled(CA, tpm)


@pytest.fixture(scope="module")
def other_keys(other: HardwareTpm) -> Path:
    return enrolled(CA, other, "b.example.org")


@pytest.fixture
def good(tpm: HardwareTpm, keys: Path) -> Evidence:
    return made(tpm, keys)


def verify(
    shown: Evidence, binding: bytes = BINDING, host: str = HOST, now: int = NOW, crl: bytes = CA.crl
) -> Verified:
    return evidence.verify(shown, binding, CA.ca, crl, host, now)


def refusal(shown: Evidence, **given: object) -> str:
    with pytest.raises(AttestError) as caught:
        verify(shown, **given)  # type: ignore[arg-type]
    assert caught.value.mend
    return caught.value.id


# -- as it should be ----------------------------------------------------------------------------


def test_good_evidence_says_who_and_what(tpm: HardwareTpm, good: Evidence) -> None:
    found = verify(good)
    with tpm.open() as hardware:
        assert found.parent_public == hardware.parent_public
        assert found.pcrs == hardware.pcrs(PCRS)
        assert found.epoch == hardware.epoch()
    assert found.host == HOST
    assert found.parent_name == evidence.parent_name(good.parent_public)
    assert len(found.parent_name) == 34


def test_the_epoch_is_the_counters(tpm: HardwareTpm, keys: Path, good: Evidence) -> None:
    with tpm.open() as hardware:
        hardware.raise_epoch(verify(good).epoch + 2)
    assert verify(made(tpm, keys)).epoch == verify(good).epoch + 2


def test_survives_json(good: Evidence) -> None:
    assert evidence.from_object(evidence.to_object(good)) == good


def test_measurements_meanwhile_are_quoted_again(tpm: HardwareTpm, keys: Path) -> None:
    """Something extends between reading and quoting: the values that come are those of the quote all the same."""
    with tpm.open() as hardware:
        quote, disturbed = hardware.quote, []

        def disturb(*given: object) -> Attestation:
            if not disturbed:
                disturbed.append(hardware)
                hardware._tpm.pcr_event(ESYS_TR.PCR4, b"meanwhile")
            return quote(*given)  # type: ignore[arg-type]

        hardware.quote = disturb  # type: ignore[method-assign,assignment]
        assert verify(evidence.make(hardware, keys, BINDING, PCRS)).host == HOST
    assert disturbed


def test_another_verifier_agrees(good: Evidence, tmp_path: Path) -> None:
    """tpm2_checkquote takes our quote for what we say it is, and only over our question."""
    key = certificates.read(good.ak_certificate).key
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for name, data in (("ak", pem), ("attest", good.quote.attest), ("signature", good.quote.signature)):
        (tmp_path / name).write_bytes(data)

    def check(binding: bytes) -> int:
        words = ("tpm2_checkquote", "-u", "ak", "-m", "attest", "-s", "signature", "-g", "sha256", "-q", binding.hex())
        return subprocess.run(words, cwd=tmp_path, capture_output=True).returncode

    assert check(BINDING) == 0
    assert check(bytes(32)) != 0


# -- step 1 and 2: whose attestation key --------------------------------------------------------


def test_certificate_of_another_ca(tpm: HardwareTpm, good: Evidence) -> None:
    with tpm.open() as hardware:
        foreign = Ca().issue(ak_key(hardware))
    assert refusal(good._replace(ak_certificate=foreign)) == "fleet.foreign"


def test_expired_certificate(tpm: HardwareTpm, good: Evidence) -> None:
    with tpm.open() as hardware:
        old = CA.issue(ak_key(hardware), now=NOW - 3 * 365 * DAY)
    assert refusal(good._replace(ak_certificate=old)) == "fleet.expired"


def test_revoked_attestation_key(good: Evidence) -> None:
    assert refusal(good, crl=CA.revoking(good.ak_certificate)) == "fleet.revoked"


def test_stale_revocations_do_not_count(good: Evidence) -> None:
    assert refusal(good, crl=CA.revoking(now=NOW - 200 * DAY)) == "fleet.crl-expired"


def test_tls_certificate_instead(good: Evidence) -> None:
    """A software key of the fleet, which its host can use as it likes."""
    tls = CA.issue(ec.generate_private_key(ec.SECP256R1()).public_key(), Kind.TLS)
    assert refusal(good._replace(ak_certificate=tls)) == "fleet.kind"


def test_evidence_of_another_host_relayed(other: HardwareTpm, other_keys: Path) -> None:
    relayed = made(other, other_keys)
    assert verify(relayed, host="b.example.org").host == "b.example.org"
    assert refusal(relayed) == "attest.other-host"


# -- step 3: the storage parent -----------------------------------------------------------------

FLAGS = {
    "attest.parent-fixed-tpm": "sensitivedataorigin|userwithauth|noda|restricted|decrypt",
    "attest.parent-restricted": "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|decrypt",
    "attest.parent-decrypt": "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign",
}
"""What a TPM can make, by what is missing first."""


@pytest.mark.parametrize("id", FLAGS)
def test_parent_of_a_tpm_with_an_attribute_missing(id: str, tpm: HardwareTpm, good: Evidence) -> None:
    """Made by a real TPM, and certified by the right attestation key over the right question."""
    signs = "sign" in FLAGS[id].split("|")
    form = "ecc:ecdsa-sha256:null" if signs else "ecc:aes128cfb" if "restricted" in FLAGS[id] else "ecc:null"
    template = TPM2B_PUBLIC.parse(form, objectAttributes=FLAGS[id])
    with tpm.open() as hardware:
        public, certify = certified(hardware, template)
    assert refusal(good._replace(parent_public=public, certify=certify)) == id


@pytest.mark.parametrize(
    ("bit", "id"),
    [
        (0x02, "attest.parent-fixed-tpm"),
        (0x10, "attest.parent-fixed-parent"),
        (0x20, "attest.parent-origin"),
        (0x10000, "attest.parent-restricted"),
        (0x20000, "attest.parent-decrypt"),
    ],
)
def test_parent_with_an_attribute_cleared(bit: int, id: str, good: Evidence) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(good.parent_public)
    public.publicArea.objectAttributes &= ~bit
    assert refusal(good._replace(parent_public=public.marshal())) == id


def test_parent_of_another_template(tpm: HardwareTpm, good: Evidence) -> None:
    """A genuine storage key, but with a password that its host could set: not the one that this software makes."""
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
    with tpm.open() as hardware:
        public, certify = certified(hardware, TPM2B_PUBLIC.parse("ecc:aes128cfb", objectAttributes=attributes))
    assert refusal(good._replace(parent_public=public, certify=certify)) == "attest.parent-template"


def test_rsa_parent(tpm: HardwareTpm, good: Evidence) -> None:
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    with tpm.open() as hardware:
        public, certify = certified(hardware, TPM2B_PUBLIC.parse("rsa2048:aes128cfb", objectAttributes=attributes))
    assert refusal(good._replace(parent_public=public, certify=certify)) == "attest.parent-template"


def test_parent_off_the_curve(good: Evidence) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(good.parent_public)
    public.publicArea.unique.ecc = TPMS_ECC_POINT(x=bytes(31) + b"\1", y=bytes(31) + b"\1")
    assert refusal(good._replace(parent_public=public.marshal())) == "attest.parent-template"


def test_bytes_behind_the_parent(good: Evidence) -> None:
    assert refusal(good._replace(parent_public=good.parent_public + b"\0")) == "attest.parent-malformed"


def test_software_key_as_parent(good: Evidence) -> None:
    """With all the right attributes: only that its TPM does not certify it tells it from a real one."""
    assert refusal(good._replace(parent_public=software_parent())) == "attest.certify-name"


# -- step 4: certified by that TPM --------------------------------------------------------------


def test_certify_of_another_tpm(other: HardwareTpm, other_keys: Path, good: Evidence) -> None:
    foreign = made(other, other_keys)
    assert refusal(good._replace(certify=foreign.certify)) == "attest.certify-signature"
    both = good._replace(certify=foreign.certify, parent_public=foreign.parent_public)
    assert refusal(both) == "attest.certify-signature"


def test_parent_of_another_tpm(other: HardwareTpm, other_keys: Path, good: Evidence) -> None:
    assert refusal(good._replace(parent_public=made(other, other_keys).parent_public)) == "attest.certify-name"


def test_answer_to_another_question(tpm: HardwareTpm, keys: Path, good: Evidence) -> None:
    replayed = made(tpm, keys, hashlib.sha256(b"an earlier question").digest())
    assert refusal(replayed) == "attest.certify-binding"
    assert refusal(good._replace(quote=replayed.quote)) == "attest.quote-binding"
    assert refusal(good._replace(epoch=replayed.epoch)) == "attest.epoch-binding"


def test_attestations_of_other_kinds(good: Evidence) -> None:
    assert refusal(good._replace(certify=good.quote)) == "attest.certify-type"
    assert refusal(good._replace(quote=good.epoch)) == "attest.quote-type"
    assert refusal(good._replace(epoch=good.certify)) == "attest.epoch-type"


@pytest.mark.parametrize("which", ["certify", "quote", "epoch"])
def test_tampered_attestation(which: str, good: Evidence) -> None:
    attest, signature = getattr(good, which)
    for at in range(0, len(attest), 7):
        bad = bytearray(attest)
        bad[at] ^= 1
        changed = good._replace(**{which: Attestation(bytes(bad), signature)})
        assert refusal(changed) == f"attest.{which}-signature"


@pytest.mark.parametrize("which", ["certify", "quote", "epoch"])
def test_signature_of_another_form(which: str, good: Evidence) -> None:
    attest, signature = getattr(good, which)
    for bad, id in (
        (b"", "malformed"),
        (signature + b"\0", "malformed"),
        (signature[:-1], "malformed"),
        (bytes(5000), "malformed"),
        # The same numbers, said to be of ECSchnorr, or over SHA-384.
        (b"\x00\x1c" + signature[2:], "signature"),
        (signature[:2] + b"\x00\x0c" + signature[4:], "signature"),
    ):
        assert refusal(good._replace(**{which: Attestation(attest, bad)})) == f"attest.{which}-{id}"


@pytest.mark.parametrize("which", ["certify", "quote", "epoch"])
def test_software_key_that_got_a_certificate(which: str, good: Evidence) -> None:
    """What the fleet must never certify would be found out by nothing but what it says: each step refuses its own."""
    software = ec.generate_private_key(ec.SECP256R1())
    forged = resigned(good, software)
    assert verify(forged).host == HOST

    def change(edit: Callable[[TPMS_ATTEST], None]) -> str:
        attest, _ = TPMS_ATTEST.unmarshal(getattr(good, which).attest)
        edit(attest)
        return refusal(forged._replace(**{which: sign_in_software(software, attest.marshal())}))

    assert change(lambda attest: setattr(attest, "magic", 0x00544347)) == f"attest.{which}-magic"
    assert change(lambda attest: setattr(attest, "extraData", b"")) == f"attest.{which}-binding"
    trailing = sign_in_software(software, getattr(good, which).attest + b"\0")
    assert refusal(forged._replace(**{which: trailing})) == f"attest.{which}-malformed"


# -- step 5: the PCRs ---------------------------------------------------------------------------


def test_quote_of_another_tpm(other: HardwareTpm, other_keys: Path, good: Evidence) -> None:
    foreign = made(other, other_keys)
    assert refusal(good._replace(quote=foreign.quote, pcrs=foreign.pcrs)) == "attest.quote-signature"


def test_other_values_than_quoted(good: Evidence) -> None:
    assert refusal(good._replace(pcrs={**good.pcrs, 4: bytes(range(32))})) == "attest.quote-pcrs"


def test_fewer_and_more_pcrs_than_quoted(good: Evidence) -> None:
    assert refusal(good._replace(pcrs={0: good.pcrs[0]})) == "attest.quote-selection"
    assert refusal(good._replace(pcrs={**good.pcrs, 8: bytes(32)})) == "attest.quote-selection"


def test_values_shifted_between_pcrs(good: Evidence) -> None:
    """Their hash is over one string: a byte moved from one PCR to the next leaves it as it was."""
    shifted = {0: good.pcrs[0][:-1], 4: good.pcrs[0][-1:] + good.pcrs[4], 7: good.pcrs[7]}
    assert refusal(good._replace(pcrs=shifted)) == "attest.pcrs"


def test_no_pcrs_and_no_such_pcr(good: Evidence) -> None:
    assert refusal(good._replace(pcrs={})) == "attest.pcrs"
    assert refusal(good._replace(pcrs={**good.pcrs, 24: bytes(32)})) == "attest.pcrs"


def test_quote_of_another_bank(tpm: HardwareTpm, good: Evidence) -> None:
    """SHA-1 of the same PCRs, by the same key over the same question."""
    selection, _ = TPML_PCR_SELECTION.unmarshal(build_selection(((SHA1, PCRS),)))
    with tpm.open() as hardware:
        attest, signature = hardware._tpm.quote(hardware._handle(AK_HANDLE), selection, BINDING)
    weak = Attestation(bytes(attest), signature.marshal())
    assert refusal(good._replace(quote=weak)) == "attest.quote-selection"


# -- step 6: the epoch --------------------------------------------------------------------------


def test_another_nv_index_as_epoch(tpm: HardwareTpm, good: Evidence) -> None:
    with tpm.open() as hardware:
        esapi = hardware._tpm
        index = esapi.nv_define_space(b"", nv_public())
        try:
            esapi.nv_write(index, bytes(7) + b"\x63", auth_handle=index)
            attest, signature = esapi.nv_certify(hardware._handle(AK_HANDLE), index, BINDING, NO_SCHEME, 8, 0, index)
        finally:
            esapi.nv_undefine_space(index)
    shown = good._replace(epoch=Attestation(bytes(attest), signature.marshal()))
    assert refusal(shown) == "attest.epoch-index"


def test_part_of_the_counter(tpm: HardwareTpm, good: Evidence) -> None:
    """Four bytes from the fourth on are a number, too, and a smaller one."""
    with tpm.open() as hardware:
        counter = hardware._handle(COUNTER_HANDLE)
        attest, signature = hardware._tpm.nv_certify(
            hardware._handle(AK_HANDLE), counter, BINDING, NO_SCHEME, 4, 4, counter
        )
    shown = good._replace(epoch=Attestation(bytes(attest), signature.marshal()))
    assert refusal(shown) == "attest.epoch-index"


# -- step 7: one boot ---------------------------------------------------------------------------


@pytest.mark.parametrize("stale", ["certify", "quote", "epoch"])
def test_answers_of_two_boots(stale: str, directory: Path) -> None:
    """The same question, asked before and after a reboot: what was true then need not be true now."""
    with HardwareTpm(directory / f"reboots-{stale}") as tpm:
        keys = enrolled(CA, tpm)
        before = made(tpm, keys)
        tpm.reboot()
        after = made(tpm, keys)
    assert verify(before).host == verify(after).host
    assert refusal(after._replace(**{stale: getattr(before, stale)})) == "attest.reset-count"


@pytest.mark.parametrize(
    ("field", "id"),
    [("restartCount", "attest.restart-count"), ("safe", "attest.clock-safe"), ("firmwareVersion", "attest.firmware")],
)
@pytest.mark.parametrize("which", ["quote", "epoch"])
def test_answers_of_two_times(which: str, field: str, id: str, good: Evidence) -> None:
    """A resume, a lost clock and new firmware are not made at will with a real TPM: a software key tells them here."""
    software = ec.generate_private_key(ec.SECP256R1())
    forged = resigned(good, software)
    attest, _ = TPMS_ATTEST.unmarshal(getattr(good, which).attest)
    holder = attest if field == "firmwareVersion" else attest.clockInfo
    setattr(holder, field, int(getattr(holder, field)) ^ 1)
    changed = forged._replace(**{which: sign_in_software(software, attest.marshal())})
    assert refusal(changed) == id


# -- the parts ----------------------------------------------------------------------------------


def certified(hardware: Hardware, template: TPM2B_PUBLIC) -> tuple[bytes, Attestation]:
    """A key of this TPM, and its attestation key's word that it has it."""
    esapi: ESAPI = hardware._tpm
    item, public, *_ = esapi.create_primary(None, template, ESYS_TR.OWNER)
    try:
        attest, signature = esapi.certify(item, hardware._handle(AK_HANDLE), BINDING, NO_SCHEME)
    finally:
        esapi.flush_context(item)
    return public.marshal(), Attestation(bytes(attest), signature.marshal())


def software_parent() -> bytes:
    """The public area of a parent whose private half is in software."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    area = TPMT_PUBLIC.parse("ecc:aes128cfb", objectAttributes=attributes)
    area.unique.ecc = TPMS_ECC_POINT(x=numbers.x.to_bytes(32, "big"), y=numbers.y.to_bytes(32, "big"))
    public: bytes = TPM2B_PUBLIC(publicArea=area).marshal()
    return public


def resigned(good: Evidence, key: ec.EllipticCurvePrivateKey) -> Evidence:
    """The same evidence, by a software key that has a certificate for attestation."""
    parts = (sign_in_software(key, part.attest) for part in (good.certify, good.quote, good.epoch))
    return Evidence(CA.issue(key.public_key()), good.parent_public, *parts, good.pcrs)


def nv_public() -> object:
    attributes = "authread|authwrite|ownerread|ownerwrite|noda"
    public = TPMS_NV_PUBLIC(nvIndex=0x01805399, nameAlg=0x0B, dataSize=8)
    public.attributes = type(public.attributes).parse(attributes)
    return TPM2B_NV_PUBLIC(nvPublic=public)


def test_attestation_keys_are_told_from_others(tpm: HardwareTpm) -> None:
    with tpm.open() as hardware:
        assert tpm_keys.check_attestation_key(hardware.ak_public).key == ak_key(hardware)
        with pytest.raises(AttestError) as caught:
            tpm_keys.check_attestation_key(hardware.parent_public)
    assert caught.value.id == "attest.ak-sign"
