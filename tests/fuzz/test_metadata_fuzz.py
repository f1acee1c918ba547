"""Whatever the bytes: domain metadata is read, is absent, or is refused with the one error type."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swtpm_prop.domain.identity import scan
from swtpm_prop.domain.metadata import Vtpm, parse_domain, parse_element, to_xml
from swtpm_prop.errors import DomainError

SEED = (
    b"<domain type='qemu'><uuid>aaaaaaaa-0000-4000-8000-000000000001</uuid><metadata>"
    b"<prop:vtpm xmlns:prop='urn:swtpm-prop:domain:1'><prop:bank algorithm='sha384' pcrs='0-9,11-14'>"
    b"<prop:property uri='https://example.org/p'/></prop:bank>"
    b"<prop:custody host-property='https://example.org/h'/></prop:vtpm></metadata>"
    b"<devices><tpm><backend type='emulator' version='2.0'/></tpm></devices></domain>"
)
PIECES = st.sampled_from(
    [
        b"<!DOCTYPE d [<!ENTITY a 'b'>]>",
        b"&a;",
        b"&#0;",
        b"&#x2d;",
        b"<![CDATA[",
        b"]]>",
        b"<?xml version='1.0' encoding='utf-16'?>",
        b"<?swtpm-prop?>",
        b"xmlns='a}swtpm-prop'",
        b"xmlns='swtpm-prop '",
        b"xmlns:swtpm-prop='swtpm-prop'",
        b"<prop:vtpm/>",
        b"<prop:custody/>",
        b"<custody/>",
        b"prop:custody",
        b"<x:y:z/>",
        b"\x00",
        b"\xc3\xb6",
        b"\xff",
        b" prop:a=''",
        b"99",
        b"-",
        b"/>",
        b">",
        b"'",
    ]
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The seed with up to six cuts, each filled with a nasty piece, a piece of the seed itself or anything."""
    data = SEED
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, len(data)))
        last = min(len(data), first + draw(st.integers(0, 24)))
        data = data[:first] + draw(PIECES | st.binary(max_size=8) | st.just(SEED[first:])) + data[last:]
    return data


def check(data: bytes) -> None:
    for parse in (parse_domain, parse_element):
        try:
            vtpm = parse(data)
        except DomainError as refused:
            assert refused.id.startswith("domain.")
            assert refused.line().isprintable()
            continue
        if vtpm is not None:
            # The hook lets a guest in without a key by this look alone.
            assert scan(data).custody is (vtpm.custody is not None)
            assert parse_element(to_xml(Vtpm(vtpm.banks)).encode()).banks == vtpm.banks


@settings(max_examples=1500, deadline=None)
@given(damaged())
def test_damaged_xml(data: bytes) -> None:
    check(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    check(data)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_namespace_and_name(namespace: str, name: str) -> None:
    check(SEED.replace(b"urn:swtpm-prop:domain:1", namespace.encode("utf-8", "surrogatepass")))
    check(
        SEED.replace(
            b"<metadata>", f"<metadata><a xmlns='swtpm-prop{namespace}' {name}='{name}'/>".encode(errors="ignore")
        )
    )
