"""The agent's stamp in a domain XML: found where libvirt keeps it, and never a request for anything."""

from __future__ import annotations

import pytest

from swtpm_prop.domain.arrival import note
from swtpm_prop.domain.identity import identify
from swtpm_prop.domain.metadata import parse_domain
from swtpm_prop.domain.stamp import Stamp, read, to_xml, transfer
from swtpm_prop.errors import DomainError

UUID = "aaaaaaaa-0000-4000-8000-000000000001"
STAMP = "<a:agent xmlns:a='urn:swtpm-prop:agent:1' endpoint='{}' host='{}'/>"


def domain(*metadata: str, elsewhere: str = "") -> bytes:
    return f"<domain><uuid>{UUID}</uuid><metadata>{''.join(metadata)}</metadata>{elsewhere}</domain>".encode()


@pytest.mark.parametrize("endpoint", ["alpha:4879", "alpha.example.org:1", "192.0.2.1:65535", "[2001:db8::1]:4879"])
def test_is_found(endpoint: str) -> None:
    xml = domain(STAMP.format(endpoint, "alpha.example.org"))
    assert read(identify(xml)) == Stamp(endpoint, "alpha.example.org")
    assert not identify(xml).concerned
    assert parse_domain(xml) is None


def test_is_what_the_agent_writes() -> None:
    stamp = Stamp("alpha:4879", "alpha")
    written = to_xml(stamp).replace("<agent", "<agent xmlns='urn:swtpm-prop:agent:1'")
    assert read(identify(domain(written))) == stamp


def test_what_no_host_could_use_is_not_written() -> None:
    for stamp in (Stamp("alpha", "alpha"), Stamp('a"b:1', "alpha"), Stamp("alpha:1", "")):
        with pytest.raises(DomainError) as refused:
            to_xml(stamp)
        assert refused.value.id == "domain.stamp"


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        STAMP.format("alpha:1", "alpha") * 2,
        STAMP.format("alpha", "alpha"),
        STAMP.format("alpha:123456", "alpha"),
        STAMP.format("al pha:1", "alpha"),
        STAMP.format("alpha:1&#10;", "alpha"),
        STAMP.format("alpha:1", "&#127;[31m"),
        STAMP.format("alpha:1", "a" * 254),
        STAMP.replace("host=", "other=").format("alpha:1", "alpha"),
        STAMP.replace("a:agent", "a:other").format("alpha:1", "alpha"),
        STAMP.replace("agent:1", "agent:2").format("alpha:1", "alpha"),
        f"<x>{STAMP.format('alpha:1', 'alpha')}</x>",
    ],
)
def test_is_one_that_an_agent_would_write_or_none(metadata: str) -> None:
    assert read(identify(domain(metadata))) is None


def test_counts_in_its_place_only() -> None:
    assert read(identify(domain(elsewhere=STAMP.format("alpha:1", "alpha")))) is None


def test_another_namespace_of_ours_is_still_noticed() -> None:
    assert identify(domain(STAMP.replace("agent:1", "agent:2").format("alpha:1", "alpha"))).concerned
    assert identify(domain(STAMP.format("alpha:1", "alpha"), "<p:x xmlns:p='urn:swtpm-prop:domain:1'/>")).concerned


def test_the_name_is_the_domains_own() -> None:
    named = domain(elsewhere="<name>a&amp;b\t..</name><x><name>no</name></x>")
    assert identify(named).name == "a&b\t.."


VTPM = (
    "<p:vtpm xmlns:p='urn:swtpm-prop:domain:1'><p:bank algorithm='sha384' pcrs='4'>"
    "<p:property uri='https://example.org/a'/></p:bank></p:vtpm>"
)
TPM = "<devices><tpm><backend type='emulator' version='2.0'/></tpm></devices>"


@pytest.mark.parametrize("stamps", ["", STAMP.format("alpha:4879", "alpha"), STAMP.format("alpha:4879", "alpha") * 2])
def test_a_transfer_is_noted_in_it_and_nothing_else_changes(stamps: str) -> None:
    xml = domain("<x:y xmlns:x='urn:x' a='&lt;ü'>&amp;</x:y>", VTPM, stamps, elsewhere=TPM)
    noted = note(xml, "ab" * 16)
    assert transfer(identify(xml)) == ""
    assert transfer(identify(noted)) == "ab" * 16
    assert transfer(identify(note(noted, "cd" * 16))) == "cd" * 16
    assert read(identify(noted)) == (Stamp("alpha:4879", "alpha") if stamps else None)
    assert parse_domain(noted) == parse_domain(xml)
    assert '<x:y xmlns:x="urn:x" a="&lt;ü">&amp;</x:y>' in noted.decode()
    assert TPM.replace("'", '"') in noted.decode()
