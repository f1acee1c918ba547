"""Do AppArmor and SELinux let the daemon run our start scripts and swtpm load the layer?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.install.plan import APPARMOR
from swtpm_prop.install.tree import at, block

SELINUX_LABEL = "swtpm_exec_t"


def apparmor(patient: Patient) -> Iterator[Finding]:
    """Where AppArmor has libvirt's profiles, they must have our lines; loaded profiles are read again by name."""
    if patient.installed is None:
        return
    profiles = at(patient.layout.root, APPARMOR)
    if not (profiles / "abstractions/libvirt-qemu").exists():
        return
    added = (profiles / "abstractions/libvirt-qemu.d/swtpm-prop").exists() or block(
        profiles / "local/abstractions/libvirt-qemu"
    )
    if added:
        yield ok("apparmor.added", "the profiles of guests let swtpm load the layer")
        return
    what = "AppArmor's profile for guests does not let swtpm load the layer"
    mend = "run swtpm-prop install"
    yield (problem if patient.live and _loaded(patient) else warning)("apparmor.missing", what, mend)


def _loaded(patient: Patient) -> bool:
    """The kernel has a profile of a daemon or of a guest (securityfs, readable by root)."""
    try:
        names = patient.at("/sys/kernel/security/apparmor/profiles").read_text(encoding="utf-8")
    except OSError:
        return False
    return any("libvirt" in line or "virtqemud" in line for line in names.splitlines())


def selinux(patient: Patient) -> Iterator[Finding]:
    """Enforcing SELinux needs the label of swtpm on its start script: a domain change there would drop the preload."""
    if patient.installed is None or not _enforcing(patient):
        return
    path = patient.layout.libexec / "swtpm"
    label = _label(path)
    if SELINUX_LABEL in label:
        yield ok("selinux.label", f"{path} has the label {SELINUX_LABEL}")
        return
    mend = "build and load packaging/selinux, then run restorecon -R /usr/libexec/swtpm-prop"
    yield problem("selinux.label", f"{path} has the label {label or '(none)'} instead of {SELINUX_LABEL}", mend)


def _enforcing(patient: Patient) -> bool:
    try:
        return patient.at("/sys/fs/selinux/enforce").read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False


def _label(path: Path) -> str:
    try:
        return os.getxattr(path, "security.selinux").rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        return ""
