"""Whether a guest's QEMU is here, by a real one."""

from __future__ import annotations

import subprocess

from waiting import eventually

from swtpm_prop.domain.processes import has_qemu

UUID = "3f1c8a52-7d0e-4c59-9b86-2a6e5d41f0c7"


def test_a_qemu_is_known_by_its_guests_uuid() -> None:
    assert not has_qemu(UUID)
    line = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-uuid", UUID, "-S"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as qemu:
        try:
            assert eventually(lambda: has_qemu(UUID))
            assert not has_qemu(UUID.replace("3", "4"))
        finally:
            qemu.kill()
    assert not has_qemu(UUID)
