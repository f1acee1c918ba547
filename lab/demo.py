"""The demonstration (``make demo``): a secret in a guest survives a certified kernel update and no other.

Read it from the top: every shell line in it is run as it stands, on a libvirt host of its own or in the guest on it.
``demo_fleet`` goes on with the same guest, its secret, and two more hosts.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import click

from lab import guest, image
from lab.debian import cache, kernel
from lab.demo_fleet import FleetDemo
from lab.domain import Domain
from lab.host import Host, laboratory
from lab.machine import Machine
from lab.process import LabError
from lab.scene import DESK, DISK, PROPERTIES, PROPERTY, RAW, SECRET, Scene
from lab.stage import Stage
from swtpm_prop.cli import output

ISSUER = "https://example.org/images"
TRUST = f"""[[issuer]]
id = "{ISSUER}"
keys = ["images.pem"]
prefixes = ["https://example.org/properties/"]
threshold = 1
"""
NOT_CERTIFIED = "grep -o 'PCR.*not certified.*'"
KERNEL_PCRS = {4, 9, 11}


class Demo(Scene):
    """One host, one guest, three kernels: the first, its update, and one that nobody certified."""

    def __init__(self, stage: Stage, host: Host, kernels: list[str]) -> None:
        super().__init__(stage, Machine(host, Domain(name="web1", firmware="ovmf", disk=Path(DISK))))
        self.host = host
        self.kernels = kernels
        (host.root / DESK).mkdir()
        self.files = [f"linux-{release(package).split('-cloud')[0]}.efi" for package in kernels]
        self.policy = ""
        self.results: list[tuple[str, str, str, str]] = []

    # -- the story ------------------------------------------------------------------------------

    def play(self) -> None:
        self.install()
        self.build_guest()
        self.reference_boot()
        self.certify()
        self.opt_in()
        self.seal()
        self.certified_update()
        self.uncertified_kernel()

    def install(self) -> None:
        self.stage.chapter(
            "Install",
            "The host below is one of its own: private namespaces, its own libvirtd, network and files. Nothing of\n"
            "this machine's libvirt is touched. What is installed is a hook and a directory first in libvirtd's PATH.",
        )
        self.on_host("swtpm-prop install")
        self.host.libvirtd.restart()
        self.stage.say("libvirtd is restarted. The index comes in chapter 4.")

    def build_guest(self) -> None:
        self.stage.chapter(
            "A guest, as Debian makes it",
            "Three kernels from the Debian archive, each made a unified kernel image with systemd's stub and an\n"
            "initramfs of busybox and Debian's tpm2-tools. OVMF boots the first from the disk's EFI partition.",
        )
        with self.stage.working("building the kernel images and a disk"):
            desk = self.host.root / DESK
            for package, file in zip(self.kernels, self.files, strict=True):
                shutil.copyfile(image.unified_kernel(package), desk / file)
            image.disk(desk / self.files[0], self.host.root / DISK.lstrip("/"))
            self.host.put(f"/{DESK}/web1.xml", self.machine.domain.xml())
        self.on_host("ls -sh *.efi")
        self.on_host("virsh -q define web1.xml")

    def reference_boot(self) -> None:
        self.stage.chapter(
            "A reference boot",
            "The guest is still an ordinary one. Its owner boots it once, looks at it, and keeps the event log: the\n"
            "firmware's own list of what it measured. This is the usual TPM: one bank, full of hashes.",
        )
        self.boot()
        self.show_pcrs()
        self.stage.say("The event log, handed to the certifier:")
        log = self.machine.event_log()
        (self.host.root / DESK / "reference.log").write_bytes(log)
        self.on_host("tpm2_eventlog reference.log 2>/dev/null | grep -c EventNum")
        self.on_host("virsh -q destroy web1")

    def certify(self) -> None:
        self.stage.chapter(
            "Certify",
            "A certifier states, signed: what has these digests has this property. The operator says whom to believe\n"
            "for which properties, and builds the index that guests are judged by. Signatures are verified here, once.",
        )
        self.on_host("openssl genpkey -algorithm ed25519 -out images.key")
        self.on_host("openssl pkey -in images.key -pubout -out /etc/swtpm-prop/images.pem")
        self.host.put("/etc/swtpm-prop/trust.toml", TRUST)
        self.on_host("cat /etc/swtpm-prop/trust.toml")
        self.issue("--event-log reference.log", "reference.json")
        self.on_host("swtpm-prop store build reference.json")

    def opt_in(self) -> None:
        self.stage.chapter(
            "Opt the guest in",
            "A few lines of metadata in its domain XML are all. The value that its property PCRs will have is known\n"
            "now, from the property's name alone, and so is the policy to seal to.",
        )
        self.on_host(f"swtpm-prop domain enable web1 --property {PROPERTY}")
        self.on_host("virsh dumpxml web1 | sed -n '/<metadata>/,/<.metadata>/p'")
        self.held = self.on_host(f"swtpm-prop pcr predict --property {PROPERTY}").strip()
        predict = f"swtpm-prop pcr predict --property {PROPERTY} --policy --pcrs {PROPERTIES.pcrs}"
        self.policy = self.on_host(predict).strip()

    def seal(self) -> None:
        self.stage.chapter(
            "Seal",
            "The same guest, the same kernel, now opted in. The sha256 bank is what it was; the sha384 bank records\n"
            "properties. Stock tpm2-tools seal one secret to each, over the same PCRs.",
        )
        self.boot()
        before, now = self.last, self.show_pcrs()
        self.stage.promise("the raw bank is what it was without us", now["sha256"] == before["sha256"])
        self.check_states(now, broken=set())
        self.machine.console.put("/run/secret", SECRET.encode())
        for seal, what in (
            (RAW, "To the raw bank:"),
            (PROPERTIES, "To the property bank, which is all the difference:"),
        ):
            self.stage.say(what)
            for line in seal.lines("/run/secret"):
                self.in_guest(line)
        policy = self.machine.console.get(PROPERTIES.policy).hex()
        self.stage.promise("the policy is the one predicted", policy == self.policy)
        self.unseal_both("by its reference boot", raw=True, properties=True)
        self.on_host("virsh -q destroy web1")

    def certified_update(self) -> None:
        self.stage.chapter(
            f"A kernel update: {release(self.kernels[1])}",
            "The certifier certifies the new image from its file, before it ever ran. The operator rebuilds the\n"
            "index. Then the guest's kernel is replaced. The guest's TPM is not told anything.",
        )
        self.issue(f"--uki {self.files[1]}", "update.json")
        self.on_host("swtpm-prop store build reference.json update.json")
        self.replace_kernel(self.files[1])
        self.boot()
        self.check_states(self.show_pcrs(), broken=set())
        self.unseal_both("from its file", raw=False, properties=True)
        self.on_host("virsh -q destroy web1")

    def uncertified_kernel(self) -> None:
        self.stage.chapter(
            f"A kernel that nobody certified: {release(self.kernels[2])}",
            "A genuine Debian kernel too, but nobody vouched for it: unknown is broken. It may run; the secret stays.",
        )
        self.replace_kernel(self.files[2])
        self.boot()
        self.check_states(self.show_pcrs(), broken=KERNEL_PCRS)
        self.unseal_both("no", raw=False, properties=False)
        self.stage.say("The host knows which measurements broke it:")
        status, _ = self.attempt_on(self.host, "swtpm-prop domain status web1")
        self.stage.promise("exit status 1 says that the guest is not held", status == 1)
        said = self.on_host(f"swtpm-prop domain log web1 | {NOT_CERTIFIED}")
        self.stage.promise("the log names what broke PCR 4", said.startswith("PCR 4 ") and "unknown" in said)
        self.on_host("virsh -q destroy web1")

    def summary(self) -> None:
        output.table(("kernel", "certified", "raw bank", "property bank"), self.results)

    # -- what recurs ----------------------------------------------------------------------------

    def issue(self, source: str, certificate: str) -> None:
        self.on_host(
            f"swtpm-prop cert issue --issuer {ISSUER} --key images.key \\\n"
            f"      --property {PROPERTY} \\\n"
            f"      {source} --output {certificate} | cut -c1-100 | sed -n 1,12p"
        )

    def unseal_both(self, certified: str, *, raw: bool, properties: bool) -> None:
        """Try both banks on the kernel that runs now, knowing what must come of it."""
        raw_word = self.unseal("raw", RAW, possible=raw)
        property_word = self.unseal("property", PROPERTIES, possible=properties)
        self.results.append((self.machine.console.check("uname -r").strip(), certified, raw_word, property_word))

    def on_host(self, line: str) -> str:
        return self.on(self.host, line)


def release(package: str) -> str:
    """The kernel release of a Debian kernel package."""
    return kernel(package).name.removeprefix("vmlinuz-")


def main() -> int:
    """Play it; 0 if everything was as promised."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    stage = Stage()
    click.secho("swtpm-prop: a TPM that records properties, beside the one that records hashes", bold=True)
    click.echo("A guest's secret is to survive every certified kernel update, and no other. Watch the two banks.")
    click.echo("Then the guest moves, live, with its TPM: to a host whose own TPM shows a good state, and to no other.")
    try:
        with stage.working("fetching three kernels from the Debian archive, if not here yet"):
            kernels = guest.kernels(3)
        with laboratory("host-a", "host-b", "host-c") as (work, hosts):
            demo = Demo(stage, hosts[0], kernels)
            demo.play()
            fleet = FleetDemo(demo, work, hosts, demo.files[1])
            fleet.play()
            stage.chapter(
                "What was shown", "One secret, sealed once to each bank, by stock tools in an unchanged guest."
            )
            demo.summary()
            click.echo()
            fleet.summary()
    except LabError as error:
        stage.promise(str(error), kept=False)
    except KeyboardInterrupt:
        click.echo("\ninterrupted")
        return 130
    return stage.end(f"Nothing stays on this machine but what was downloaded and built for it, in {cache()}.")


if __name__ == "__main__":
    sys.exit(main())
