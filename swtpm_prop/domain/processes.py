"""The processes that run here for guests: whose TPMs the swtpms are, which have a layer, whether a QEMU is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from swtpm_prop.domain.identity import UUID

_DIRECTORY = re.compile(rf"(?<=/){UUID.pattern}(?=/)")


def swtpm_guests() -> Iterator[str]:
    """UUIDs in the arguments of the swtpm processes here: libvirt keeps a guest's TPM in a directory of that name."""
    for process in _swtpms():
        yield from _DIRECTORY.findall(_arguments(process).decode("utf-8", "replace"))


def has_layer(log: Path) -> bool:
    """Whether a swtpm has this property log open, as its layer has from before the TPM starts to its end.

    Asking the log's lock instead would take it, and a layer that starts at that moment would refuse to. The kernel's
    list of locks names devices that are not those of stat(2) on btrfs and overlayfs.

    Raises:
        PermissionError: another user's processes cannot be looked into.
    """
    with suppress(FileNotFoundError):
        wanted = log.stat()
        return any(os.path.samestat(wanted, found) for process in _swtpms() for found in _open_files(process))
    return False


def has_qemu(uuid: str) -> bool:
    """Whether a QEMU of the guest is here, in whatever state; libvirt names the UUID in its arguments."""
    return any(f"\0-uuid\0{uuid}\0".encode() in _arguments(process) for process in _all())


def _arguments(process: Path) -> bytes:
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        return (process / "cmdline").read_bytes()
    return b""


def _all() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def _swtpms() -> Iterator[Path]:
    for process in _all():
        with suppress(FileNotFoundError, ProcessLookupError):
            if (process / "comm").read_text().startswith("swtpm"):
                yield process


def _open_files(process: Path) -> Iterator[os.stat_result]:
    """Of a process that may end meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in (process / "fd").iterdir():
            with suppress(FileNotFoundError):
                yield descriptor.stat()
