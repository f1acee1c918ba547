"""Read from a host what the plan depends on."""

from __future__ import annotations

import sys
from pathlib import Path

import swtpm_prop
from swtpm_prop.emulator import shims
from swtpm_prop.install.plan import APPARMOR, DAEMONS, Host
from swtpm_prop.install.tree import at
from swtpm_prop.layout import Layout


def survey(layout: Layout) -> Host:
    """The facts about the host below ``layout.root``; interpreter and package are those that run this.

    Raises:
        HostError: ``shim.object-missing``: the object to preload was not built for this interpreter.
    """
    package = Path(swtpm_prop.__file__).resolve().parent
    profiles = at(layout.root, APPARMOR)
    guest = profiles / "abstractions/libvirt-qemu"
    daemons = (f"usr.sbin.{daemon}" for daemon in DAEMONS)
    return Host(
        python=Path(sys.executable),
        preload=shims.preload_object(),
        prefix=Path(sys.prefix),
        package=package,
        guest_profile=guest.read_text(encoding="utf-8", errors="replace") if guest.exists() else None,
        daemon_profiles=tuple(name for name in daemons if (profiles / name).exists()),
        swtpm_profile=(profiles / "usr.bin.swtpm").exists(),
    )
