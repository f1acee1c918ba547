"""Certificate subjects of real files, images and logs, against independent tools and against what guests measured."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lief
import pytest

from lab import debian
from swtpm_prop import limits
from swtpm_prop.errors import Error
from swtpm_prop.tpm import eventlog
from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.translate.verdict import covers
from swtpm_prop.trust import sources
from swtpm_prop.trust.measurements import LeftOut
from swtpm_prop.trust.sources import Subject

DATA = Path(__file__).parent.parent / "data"
OS_RELEASE = b"ID=debian\nVERSION_ID=12\nPRETTY_NAME=lab\nVERSION=12\n"
INITRD = b"not a real initrd, of odd size"
STUB_252 = (".linux", ".osrel", ".cmdline", ".initrd")
"""The sections below in the order in which systemd-stub 252 measures them."""


def kernel() -> Path:
    return debian.kernel(debian.cloud_kernels()[0])


def make_uki(directory: Path, command_line: bytes, linux: Path | None = None, **more: bytes) -> Path:
    """A unified kernel image as objcopy makes it from Debian's systemd-stub."""
    stub = debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
    parts = {"osrel": OS_RELEASE, "cmdline": command_line, "initrd": INITRD, **more}
    for name, content in parts.items():
        (directory / name).write_bytes(content)
    files = {**{name: directory / name for name in parts}, **({"linux": linux} if linux else {})}
    parsed = lief.PE.parse(str(stub))
    assert parsed is not None
    address = max(section.virtual_address + section.virtual_size for section in parsed.sections)
    command: list[str | Path] = ["objcopy"]
    for name, path in files.items():
        address = (address + 0xFFF) & ~0xFFF
        command += ["--add-section", f".{name}={path}", "--change-section-vma", f".{name}={address:#x}"]
        address += path.stat().st_size
    uki = directory / "test.efi"
    subprocess.run([*command, stub, uki], check=True)
    return uki


def authentihash(path: Path) -> bytes:
    parsed = lief.PE.parse(str(path))
    assert parsed is not None
    return bytes(parsed.authentihash(lief.PE.ALGORITHMS.SHA_256))


def by_name(subjects: list[Subject], image: Path) -> dict[str, Subject]:
    return {subject.name.removeprefix(f"{image} "): subject for subject in subjects}


def measured(log: str, pcr: int) -> list[dict[str, bytes]]:
    events = eventlog.parse((DATA / f"{log}.eventlog").read_bytes()).events
    return [{d.algorithm.name: d.value for d in event.digests} for event in events if event.pcr == pcr]


@pytest.fixture(scope="module")
def uki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_uki(tmp_path_factory.mktemp("uki"), b"console=ttyS0 quiet sd\n", kernel())


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "grub.cfg"
    path.write_bytes(os.urandom(3_000_001))
    (subject,) = sources.from_file(path)
    assert subject.name == str(path)
    for algorithm in STRONG:
        said = subprocess.run([f"{algorithm.name}sum", path], check=True, capture_output=True, text=True).stdout
        assert subject.digests[algorithm.name].hex() == said.split()[0]


def test_pe() -> None:
    (subject,) = sources.from_pe(kernel())
    assert subject.name == f"{kernel()} Authenticode"
    assert subject.digests["sha256"] == authentihash(kernel())
    assert sorted(subject.digests) == ["sha256", "sha384", "sha512"]


def test_uki_pcr_4_is_the_image_and_the_kernel_in_it(uki: Path) -> None:
    subjects = by_name(list(sources.from_uki(uki)), uki)
    assert subjects["Authenticode"].digests["sha256"] == authentihash(uki)
    assert subjects[".linux Authenticode"].digests["sha256"] == authentihash(kernel())


def test_uki_pcr_11_equals_systemd_measure(uki: Path) -> None:
    tool = debian.package("systemd") / "lib/systemd/systemd-measure"
    libraries = debian.package("libsystemd-shared") / "usr/lib/x86_64-linux-gnu/systemd"
    command: list[str | Path] = [tool, "calculate", "--phase=", f"--linux={kernel()}"]
    command += [f"--{name}={uki.parent / name}" for name in ("osrel", "cmdline", "initrd")]
    command += [f"--bank={algorithm.name}" for algorithm in STRONG]
    environment = {"LD_LIBRARY_PATH": str(libraries)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    subjects = by_name(list(sources.from_uki(uki)), uki)
    for algorithm in STRONG:
        value = bytes(algorithm.size)
        for section in STUB_252:
            for name in (f"section name {section}", f"section {section}"):
                value = hashlib.new(algorithm.name, value + subjects[name].digests[algorithm.name]).digest()
        assert f"11:{algorithm.name}={value.hex()}" in said


def test_uki_measurements_are_those_of_a_guest(uki: Path) -> None:
    """The guest of the log had another kernel and initrd, but this command line, os-release and stub."""
    subjects = by_name(list(sources.from_uki(uki)), uki)
    pcr_11 = measured("ovmf-systemd-boot", 11)
    names = [subjects[f"section name {section}"].digests for section in STUB_252]
    assert [covers(*pair) for pair in zip(names, pcr_11[::2], strict=True)] == [True] * 4
    assert covers(subjects["section .osrel"].digests, pcr_11[3])
    assert covers(subjects["section .cmdline"].digests, pcr_11[5])
    command_line = subjects["command line"].digests
    assert covers(command_line, measured("ovmf-systemd-boot", 9)[0])
    assert [covers(command_line, event) for event in measured("ovmf-systemd-boot", 12)] == [True, True]
    (boot_loader,) = sources.from_pe(
        debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
    )
    assert any(covers(boot_loader.digests, event) for event in measured("ovmf-systemd-boot", 4))


def test_command_line_is_what_the_stub_makes_of_it(tmp_path: Path) -> None:
    uki = make_uki(tmp_path, "  console=ttyS0 quiet\tü  tab \n\n".encode(), kernel())
    subjects = by_name(list(sources.from_uki(uki)), uki)
    assert covers(subjects["command line"].digests, measured("ovmf-uki", 9)[0])


def test_command_line_ends_at_its_first_nul(tmp_path: Path) -> None:
    uki = make_uki(tmp_path, b"quiet \0more", kernel())
    subjects = by_name(list(sources.from_uki(uki)), uki)
    assert subjects["command line"].digests["sha256"] == hashlib.sha256("quiet\0".encode("utf-16-le")).digest()


def test_uki_without_command_line_and_with_other_sections(tmp_path: Path) -> None:
    uki = make_uki(tmp_path, b"", kernel(), pcrsig=b"{}", uname=b"6.1", notes=b"ours")
    names = set(by_name(list(sources.from_uki(uki)), uki))
    assert {"section .uname", "section name .sbat", "section .sbat"} <= names
    assert not names & {"command line", "section .cmdline", "section .pcrsig", "section .notes", "section .text"}


@pytest.mark.parametrize("log", ["ovmf-uki", "ovmf-systemd-boot", "ovmf-direct", "seabios"])
def test_event_log_certifies_every_measurement_of_the_boot(log: str) -> None:
    data = (DATA / f"{log}.eventlog").read_bytes()
    subjects = list(sources.from_event_log(data, Counter()))
    events = [event for event in eventlog.parse(data).events if event.type != eventlog.EV_NO_ACTION]
    for event in events:
        guest = {digest.algorithm.name: digest.value for digest in event.digests}
        assert [covers(subject.digests, guest) for subject in subjects].count(True) == 1
    assert len({subject.digests["sha256"] for subject in subjects}) == len(subjects)
    assert {tuple(subject.digests) for subject in subjects} == {("sha256", "sha384", "sha512")}


def test_event_log_names() -> None:
    names = [subject.name for subject in sources.from_event_log((DATA / "ovmf-uki.eventlog").read_bytes(), Counter())]
    assert "EV_SEPARATOR 00000000 (PCR 0, 1, 2, 3, 4, 5, 6, 7)" in names
    assert "EV_IPL .initrd (PCR 9, 11)" in names
    assert not [name for name in names if "NO_ACTION" in name]


def agile_log(*events: dict[int, bytes]) -> bytes:
    sizes = {0x0B: 32, 0x0C: 48}
    spec = eventlog.SPEC_ID + bytes(8) + struct.pack("<I", 2) + struct.pack("<HHHHB", 0x0B, 32, 0x0C, 48, 0)
    log = struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec
    for event in events:
        digests = b"".join(struct.pack("<H", a) + value.ljust(sizes[a], b"\0") for a, value in event.items())
        log += struct.pack("<III", 9, 0x0D, len(event)) + digests + struct.pack("<I", 0)
    return log


def test_padded_digests_do_not_count() -> None:
    sha1, sha256 = hashlib.sha1(b"x").digest(), hashlib.sha256(b"x").digest()
    log = agile_log(
        {0x0B: sha256, 0x0C: sha1},
        {0x0B: hashlib.sha256(b"y").digest(), 0x0C: sha256},
        {0x0B: sha1},
        {0x0B: b"\xff" * 32},
    )
    left_out: LeftOut = Counter()
    digests = [subject.digests for subject in sources.from_event_log(log, left_out)]
    assert digests == [{"sha256": sha256}, {"sha256": hashlib.sha256(b"y").digest()}]
    assert left_out == {"padded": 1, "violation": 1}


def failing(run: Callable[[], object]) -> Error:
    with pytest.raises(Error) as caught:
        run()
    return caught.value


def test_log_without_strong_digests() -> None:
    sha1 = (DATA / "seabios-sha1.eventlog").read_bytes()
    assert failing(lambda: list(sources.from_event_log(sha1, Counter()))).id == "source.weak-log"
    padded = agile_log({0x0B: hashlib.sha1(b"x").digest()})
    assert failing(lambda: list(sources.from_event_log(padded, Counter()))).id == "source.weak-log"
    assert list(sources.from_event_log(agile_log(), Counter())) == []


SOURCES = [sources.from_file, sources.from_pe, sources.from_uki]


@pytest.mark.parametrize("source", SOURCES)
def test_unreadable(source: Callable[[Path], object], tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        error = failing(lambda path=path: list(source(path)))  # type: ignore[misc,call-overload]
        assert error.id == "source.unreadable"
        assert str(path) in error.what


def test_errors_name_the_file(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no image")
    stub = debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
    for source, path, id in (
        (sources.from_pe, text, "pe.truncated"),
        (sources.from_uki, text, "pe.truncated"),
        (sources.from_uki, stub, "source.not-uki"),
        (sources.from_uki, make_uki(tmp_path, b"\xff", kernel()), "source.command-line"),
    ):
        error = failing(lambda source=source, path=path: list(source(path)))  # type: ignore[misc]
        assert error.id == id
        assert error.what.startswith(f"{path}: ")


def test_image_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(2048))
    monkeypatch.setattr(limits, "IMAGE_BYTES", 2047)
    assert failing(lambda: list(sources.from_pe(path))).id == "source.too-big"


def test_hostile_file_names_cannot_act(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\x1b[2J\xff\n"))
    path.write_bytes(b"x")
    (subject,) = sources.from_file(path)
    assert subject.name == f"{tmp_path}/\\x1b[2J\\udcff\\n"
    assert str(failing(lambda: list(sources.from_pe(path)))).isprintable()
