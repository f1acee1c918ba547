"""What the parts of the demonstration share: shell lines on hosts and in the guest, and the guest's secret."""

from __future__ import annotations

import sys
from pathlib import Path

from lab import image
from lab.host import Host
from lab.machine import Machine
from lab.process import ENVIRONMENT
from lab.seal import Seal
from lab.stage import Answer, Pcrs, Stage, measured, refused, word
from swtpm_prop.cli import output

DESK = "run/demo"  # where the operator works on each host
DISK = "/var/lib/libvirt/images/web1.raw"
PROPERTY = "https://example.org/properties/debian-12-boot"
SECRET = "the key of web1's disk"
RAW, PROPERTIES = Seal("sha256", "0x81000001"), Seal("sha384", "0x81000002")


class Scene:
    """A guest and the stage it is shown on; ``held`` is the value of its property PCRs, once that is known."""

    def __init__(self, stage: Stage, machine: Machine) -> None:
        self.stage = stage
        self.machine = machine
        self.held = ""
        self.last: Pcrs = {}

    def on(self, host: Host, line: str) -> str:
        """A shell line of the operator's that must succeed; what it says."""
        return self.stage.command(host.name, line, lambda line: _operator(host, line))

    def attempt_on(self, host: Host, line: str) -> Answer:
        """One that may fail."""
        return self.stage.attempt(host.name, line, lambda line: _operator(host, line))

    def in_guest(self, line: str) -> str:
        """A shell line of the guest's owner that must succeed; what it says."""
        return self.stage.command("guest", line, self.machine.console.run)

    def boot(self) -> None:
        self.machine.console.attach(self.machine.host)
        self.on(self.machine.host, "virsh -q start web1")
        with self.stage.working("OVMF, systemd's stub, the kernel and a shell come up (emulated, so slowly)"):
            self.machine.console.wait_ready()
        self.in_guest("uname -r")

    def replace_kernel(self, file: str) -> None:
        self.on(self.machine.host, f"mcopy -o -i {DISK}@@1M {file} {image.BOOT}")

    def show_pcrs(self) -> Pcrs:
        now = self.machine.pcrs()
        self.stage.pcrs(self.last, now, PROPERTIES.bank, self.held)
        self.last = now
        return now

    def check_states(self, now: Pcrs, broken: set[int]) -> None:
        words = {pcr: word(now[PROPERTIES.bank][pcr], self.held) for pcr in measured(now)}
        wanted = {pcr: "broken" if pcr in broken else "held" for pcr in words}
        what = f"PCRs {', '.join(map(str, sorted(broken)))} are broken, the others held" if broken else "all are held"
        self.stage.promise(what, words == wanted)

    def unseal(self, name: str, seal: Seal, *, possible: bool) -> str:
        """Try one bank on the kernel that runs now, knowing what must come of it; the outcome in a word."""
        self.stage.say(f"Unseal from the {name} bank:")
        answer = self.stage.attempt("guest", seal.unseal, self.machine.console.run)
        if possible:
            self.stage.promise("it unseals", answer == (0, SECRET))
        else:
            self.stage.promise("it is refused", refused(answer))
        return output.paint("unseals", "green") if answer[0] == 0 else output.paint("refused", "red")


def _operator(host: Host, line: str) -> Answer:
    path = f"{Path(sys.prefix) / 'bin'}:{ENVIRONMENT['PATH']}"
    shell = ["env", f"PATH={path}", "bash", "-o", "pipefail", "-c", f"cd /{DESK}; {line}"]
    # away from the terminal: virsh would look for a polkit agent there
    done = host.run(["setsid", "-w", *shell], check=False)
    return done.returncode, done.stdout + done.stderr
