"""Event logs of real guests against tpm2_eventlog and the PCRs those guests had; damaged logs against the parser."""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
from pathlib import Path

import pytest

from swtpm_prop import limits
from swtpm_prop.errors import WireError
from swtpm_prop.tpm import devicepath, eventlog
from swtpm_prop.tpm.algorithms import ALGORITHMS, BY_NAME, SHA1, SHA256, SHA384, Digest, HashAlgorithm
from swtpm_prop.tpm.eventlog import Event
from swtpm_prop.tpm.eventlog_text import describe, type_name

DATA = Path(__file__).parent.parent / "data"
LOGS = sorted(DATA.glob("*.eventlog"))
AGILE = [path for path in LOGS if path.stem != "seabios-sha1"]

names = pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)


def oracle(path: Path) -> str:
    return subprocess.run(["tpm2_eventlog", path], check=True, capture_output=True, text=True).stdout


def header(*algorithms: tuple[int, int], tail: bytes = b"\0", count: int | None = None) -> bytes:
    listed = b"".join(struct.pack("<HH", *algorithm) for algorithm in algorithms)
    number = len(algorithms) if count is None else count
    data = eventlog.SPEC_ID + bytes(8) + struct.pack("<I", number) + listed + tail
    return struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data


def record(pcr: int, kind: int, digests: list[tuple[int, bytes]], data: bytes = b"") -> bytes:
    listed = b"".join(struct.pack("<H", identifier) + value for identifier, value in digests)
    return struct.pack("<III", pcr, kind, len(digests)) + listed + struct.pack("<I", len(data)) + data


ONE = header((SHA256.id, 32))
MEASURED = record(4, 0xD, [(SHA256.id, b"\x11" * 32)], b"x")


@names
def test_events_equal_those_of_tpm2_eventlog(path: Path) -> None:
    said = oracle(path).split("pcrs:")[0]
    log = eventlog.parse(path.read_bytes())
    assert [type_name(event) for event in log.events] == re.findall(r"EventType: (\S+)", said)
    assert [str(event.pcr) for event in log.events] == re.findall(r"PCRIndex: (\d+)", said)
    assert [str(len(event.data)) for event in log.events] == re.findall(r"EventSize: (\d+)", said)
    digests = [digest.value.hex() for event in log.events for digest in event.digests]
    assert digests == re.findall(r'Digest: "([0-9a-f]+)"', said)


@names
def test_replay_equals_the_pcrs_of_the_guest_and_of_tpm2_eventlog(path: Path) -> None:
    log = eventlog.parse(path.read_bytes())
    guest = {(a, int(p)): v for a, p, v in map(str.split, path.with_suffix(".pcrs").read_text().splitlines())}
    said, bank = {}, ""
    for line in oracle(path).split("pcrs:")[1].splitlines():
        if match := re.fullmatch(r"    (\d+) *: 0x([0-9a-f]+)", line):
            said[bank, int(match[1])] = match[2]
        else:
            bank = line.strip().rstrip(":")
    ours = {(a.name, pcr): value.hex() for a in log.algorithms for pcr, value in eventlog.replay(log, a).items()}
    assert ours == said
    assert ours.items() <= guest.items()
    untouched = {key: value for key, value in guest.items() if key not in ours}
    assert {key for key, value in untouched.items() if set(value) != {"0"}} == set()


def test_the_formats_announce_their_algorithms() -> None:
    found = {path.stem: eventlog.parse(path.read_bytes()).algorithms for path in LOGS}
    assert found["seabios-sha1"] == (SHA1,)
    assert {found[path.stem] for path in AGILE} == {ALGORITHMS}


def test_startup_locality_starts_pcr_0() -> None:
    note = record(0, 3, [(SHA256.id, bytes(32))], eventlog.STARTUP_LOCALITY + b"\3")
    log = eventlog.parse(ONE + note + record(0, 4, [(SHA256.id, b"\x22" * 32)]))
    assert log.startup_locality == 3
    assert eventlog.replay(log, SHA256)[0] == hashlib.sha256(bytes(31) + b"\3" + b"\x22" * 32).digest()


def test_dynamic_launch_pcrs_start_at_all_ones() -> None:
    log = eventlog.parse(ONE + record(17, 4, [(SHA256.id, b"\x22" * 32)]) + record(23, 4, [(SHA256.id, b"\x22" * 32)]))
    assert eventlog.replay(log, SHA256) == {
        17: hashlib.sha256(b"\xff" * 32 + b"\x22" * 32).digest(),
        23: hashlib.sha256(bytes(32) + b"\x22" * 32).digest(),
    }


def test_an_informational_record_may_name_any_pcr() -> None:
    log = eventlog.parse(ONE + record(0xFFFFFFFF, 3, [(SHA256.id, bytes(32))]))
    assert log.events[1].pcr == 0xFFFFFFFF
    assert eventlog.replay(log, SHA256) == {}


def test_an_algorithm_not_known_here_is_kept_but_not_replayed() -> None:
    sm3 = HashAlgorithm(0x12, "0x0012", 32, b"\x00\x12")
    log = eventlog.parse(header((0x12, 32), (SHA256.id, 32)) + record(7, 4, [(0x12, b"\1" * 32)]))
    assert log.events[1].digests == (Digest(sm3, b"\1" * 32),)
    for algorithm in (sm3, SHA256, SHA384):
        with pytest.raises(WireError) as caught:
            eventlog.replay(log, algorithm)
        assert caught.value.id == "eventlog.algorithm"


@pytest.mark.parametrize(
    ("data", "id"),
    [
        (b"", "eventlog.truncated"),
        (ONE[:-1], "eventlog.truncated"),
        (ONE + MEASURED[:-1], "eventlog.truncated"),
        (ONE + MEASURED + b"\0", "eventlog.truncated"),
        (ONE + MEASURED[:40], "eventlog.truncated"),
        (ONE + struct.pack("<III", 4, 13, 0xFFFFFFFF), "eventlog.digests"),
        (ONE + record(4, 13, []), "eventlog.digests"),
        (ONE + record(4, 13, [(SHA384.id, bytes(48))]), "eventlog.digests"),
        (header((11, 32), (12, 48)) + record(4, 13, [(11, bytes(32)), (11, bytes(32))]), "eventlog.digests"),
        (ONE + record(24, 13, [(SHA256.id, bytes(32))]), "eventlog.pcr"),
        (header((SHA256.id, 20)), "eventlog.header"),
        (header((SHA256.id, 32), (SHA256.id, 32)), "eventlog.header"),
        (header((0x77, 0)), "eventlog.header"),
        (header(), "eventlog.header"),
        (header((SHA256.id, 32), tail=b"\0more"), "eventlog.header"),
        (header((SHA256.id, 32), tail=b"\4mo"), "eventlog.truncated"),
        (header((SHA256.id, 32), count=0xFFFFFFFF), "eventlog.truncated"),
        (ONE + record(0, 3, [(11, bytes(32))], eventlog.STARTUP_LOCALITY), "eventlog.locality"),
        (ONE + record(0, 3, [(11, bytes(32))], eventlog.STARTUP_LOCALITY + b"\1"), "eventlog.locality"),
        (ONE + 2 * record(0, 3, [(11, bytes(32))], eventlog.STARTUP_LOCALITY + b"\0"), "eventlog.locality"),
        (bytes(limits.EVENT_LOG_BYTES + 1), "eventlog.too-big"),
        (ONE + record(4, 13, [(11, bytes(32))]) * limits.EVENTS, "eventlog.too-big"),
    ],
)
def test_damage_is_refused(data: bytes, id: str) -> None:
    with pytest.raises(WireError) as caught:
        eventlog.parse(data)
    assert caught.value.id == id


def said(path: str, pcr: int) -> list[str]:
    log = eventlog.parse((DATA / f"{path}.eventlog").read_bytes())
    return [describe(event) for event in log.events if event.pcr == pcr]


def test_descriptions_of_a_real_boot() -> None:
    disk = r"PciRoot(0x0)/Pci(0x2,0x0)/HD(1,GPT,11111111-2222-3333-4444-555555555555,0x800,0x1f7de)"
    assert rf"{disk}/\EFI\BOOT\BOOTX64.EFI" in said("ovmf-uki", 4)
    assert rf"{disk}/\EFI\Linux\uki.efi" in said("ovmf-systemd-boot", 4)
    assert said("ovmf-uki", 0)[:3] == ["Spec ID Event03", "0000", "firmware of 917504 bytes at 0x820000"]
    assert "variable SecureBoot (8be4df61-93ca-11d2-aa0d-00e098032b8c) = 00" in said("ovmf-uki", 7)
    boot = said("ovmf-uki", 1)
    assert boot[0] == "variable BootOrder (8be4df61-93ca-11d2-aa0d-00e098032b8c) = 0000,0001,0002,0003"
    assert boot[2].endswith("= 'UEFI QEMU DVD-ROM QM00005 ' PciRoot(0x0)/Pci(0x1f,0x2)/Sata(0x2,0xffff,0x0)")
    assert said("ovmf-uki", 5)[1].startswith("GPT aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee: 'ESP' 11111111-")
    assert said("ovmf-uki", 11)[::2] == [".linux", ".osrel", ".cmdline", ".initrd"]
    assert said("ovmf-systemd-boot", 12) == ["console=ttyS0 quiet sd"] * 2
    assert said("ovmf-direct", 9) == ["LOADED_IMAGE::LoadOptions (tag 0x8f3b22ed)", "Linux initrd (tag 0x8f3b22ec)"]
    assert said("ovmf-direct", 4)[0] == "VenMedia(1428f772-b64a-441e-b8c3-9ebdd7f893c7)/kernel"
    assert said("seabios", 4) == ["Calling INT 19h", "ffffffff"]


VARIABLE = struct.pack("<16sQQ", bytes(16), 2, 1) + "db".encode("utf-16-le")


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (0x80000001, VARIABLE + b"\1", "variable db (00000000-0000-0000-0000-000000000000) = 01"),
        (0x80000001, VARIABLE, VARIABLE[:32].hex() + "... (36 bytes)"),
        (0x80000001, struct.pack("<16sQQ", bytes(16), 2**63, 2**63), "00" * 16 + "00000000000000800000000000000080"),
        (0x80000003, struct.pack("<QQQQ", 0, 0, 0, 4) + b"\x7f\xff\4\0", "image without a path"),
        (0x80000003, struct.pack("<QQQQ", 0, 0, 0, 4) + b"\4\4\4\0", "/..."),
        (0x80000006, b"EFI PART" + bytes(92), (b"EFI PART" + bytes(24)).hex() + "... (100 bytes)"),
        (0x8000000A, b"\4VOL0" + struct.pack("<QQ", 16, 32), "VOL0: firmware of 32 bytes at 0x10"),
        (0x80000009, struct.pack("<Q", 0), "tables"),
        (0x04, b"\1\0\0\0", "error 01000000"),
        (0x06, struct.pack("<II", 1, 5) + b"four", "0100000005000000666f7572"),
        (0x0D, b"grub_cmd: echo \x1b[2J", r"grub_cmd: echo \x1b[2J"),
        (0x0D, "root=LABEL=tür quiet\t".encode(), "root=LABEL=tür quiet"),
        (0x0D, "dïe da\u202e\n".encode("utf-16-le"), r"dïe da\u202e"),
        (0x0D, "\u4e00\u4e01a".encode("utf-16-le"), "004e014e6100"),
        (0x0D, b"\x1b[", "1b5b"),
        (0x0D, b"text\0hidden", "746578740068696464656e"),
        (0x0D, b"x" * 5000 + b" init=/bin/sh", "x" * 5000 + " init=/bin/sh"),
        (0x0D, b"", ""),
        (0x03, eventlog.STARTUP_LOCALITY, "StartupLocality"),
        (0x12345678, b"text\0", "text"),
    ],
)
def test_descriptions_of_other_data(kind: int, data: bytes, words: str) -> None:
    assert describe(Event(1, 0, kind, (), data)) == words


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", ""),
        ("0101 0000 0101 0000", "..."),
        ("0101 06", "..."),
        ("0101 0600 00", "..."),
        ("0101 0600 021f 7fff 0400", "Pci(0x1f,0x2)"),
        ("0101 0500 02 7fff 0400", "Path(1,1,02)"),
        ("030b 2500 525400123456" + "00" * 26 + "01 7fff 0400", "MAC(525400123456,0x1)"),
        ("0317 1000 01000000 0102030405060708 7fff 0400", "NVMe(0x1,08-07-06-05-04-03-02-01)"),
        (
            "0401 2a00 02000000 0008000000000000 0010000000000000 78563412" + "00" * 12 + "0101 7fff 0400",
            "HD(2,MBR,0x12345678,0x800,0x1000)",
        ),
        (
            "0201 0c00 d041 0105 03000000 7f01 0400 0318 0900 6874747073 7fff 0400",
            "Acpi(PNP0501,0x3)/Path(127,1,)/Uri(https)",
        ),
    ],
)
def test_device_paths(path: str, words: str) -> None:
    assert devicepath.text(bytes.fromhex(path)) == words


def test_type_names() -> None:
    assert type_name(Event(1, 0, 0x800000E0, (), b"")) == "EV_EFI_VARIABLE_AUTHORITY"
    assert type_name(Event(1, 0, 0x12345678, (), b"")) == "0x12345678"
    assert BY_NAME["sha256"] is SHA256
