"""A small Debian userland in an initramfs: files of packages as they are, and beside them a tree of what none has."""

from __future__ import annotations

import gzip
import re
import stat
from pathlib import Path

from lab import cpio, guest
from lab.debian import archive, package
from lab.process import run

PACKAGES = (
    *("busybox-static", "tpm2-tools", "libc6", "libssl3", "libtss2-esys-3.0.2-0", "libtss2-mu0", "libtss2-rc0"),
    *("libtss2-sys1", "libtss2-tcti-device0", "libtss2-tctildr0"),
)
TAKEN = re.compile(r"usr/(bin/(busybox|tpm2\w*)|lib64/ld-[^/]+|lib/x86_64-linux-gnu/(ld-[^/]+|lib[^/]+\.so[^/]*))")
CURL = "usr/lib/x86_64-linux-gnu/libcurl-gnutls.so.4"
INIT = """#!/bin/sh
# Commands and their output are new in every boot: they belong on a tmpfs, which ima_policy=tcb leaves out.
/bin/busybox mount -t tmpfs run /run
/bin/busybox mount -t tmpfs tmp /tmp
exec /bin/busybox sh /laboratory
"""


def archives() -> list[Path]:
    """The .deb files that the userland is from."""
    return [archive(name) for name in PACKAGES]


def own_tree(tree: Path) -> Path:
    """What the maker of the image adds: its scripts, and a library that it replaced. Written to ``tree``."""
    added = {
        "init": INIT.encode(),
        "laboratory": guest.INIT.read_bytes(),
        CURL: guest.hollow_curl(Path(CURL).name),
    }
    for path, content in added.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
        (tree / path).chmod(0o755)
    return tree


def unpacked(tree: Path) -> Path:
    """The packages, unpacked over one another to ``tree``."""
    for deb in archives():
        run(["dpkg", "-x", deb, tree])
    return tree


def initramfs(path: Path, packages: Path, own: Path, kernel_package: str) -> Path:
    """The userland of both trees with merged /usr, and a module of a kernel at its own path; written to ``path``."""
    entries = {name: cpio.link(f"usr/{name}") for name in ("bin", "lib", "lib64")}
    entries |= {name: cpio.directory() for name in ("proc", "sys", "dev", "run", "tmp")}
    entries["usr/bin/sh"] = cpio.link("busybox")
    entries |= {name: entry for name, entry in _entries(packages).items() if TAKEN.fullmatch(name)}
    entries |= _entries(own)
    for name, entry in _entries(package(kernel_package)).items():
        if name.endswith(("/efivarfs.ko", "/efivarfs.ko.xz")):
            entries |= {name: entry, "usr/lib/modules/efivarfs.ko": cpio.link(f"/{name}")}
    path.write_bytes(gzip.compress(cpio.archive(entries), 1))
    return path


def _entries(tree: Path) -> dict[str, cpio.Entry]:
    """The files and links of a tree, below /usr where Debian's links lead there."""
    found = {}
    for path in sorted(tree.rglob("*")):
        name = re.sub(r"^(bin|sbin|lib|lib64)/", r"usr/\1/", str(path.relative_to(tree)))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = cpio.link(str(path.readlink()))
        elif stat.S_ISREG(mode):
            found[name] = cpio.file(path.read_bytes(), stat.S_IMODE(mode))
    return found
