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
        self.fleet_ca = self.etc / "fleet.pem"
        self.store_root = self.etc / "root.json"
        self.store = self.state / "store"
        self.index = self.state / "index/index.sqlite"
        self.guests = self.state / "guests"
        self.host_keys = self.state / "host"
        self.fleet_crl = self.state / "fleet.crl"
        self.approvals = self.state / "approvals"
        self.keys = self.state / "keys"
        self.transfers = self.state / "transfers"
        self.run = root / "run/swtpm-prop"
        self.arriving = self.run / "arriving"
        self.tpm_lock = self.run / "tpm.lock"
        self.agent_socket = self.run / "agent.socket"
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

    def guest_key(self, uuid: str) -> Path:
        """The record of the guest's key, sealed in this host's TPM."""
        return self.keys / f"{uuid}.json"

    def state_key(self, uuid: str) -> Path:
        """What the guest's TPM state is encrypted under, 64 hexadecimal digits; gone once the guest has started."""
        return self.guest_run(uuid) / "state-key"

    def migration_key(self, uuid: str) -> Path:
        """What the TPM's part of the migration stream is encrypted under; as `state_key`."""
        return self.guest_run(uuid) / "migration-key"

    def arriving_key(self, id: str) -> Path:
        """The opened key of a guest that is about to arrive by the transfer ``id``; between two hooks, for a moment."""
        return self.arriving / id

    def guest_log(self, uuid: str) -> Path:
        """The guest's property log, JSON lines."""
        return self.logs / f"{uuid}.jsonl"

    def guest_tpm(self, uuid: str) -> Path:
        """Where libvirt keeps the guest's TPM state (src/qemu/qemu_tpm.c, qemuTPMEmulatorInitStorage)."""
        return self.root / "var/lib/libvirt/swtpm" / uuid / "tpm2"

    def qemu_log(self, name: str) -> Path:
        """Where libvirt notes why a guest ended, by its name without a slash (src/qemu/qemu_domain.c)."""
        return self.root / "var/log/libvirt/qemu" / f"{name}.log"

    def guest_status(self, name: str) -> Path:
        """Where libvirt keeps the status of a running guest, by its name without a slash (src/qemu/qemu_conf.c)."""
        return self.root / "run/libvirt/qemu" / f"{name}.xml"
