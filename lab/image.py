"""Unified kernel images and the disks they boot from."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from lab import gpt, guest
from lab.cache import artefact
from lab.debian import kernel, package
from lab.process import LabError, run

STUB = "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
BOOT = "::/EFI/BOOT/BOOTX64.EFI"
SIZE = 64 * 1024 * 1024  # bytes of a disk: a unified kernel image is about 19 MiB
ALIGNMENT = 4096  # bytes; the stub's section alignment


def unified_kernel(kernel_package: str, programs: tuple[Path, ...] = ()) -> Path:
    """A unified kernel image (systemd-stub(7)) of a Debian kernel with the laboratory's initramfs (see there)."""
    stub = package("systemd-boot-efi") / STUB
    linux, initrd = kernel(kernel_package), guest.initramfs(kernel_package, programs)
    cmdline = guest.CMDLINE
    release = linux.name.removeprefix("vmlinuz-")
    system = f'ID=debian\nPRETTY_NAME="Debian, kernel {release}"\nVERSION_ID="{release}"\n'

    def build(path: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            texts = {".osrel": system, ".uname": release, ".cmdline": cmdline}
            sections = {name: Path(scratch) / name for name in texts}
            for name, text in texts.items():
                sections[name].write_text(text)
            _add_sections(stub, sections | {".linux": linux, ".initrd": initrd}, path)

    return artefact(f"{release}.efi", [stub, linux, initrd, system, cmdline, Path(__file__)], build)


def disk(efi: Path, path: Path) -> Path:
    """A disk at ``path`` (qcow2 by its suffix, else raw) whose firmware boots ``efi``; any user may write it."""
    empty = artefact("esp.raw", [Path(gpt.__file__), Path(__file__)], _empty)
    _rewrite(empty, path, efi)
    path.chmod(0o666)
    return path


def install_kernel(image: Path, efi: Path) -> None:
    """Replace what a disk made by ``disk`` boots; partition table and file system stay (PCR 5 does not move)."""
    _rewrite(image, image, efi)


def _rewrite(source: Path, target: Path, efi: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        raw = Path(scratch) / "raw"
        if source.suffix == ".qcow2":
            run(["qemu-img", "convert", "-O", "raw", source, raw])
        else:
            shutil.copyfile(source, raw)
        run(["mcopy", "-o", "-i", f"{raw}@@{gpt.FIRST * gpt.SECTOR}", efi, BOOT])
        if target.suffix == ".qcow2":
            cooked = Path(scratch) / "qcow2"
            run(["qemu-img", "convert", "-O", "qcow2", raw, cooked])
            raw = cooked
        # the file keeps its owner and its identity: libvirt and QEMU may know it already
        shutil.copyfile(raw, target)


def _empty(path: Path) -> None:
    sectors = SIZE // gpt.SECTOR
    front, back = gpt.tables(sectors)
    with path.open("wb") as image:
        image.write(front)
        image.truncate(SIZE - len(back))
        image.seek(SIZE - len(back))
        image.write(back)
    blocks = (gpt.last(sectors) - gpt.FIRST + 1) // 2
    run(["mkfs.vfat", "-F", "32", "-s", "1", "-i", "5A17B007", f"--offset={gpt.FIRST}", path, str(blocks)])
    run(["mmd", "-i", f"{path}@@{gpt.FIRST * gpt.SECTOR}", "::/EFI", "::/EFI/BOOT"])


def _add_sections(stub: Path, sections: dict[str, Path], image: Path) -> None:
    """Append sections to a PE image, each at the next free aligned address behind those it has."""
    headers = re.findall(r"^ +\d+ \S+ +([0-9a-f]+) +([0-9a-f]+)", run(["objdump", "-h", stub]).stdout, re.M)
    if not headers:
        raise LabError(f"{stub} has no sections")
    address = max(int(size, 16) + int(start, 16) for size, start in headers)
    words = []
    for name, content in sections.items():
        address += -address % ALIGNMENT
        words += ["--add-section", f"{name}={content}", "--change-section-vma", f"{name}={address:#x}"]
        address += content.stat().st_size
    run(["objcopy", *words, stub, image])
