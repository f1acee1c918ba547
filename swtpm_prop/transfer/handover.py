"""An opened key on its way from libvirt's migrate hook to the prepare hook that follows: in memory, root's alone.

Opening it in the TPM anew would only cost time: the migrate hook has just shown that this host may. A key lies here
only while its transfer is imported, see `settle.Settler`; where none lies prepare opens it itself.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from swtpm_prop.custody import mounts
from swtpm_prop.custody.keys import KEY_BYTES, KeyRecord
from swtpm_prop.layout import Layout

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Arrival(NamedTuple):
    """A guest's key that came from another host.

    Attributes:
        record: the key in this host's TPM.
        key: opened, KEY_BYTES; None: it has to be opened.
    """

    record: KeyRecord
    key: bytes | None = None


def leave(id: str, key: bytes, layout: Layout) -> None:
    """Leave the key of a transfer here, if this is memory.

    Args:
        id: of the transfer.
        key: KEY_BYTES.
    """
    path = layout.arriving_key(id)
    # What cannot be left is opened again.
    with suppress(OSError):
        if mounts.kind(path) not in mounts.MEMORY:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, _NEW, 0o600), "wb") as file:
            file.write(key)


def take(id: str, layout: Layout) -> bytes | None:
    """The key of a transfer, which lies here no more; None if there is none."""
    path = layout.arriving_key(id)
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    path.unlink()
    return key if len(key) == KEY_BYTES else None


def discard(id: str, layout: Layout) -> None:
    """Remove the key of a transfer; silent if there is none."""
    layout.arriving_key(id).unlink(missing_ok=True)
