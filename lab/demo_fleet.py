"""The demonstration's second part: the guest's TPM opens on hosts in an approved state, and moves among them alone."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from lab.agent import LOG, Agent
from lab.hardware import EVENT_LOG, STOCK, TCTI, HardwareTpm, Maker, boot_of
from lab.host import Host
from lab.process import LabError
from lab.scene import DESK, DISK, PROPERTIES, PROPERTY, SECRET, Scene
from swtpm_prop.cli import output
from swtpm_prop.layout import Layout

APPROVED = "https://example.org/hosts/approved"
AUTHORITY = """
[[issuer]]
id = "https://example.org/operations"
keys = ["authority.pem"]
prefixes = ["https://example.org/hosts/"]
approves-hosts = true
"""
CONFIGURATION = f"""[tpm]
tcti = "{TCTI}"
event-log = "{EVENT_LOG}"

[custody]
recovery = ["recovery.pem"]
"""
SHARED = "shared"  # a directory on each desk that is the same one: for what is no secret
OLD_FIRMWARE = boot_of("linux 6.1.0-50", "firmware 0.9")
P256 = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
MIGRATE = "virsh -q migrate --live --persistent --undefinesource --unsafe \\\n      web1 qemu+tcp://{}/system"
READ_STATE = f"grep -ao {shlex.quote(SECRET)} /var/lib/libvirt/swtpm/*/tpm2/tpm2-00.permall"
PATIENCE = 10.0  # seconds


class FleetDemo:
    """Three hosts, the first of them the first part's: two in a state that is approved, and one that is not."""

    def __init__(self, scene: Scene, work: Path, hosts: Sequence[Host], kernel: str) -> None:
        self.scene = scene
        self.stage = scene.stage
        self.work = work
        self.hosts = self.here, self.there, self.stranger = tuple(hosts)
        self.kernel = kernel
        self.results: list[tuple[str, str, str, str]] = []

    # -- the story ------------------------------------------------------------------------------

    def play(self) -> None:
        self.equip()
        self.install()
        self.enrol()
        self.approve()
        self.start_agents()
        self.take_custody()
        self.move()
        self.refuse()

    def equip(self) -> None:
        self.stage.chapter(
            "Two more hosts, and a TPM in each",
            "So far whoever copies the guest's TPM state from the host, or from a backup, has the secret. Now it\n"
            "is to open on good hosts only. There are three, which share the guest's disk. Each has a TPM\n"
            "as its hardware (here: a swtpm of its own, with its maker's certificate). host-c has an older firmware.",
        )
        self.stage.promise("the state is an open book", SECRET in self.on(self.here, READ_STATE))
        with self.stage.working("making three TPMs, and switching the hosts on"):
            self.share()
            maker = Maker(self.work)
            for host in self.hosts:
                HardwareTpm(host, maker).boot(OLD_FIRMWARE if host is self.stranger else STOCK)
            self.host_path(SHARED).joinpath("makers.pem").write_text(maker.roots.read_text())
        for host in self.hosts:
            self.on(host, f"tpm2_pcrread -T {TCTI} sha256:0,4 | cut -c1-48")

    def install(self) -> None:
        self.stage.chapter(
            "Install, configure",
            "Two more keys: one by which an authority says which states of hosts are good, and one, to be kept\n"
            "offline, that opens a guest's state if its host is lost. All hosts trust whom host-a trusts.",
        )
        for key in ("authority", "recovery"):
            self.on(self.here, f"{P256} -out {key}.key")
            self.on(self.here, f"openssl pkey -in {key}.key -pubout -out {SHARED}/{key}.pem")
        self.on(self.here, f"cp /etc/swtpm-prop/images.pem reference.json update.json {SHARED}")
        trust = self.here.read("/etc/swtpm-prop/trust.toml") + AUTHORITY
        for host in self.hosts:
            host.put("/etc/swtpm-prop/host.toml", CONFIGURATION)
            host.put("/etc/swtpm-prop/trust.toml", trust)
        self.on(self.here, "cat /etc/swtpm-prop/host.toml; tail -n 6 /etc/swtpm-prop/trust.toml")
        for host in self.hosts[1:]:
            self.on(host, "swtpm-prop install >/dev/null")
            host.libvirtd.restart()
        for host in self.hosts:
            self.on(host, f"cp {SHARED}/*.pem /etc/swtpm-prop; swtpm-prop store build {SHARED}/*.json")

    def enrol(self) -> None:
        self.stage.chapter(
            "A fleet",
            "Each host makes keys in its TPM and asks; the fleet's keeper answers. Three things tell which TPM it\n"
            "is: its maker's certificate, its endorsement key, which people compare, and an answer only it can open.",
        )
        self.on(self.here, f"swtpm-prop fleet init fleet && cp fleet/fleet.pem fleet/fleet.crl {SHARED}")
        for host in self.hosts:
            request, answer = (f"{SHARED}/{host.name}.{kind}" for kind in ("request", "answer"))
            seen = self.on(host, "swtpm-prop host init")
            self.on(host, f"swtpm-prop host enroll --name {host.name} --request {request}")
            admit = f"swtpm-prop fleet admit fleet {request} --ek-roots {SHARED}/makers.pem"
            asked = self.on(self.here, f"{admit} \\\n      --output {answer} --yes")
            self.stage.promise("it is the key that the host's own console shows", endorsed(seen) == endorsed(asked))
            self.on(host, f"swtpm-prop host enroll --answer {answer} --ca {SHARED}/fleet.pem")
        self.on(self.here, "swtpm-prop fleet list fleet")

    def approve(self) -> None:
        self.stage.chapter(
            "Approve a state",
            "The authority sees what host-a booted, and signs that hosts in this state are good. Whoever is in it is\n"
            "approved, and nobody else: TPMs decide that, by their PCRs and this signature.",
        )
        self.on(
            self.here,
            f"swtpm-prop host approve --here --property {APPROVED} \\\n"
            f"      --label 'firmware 1.0' --list {SHARED}/approvals.json --key authority.key --yes",
        )
        for host in self.hosts:
            self.on(host, f"swtpm-prop host update {SHARED}/approvals.json {SHARED}/fleet.crl")
            status, said = self.attempt_on(host, "swtpm-prop host check")
            if host is self.stranger:
                self.stage.promise("it is not, and its firmware is why", status == 1 and "PCR 0 " in said)
            else:
                self.stage.promise("it is approved", status == 0)

    def start_agents(self) -> None:
        self.stage.chapter(
            "An agent on each",
            "Of it other hosts ask for keys of guests that move to them. Where there is a service manager:\n"
            "systemctl enable --now swtpm-prop-agent.",
        )
        for host in self.hosts:
            self.on(host, f"setsid -f swtpm-prop agent >{LOG} 2>&1")
        for host in self.hosts:
            Agent(host).wait()

    def take_custody(self) -> None:
        self.stage.chapter(
            "Custody",
            "The guest gets its certified kernel back, and two more lines of metadata. Its next start encrypts the\n"
            "state of its TPM, which has the secret, under a key that lies sealed in the TPM of host-a.",
        )
        self.scene.replace_kernel(self.kernel)
        self.on(
            self.here,
            f"swtpm-prop domain enable web1 --property {PROPERTY} \\\n      --custody {APPROVED} --migration attested",
        )
        self.scene.boot()
        self.on(self.here, "swtpm-prop key show web1")
        self.check_closed(self.here)
        self.unseals(self.here)

    def move(self) -> None:
        self.stage.chapter(
            "Move it, live",
            "Before libvirt moves anything, host-b's TPM proves to host-a what it is and in which state, and that of\n"
            "host-a re-binds the key to it. (--unsafe: libvirt sees that the shared disk is on no network storage.)",
        )
        machine = self.scene.machine
        before, position = machine.pcrs(), machine.console.size(self.there)
        self.on(self.here, MIGRATE.format(self.there.name))
        machine.host = self.there
        machine.console.attach(self.there, position)
        self.stage.promise("its PCRs are what they were", machine.pcrs() == before)
        self.unseals(self.there)
        self.check_closed(self.there)
        self.stage.say("The guest runs there, so host-a has destroyed its key:")
        self.await_gone()
        for host in (self.here, self.there):
            self.on(host, "swtpm-prop key show")

    def refuse(self) -> None:
        self.stage.chapter(
            "A host that nobody approved",
            "host-c is of the same fleet, with the same software and configuration, and an older firmware.",
        )
        status, said = self.attempt_on(self.there, MIGRATE.format(self.stranger.name))
        self.stage.promise("virsh says why", status == 1 and "[transfer.state-not-approved]" in said)
        said = self.on(self.stranger, "swtpm-prop key show; virsh -q list --all")
        self.stage.promise("nothing of the guest is there", said.strip() == "this host has no key of a guest")
        self.results.append((self.stranger.name, "firmware 0.9", "no", output.paint("migration refused", "red")))
        self.stage.promise("the guest runs on", self.on(self.there, "virsh -q domstate web1").strip() == "running")
        self.scene.unseal("property", PROPERTIES, possible=True)
        self.on(self.there, "virsh -q destroy web1")

    def summary(self) -> None:
        output.table(("host", "booted", "approved", "property bank"), self.results)

    # -- what recurs ----------------------------------------------------------------------------

    def on(self, host: Host, line: str) -> str:
        return self.scene.on(host, line)

    def attempt_on(self, host: Host, line: str) -> tuple[int, str]:
        return self.scene.attempt_on(host, line)

    def unseals(self, host: Host) -> None:
        word = self.scene.unseal("property", PROPERTIES, possible=True)
        self.results.append((host.name, "firmware 1.0", "yes", word))

    def check_closed(self, host: Host) -> None:
        status, said = self.attempt_on(host, READ_STATE)
        self.stage.promise("the state says nothing", (status, said) == (1, ""))

    def await_gone(self) -> None:
        """Wait for what the agents do once the guest runs on."""
        key = self.here.root / str(Layout().guest_key(self.scene.machine.domain.uuid)).lstrip("/")
        deadline = time.monotonic() + PATIENCE
        while key.exists():
            if time.monotonic() > deadline:
                raise LabError(f"{self.here.name} keeps the guest's key")
            time.sleep(0.02)

    def host_path(self, name: str) -> Path:
        return self.here.root / DESK / name

    def share(self) -> None:
        """What a network file system would do: one directory of disks, and one for letters, on all hosts."""
        places = {str(Path(DISK).parent): self.here.tree / str(Path(DISK).parent).lstrip("/")}
        places[f"/{DESK}/{SHARED}"] = self.work / SHARED
        (self.work / SHARED).mkdir()
        for host in self.hosts:
            (host.root / DESK / SHARED).mkdir(parents=True)
            for place, of in places.items():
                host.run(["mount", "--bind", of, place])


def endorsed(text: str) -> str:
    """The endorsement key's Name in what a command said."""
    found = re.search(r"endorsement key +([0-9a-f]+)", text)
    return found[1] if found else ""
