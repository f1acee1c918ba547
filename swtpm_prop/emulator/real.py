"""Where the real swtpm and swtpm_setup are, which our own programs stand before in the daemon's PATH."""

from __future__ import annotations

import os
from pathlib import Path

from swtpm_prop.layout import Layout

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where libvirt's packages and swtpm's are, if the daemon has no PATH."""


def real_path(layout: Layout) -> str:
    """This process's PATH without our directory."""
    return ":".join(entry for entry in os.environ.get("PATH", PATH).split(":") if Path(entry) != layout.libexec)
