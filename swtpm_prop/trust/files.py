"""Certificates, keys and trust files on the disk: bounded reading, atomic writing, one kind of error."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from swtpm_prop.errors import TrustError


def read_file(path: Path, most: int) -> bytes:
    """The whole file, at most ``most`` bytes.

    Raises:
        TrustError: ``trust.file-missing``, ``trust.file-unreadable``, ``trust.too-large``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise TrustError(
            "trust.file-missing", f"there is no file '{path}'", "check the name, or put the file there"
        ) from None
    except (OSError, ValueError) as error:
        raise TrustError(
            "trust.file-unreadable", f"'{path}' cannot be read: {error}", "be root, or let this user read it"
        ) from None
    if len(data) > most:
        raise TrustError(
            "trust.too-large",
            f"'{path}' has more than {most} bytes",
            "check the name: this is not the file that is wanted here",
        )
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write the file, readable for all, or leave what was there.

    Raises:
        TrustError: ``trust.file-unwritable``.
    """
    try:
        descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            Path(new).replace(path)
        finally:
            Path(new).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise TrustError(
            "trust.file-unwritable",
            f"'{path}' cannot be written: {error}",
            "free space on its disk, and write where this user may",
        ) from None
