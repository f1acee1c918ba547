"""Domain XML of laboratory guests."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

LOADER = "/usr/share/OVMF/OVMF_CODE_4M.fd"
VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"


@dataclass(frozen=True)
class Domain:
    """A guest as libvirt is to define it.

    It boots ``disk`` (raw, or qcow2 by its suffix), or ``kernel`` with ``initrd`` and ``cmdline`` directly.
    ``memory`` is in MiB; ``metadata`` is what stands inside ``<metadata>``; ``banks`` are libvirt's
    active_pcr_banks, none = libvirt does not touch them; ``secret`` is the UUID of libvirt's own secret that encrypts
    the TPM's state.
    """

    name: str = "guest"
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    firmware: Literal["ovmf", "seabios"] = "seabios"
    tpm: Literal["crb", "tis"] = "crb"
    memory: int = 256
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = None
    metadata: str = ""
    banks: tuple[str, ...] = ()
    secret: str = ""

    @property
    def socket(self) -> str:
        """The guest's serial console on its host; by the UUID, for names may hold anything."""
        return f"/var/lib/libvirt/qemu/{self.uuid}.console"

    @property
    def transcript(self) -> str:
        """Everything the serial console said on this host."""
        return f"/var/log/libvirt/qemu/{self.uuid}-console.log"

    def xml(self) -> str:
        """The document for ``virsh define``."""
        metadata = f"<metadata>{self.metadata}</metadata>" if self.metadata else ""
        return f"""<domain type='qemu'>
  <name>{escape(self.name)}</name>
  <uuid>{self.uuid}</uuid>
  {metadata}
  <memory unit='MiB'>{self.memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>{self._firmware()}{self._direct_boot()}
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <on_crash>destroy</on_crash>
  <devices>{self._disk()}
    <controller type='usb' model='none'/>
    <serial type='unix'>
      <source mode='bind' path='{self.socket}'/>
      <log file='{self.transcript}' append='on'/>
      <target port='0'/>
    </serial>
    <tpm model='tpm-{self.tpm}'>
      <backend type='emulator' version='2.0'>{self._encryption()}{self._banks()}</backend>
    </tpm>
    <memballoon model='none'/>
  </devices>
</domain>
"""

    def _firmware(self) -> str:
        if self.firmware == "seabios":
            return ""
        loader = f"<loader readonly='yes' type='pflash'>{LOADER}</loader>"
        return f"\n    {loader}\n    <nvram template='{VARIABLES}'/>"

    def _direct_boot(self) -> str:
        parts = ((name, getattr(self, name)) for name in ("kernel", "initrd", "cmdline"))
        return "".join(f"\n    <{name}>{escape(str(value))}</{name}>" for name, value in parts if value)

    def _disk(self) -> str:
        if self.disk is None:
            return ""
        kind = "qcow2" if self.disk.suffix == ".qcow2" else "raw"
        return f"""
    <disk type='file' device='disk'>
      <driver name='qemu' type='{kind}'/>
      <source file={quoteattr(str(self.disk))}/>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
    </disk>"""

    def _encryption(self) -> str:
        return f"<encryption secret='{self.secret}'/>" if self.secret else ""

    def _banks(self) -> str:
        banks = "".join(f"<{name}/>" for name in self.banks)
        return f"<active_pcr_banks>{banks}</active_pcr_banks>" if banks else ""
