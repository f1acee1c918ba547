"""The normal form of property URIs."""

from __future__ import annotations

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import URI_CHARS
from swtpm_prop.trust.uri import check_property


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/",
        "https://example.org/properties/debian-12-boot",
        "https://example.org:8443/p?level=3#boot",
        "https://example.org/a%20b/c%2Fd",
        "urn:example:boot",
        "tag:example.org,2026:boot",
        "https://example.org/...",
        "https://example.org/" + "a" * (URI_CHARS - 20),
    ],
)
def test_normal_form_is_accepted(uri: str) -> None:
    check_property(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "boot",
        "/properties/boot",
        "//example.org/boot",
        "https:",
        "https://",
        "https:///boot",
        "https://example.org",
        "https://example.org?boot",
        "HTTPS://example.org/boot",
        "https://Example.org/boot",
        "https://example.org:443/boot",
        "http://example.org:80/boot",
        "https://example.org:0/boot",
        "https://example.org:70000/boot",
        "https://user@example.org/boot",
        "https://example.org/a/../boot",
        "https://example.org/a/.",
        "https://example.org/./boot",
        "https://example.org/%2e%2E/boot",
        "https://example.org/%2E%2E/boot",
        "https://example.org/%41",
        "https://example.org/a%2fb",
        "https://example.org/a%2",
        "https://example.org/a b",
        "https://example.org/a\n",
        "https://example.org/\x1b[31m",
        "https://example.org/b\u00f6\u00f6t",
        "https://example.org\\boot",
        "urn:",
        "https://example.org/" + "a" * (URI_CHARS - 19),
    ],
)
def test_everything_else_is_refused(uri: str) -> None:
    with pytest.raises(TrustError) as refused:
        check_property(uri)
    assert refused.value.id == "trust.uri"
    assert refused.value.line().isprintable()


@given(st.text(max_size=URI_CHARS + 8))
def test_any_text_is_accepted_or_refused_and_accepted_text_is_safe_to_join(uri: str) -> None:
    try:
        check_property(uri)
    except TrustError:
        return
    assert uri.isascii()
    assert uri.isprintable()
    assert " " not in uri


@pytest.mark.parametrize(("head", "part", "tail"), [("https://", "a-", ""), ("https://", "a.", "/"), ("a:", "%41", "")])
def test_hostile_text_is_answered_at_once(head: str, part: str, tail: str) -> None:
    def refuse(size: int) -> None:
        with pytest.raises(TrustError):
            check_property(head + part * (size // len(part)) + tail)

    assert growth(refuse, URI_CHARS - 20) < 30
