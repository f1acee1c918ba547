"""Where everything lies on a host; the only module that knows these paths."""

from __future__ import annotations

from pathlib import Path


class Layout:
    """The host's directories below ``root`` (``/`` on a real host, another directory for ``--root`` and tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.etc = root / "etc/swtpm-prop"
        self.trust = self.etc / "trust.toml"
        self.host = self.etc / "host.toml"
        self.state = root / "var/lib/swtpm-prop"
        self.store_root = self.etc / "root.json"
        self.store = self.state / "store"
        self.index = self.state / "index/index.sqlite"
        self.guests = self.state / "guests"
        self.run = root / "run/swtpm-prop"
        self.logs = root / "var/log/swtpm-prop"
        self.libexec = root / "usr/libexec/swtpm-prop"
        self.hook = root / "etc/libvirt/hooks/qemu.d/swtpm-prop"
        self.qemu_conf = root / "etc/libvirt/qemu.conf"

    def guest_run(self, uuid: str) -> Path:
        """What one start of the guest needs; exists from prepare to release."""
        return self.run / uuid

    def guest_marker(self, uuid: str) -> Path:
        """Says, across reboots, that this guest must never start without the layer."""
        return self.guests / uuid

    def guest_log(self, uuid: str) -> Path:
        """The guest's property log, JSON lines."""
        return self.logs / f"{uuid}.jsonl"

    def guest_tpm(self, uuid: str) -> Path:
        """Where libvirt keeps the guest's TPM state (src/qemu/qemu_tpm.c, qemuTPMEmulatorInitStorage)."""
        return self.root / "var/lib/libvirt/swtpm" / uuid / "tpm2"
