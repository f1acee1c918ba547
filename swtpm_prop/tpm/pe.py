"""PE/COFF images, as far as firmware looks at them before it measures one: headers, section table, certificate table.

Follows the Microsoft PE format (COFF header, optional header, section table) with the checks of EDK2's
PeCoffLoaderGetPeHeader. All integers are little-endian. Any input either parses or raises WireError ``pe.*``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from swtpm_prop import limits
from swtpm_prop.errors import WireError

_COFF = struct.Struct("<IHHIIIHH")
_PE = int.from_bytes(b"PE\0\0", "little")
_SECTION = struct.Struct("<8sIIIIIIHHI")
_CHECKSUM = 64
_LAYOUTS = {0x10B: 96, 0x20B: 112}
"""Optional header magic (PE32, PE32+) to the offset of its data directories."""

_DIRECTORIES = 16
_SECURITY = 4


class Section(NamedTuple):
    """One section header: name, size in memory, then offset and size in the file (all in bytes)."""

    name: str
    virtual_size: int
    raw_offset: int
    raw_size: int


class Headers(NamedTuple):
    """What the headers of an image say.

    Attributes:
        checksum: file offset of the CheckSum field (4 bytes).
        security: file offset of the certificate table's directory entry (8 bytes); None if the image has none.
        size: SizeOfHeaders, bytes from the start of the file.
        certificates: bytes of the certificate table.
        sections: in the order of the section table.
    """

    checksum: int
    security: int | None
    size: int
    certificates: int
    sections: tuple[Section, ...]


def parse(image: bytes | memoryview) -> Headers:
    """Read and check the headers.

    Raises:
        WireError: ``pe.too-big``, ``pe.truncated``, ``pe.signature``, ``pe.header``, ``pe.section``,
            ``pe.certificates``.
    """
    view = memoryview(image)
    if len(view) > limits.IMAGE_BYTES:
        raise WireError("pe.too-big", f"image of {len(view)} bytes, the limit is {limits.IMAGE_BYTES}")
    start, section_count, optional_size = _coff(view)
    (magic,) = _unpack(view, struct.Struct("<H"), start)
    directories_at = _LAYOUTS.get(magic)
    if directories_at is None:
        raise WireError("pe.signature", f"optional header of unknown kind 0x{magic:x}")
    (header_size,) = _unpack(view, struct.Struct("<I"), start + 60)
    (directories,) = _unpack(view, struct.Struct("<I"), start + directories_at - 4)
    if directories > _DIRECTORIES or optional_size != directories_at + 8 * directories:
        raise WireError("pe.header", f"optional header of {optional_size} bytes with {directories} directories")
    table = start + optional_size
    if not table + _SECTION.size * section_count <= header_size <= len(view):
        raise WireError("pe.header", f"headers of {header_size} bytes cannot hold {section_count} sections, or overrun")
    security = start + directories_at + 8 * _SECURITY if directories > _SECURITY else None
    certificates = 0 if security is None else _certificates(view, security)
    sections = tuple(_section(view, table + _SECTION.size * index) for index in range(section_count))
    return Headers(start + _CHECKSUM, security, header_size, certificates, sections)


def sections(image: bytes | memoryview) -> Mapping[str, memoryview]:
    """The sections by name, each as it is in memory: VirtualSize bytes, zeros after the end of what the file holds.

    Raises:
        WireError: as parse; ``pe.section`` also if a name occurs twice, for then nobody can say which one is meant,
            or if the zeros would take more than limits.IMAGE_BYTES.
    """
    view = memoryview(image)
    table = parse(view).sections
    if sum(max(0, section.virtual_size - section.raw_size) for section in table) > limits.IMAGE_BYTES:
        raise WireError("pe.section", "the sections are too large in memory")
    found: dict[str, memoryview] = {}
    for section in table:
        if section.name in found:
            raise WireError("pe.section", f"two sections are named {section.name!r}")
        found[section.name] = _content(view, section)
    return found


def _unpack(view: memoryview, layout: struct.Struct, at: int) -> tuple[int, ...]:
    if at + layout.size > len(view):
        raise WireError("pe.truncated", f"image of {len(view)} bytes ends within its headers")
    return layout.unpack_from(view, at)


def _coff(view: memoryview) -> tuple[int, int, int]:
    """Offset of the optional header, number of sections, size of the optional header."""
    at = 0
    if bytes(view[:2]) == b"MZ":
        (at,) = _unpack(view, struct.Struct("<I"), 0x3C)
    signature, _, section_count, _, _, _, optional_size, _ = _unpack(view, _COFF, at)
    if signature != _PE:
        raise WireError("pe.signature", "not a PE/COFF image")
    return at + _COFF.size, section_count, optional_size


def _certificates(view: memoryview, security: int) -> int:
    offset, size = _unpack(view, struct.Struct("<II"), security)
    if size and offset + size > len(view):
        raise WireError("pe.certificates", "the certificate table lies beyond the end of the image")
    return size


def _section(view: memoryview, at: int) -> Section:
    raw_name, virtual_size, _, raw_size, raw_offset, *_ = _SECTION.unpack_from(view, at)
    name = raw_name.rstrip(b"\0").decode("latin-1")
    if raw_size and raw_offset + raw_size > len(view):
        raise WireError("pe.section", f"section {name!r} lies beyond the end of the image")
    return Section(name, virtual_size, raw_offset, raw_size)


def _content(view: memoryview, section: Section) -> memoryview:
    held = view[section.raw_offset : section.raw_offset + min(section.raw_size, section.virtual_size)]
    missing = section.virtual_size - len(held)
    return memoryview(bytes(held) + bytes(missing)) if missing else held
