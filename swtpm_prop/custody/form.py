"""Whether a guest has a TPM state at rest and whether it is encrypted, by the header that swtpm gives it."""

from __future__ import annotations

import os
import stat
import struct
from enum import Enum
from pathlib import Path

from swtpm_prop.errors import HostError
from swtpm_prop.limits import STATE_BYTES

PERMANENT = "tpm2-00.permall"
"""swtpm's file of everything that outlives a power cycle (src/swtpm/swtpm_nvstore_dir.c)."""

ENCRYPTED_FLAG = 0x1
"""Of the flags in a header: BLOB_FLAG_ENCRYPTED."""

_HEADER = struct.Struct(">BBHHI")
"""Version, least version, size of this header, flags, size of all (src/swtpm/swtpm_nvstore.c, struct blobheader)."""


class Form(Enum):
    """What there is of a TPM state."""

    NONE = "none"
    PLAIN = "plain"
    ENCRYPTED = "encrypted"
    UNREADABLE = "unreadable"
    """No state of a TPM 2.0 as swtpm writes it, or a damaged one."""


def form(directory: Path) -> Form:
    """What there is in the directory."""
    try:
        data = read(directory / PERMANENT)
    except HostError:
        return Form.UNREADABLE
    if data is None:
        return Form.NONE
    if len(data) >= _HEADER.size:
        version, _, header, flags, total = _HEADER.unpack_from(data)
        if version and header == _HEADER.size and total == len(data):
            return Form.ENCRYPTED if flags & ENCRYPTED_FLAG else Form.PLAIN
    return Form.UNREADABLE


def read(path: Path) -> bytes | None:
    """The whole file, which swtpm's user may have put there for root to stumble over; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, str(error)) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > STATE_BYTES:
            raise unreadable(path, f"it is no regular file of at most {STATE_BYTES} bytes")
        return os.read(descriptor, STATE_BYTES)
    finally:
        os.close(descriptor)


def unreadable(path: Path, why: str) -> HostError:
    """The error for a state that does not open."""
    return HostError(
        "custody.state-unreadable",
        f"the TPM state {path} does not open: {why}",
        "put it back from a backup of the same time as the guest's key; swtpm-prop key show says what there is",
    )
