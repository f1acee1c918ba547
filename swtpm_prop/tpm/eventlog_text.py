"""What an event log record says, in words for people: the name of its type and what its data describe.

The data of a record are not what was measured (the digest is): treat the text as a claim of the guest's firmware.
Layouts are those of the TCG PC Client Platform Firmware Profile 1.06, section 10; integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from swtpm_prop.errors import printable
from swtpm_prop.tpm import devicepath
from swtpm_prop.tpm.eventlog import EV_NO_ACTION, SPEC_ID, STARTUP_LOCALITY, Event

TYPES = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x02: "EV_UNUSED",
    EV_NO_ACTION: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x13: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}

_LOAD_IMAGE = struct.Struct("<QQQQ")
_VARIABLE = struct.Struct("<16sQQ")
_GPT_HEADER_BYTES = 92
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")


def type_name(event: Event) -> str:
    """``EV_...`` as the specification writes it, or the number of an unknown type in hexadecimal."""
    return TYPES.get(event.type, f"0x{event.type:08x}")


def describe(event: Event) -> str:
    """One printable line. Text is in it to its end: what somebody certifies may say the worst last.

    Data that do not fit their type are shown as bytes, and of those the first; the digest names them all.
    """
    reader = _READERS.get(event.type, _plain)
    try:
        words = reader(event.data)
    except (struct.error, ValueError, IndexError):
        words = _plain(event.data)
    return printable(words.strip())


def _plain(data: bytes) -> str:
    """Text if it reads as UTF-8 or UTF-16 (with or without a final NUL), else hexadecimal digits."""
    for encoding in ("utf-8", "utf-16-le"):
        try:
            text = data.decode(encoding).removesuffix("\0")
        except ValueError:
            continue
        if _is_text(text):
            return text
    return data.hex() if len(data) <= 32 else f"{data[:32].hex()}... ({len(data)} bytes)"


def _is_text(text: str) -> bool:
    """No NUL, and mostly printable ASCII: binary data read as UTF-16 are mostly Chinese.

    The rest may be anything; one control character must not turn a whole command line into digits.
    """
    plain = sum(character.isascii() and character.isprintable() for character in text)
    return "\0" not in text and 2 * plain > len(text)


def _no_action(data: bytes) -> str:
    if data.startswith(STARTUP_LOCALITY):
        return f"startup locality {data[len(STARTUP_LOCALITY)]}"
    return "Spec ID Event03" if data.startswith(SPEC_ID) else _plain(data.split(b"\0")[0])


def _separator(data: bytes) -> str:
    return f"error {data.hex()}" if data == b"\1\0\0\0" else data[:32].hex()


def _tag(data: bytes) -> str:
    """TCG_PCClientTaggedEvent: id, size, data."""
    identifier, size = struct.unpack_from("<II", data)
    if size != len(data) - 8:
        raise ValueError("tagged event of another size")
    return f"{_plain(data[8:])} (tag 0x{identifier:08x})"


def _load_image(data: bytes) -> str:
    """UEFI_IMAGE_LOAD_EVENT: address, length, link-time address, length of the device path, device path."""
    _, _, _, length = _LOAD_IMAGE.unpack_from(data)
    path = data[_LOAD_IMAGE.size :]
    if length != len(path):
        raise ValueError("device path of another size")
    return devicepath.text(path) or "image without a path"


def _variable(data: bytes) -> str:
    """UEFI_VARIABLE_DATA: GUID, characters of the name, bytes of the value, name in UTF-16, value."""
    vendor, characters, size = _VARIABLE.unpack_from(data)
    end = _VARIABLE.size + 2 * characters
    if end + size != len(data):
        raise ValueError("variable of another size")
    name = data[_VARIABLE.size : end].decode("utf-16-le")
    return f"variable {name} ({devicepath.guid(vendor)}) = {_value(name, data[end:])}"


def _value(name: str, value: bytes) -> str:
    if name == "BootOrder":
        return ",".join(f"{number:04X}" for (number,) in struct.iter_unpack("<H", value))
    if name.startswith("Boot") and len(name) == 8 and len(value) > 6:
        return _load_option(value)
    return _plain(value) if len(value) > 1 else value.hex() or "empty"


def _load_option(value: bytes) -> str:
    """EFI_LOAD_OPTION: attributes, bytes of the path list, description in UTF-16 with NUL, paths, optional data."""
    (size,) = struct.unpack_from("<H", value, 4)
    words = value[6:]
    end = next((at for at in range(0, len(words), 2) if words[at : at + 2] == b"\0\0"), len(words))
    return f"{words[:end].decode('utf-16-le')!r} {devicepath.text(words[end + 2 : end + 2 + size])}"


def _gpt(data: bytes) -> str:
    """UEFI_GPT_DATA: the partition table header, the number of entries in use, those entries."""
    if data[:8] != b"EFI PART":
        raise ValueError("no partition table")
    (count,) = struct.unpack_from("<Q", data, _GPT_HEADER_BYTES)
    entries = data[_GPT_HEADER_BYTES + 8 :]
    if not 0 < count <= len(entries) // _GPT_ENTRY.size:
        raise ValueError("partitions of another number")
    names = ", ".join(_partition(entries[at * _GPT_ENTRY.size :]) for at in range(count))
    return f"GPT {devicepath.guid(data[56:72])}: {names}"


def _partition(entry: bytes) -> str:
    _, unique, _, _, _, name = _GPT_ENTRY.unpack_from(entry)
    return f"{name.decode('utf-16-le').split(chr(0))[0]!r} {devicepath.guid(unique)}"


def _blob(data: bytes) -> str:
    base, length = struct.unpack("<QQ", data)
    return f"firmware of {length} bytes at 0x{base:x}"


def _named_blob(data: bytes) -> str:
    """UEFI_PLATFORM_FIRMWARE_BLOB2: length of the name, name, base, length."""
    end = 1 + data[0]
    return f"{_plain(data[1:end])}: {_blob(data[end:])}"


def _tables(data: bytes) -> str:
    """UEFI_HANDOFF_TABLE_POINTERS: number of tables, then GUID and address of each."""
    (count,) = struct.unpack_from("<Q", data)
    if len(data) != 8 + 24 * count:
        raise ValueError("tables of another number")
    return "tables " + ", ".join(devicepath.guid(data[at : at + 16]) for at in range(8, len(data), 24))


def _named_tables(data: bytes) -> str:
    end = 1 + data[0]
    return f"{_plain(data[1:end])}: {_tables(data[end:])}"


def _post_code(data: bytes) -> str:
    """EV_POST_CODE holds either text or, for code, the address and length of a blob."""
    words = _plain(data)
    return _blob(data) if len(data) == 16 and words == data.hex() else words


_READERS: dict[int, Callable[[bytes], str]] = {
    0x01: _post_code,
    EV_NO_ACTION: _no_action,
    0x04: _separator,
    0x06: _tag,
    0x13: _named_blob,
    0x80000001: _variable,
    0x80000002: _variable,
    0x80000003: _load_image,
    0x80000004: _load_image,
    0x80000005: _load_image,
    0x80000006: _gpt,
    0x80000008: _blob,
    0x80000009: _tables,
    0x8000000A: _named_blob,
    0x8000000B: _named_tables,
    0x8000000C: _variable,
    0x8000000D: _gpt,
    0x800000E0: _variable,
}
