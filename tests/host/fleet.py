"""Hosts of a fleet as people make one: TPMs with keys, members of one CA, approved states, agents; and their guests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from product import Product, processes
from waiting import eventually

from lab.agent import Agent
from lab.domain import Domain
from lab.hardware import EVENT_LOG, STOCK, TCTI, HardwareTpm, Maker, Measurement
from lab.host import Host, connect
from lab.machine import Machine
from lab.process import LabError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer

AUTHORITY = "https://example.org/operations"
APPROVED = "https://example.org/hosts/approved"
ISSUER = '[[issuer]]\nid = "{}"\nkeys = ["""{}"""]\nprefixes = ["https://example.org/hosts"]\napproves-hosts = true\n'
CONFIGURATION = """[tpm]
tcti = "{tcti}"
event-log = "{log}"
[custody]
recovery = ["recovery.pem"]
[agent]
endpoint = "{name}:4879"
peers = [{peers}]
"""
CUSTODY = ("--custody", APPROVED, "--migration", "attested")


class Member:
    """A host of the fleet: its TPM and its agent."""

    def __init__(self, host: Host, maker: Maker) -> None:
        self.host = host
        self.tpm = HardwareTpm(host, maker)
        self.agent = Agent(host)

    def reboot(self, measurements: Sequence[Measurement] = STOCK) -> None:
        """Off, with whatever runs, and on again: what lay in /run is gone, the TPM begins a new boot."""
        # everything in the host but its first process and this one's
        self.host.run(["sh", "-c", "kill -9 -1"], check=False)
        if not eventually(lambda: not processes(self.host, "qemu-system-x86_64") and self.host.libvirtd.pid is None):
            raise LabError(f"{self.host.name} does not go off")
        self.host.run(["sh", "-c", "umount /run/lab-* 2>/dev/null; rm -rf /run/*; mkdir /run/lock"])
        self.tpm.boot(measurements)
        self.host.libvirtd.start()
        self.agent.start()


class Fleet:
    """``hosts`` become members, each with a TPM of its own; their stock state is approved, but of ``strangers`` not.

    Strangers are members as the others, in a state that nobody approved.
    """

    def __init__(self, work: Path, product: Product, hosts: Sequence[Host], strangers: Sequence[Host] = ()) -> None:
        self.work = work
        self.product = product
        self.keeper = hosts[0]  # the machine where the CA and the authority work
        self.ca, self.approvals = work / "fleet", work / "approvals.json"
        self.authority, self.recovery = work / "authority.pem", work / "recovery.key"
        self.maker = Maker(work)
        everybody = [*hosts, *strangers]
        self.members = {host.name: Member(host, self.maker) for host in everybody}
        for file in (self.authority, self.recovery):
            self._make_key(file)
        self.keeper.cli("fleet", "init", str(self.ca))
        for host in everybody:
            self._configure(host, [other.name for other in everybody if other is not host])
            self.members[host.name].tpm.boot(STOCK if host in hosts else [*STOCK, Measurement(4, 0xD, b"stranger\0")])
            self.enrol(host)
        self.approve(self.keeper, "stock")
        for member in self.members.values():
            member.agent.start()

    def enrol(self, host: Host) -> None:
        """Keys in its TPM, and certificates by one round trip."""
        request, answer = (self.work / f"{host.name}.{kind}" for kind in ("request", "answer"))
        host.cli("host", "init")
        host.cli("host", "enroll", "--name", host.name, "--request", str(request))
        roots = ("--ek-roots", str(self.maker.roots))
        self.keeper.cli("fleet", "admit", str(self.ca), str(request), "--output", str(answer), *roots, "--yes")
        host.put(str(Layout().fleet_ca), (self.ca / "fleet.pem").read_text())
        host.cli("host", "enroll", "--answer", str(answer))

    def approve(self, host: Host, label: str) -> None:
        """The authority approves the state that ``host`` is in, and everybody hears of it."""
        words = ("--property", APPROVED, "--here", "--label", label, *self._listed(), "--yes")
        host.cli("host", "approve", *words)
        self.distribute()

    def revoke(self, label: str) -> None:
        """The authority takes an approval back, and everybody hears of it."""
        self.keeper.cli("host", "revoke", label, *self._listed())
        self.distribute()

    def distribute(self) -> None:
        """Every host gets the newest lists of approvals and of revoked certificates."""
        for member in self.members.values():
            member.host.cli("host", "update", str(self.approvals), str(self.ca / "fleet.crl"))

    def define(self, host: Host, domain: Domain) -> Machine:
        """A guest with custody that may migrate, not started."""
        machine = Machine(host, domain)
        machine.define()
        self.product.enable(machine, *CUSTODY)
        return machine

    def transfers(self, host: Host) -> list[dict[str, object]]:
        """What ``transfer list`` says."""
        listed = json.loads(host.cli("transfer", "list", "--json").stdout)
        assert isinstance(listed, list)
        return listed

    def _listed(self) -> tuple[str, ...]:
        return "--list", str(self.approvals), "--key", str(self.authority)

    def _make_key(self, file: Path) -> None:
        self.keeper.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", file])

    def _public(self, file: Path) -> str:
        return self.keeper.run(["openssl", "pkey", "-in", file, "-pubout"]).stdout

    def _configure(self, host: Host, others: Sequence[str]) -> None:
        layout = Layout()
        peers = ", ".join(f'"{name}:4879"' for name in others)
        text = CONFIGURATION.format(tcti=TCTI, log=EVENT_LOG, name=host.name, peers=peers)
        host.put(str(layout.host), text)
        host.put(str(layout.etc / "recovery.pem"), self._public(self.recovery))
        host.put(
            str(layout.trust), host.read(str(layout.trust)) + ISSUER.format(AUTHORITY, self._public(self.authority))
        )


def unfinished(host: Host) -> list[Transfer]:
    """What ``Fleet.transfers`` says, by the host's own journal: takes little from those who are waited for."""
    journal = Journal(Layout(host.root))
    return [transfer for uuid in journal.guests() for transfer in journal.of(uuid) if transfer.unfinished]


def connect_all(hosts: Sequence[Host]) -> None:
    """Join those that a laboratory has not joined: it joins each with the next."""
    for one, other in itertools.combinations(hosts, 2):
        if hosts.index(other) - hosts.index(one) > 1:
            connect(one, other)
