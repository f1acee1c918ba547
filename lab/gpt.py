"""A partition table for one EFI system partition (UEFI specification 2.10, section 5.3), the same bytes every time."""

from __future__ import annotations

import struct
import uuid
import zlib

SECTOR = 512
FIRST = 2048  # the partition's first sector: 1 MiB in, as installers do
ENTRIES, ENTRY = 128, 128  # count and bytes of partition entries
TABLE = ENTRIES * ENTRY // SECTOR  # sectors
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
DISK = uuid.uuid5(ESP, "disk")
PARTITION = uuid.uuid5(ESP, "partition")


def last(sectors: int) -> int:
    """The partition's last sector on a disk of this many sectors; the second table follows it."""
    return sectors - TABLE - 2


def tables(sectors: int) -> tuple[bytes, bytes]:
    """What stands at the start of the disk (protective MBR, header, entries), and at its end (entries, header)."""
    entry = ESP.bytes_le + PARTITION.bytes_le + struct.pack("<QQQ", FIRST, last(sectors), 0) + "ESP".encode("utf-16-le")
    entries = entry.ljust(ENTRIES * ENTRY, b"\0")
    front = _mbr(sectors) + _header(1, sectors - 1, 2, sectors, entries) + entries
    return front, entries + _header(sectors - 1, 1, sectors - 1 - TABLE, sectors, entries)


def _mbr(sectors: int) -> bytes:
    partition = bytes([0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF]) + struct.pack("<II", 1, sectors - 1)
    return bytes(446) + partition + bytes(48) + b"\x55\xaa"


def _header(own: int, other: int, table: int, sectors: int, entries: bytes) -> bytes:
    def pack(checksum: int) -> bytes:
        places = struct.pack("<QQQQ", own, other, 2 + TABLE, last(sectors))
        start = b"EFI PART" + struct.pack("<IIII", 0x10000, 92, checksum, 0)
        return start + places + DISK.bytes_le + struct.pack("<QIII", table, ENTRIES, ENTRY, zlib.crc32(entries))

    return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")
