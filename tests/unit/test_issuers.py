"""The trust file: read strictly, because a slip in it is a hole."""

from __future__ import annotations

from pathlib import Path

import pytest
from certifier import ED25519, ISSUER, P256, PREFIX, private_pem, public_pem, trust_text

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import ISSUER_KEYS, KEY_BYTES, TRUST_BYTES
from swtpm_prop.trust import issuers
from swtpm_prop.trust.keys import keyid

GOOD = trust_text(ED25519, P256, threshold=2)


def test_keys_inline_and_from_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/p256.pem").write_text(public_pem(P256))
    file = tmp_path / "trust.toml"
    file.write_text(
        f'[[issuer]]\nid="{ISSUER}"\nkeys=["""{public_pem(ED25519)}""", "keys/p256.pem"]\nprefixes=["{PREFIX}"]'
    )
    issuer = issuers.load(file)[ISSUER]
    assert [keyid(key) for key in issuer.keys] == [keyid(ED25519.public_key()), keyid(P256.public_key())]
    assert (issuer.prefixes, issuer.threshold) == ((PREFIX,), 1)


def test_an_empty_file_trusts_nobody() -> None:
    assert issuers.parse(b"# nobody yet\n", Path()) == {}


@pytest.mark.parametrize(
    ("prefix", "uri", "may"),
    [
        ("https://a.org/p", "https://a.org/p", True),
        ("https://a.org/p", "https://a.org/p/q", True),
        ("https://a.org/p", "https://a.org/pq", False),
        ("https://a.org/p", "https://a.org/p?q", False),
        ("https://a.org/p", "https://a.org/", False),
        ("https://a.org/p", "https://a.org:8443/p/q", False),
        ("https://a.org/p/", "https://a.org/p/q", True),
        ("https://a.org/p/", "https://a.org/p", False),
        ("https://a.org/p//", "https://a.org/p/q", False),
        ("https://a.org/", "https://a.org/p", True),
        ("https://a.org/", "https://a.org.evil.net/p", False),
        ("https://a.org/P", "https://a.org/p/q", False),
    ],
)
def test_a_prefix_ends_at_a_path_segment(prefix: str, uri: str, may: bool) -> None:
    issuer = issuers.parse(trust_text(prefix=prefix).encode(), Path())[ISSUER]
    assert issuer.may_certify(uri) is may


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("[[issuer]", "trust.file"),
        ("issuer = 1", "trust.file"),
        ("issuer = [1]", "trust.file"),
        ("[[issuers]]", "trust.file"),
        ("[[issuer]]", "trust.file"),
        (GOOD + "treshold = 2", "trust.file"),
        (GOOD + GOOD, "trust.file"),
        (GOOD.replace("threshold = 2", "threshold = 3"), "trust.file"),
        (GOOD.replace("threshold = 2", "threshold = 0"), "trust.file"),
        (GOOD.replace("threshold = 2", "threshold = true"), "trust.file"),
        (GOOD.replace("threshold = 2", "threshold = '2'"), "trust.file"),
        (trust_text(ED25519, ED25519, threshold=2), "trust.file"),
        (GOOD + "approves-hosts = true", "trust.file"),
        (GOOD + "approves-hosts = 1", "trust.file"),
        (trust_text(ED25519) + "approves-hosts = true", "trust.file"),
        (GOOD.replace(ISSUER, "debian"), "trust.file"),
        (GOOD.replace(f'["{PREFIX}"]', "[]"), "trust.file"),
        (GOOD.replace(f'["{PREFIX}"]', f'"{PREFIX}"'), "trust.file"),
        (trust_text(prefix="https://example.org/a/../b"), "trust.file"),
        (trust_text(prefix="https://example.org"), "trust.file"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=[]\nprefixes=["{PREFIX}"]', "trust.file"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys={["k"] * (ISSUER_KEYS + 1)}\nprefixes=["{PREFIX}"]', "trust.file"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=["no.pem"]\nprefixes=["{PREFIX}"]', "trust.file-missing"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=["."]\nprefixes=["{PREFIX}"]', "trust.file-unreadable"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=["a\\u0000b"]\nprefixes=["{PREFIX}"]', "trust.file-unreadable"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=["big.pem"]\nprefixes=["{PREFIX}"]', "trust.too-large"),
        (f'[[issuer]]\nid="{ISSUER}"\nkeys=["private.pem"]\nprefixes=["{PREFIX}"]', "trust.key"),
        (trust_text().replace("PUBLIC", "CERTIFICATE"), "trust.key"),
        ("#" * (TRUST_BYTES + 1), "trust.file"),
    ],
)
def test_what_is_not_exactly_right_is_refused(tmp_path: Path, text: str, id: str) -> None:
    (tmp_path / "private.pem").write_bytes(private_pem(ED25519))
    (tmp_path / "big.pem").write_bytes(b"x" * (KEY_BYTES + 1))
    with pytest.raises(TrustError) as refused:
        issuers.parse(text.encode(), tmp_path)
    assert refused.value.id == id
    assert refused.value.line().isprintable()


def test_a_missing_trust_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrustError) as refused:
        issuers.load(tmp_path / "trust.toml")
    assert refused.value.id == "trust.file-missing"
