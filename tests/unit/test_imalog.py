"""IMA measurement lists of real guests: against the PCRs of these guests and against evmctl; damaged lists."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from swtpm_prop import limits
from swtpm_prop.errors import WireError
from swtpm_prop.tpm import ima, imalog
from swtpm_prop.tpm.algorithms import BY_NAME, SHA1, SHA256, SHA384

DATA = Path(__file__).parent.parent / "data"
TEMPLATES = ["ima-ng", "ima-sig"]


def entries(name: str) -> tuple[imalog.Entry, ...]:
    return imalog.parse((DATA / f"{name}.imalog").read_bytes())


def pcrs(name: str, bank: str) -> dict[int, bytes]:
    lines = [line.split() for line in (DATA / f"{name}.pcrs").read_text().splitlines()]
    return {int(pcr): bytes.fromhex(value) for of, pcr, value in lines if of == bank}


def pcr_file(directory: Path, name: str, bank: str) -> Path:
    """PCR values as evmctl reads them."""
    path = directory / bank
    values = {**dict.fromkeys(range(24), bytes(BY_NAME[bank].size)), **pcrs(name, bank)}
    path.write_text("".join(f"PCR-{pcr:02}: {value.hex(' ').upper()}\n" for pcr, value in sorted(values.items())))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_replay_is_what_the_guest_had_in_pcr_10(name: str) -> None:
    for algorithm in (SHA1, SHA256):
        assert imalog.replay(entries(name), algorithm) == {10: pcrs(name, algorithm.name)[10]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bank_whose_hash_the_kernel_has_not_got_padded_digests(name: str) -> None:
    """Debian's 6.1 has no SHA-384 that early; this is why only SHA-256 is ever certified for IMA."""
    value = bytes(48)
    for entry in entries(name):
        padded = b"\xff" * 48 if entry.violation else hashlib.sha1(entry.data).digest().ljust(48, b"\0")
        value = hashlib.sha384(value + padded).digest()
    assert pcrs(name, "sha384")[10] == value != imalog.replay(entries(name), SHA384)[10]


@pytest.mark.parametrize("name", TEMPLATES)
def test_evmctl_agrees(name: str, tmp_path: Path) -> None:
    banks = [word for bank in ("sha1", "sha256") for word in ("--pcrs", f"{bank},{pcr_file(tmp_path, name, bank)}")]
    log = str(DATA / f"{name}.imalog")
    said = subprocess.run(
        ["evmctl", "ima_measurement", "--ignore-violations", *banks, log], check=True, capture_output=True, text=True
    )
    assert "Matched per TPM bank" in said.stdout + said.stderr


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_boot_aggregate_is_known_from_the_pcrs(name: str, tmp_path: Path) -> None:
    first, *rest = entries(name)
    assert first.path == ima.BOOT_AGGREGATE
    raw = pcrs(name, "sha256")
    assert first.digest == ima.boot_aggregate(raw)
    assert first.data == ima.boot_aggregate_measurement(name, raw)
    assert not [entry for entry in rest if entry.path == ima.BOOT_AGGREGATE]
    command = ["evmctl", "ima_boot_aggregate", "--pcrs", f"sha256,{pcr_file(tmp_path, name, 'sha256')}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"sha256:{ima.boot_aggregate(raw).hex()}"
    assert ima.boot_aggregate({**raw, 9: bytes(32), 8: b"\1" * 32}) != first.digest


@pytest.mark.parametrize("name", TEMPLATES)
def test_measurements_of_files_are_made_as_the_kernel_makes_them(name: str) -> None:
    for entry in entries(name):
        assert entry.template == name
        assert ima.file_measurement(name, entry.path, entry.digest) == entry.data


def test_paths() -> None:
    """The guest ran /sbin/busybox, /sbin being a link to usr/sbin, and read "/with space ü"."""
    found = {entry.path.decode(): entry for entry in entries("ima-ng")}
    assert "/usr/sbin/busybox" in found
    assert "/sbin/busybox" not in found
    assert found["/usr/sbin/busybox"].digest == found["/bin/busybox"].digest
    spaced = "/with space ü".encode()
    assert found["/with_space_ü"].data == ima.file_measurement("ima-ng", spaced, hashlib.sha256(b"x").digest())
    assert found["/empty"].digest == hashlib.sha256().digest()


def test_violations_and_words() -> None:
    violations = [entry for entry in entries("ima-ng") if entry.violation]
    assert {entry.path for entry in violations} == {b"/bin/b2", b"/run/output"}
    assert {imalog.measured(entry, SHA256) for entry in violations} == {b"\xff" * 32}
    assert imalog.describe(violations[0]) == "/bin/b2 (violation)"
    hostile = entries("ima-sig")[1]._replace(path=b"/\x1b[2J\xff\n")
    assert imalog.describe(hostile) == "/\\x1b[2J\\xff\\n"


def made(template: bytes = b"ima-ng", *, fields: tuple[bytes, ...] = (), pcr: int = 10, sha1: bytes = b"") -> bytes:
    chosen = fields or (b"sha256:\0" + bytes(32), b"/x\0")
    content = b"".join(len(field).to_bytes(4, "little") + field for field in chosen)
    head = pcr.to_bytes(4, "little") + (sha1 or hashlib.sha1(content).digest())
    return head + len(template).to_bytes(4, "little") + template + len(content).to_bytes(4, "little") + content


SHA_FIELD = b"sha256:\0" + bytes(32)
BAD = [
    (made(pcr=24), "imalog.pcr"),
    (made(pcr=0x0A000000), "imalog.pcr"),
    (made(b"ima"), "imalog.template"),
    (made(b"d-ng|n-ng"), "imalog.template"),
    (made(b"ima-ng\0"), "imalog.template"),
    (made(b"\xff\x1b"), "imalog.template"),
    (made(sha1=b"\1" * 20), "imalog.digest"),
    (made(fields=(SHA_FIELD, b"/x")), "imalog.field"),
    (made(fields=(SHA_FIELD, b"")), "imalog.field"),
    (made(fields=(SHA_FIELD, b"/x\0y\0")), "imalog.field"),
    (made(fields=(SHA_FIELD + b"\0", b"/x\0")), "imalog.field"),
    (made(fields=(b"sha256" + bytes(32), b"/x\0")), "imalog.field"),
    (made(fields=(b"SHA256:\0" + bytes(32), b"/x\0")), "imalog.field"),
    (made(fields=(SHA_FIELD, b"/x\0", b"")), "imalog.field"),
    (made(b"ima-sig"), "imalog.truncated"),
    (made(fields=(SHA_FIELD,)), "imalog.truncated"),
    (made() + b"\0", "imalog.truncated"),
    (made()[:-1], "imalog.truncated"),
]


@pytest.mark.parametrize(("data", "id"), BAD)
def test_damaged_lists_are_refused(data: bytes, id: str) -> None:
    with pytest.raises(WireError) as refused:
        imalog.parse(data)
    assert refused.value.id == id
    assert refused.value.line().isprintable()


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert imalog.parse(b"") == ()
    assert len(imalog.parse(made() * 3)) == 3
    monkeypatch.setattr(limits, "IMA_ENTRIES", 2)
    with pytest.raises(WireError, match="too-big"):
        imalog.parse(made() * 3)
    monkeypatch.setattr(limits, "IMA_LOG_BYTES", len(made()) - 1)
    with pytest.raises(WireError, match="too-big"):
        imalog.parse(made())


def test_other_hashes_and_buffers_are_read() -> None:
    (entry,) = imalog.parse(made(fields=(b"sm3:\0" + bytes(32), b"/x\0")))
    assert (entry.algorithm, entry.digest) == ("sm3", bytes(32))
    (entry,) = imalog.parse(made(b"ima-buf", fields=(SHA_FIELD, b"kexec-cmdline\0", b"quiet")))
    assert entry.path == b"kexec-cmdline"
