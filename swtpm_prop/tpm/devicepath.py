"""EFI device paths as the text that firmware shells and boot managers show (UEFI specification 2.10, 10.6)."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable

NODES = 64
"""Most nodes turned to text; real paths have fewer than 10."""

_END = 0x7F
_PCI_ROOTS = (0x0A0341D0, 0x0A0841D0)
_PARTITION_TABLES = {1: "MBR", 2: "GPT"}


def text(path: bytes) -> str:
    """The path as text: ``PciRoot(0x0)/Pci(0x1f,0x2)/HD(1,GPT,...)/\\EFI\\BOOT\\BOOTX64.EFI``.

    Never fails: unknown nodes become ``Path(type,subtype,hex)``, and a path that breaks off ends in ``...``.
    """
    parts: list[str] = []
    at = 0
    while len(parts) < NODES and len(path) - at >= 4:
        kind, subkind, length = struct.unpack_from("<BBH", path, at)
        if kind == _END and subkind == 0xFF:
            return "/".join(parts)
        if length < 4 or at + length > len(path):
            break
        parts.append(_node(kind, subkind, path[at + 4 : at + length]))
        at += length
    return "/".join([*parts, "..."]) if path else ""


def guid(data: bytes) -> str:
    """An EFI_GUID (16 bytes, first three fields little-endian) in its usual writing."""
    return str(uuid.UUID(bytes_le=bytes(data)))


def _node(kind: int, subkind: int, data: bytes) -> str:
    reader = _READERS.get((kind, subkind))
    if reader is not None:
        try:
            return reader(data)
        except (struct.error, ValueError, IndexError):
            pass
    return f"Path({kind},{subkind},{data[:64].hex()})"


def _pci(data: bytes) -> str:
    function, device = struct.unpack("<BB", data)
    return f"Pci(0x{device:x},0x{function:x})"


def _acpi(data: bytes) -> str:
    hid, uid = struct.unpack("<II", data)
    if hid in _PCI_ROOTS:
        return f"PciRoot(0x{uid:x})"
    return f"Acpi(PNP{hid >> 16:04X},0x{uid:x})" if hid & 0xFFFF == 0x41D0 else f"Acpi(0x{hid:08x},0x{uid:x})"


def _hard_drive(data: bytes) -> str:
    number, start, size, signature, table, signature_type = struct.unpack("<IQQ16sBB", data)
    mark = guid(signature) if signature_type == 2 else f"0x{int.from_bytes(signature[:4], 'little'):08x}"
    return f"HD({number},{_PARTITION_TABLES.get(table, table)},{mark},0x{start:x},0x{size:x})"


def _cd_rom(data: bytes) -> str:
    return "CDROM(0x{:x},0x{:x},0x{:x})".format(*struct.unpack("<IQQ", data))


def _numbers(name: str, layout: str) -> Callable[[bytes], str]:
    def read(data: bytes) -> str:
        return f"{name}({','.join(f'0x{number:x}' for number in struct.unpack(layout, data))})"

    return read


def _guid(name: str, skip: int = 0) -> Callable[[bytes], str]:
    return lambda data: f"{name}({guid(data[skip : skip + 16])})"


def _mac(data: bytes) -> str:
    address, interface = struct.unpack("<32sB", data)
    return f"MAC({address[:6].hex()},0x{interface:x})"


def _nvme(data: bytes) -> str:
    namespace, eui = struct.unpack("<I8s", data)
    return f"NVMe(0x{namespace:x},{eui[::-1].hex('-')})"


def _file(data: bytes) -> str:
    return data.decode("utf-16-le").split("\0")[0]


_READERS: dict[tuple[int, int], Callable[[bytes], str]] = {
    (1, 1): _pci,
    (1, 3): _numbers("MemoryMapped", "<IQQ"),
    (1, 4): _guid("VenHw"),
    (1, 5): _numbers("Ctrl", "<I"),
    (2, 1): _acpi,
    (3, 1): _numbers("Ata", "<BBH"),
    (3, 2): _numbers("Scsi", "<HH"),
    (3, 5): _numbers("USB", "<BB"),
    (3, 10): _guid("VenMsg"),
    (3, 11): _mac,
    (3, 18): _numbers("Sata", "<HHH"),
    (3, 23): _nvme,
    (3, 24): lambda data: f"Uri({data.decode('ascii')})",
    (4, 1): _hard_drive,
    (4, 2): _cd_rom,
    (4, 3): _guid("VenMedia"),
    (4, 4): _file,
    (4, 6): _guid("FvFile"),
    (4, 7): _guid("Fv"),
    (4, 8): _numbers("Offset", "<IQQ"),
}
