"""The swtpm processes that run here: whose TPMs they are, and which have a layer that writes the guest's log."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_UUID = re.compile(r"(?<=/)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?=/)")


def swtpm_guests() -> Iterator[str]:
    """UUIDs in the arguments of the swtpm processes here: libvirt keeps a guest's TPM in a directory of that name."""
    for process in _swtpms():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            yield from _UUID.findall((process / "cmdline").read_bytes().decode("utf-8", "replace"))


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


def _swtpms() -> Iterator[Path]:
    for process in (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        with suppress(FileNotFoundError, ProcessLookupError):
            if (process / "comm").read_text().startswith("swtpm"):
                yield process


def _open_files(process: Path) -> Iterator[os.stat_result]:
    """Of a process that may end meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in (process / "fd").iterdir():
            with suppress(FileNotFoundError):
                yield descriptor.stat()
