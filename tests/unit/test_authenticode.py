"""Authenticode hashes of real Debian images against pesign and lief; damaged images against the parser."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from pathlib import Path

import lief
import pytest

from lab import debian
from swtpm_prop import limits
from swtpm_prop.errors import WireError
from swtpm_prop.tpm import authenticode, pe
from swtpm_prop.tpm.algorithms import STRONG

STUB = "usr/lib/systemd/boot/efi/linuxx64.efi.stub"


def images() -> list[Path]:
    kernels = debian.cloud_kernels()
    boot = debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi"
    return [
        debian.package("shim-signed") / "usr/lib/shim/shimx64.efi.signed",
        debian.package("grub-efi-amd64-signed") / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        boot / "systemd-bootx64.efi",
        boot / "linuxx64.efi.stub",
        debian.kernel(kernels[0]),
        debian.kernel(kernels[-1]),
    ]


@pytest.fixture(scope="module", params=range(6), ids=["shim", "grub", "sd-boot", "sd-stub", "linux-old", "linux-new"])
def image(request: pytest.FixtureRequest) -> Path:
    path: Path = images()[request.param]
    return path


@pytest.fixture(scope="module")
def stub() -> bytes:
    return (debian.package("systemd-boot-efi") / STUB).read_bytes()


def test_equals_pesign(image: Path) -> None:
    said = subprocess.run(["pesign", "-h", "-i", image], check=True, capture_output=True, text=True).stdout
    assert authenticode.digests(image.read_bytes())["sha256"].hex() in said.split()


def test_equals_lief(image: Path) -> None:
    parsed = lief.PE.parse(str(image))
    assert parsed is not None
    by_name = {a.name: bytes(parsed.authentihash(getattr(lief.PE.ALGORITHMS, f"SHA_{a.size * 8}"))) for a in STRONG}
    assert authenticode.digests(image.read_bytes()) == by_name


def test_sections_equal_those_of_lief(image: Path) -> None:
    parsed = lief.PE.parse(str(image))
    assert parsed is not None
    theirs = {
        section.name: (bytes(section.content)[: section.virtual_size]).ljust(section.virtual_size, b"\0")
        for section in parsed.sections
    }
    assert {name: bytes(content) for name, content in pe.sections(image.read_bytes()).items()} == theirs


def test_what_signing_changes_is_not_hashed(stub: bytes) -> None:
    headers = pe.parse(stub)
    assert headers.security is not None
    signed = bytearray(stub) + bytes(range(64))
    struct.pack_into("<I", signed, headers.checksum, 0x12345678)
    struct.pack_into("<II", signed, headers.security, len(stub), 64)
    assert authenticode.digests(bytes(signed)) == authenticode.digests(stub)
    assert authenticode.digests(memoryview(signed)) == authenticode.digests(stub)
    for at in (2, headers.checksum + 4, headers.security + 8, headers.size, len(stub) - 1):
        changed = bytearray(stub)
        changed[at] ^= 1
        assert authenticode.digests(bytes(changed)) != authenticode.digests(stub)


def test_bytes_after_the_sections_are_hashed(stub: bytes) -> None:
    assert authenticode.digests(stub + b"\0") != authenticode.digests(stub)


def small(
    sections: list[tuple[bytes, int, int, int]], *, magic: int = 0x20B, directories: int = 16, size: int = 1024
) -> bytes:
    """An image of ``size`` bytes, headers of 512; sections are (name, virtual size, raw size, raw offset)."""
    optional = bytearray(112 if magic == 0x20B else 96) + bytes(8 * directories)
    struct.pack_into("<H", optional, 0, magic)
    struct.pack_into("<I", optional, 60, 512)
    struct.pack_into("<I", optional, (112 if magic == 0x20B else 96) - 4, directories)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, len(optional), 0)
    table = b"".join(struct.pack("<8sIIII16x", n, v, 0, r, o) for n, v, r, o in sections)
    return (coff + bytes(optional) + table).ljust(size, b"\xa5")


def test_image_without_a_certificate_directory_and_without_dos_header() -> None:
    image = small([(b".a", 16, 256, 768), (b".b", 16, 256, 512)], magic=0x10B, directories=4)
    hashed = image[: 24 + 64] + image[24 + 68 :]
    assert authenticode.digest(image, STRONG[0]) == hashlib.sha256(hashed).digest()


def test_sections_are_hashed_by_file_offset() -> None:
    image = bytearray(small([(b".late", 16, 256, 768), (b".early", 16, 256, 512)]))
    image[512:768], image[768:1024] = b"1" * 256, b"2" * 256
    parts = image[:88], image[92 : 24 + 112 + 32], image[24 + 112 + 40 :]
    assert authenticode.digest(bytes(image), STRONG[0]) == hashlib.sha256(b"".join(parts)).digest()


def test_a_gap_shifts_the_tail() -> None:
    """The firmware counts hashed bytes: with a gap of 100 bytes before the section the tail starts 100 too early."""
    image = small([(b".a", 0, 300, 612)])
    image = image[:900] + bytes(range(124))
    parts = image[:88], image[92 : 24 + 112 + 32], image[24 + 112 + 40 : 512], image[612:912], image[812:]
    assert authenticode.digest(image, STRONG[0]) == hashlib.sha256(b"".join(parts)).digest()


def test_section_in_memory_is_cut_or_filled() -> None:
    found = pe.sections(small([(b".cut", 3, 16, 512), (b".fill", 20, 16, 512), (b".bss", 5, 0, 0)]))
    assert {name: bytes(content) for name, content in found.items()} == {
        ".cut": b"\xa5" * 3,
        ".fill": b"\xa5" * 16 + bytes(4),
        ".bss": bytes(5),
    }


def damaged(at: int, layout: str, *values: int) -> bytes:
    image = bytearray(small([(b".a", 16, 256, 512)]))
    struct.pack_into(layout, image, at, *values)
    return bytes(image)


@pytest.mark.parametrize(
    ("image", "id"),
    [
        (b"", "pe.truncated"),
        (b"MZ", "pe.truncated"),
        (b"MZ" + b"\xff" * 62, "pe.truncated"),
        (b"\x7fELF" + bytes(60), "pe.signature"),
        (damaged(24, "<H", 0x107), "pe.signature"),
        (small([])[:60], "pe.truncated"),
        (damaged(24 + 60, "<I", 0xFFFFFFFF), "pe.header"),
        (damaged(24 + 60, "<I", 24 + 240), "pe.header"),
        (damaged(6, "<H", 0xFFFF), "pe.header"),
        (damaged(24 + 108, "<I", 17), "pe.header"),
        (damaged(20, "<H", 0xFFFF), "pe.header"),
        (damaged(24 + 112 + 32, "<II", 1000, 25), "pe.certificates"),
        (damaged(24 + 112 + 32, "<II", 0xFFFFFFFF, 0xFFFFFFFF), "pe.certificates"),
        (damaged(24 + 112 + 32, "<II", 500, 500), "pe.certificates"),
        (small([(b".a", 16, 256, 800)]), "pe.section"),
        (small([(b".a", 16, 0xFFFFFFFF, 0xFFFFFFFF)]), "pe.section"),
    ],
)
def test_damage_is_refused(image: bytes, id: str) -> None:
    with pytest.raises(WireError) as caught:
        authenticode.digests(image)
    assert caught.value.id == id


@pytest.mark.parametrize(
    "image",
    [
        small([(b".a", 16, 16, 512), (b".a", 16, 16, 512)]),
        small([(b".a", limits.IMAGE_BYTES + 1, 0, 0)]),
        small([(b".a", limits.IMAGE_BYTES, 0, 0), (b".b", 1, 0, 0)]),
    ],
)
def test_ambiguous_or_huge_sections_are_refused(image: bytes) -> None:
    with pytest.raises(WireError) as caught:
        pe.sections(image)
    assert caught.value.id == "pe.section"
