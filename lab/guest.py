"""What runs in a laboratory guest: a Debian kernel, busybox and Debian's tpm2-tools in an initramfs."""

from __future__ import annotations

import gzip
import lzma
import re
import tempfile
from pathlib import Path

from lab import cpio
from lab.cache import artefact
from lab.debian import cloud_kernels, kernel, package
from lab.process import LabError, run

CMDLINE = "console=ttyS0 quiet panic=-1"
MODULES = ("efivarfs",)  # the TPM drivers and IMA are built in
INIT = Path(__file__).with_name("guest-init.sh")
TPM2 = Path("/usr/bin/tpm2")
TCTI = Path("/usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0")


def kernels(count: int, series: str = "") -> list[str]:
    """The newest ``count`` cloud kernel packages (of a series, ``6.1``) the archive really hands out, oldest first."""
    found: list[str] = []
    for name in reversed(cloud_kernels()):
        if len(found) == count:
            break
        if series and not name.startswith(f"linux-image-{series}."):
            continue
        try:
            package(name)
        except RuntimeError:
            continue  # listed, but no longer in the pool
        found.append(name)
    if len(found) < count:
        raise LabError(f"the archive has {len(found)} cloud kernels, {count} are needed")
    return found[::-1]


def initramfs(kernel_package: str, programs: tuple[Path, ...] = ()) -> Path:
    """The initramfs for a kernel package: the same for every kernel but for its modules.

    ``programs`` are further files of this machine, there at their own paths, with the libraries they are linked to.
    """
    release = kernel(kernel_package).name.removeprefix("vmlinuz-")
    ingredients: list[Path | str] = [INIT, TPM2, TCTI, Path(__file__), Path(cpio.__file__), release]
    ingredients += [text for program in programs for text in (program, str(program))]

    def build(path: Path) -> None:
        path.write_bytes(gzip.compress(cpio.archive(_linked(programs) | _entries(kernel_package)), 6, mtime=0))

    return artefact(f"{release}.initramfs", ingredients, build)


def _entries(kernel_package: str) -> dict[str, cpio.Entry]:
    busybox = package("busybox-static") / "bin/busybox"
    entries = {
        "init": cpio.program(INIT.read_bytes()),
        "bin/busybox": cpio.program(busybox.read_bytes()),
        "bin/tpm2": cpio.program(TPM2.read_bytes()),
    }
    entries |= {f"bin/{tool.name}": cpio.link("tpm2") for tool in TPM2.parent.glob("tpm2_*")}
    entries |= {name: cpio.directory() for name in ("proc", "sys", "dev", "run", "tmp")}
    entries |= {str(path).lstrip("/"): cpio.program(path.read_bytes()) for path in _libraries()}
    entries |= {f"lib/modules/{name}.ko": cpio.file(_module(kernel_package, name)) for name in MODULES}
    curl = next(path for path in entries if "/libcurl" in path)
    entries[curl] = cpio.program(hollow_curl(Path(curl).name))
    return entries


def _linked(programs: tuple[Path, ...]) -> dict[str, cpio.Entry]:
    """The files and everything the dynamic linker loads for them."""
    found = set(programs)
    if programs:
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", run(["ldd", *programs]).stdout)}
    return {str(path).lstrip("/"): cpio.program(path.read_bytes()) for path in found}


def _libraries() -> set[Path]:
    """What the dynamic linker loads for tpm2 and its TPM device, without what only libcurl wants (20 MB)."""
    found = {TCTI}
    for line in run(["ldd", TPM2, TCTI]).stdout.splitlines():
        if match := re.search(r"(/\S*(?:ld-linux-x86-64|/lib(?:tss2-[a-z]+|crypto|c|curl-gnutls))\.so\S*) \(", line):
            found.add(Path(match[1]))
    return found


def hollow_curl(soname: str) -> bytes:
    """A libcurl with the functions tpm2 links against and nothing in them: guests fetch no certificates."""
    symbols = re.findall(r" U (curl_\w+)@(\w+)", run(["nm", "-D", TPM2]).stdout)
    (version,) = {version for _, version in symbols}
    with tempfile.TemporaryDirectory() as scratch:
        source, script, library = (Path(scratch) / name for name in ("curl.c", "curl.map", soname))
        source.write_text("".join(f"void {name}(void) {{}}\n" for name, _ in symbols))
        script.write_text(f"{version} {{ curl_*; }};\n")
        options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script,{script}"]
        run(["cc", *options, "-o", library, source])
        return library.read_bytes()


def _module(kernel_package: str, name: str) -> bytes:
    """A module of the kernel, uncompressed."""
    for path in (package(kernel_package) / "lib/modules").rglob(f"{name}.ko*"):
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    raise LabError(f"{kernel_package} has no module {name}")
