"""The demonstration's second part: the guest's keys belong to the host's TPM, and go along when it moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.agent import Agent
from lab.hardware import EVENT_LOG, STOCK, TCTI, HardwareTpm, Maker, boot_of
from lab.host import Host
from lab.scene import DESK, DISK, PROPERTIES, PROPERTY, Scene
from swtpm_prop.cli import output

APPROVED = "https://example.org/hosts/approved"
AUTHORITY = """
[[issuer]]
id = "https://example.org/operations"
keys = ["authority.pem"]
prefixes = ["https://example.org/hosts/"]
threshold = 1
"""
CONFIGURATION = f"""[tpm]
tcti = "{TCTI}"
event-log = "{EVENT_LOG}"

[custody]
recovery = ["recovery.pem"]
"""
MAILED = "post"  # a directory below the desk that all hosts see: for what is no secret
OLD = boot_of("linux 6.1.0-50", "firmware 0.9")
MIGRATE = "virsh migrate --live --persistent --undefinesource --unsafe web1 qemu+tcp://{}/system"


class FleetDemo:
    """Three hosts, the first of them the first part's: two in a state that is approved, and one that is not."""

    def __init__(self, scene: Scene, work: Path, hosts: Sequence[Host], kernel: str) -> None:
        self.scene = scene
        self.stage = scene.stage
        self.hosts = self.here, self.there, self.stranger = tuple(hosts)
        self.kernel = kernel
        self.work = work
        self.agents = {host.name: Agent(host) for host in hosts}
        self.results: list[tuple[str, str, str]] = []

    def play(self) -> None:
        self.equip()
        self.enrol()
        self.approve()
        self.take_custody()
        self.move()
        self.refuse()
        self.summary()

    # -- the story ------------------------------------------------------------------------------

    def equip(self) -> None:
        self.stage.chapter(
            "Two more hosts, and a TPM in each",
            "They share the guest's disk. Hosts a and b boot the same firmware, host c an older one. Each has a TPM of\n"
            "its own as its hardware (here: a swtpm with its maker's certificate).",
        )
        with self.stage.working("making three TPMs and switching them on"):
            self._share()
            maker = Maker(self.work)
            for host in self.hosts:
                HardwareTpm(host, maker).boot(OLD if host is self.stranger else STOCK)
            (self.work / MAILED / "makers.pem").write_text(maker.roots.read_text())
        on = self.scene.on
        on(self.here, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out authority.key")
        on(self.here, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out recovery.key")
        for name in ("authority", "recovery"):
            on(self.here, f"openssl pkey -in {name}.key -pubout -out {MAILED}/{name}.pem")
        on(self.here, f"cp /etc/swtpm-prop/images.pem reference.json update.json {MAILED}")
        trust = self.here.read("/etc/swtpm-prop/trust.toml") + AUTHORITY
        for host in self.hosts:
            if host is not self.here:
                on(host, "swtpm-prop install")
                host.libvirtd.restart()
            host.put("/etc/swtpm-prop/host.toml", CONFIGURATION)
            host.put(
                "/etc/swtpm-prop/trust.toml",
                self.here.read("/etc/swtpm-prop/trust.toml") + AUTHORITY * (host is self.here),
            )
            on(host, f"cp {MAILED}/*.pem /etc/swtpm-prop")
            on(host, f"swtpm-prop store build {MAILED}/reference.json {MAILED}/update.json")

    def enrol(self) -> None:
        self.stage.chapter("A fleet", "Keys in each TPM, and a certificate for each host.")
        on = self.scene.on
        on(self.here, "swtpm-prop fleet init fleet")
        on(self.here, f"cp fleet/fleet.pem fleet/fleet.crl {MAILED}")
        for host in self.hosts:
            on(host, "swtpm-prop host init")
            on(host, f"swtpm-prop host enroll --name {host.name} --request {MAILED}/{host.name}.request")
            on(
                self.here,
                f"swtpm-prop fleet admit fleet {MAILED}/{host.name}.request --yes \\\n"
                f"      --ek-roots {MAILED}/makers.pem --output {MAILED}/{host.name}.answer",
            )
            on(host, f"swtpm-prop host enroll --answer {MAILED}/{host.name}.answer --ca {MAILED}/fleet.pem")

    def approve(self) -> None:
        self.stage.chapter(
            "Approve a state", "The authority looks at host a and signs its state. Host c is in another."
        )
        on = self.scene.on
        on(
            self.here,
            f"swtpm-prop host approve --here --property {APPROVED} \\\n"
            f"      --label 'firmware 1.0' --list {MAILED}/approvals.json --key authority.key --yes",
        )
        for host in self.hosts:
            on(host, f"swtpm-prop host update {MAILED}/approvals.json {MAILED}/fleet.crl")
            status, _ = self.scene.attempt_on(host, "swtpm-prop host check")
            approved = host is not self.stranger
            self.stage.promise(
                f"{host.name} is {'approved' if approved else 'not approved'}", (status == 0) == approved
            )
            on(host, "setsid -f swtpm-prop agent >/var/log/agent.log 2>&1 </dev/null")

    def take_custody(self) -> None:
        self.stage.chapter(
            "Custody", "The guest's TPM state is encrypted under a key that opens on approved hosts only."
        )
        scene = self.scene
        scene.replace_kernel(self.kernel)
        scene.on(
            self.here,
            f"swtpm-prop domain enable web1 --property {PROPERTY} \\\n      --custody {APPROVED} --migration attested",
        )
        scene.boot()
        scene.on(self.here, "swtpm-prop key show web1")
        self._unseals(self.here)

    def move(self) -> None:
        self.stage.chapter("Move it, live", "The key goes from TPM to TPM inside libvirt's own hooks.")
        console, before = self.scene.machine.console, self.scene.machine.pcrs()
        position = console.size(self.there)
        self.scene.on(self.here, MIGRATE.format(self.there.name))
        self.scene.machine.host = self.there
        console.attach(self.there, position)
        self.stage.promise("its PCRs are what they were", self.scene.machine.pcrs() == before)
        self._unseals(self.there)

    def refuse(self) -> None:
        self.stage.chapter("A host that nobody approved", "Its state is not approved: no key, no guest.")
        status, said = self.scene.attempt_on(self.there, MIGRATE.format(self.stranger.name))
        self.stage.promise("virsh says why", status == 1 and "[transfer.state-not-approved]" in said)
        self.results.append((self.stranger.name, "no", output.paint("refused", "red")))
        said = self.scene.on(self.there, "virsh -q domstate web1")
        self.stage.promise("the guest runs on", said.strip() == "running")
        self.scene.unseal("property", PROPERTIES, possible=True)
        self.scene.on(self.there, "virsh -q destroy web1")

    def summary(self) -> None:
        self.stage.chapter("What was shown", "One guest, sealed once, on the hosts that may have it.")
        output.table(("host", "approved", "secret"), self.results)

    # -- what recurs ----------------------------------------------------------------------------

    def _unseals(self, host: Host) -> None:
        self.results.append((host.name, "yes", self.scene.unseal("property", PROPERTIES, possible=True)))

    def _share(self) -> None:
        """What a network file system would do: the directory of disks, and one for letters."""
        images = str(Path(DISK).parent)
        (self.work / MAILED).mkdir()
        for host in self.hosts:
            (host.root / DESK / MAILED).mkdir(parents=True)
            host.run(["mount", "--bind", self.work / MAILED, f"/{DESK}/{MAILED}"])
            if host is not self.here:
                host.run(["mount", "--bind", str(self.here.tree) + images, images])
