"""Records of guests' keys, their copies for recovery, and the keys made from them; without a TPM."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop import durable
from swtpm_prop.custody import keys, recovery
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.custody.recovery import Wrap
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout

UUID = "aaaaaaaa-0000-4000-8000-000000000001"
AUTHORITY = ec.derive_private_key(0x5EED, ec.SECP256R1()).public_key()
RECOVERY = ec.derive_private_key(0xCAFE, ec.SECP256R1())
RECORD = KeyRecord(
    uuid=UUID,
    epoch=3,
    property="https://example.org/hosts/approved",
    authority=keys.pem(AUTHORITY),
    sealed=Sealed(b"public", b"private"),
    recovery=(Wrap("ab" * 32, b"one"), Wrap("cd" * 32, b"two")),
    encrypted=True,
)


@given(st.binary(min_size=32, max_size=32))
def test_the_migration_key_is_hkdf(key: bytes) -> None:
    """RFC 5869 by another implementation; without a salt is with a salt of zeros."""
    assert keys.migration_key(key) == HKDF(SHA256(), 32, None, b"swtpm-prop/v1/migration").derive(key)


def test_a_record_is_read_as_it_was_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert keys.load(UUID, layout) is None
    keys.store(RECORD, layout)
    keys.store(RECORD._replace(epoch=4), layout)
    assert keys.load(UUID, layout) == RECORD._replace(epoch=4)
    assert RECORD.authority_key() == AUTHORITY
    assert [path.name for path in layout.keys.iterdir()] == [f"{UUID}.json"]
    copy = keys.load_recovery_copy(keys.recovery_copy(UUID, layout), UUID)
    assert copy == (4, RECORD.property, RECORD.recovery)
    for path in (layout.guest_key(UUID), keys.recovery_copy(UUID, layout)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys.destroy(UUID, layout)
    keys.destroy(UUID, layout)
    assert keys.load(UUID, layout) is None


def test_without_recovery_keys_there_is_no_copy(tmp_path: Path) -> None:
    keys.store(RECORD._replace(recovery=()), Layout(tmp_path))
    assert not keys.recovery_copy(UUID, Layout(tmp_path)).exists()


def damaged() -> list[bytes]:
    whole = json.loads(keys.serialise(RECORD))
    changes = [
        {"version": 2}, {"uuid": UUID.replace("a", "b")}, {"epoch": "3"}, {"epoch": True}, {"property": None},
        {"sealed": {}}, {"sealed": {"public": "zz", "private": ""}}, {"recovery": []}, {"recovery": {"a": "zz"}},
        {"encrypted": 1}, {"authority": 7},
    ]  # fmt: skip
    lost = [{name: value for name, value in whole.items() if name != gone} for gone in whole]
    return [*(json.dumps({**whole, **change}).encode() for change in changes), *(json.dumps(x).encode() for x in lost)]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, *damaged()])
def test_what_is_no_record_of_this_guest_is_refused(tmp_path: Path, data: bytes) -> None:
    layout = Layout(tmp_path)
    durable.write(layout.guest_key(UUID), data)
    with pytest.raises(HostError) as refused:
        keys.load(UUID, layout)
    assert refused.value.id == "custody.record-damaged"
    assert refused.value.line().isprintable()


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    with pytest.raises(HostError):
        keys.parse(data, UUID)


def test_an_authority_on_another_curve_is_no_authority() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert RECORD._replace(authority=keys.pem(other)).authority_key() == other
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = edwards.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(HostError) as refused:
        RECORD._replace(authority=pem).authority_key()
    assert refused.value.id == "custody.record-damaged"


# -- recovery -------------------------------------------------------------------------------------


def test_each_recovery_key_opens_its_wrap_for_this_guest_alone() -> None:
    second = ec.generate_private_key(ec.SECP256R1())
    wraps = recovery.wrap(bytes(32), UUID, [RECOVERY.public_key(), second.public_key()])
    assert recovery.from_json(recovery.to_json(wraps)) == wraps
    for private in (RECOVERY, second):
        assert recovery.unwrap(wraps, UUID, private) == bytes(32)
        with pytest.raises(HostError) as refused:
            recovery.unwrap(wraps, UUID.replace("a", "b"), private)
        assert refused.value.id == "custody.recovery-damaged"
    with pytest.raises(HostError) as refused:
        recovery.unwrap(wraps, UUID, ec.generate_private_key(ec.SECP256R1()))
    assert refused.value.id == "custody.recovery-key"
    assert bytes(32) not in b"".join(wrap.ciphertext for wrap in wraps)


def test_a_recovery_key_of_another_kind_is_refused_before_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "recovery.pem"
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    for text in (b"", edwards.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), None):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(HostError) as refused:
            recovery.load_keys([path])
        assert refused.value.id == "custody.recovery-key"


# -- files ----------------------------------------------------------------------------------------


def test_a_disk_that_fails_leaves_the_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    keys.store(RECORD, layout)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keys.store(RECORD._replace(epoch=9), layout)
    assert keys.load(UUID, layout) == RECORD
    assert [path.name for path in layout.keys.iterdir()] == [f"{UUID}.json"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / ".file.new").symlink_to(target)
    durable.write(tmp_path / "file", b"new")
    assert (target.read_text(), (tmp_path / "file").read_bytes()) == ("kept", b"new")
