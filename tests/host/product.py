"""The product on laboratory hosts as people use it: certificates, index, guests and their state by the command line."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lab.host import Host
from lab.machine import Machine
from swtpm_prop.domain.pcrs import DEFAULT, parse_pcrs
from swtpm_prop.layout import Layout
from swtpm_prop.tpm.algorithms import BY_NAME
from swtpm_prop.tpm.pcr import READ_PCRS, build_pcr_read, parse_pcr_read

ISSUER = "https://example.org/images"
PROPERTY = "https://example.org/properties/boot"
TRANSLATED = sorted(parse_pcrs(DEFAULT))
TRUST = '[[issuer]]\nid = "{}"\nkeys = ["""{}"""]\nprefixes = ["https://example.org/properties"]\nthreshold = 1\n'

States = dict[int, str]
"""PCR to ``unmeasured``, ``held`` or ``broken``."""


class Product:
    """One certifier, whom the ``hosts`` trust, and their common index; ``work`` is seen by all of them."""

    def __init__(self, work: Path, hosts: Sequence[Host]) -> None:
        self._work = work
        self._hosts = hosts
        self._issued = 0
        self._key = work / "issuer.pem"
        hosts[0].run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", self._key])
        public = hosts[0].run(["openssl", "pkey", "-in", self._key, "-pubout"]).stdout
        for host in hosts:
            host.put(str(Layout().trust), TRUST.format(ISSUER, public))
        self.held = hosts[0].cli("pcr", "predict", "--property", PROPERTY).stdout.strip()
        self.other = self.certify("--file", self.content("other", b"of no guest"))

    def content(self, name: str, data: bytes) -> Path:
        """A file with ``data``, to certify or to measure."""
        path = self._work / name
        path.write_bytes(data)
        return path

    def certify(self, *sources: str | Path) -> Path:
        """A certificate for what is measured of ``sources``: options of ``cert issue`` and their files."""
        self._issued += 1
        path = self._work / f"certificate-{self._issued}.json"
        words = ("--issuer", ISSUER, "--key", self._key, "--property", PROPERTY, *sources, "--output", path)
        self._hosts[0].cli("cert", "issue", *map(str, words))
        return path

    def build(self, *certificates: Path) -> None:
        """Give every host an index of exactly these (none: one that certifies nothing any guest measures)."""
        for host in self._hosts:
            host.cli("store", "build", *map(str, certificates or (self.other,)))

    def enable(self, machine: Machine, *options: str) -> None:
        """Opt the guest in, from its next start on."""
        machine.host.cli("domain", "enable", *options, "--property", PROPERTY, "--", machine.domain.name)

    def status(self, machine: Machine) -> States:
        """What ``domain status`` says; its exit status must say whether one is broken."""
        done = machine.host.cli("domain", "status", "--json", "--", machine.domain.name, check=False)
        said = json.loads(done.stdout)
        assert said["failure"] == ""
        (states,) = said["states"].values()
        assert done.returncode == ("broken" in states.values())
        return {int(pcr): state for pcr, state in states.items()}

    def log(self, machine: Machine) -> list[dict[str, Any]]:
        """The property log of the guest's present start."""
        said = machine.host.cli("domain", "log", "--json", "--", machine.domain.name).stdout
        return [json.loads(line) for line in said.splitlines()]

    def states(self, machine: Machine) -> States:
        """The states of the translated PCRs as the guest reads them, whether it is shown the bank or not."""
        words = {"00" * 48: "unmeasured", self.held: "held"}
        values = read_bank(machine, "sha384")
        return {pcr: words.get(values[pcr], "broken") for pcr in TRANSLATED}

    def agreed(self, machine: Machine) -> States:
        """As ``states``, and ``domain status`` says the same."""
        states = self.states(machine)
        assert self.status(machine) == states
        return states


def read_bank(machine: Machine, bank: str) -> dict[int, str]:
    """All PCRs of a bank in hex, asked for by PCR_Read alone: no tool of the guest must find the bank listed."""
    pcrs = range(24)
    selections = [((BY_NAME[bank], tuple(pcrs[at : at + READ_PCRS])),) for at in pcrs[::READ_PCRS]]
    commands = " ".join(base64.b64encode(build_pcr_read(selection)).decode() for selection in selections)
    said = machine.console.check(
        f"for c in {commands}; do echo $c | base64 -d | tpm2_send | base64 -w0 || exit 1; echo; done"
    )
    values: list[bytes] = []
    for line, selection in zip(said.split(), selections, strict=True):
        values += parse_pcr_read(base64.b64decode(line), selection) or []
    return {pcr: value.hex() for pcr, value in zip(pcrs, values, strict=True)}


def extend(machine: Machine, pcr: int, content: bytes) -> None:
    """Let the guest measure ``content`` as its tools would: by a plain password, with the digests of both banks."""
    digests = ",".join(f"{bank}={hashlib.new(bank, content).hexdigest()}" for bank in ("sha256", "sha384"))
    machine.console.check(f"tpm2_pcrextend {pcr}:{digests}")


def expected(held: Iterable[int] = (), broken: Iterable[int] = ()) -> States:
    """The states of the translated PCRs when exactly these are held and broken."""
    held, broken = set(held), set(broken)
    return {pcr: "broken" if pcr in broken else "held" if pcr in held else "unmeasured" for pcr in TRANSLATED}


def run_directories(host: Host) -> list[str]:
    """What lies in the directory of what guests need for one start, and of keys on their way from hook to hook."""
    run, arriving = at(host, Layout().run), at(host, Layout().arriving)
    guests = [path.name for path in run.iterdir() if path.is_dir() and path != arriving]
    return sorted([*guests, *(path.name for path in arriving.glob("*"))])


def at(host: Host, path: Path) -> Path:
    """A path of the layout on a host, seen from outside."""
    return host.root / str(path).lstrip("/")


def processes(host: Host, program: str) -> list[Path]:
    """The directories below /proc of what runs ``program`` on the host."""
    found = []
    for process in (host.root / "proc").glob("[0-9]*"):
        try:
            if (process / "exe").readlink().name == program:
                found.append(process)
        except OSError:
            continue  # it has just ended
    return found
