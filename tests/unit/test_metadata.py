"""Domain metadata: what is read, what is refused and with which id."""

from __future__ import annotations

from itertools import pairwise

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from swtpm_prop.domain.identity import identify
from swtpm_prop.domain.metadata import NAMESPACE, Vtpm, fit, parse_domain, parse_element, to_xml
from swtpm_prop.domain.pcrs import format_pcrs, parse_pcrs
from swtpm_prop.errors import DomainError
from swtpm_prop.limits import BANK_PROPERTIES, DOMAIN_XML_BYTES, METADATA_BYTES
from swtpm_prop.tpm.algorithms import SHA1, SHA256, SHA384, SHA512, HashAlgorithm
from swtpm_prop.translate.policy import Bank

UUID = "aaaaaaaa-0000-4000-8000-000000000001"
BOOT = "https://example.org/properties/debian-12-boot"
PROPERTY = f"<prop:property uri='{BOOT}'/>"
BANK = f"<prop:bank algorithm='sha384' pcrs='0-9,11-14'>{PROPERTY}</prop:bank>"
HOST = "https://example.org/properties/approved-host"
CUSTODY = f"<prop:custody host-property='{HOST}'/>"
MIGRATION = "<prop:migration allow='attested'/>"
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def element(inner: str = BANK, namespace: str = NAMESPACE, attributes: str = "") -> str:
    return f"<prop:vtpm xmlns:prop='{namespace}' {attributes}>{inner}</prop:vtpm>"


def domain(metadata: str = element(), tpm: str = TPM, head: str = "") -> bytes:
    return (
        f"{head}<domain type='qemu'><name>g</name><uuid>{UUID}</uuid>"
        f"<metadata>{metadata}</metadata><devices>{tpm}</devices></domain>"
    ).encode()


def refusal(xml: bytes) -> DomainError:
    with pytest.raises(DomainError) as refused:
        parse_domain(xml)
    assert refused.value.line().isprintable()
    return refused.value


def test_a_domain_is_read() -> None:
    bank = Bank(SHA384, frozenset({*range(10), 11, 12, 13, 14}), True, (BOOT,))
    vtpm = parse_domain(domain())
    assert vtpm == Vtpm((bank,))
    assert vtpm.raw_banks() == (SHA256,)
    assert vtpm.all_banks() == (SHA256, SHA384)


def test_a_domain_that_does_not_speak_of_us_is_not_opted_in() -> None:
    assert parse_domain(domain(metadata="")) is None
    assert parse_domain(domain(metadata="<x:a xmlns:x='urn:x'>swtpm-prop</x:a>")) is None


def test_two_banks_a_hidden_one_and_a_comment() -> None:
    hidden = f"<prop:bank algorithm='sha512' pcrs='4' visible='no'>{PROPERTY}</prop:bank>"
    vtpm = parse_domain(domain(element(BANK + "<!-- <!DOCTYPE --> " + hidden)))
    assert vtpm is not None
    assert [(b.algorithm, b.visible) for b in vtpm.banks] == [(SHA384, True), (SHA512, False)]
    assert vtpm.all_banks() == (SHA256, SHA384, SHA512)


def test_active_banks_and_encryption_of_libvirt_are_seen() -> None:
    backend = "<active_pcr_banks><sha1/><sha512/></active_pcr_banks><encryption secret='x'/>"
    vtpm = parse_domain(domain(tpm=TPM.replace("/></tpm>", f">{backend}</backend></tpm>")))
    assert vtpm is not None
    assert vtpm.encrypted
    assert vtpm.raw_banks() == (SHA1, SHA512)
    assert vtpm.all_banks() == (SHA1, SHA384, SHA512)


def test_custody_and_attested_migration_are_read() -> None:
    for inner, custody, migration in ((CUSTODY, HOST, None), (CUSTODY + MIGRATION, HOST, "attested")):
        vtpm = parse_domain(domain(element(BANK + inner)))
        assert vtpm is not None
        assert (vtpm.custody, vtpm.migration) == (custody, migration)
        assert parse_element(to_xml(vtpm).encode()) == vtpm


def test_custody_beside_a_secret_of_libvirt_is_refused() -> None:
    secret = TPM.replace("/></tpm>", "><encryption secret='x'/></backend></tpm>")
    assert refusal(domain(element(BANK + CUSTODY), secret)).id == "domain.custody-and-secret"
    vtpm = parse_element(element(BANK + CUSTODY).encode())
    with pytest.raises(DomainError) as refused:
        fit(vtpm, domain(metadata="", tpm=secret))
    assert refused.value.id == "domain.custody-and-secret"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        (("sha384", "sha1"), "domain.schema"),
        (("sha384", "SHA384"), "domain.schema"),
        (("algorithm='sha384'", ""), "domain.schema"),
        (("algorithm", "prop:algorithm"), "domain.schema"),
        (("0-9,11-14", ""), "domain.schema"),
        (("0-9,11-14", "0-"), "domain.schema"),
        (("0-9,11-14", "0 - 9"), "domain.schema"),
        (("0-9,11-14", "0x4"), "domain.schema"),
        (("0-9,11-14", "0,,1"), "domain.schema"),
        (("0-9,11-14", "9-0"), "domain.pcrs"),
        (("0-9,11-14", "0-9,9"), "domain.pcrs"),
        (("0-9,11-14", "4,4"), "domain.pcrs"),
        (("0-9,11-14", "24"), "domain.pcr-not-translatable"),
        (("0-9,11-14", "0-16"), "domain.pcr-not-translatable"),
        (("0-9,11-14", "23"), "domain.pcr-not-translatable"),
        (("pcrs=", "mode='x' pcrs="), "domain.schema"),
        (("pcrs=", "visible='maybe' pcrs="), "domain.schema"),
        ((PROPERTY, ""), "domain.schema"),
        ((PROPERTY, PROPERTY * 2), "domain.property-doubled"),
        ((PROPERTY, "<prop:property uri='https://Example.org/'/>"), "domain.property"),
        ((PROPERTY, "<prop:property uri='boot'/>"), "domain.property"),
        ((PROPERTY, PROPERTY + "<prop:other/>"), "domain.schema"),
        ((BANK, ""), "domain.schema"),
        ((BANK, BANK * 2), "domain.bank-doubled"),
        ((BANK, BANK + "<other/>"), "domain.schema"),
        ((BANK, "text" + BANK), "domain.schema"),
        ((BANK, BANK + "<prop:custody/>"), "domain.schema"),
        ((BANK, BANK + CUSTODY.replace(HOST, "host")), "domain.property"),
        ((BANK, BANK + CUSTODY * 2), "domain.schema"),
        ((BANK, BANK + MIGRATION), "domain.migration-without-custody"),
        ((BANK, BANK + MIGRATION + CUSTODY), "domain.schema"),
        ((BANK, BANK + CUSTODY + MIGRATION.replace("attested", "any")), "domain.schema"),
        ((NAMESPACE, "urn:swtpm-prop:domain:2"), "domain.namespace"),
        (("<prop:vtpm", "<prop:vtpm version='2'"), "domain.schema"),
        (("prop:vtpm", "prop:vtmp"), "domain.misplaced"),
        (("prop:vtpm", "vtpm"), "domain.misplaced"),
    ],
)
def test_wrong_metadata_is_refused(change: tuple[str, str], id: str) -> None:
    assert refusal(domain(element().replace(*change))).id == id


def test_too_many_properties() -> None:
    many = "".join(f"<prop:property uri='urn:example:{n}'/>" for n in range(BANK_PROPERTIES + 1))
    assert refusal(domain(element(BANK.replace(PROPERTY, many)))).id == "domain.property-count"


def test_a_raw_bank_always_remains() -> None:
    def raw(algorithms: tuple[str, ...], active: str = "") -> tuple[HashAlgorithm, ...]:
        banks = "".join(BANK.replace("sha384", name) for name in algorithms)
        tpm = TPM.replace("/></tpm>", f"><active_pcr_banks>{active}</active_pcr_banks></backend></tpm>")
        vtpm = parse_domain(domain(element(banks), tpm if active else TPM))
        assert vtpm is not None
        assert set(vtpm.raw_banks()) <= set(vtpm.all_banks())
        return vtpm.raw_banks()

    assert raw(("sha256",)) == (SHA384,)
    assert raw(("sha256",), "<sha256/>") == (SHA384,)
    assert raw(("sha256",), "<sha256/><sha512/>") == (SHA512,)
    assert raw(("sha256", "sha384")) == (SHA512,)
    assert raw(("sha256", "sha384", "sha512")) == (SHA1,)


@pytest.mark.parametrize(
    ("tpm", "id"),
    [
        ("", "domain.tpm"),
        (TPM * 2, "domain.tpm"),
        ("<tpm/>", "domain.tpm"),
        (TPM.replace("2.0", "1.2"), "domain.tpm-kind"),
        (TPM.replace("version='2.0'", ""), "domain.tpm-kind"),
        (TPM.replace("emulator", "external"), "domain.tpm-kind"),
        (TPM.replace("emulator", "passthrough"), "domain.tpm-kind"),
        (TPM.replace("/></tpm>", "><source type='dir' path='/x'/></backend></tpm>"), "domain.tpm-source"),
        (
            TPM.replace("/></tpm>", "><active_pcr_banks><md5/></active_pcr_banks></backend></tpm>"),
            "domain.active-banks",
        ),
    ],
)
def test_a_tpm_that_cannot_record_properties_is_refused(tpm: str, id: str) -> None:
    assert refusal(domain(tpm=tpm)).id == id


@pytest.mark.parametrize(
    ("xml", "id"),
    [
        (domain(element() + element()), "domain.doubled"),
        (domain(element() + element(namespace="urn:swtpm-prop:domain:9")), "domain.namespace"),
        (domain(element() + "<a xmlns:p='http://swtpm-prop/' p:b=''/>"), "domain.namespace"),
        (domain(f"<x>{element()}</x>"), "domain.misplaced"),
        (domain("", TPM + element()), "domain.misplaced"),
        (element().encode(), "domain.misplaced"),
        (domain(head="<!DOCTYPE domain>"), "domain.xml-doctype"),
        (domain(head="<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>", metadata="&a;"), "domain.xml-doctype"),
        (domain(head="<!DOCTYPE d SYSTEM 'http://127.0.0.1/x.dtd'>"), "domain.xml-doctype"),
        (domain("&undefined;" + element()), "domain.xml-malformed"),
        (domain().replace(b"</devices>", b""), "domain.xml-malformed"),
        (domain() + b"<x/>", "domain.xml-malformed"),
        (domain().decode().encode("utf-16"), "domain.xml-malformed"),
        (domain("\x00" + element()), "domain.xml-malformed"),
        (domain("<a>" * 1000 + "</a>" * 1000 + element()), "domain.xml-malformed"),
        (b"", "domain.xml-malformed"),
        (b"\xff\xfe", "domain.xml-malformed"),
    ],
)
def test_hostile_xml_is_refused(xml: bytes, id: str) -> None:
    assert refusal(xml).id == id


def test_size_limits() -> None:
    assert refusal(domain("<x>" + "y" * 10_000_000 + "</x>" + element())).id == "domain.xml-size"
    assert refusal(domain(element(BANK + "<!---->" + " " * METADATA_BYTES))).id == "domain.size"
    with pytest.raises(DomainError) as refused:
        parse_element(element(" " * METADATA_BYTES).encode())
    assert refused.value.id == "domain.xml-size"


def test_entities_are_never_expanded() -> None:
    laughs = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10 if n else 'ha' * 50}'>" for n in range(20))
    assert refusal(domain("&e19;" + element(), head=f"<!DOCTYPE d [{laughs}]>")).id == "domain.xml-doctype"
    # Not even declared: nothing behind this is read, for it is no XML.
    assert refusal(domain("&e19;" + element(), head="<!DOCTYPE d [<!ENTITY")).id == "domain.xml-doctype"


def test_the_largest_domain_is_read_in_time() -> None:
    def read(size: int) -> None:
        assert parse_domain(domain("<x>" + "y" * size + "</x>" + element())) is not None

    assert growth(read, DOMAIN_XML_BYTES - len(domain()) - 7) < 30


def test_element_round_trip_and_the_form_for_libvirt() -> None:
    vtpm = Vtpm(
        (
            Bank(SHA384, frozenset({0, 2, 3, 4, 15}), False, (BOOT, "urn:example:b&c';")),
            Bank(SHA512, frozenset({7}), True, (BOOT,)),
        )
    )
    assert parse_element(to_xml(vtpm).encode()) == vtpm
    bare = etree.fromstring(to_xml(vtpm, prefix=""))
    assert all(e.tag in {"vtpm", "bank", "property"} for e in bare.iter())
    assert fit(vtpm, domain(metadata="")) == vtpm


def test_the_uuid_is_the_domains_own() -> None:
    assert identify(domain("<domain><uuid>bbbbbbbb-0000-4000-8000-000000000001</uuid></domain>"))[:2] == (UUID, False)
    assert identify(domain())[:2] == (UUID, True)
    for wrong in ("", "../../etc", UUID.upper(), UUID + "</uuid><uuid>" + UUID, UUID + "/.."):
        with pytest.raises(DomainError) as refused:
            identify(domain().replace(UUID.encode(), wrong.encode()))
        assert refused.value.id == "domain.uuid"


@given(st.sets(st.integers(0, 15), min_size=1))
def test_pcr_lists_round_trip_in_their_shortest_form(pcrs: set[int]) -> None:
    text = format_pcrs(pcrs)
    assert parse_pcrs(text) == pcrs
    spans = [tuple(map(int, item.split("-"))) for item in text.split(",")]
    assert all(after[0] > before[-1] + 1 for before, after in pairwise(spans))
