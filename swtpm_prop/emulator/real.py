"""The real swtpm and swtpm_setup, which our own programs stand before in the daemon's PATH: place and key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swtpm_prop.layout import Layout

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where libvirt's packages and swtpm's are, if the daemon has no PATH."""


def real_path(layout: Layout) -> str:
    """This process's PATH without our directory."""
    return ":".join(entry for entry in os.environ.get("PATH", PATH).split(":") if Path(entry) != layout.libexec)


@contextmanager
def key_pipe(key: bytes | None) -> Iterator[int | None]:
    """The reading end of a pipe with the key in hexadecimal digits, the form both programs take; None for no key."""
    if key is None:
        yield None
        return
    reading, writing = os.pipe()
    try:
        os.write(writing, key.hex().encode())
        os.close(writing)
        yield reading
    finally:
        os.close(reading)
