"""A guest defined on a laboratory host: its life under libvirt, its console, its PCRs."""

from __future__ import annotations

import re
import time

from lab.console import Console
from lab.domain import Domain
from lab.host import Host
from lab.process import LabError


class Machine:
    """A guest; ``with`` defines it, and takes it away again from wherever it then is."""

    def __init__(self, host: Host, domain: Domain) -> None:
        self.host = host
        self.domain = domain
        self.console = Console(host, domain)

    def __enter__(self) -> Machine:
        self.define()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def define(self) -> None:
        """Give the XML to libvirt; an existing definition of this UUID is replaced."""
        self.host.put(f"/run/{self.domain.uuid}.xml", self.domain.xml())
        self.host.virsh("define", f"/run/{self.domain.uuid}.xml")

    def start(self) -> None:
        """Start (or restore a managed save) without waiting for the guest's shell."""
        self.console.attach(self.host)
        self._virsh("start")

    def boot(self, timeout: float = 120) -> None:
        """Start, and wait for the guest's shell."""
        self.start()
        self.console.wait_ready(timeout)

    def destroy(self) -> None:
        self._virsh("destroy")

    def reset(self) -> None:
        """Press the reset button, and wait for the guest's shell."""
        self.console.attach(self.host)
        self._virsh("reset")
        self.console.wait_ready()

    def reboot(self) -> None:
        """Reboot from within, and wait for the guest's shell."""
        self.console.attach(self.host)
        self.console.begin("reboot -f")
        self.console.wait_ready()

    def power_off(self) -> None:
        """Power off from within, and wait until libvirt sees it off."""
        self.console.begin("poweroff -f")
        deadline = time.monotonic() + 30
        while self.state() != "shut off":
            if time.monotonic() > deadline:
                raise LabError("the guest does not power off")
            time.sleep(0.02)

    def save(self, path: str) -> None:
        self._virsh("save", path)

    def restore(self, path: str) -> None:
        self.console.attach(self.host)
        self.host.virsh("restore", path)

    def managed_save(self) -> None:
        """Save; the next ``start`` restores."""
        self._virsh("managedsave")

    def snapshot(self, name: str) -> None:
        """Keep disk, memory and TPM as they are now (disks: qcow2 only)."""
        self._virsh("snapshot-create-as", name)

    def revert(self, name: str) -> None:
        self._virsh("snapshot-revert", name)
        self.console.attach(self.host)

    def migrate(self, to: Host, *options: str) -> None:
        """Live-migrate; definition and TPM go along. ``options`` are further words for ``virsh migrate``.

        Disks are seen by both hosts but lie on no network file system, which libvirt calls unsafe.
        """
        position = self.console.size(to)
        words = ("--live", "--p2p", "--persistent", "--undefinesource", "--unsafe", *options)
        self._virsh("migrate", f"qemu+tcp://{to.name}/system", *words)
        self.host = to
        self.console.attach(to, position)

    def state(self) -> str:
        """``running``, ``shut off``, ``paused`` ... as virsh says."""
        return self._virsh("domstate").strip()

    def remove(self) -> None:
        """Destroy and undefine it with everything libvirt keeps for it; nothing wrong if it is already gone."""
        self.host.run(["virsh", "-q", "-c", "qemu:///system", "destroy", self.domain.uuid], check=False)
        if self.domain.uuid in self.host.virsh("list", "--all", "--uuid"):
            self._virsh("undefine", "--nvram", "--managed-save", "--snapshots-metadata")

    def pcrs(self) -> dict[str, dict[int, str]]:
        """Every PCR the guest's kernel can see: bank, number, value in lower-case hex."""
        seen = self.console.check("cd /sys/class/tpm/tpm0 && grep -H . pcr-*/*")
        values: dict[str, dict[int, str]] = {}
        for bank, number, value in re.findall(r"pcr-(\w+)/(\d+):([0-9A-F]+)", seen):
            values.setdefault(bank, {})[int(number)] = value.lower()
        return values

    def event_log(self) -> bytes:
        """The firmware's TCG event log, as the guest's kernel hands it out."""
        return self.console.get("/sys/kernel/security/tpm0/binary_bios_measurements")

    def _virsh(self, verb: str, *words: str) -> str:
        return self.host.virsh(verb, self.domain.uuid, *words)
