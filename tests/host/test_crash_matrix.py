"""Every step of a transfer, and in the moment it is written down something dies, on either side, or the network goes.

Afterwards exactly one host can run the guest, with the TPM it had, and nothing is left open; the table says how it came
out. What is killed is started again as a service manager would; guests are not.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product as combinations
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import connect_all
from faults import Faults, Trap
from fleet import Fleet, unfinished
from inside import Identity, identity, key_of, state_of
from product import Product, at, processes
from waiting import eventually

from lab.domain import Domain
from lab.host import Host, laboratory
from lab.process import LabError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Transfer

pytestmark = [pytest.mark.host, pytest.mark.fault]

STEPS = (
    ("destination", "asked"),
    ("source", "offered"),
    ("destination", "imported"),
    ("destination", "arriving"),
    ("destination", "activated"),
    ("source", "moved"),
    ("source", "yielded"),
    ("source", "released"),
    ("destination", "settled"),
)
"""In their order; a source passes through moved only when the destination says nothing."""

VICTIMS = ("hook", "agent", "libvirtd", "qemu", "swtpm", "power")
FAULTS = [f"{victim} of the {side}" for victim, side in combinations(VICTIMS, ("source", "destination"))]
FAULTS += ["lone hook of the destination", "network"]
"""A lone hook has no agent beside it, and does itself what that does for it otherwise."""

THERE = {
    "hook of the source": ("moved", "released"),  # it takes no part until the guest has gone
    "hook of the destination": ("asked", "offered", "imported", "arriving"),
    "lone hook of the destination": ("asked", "offered", "imported"),
    "agent of the destination": tuple(state for _, state in STEPS if state != "moved"),
    "qemu of the source": ("asked", "offered", "imported", "arriving", "activated"),
    "swtpm of the source": ("asked", "offered", "imported", "arriving", "activated"),
    "qemu of the destination": ("arriving", "activated", "moved", "yielded", "released", "settled"),
    "swtpm of the destination": ("arriving", "activated", "moved", "yielded", "released", "settled"),
}
"""The steps at which there is such a process to kill."""

PATIENCE = 60
"""For how many seconds a transfer may come by another way than that on which the fault awaits it, or to nothing.

Right after a fault it may: an agent whose libvirt was killed looks for another every few seconds.
"""

LEAVING = {("qemu of the source", "activated"), ("swtpm of the source", "activated")}
"""Faults and steps where libvirt ends the process itself in that moment; on a busy machine it may always be first."""
LEAVING_PATIENCE = 15

PROGRAMS = {"qemu": ("qemu-system-x86_64", b""), "swtpm": ("swtpm", b"-swtpm.sock")}
"""What runs, and a word of its command line: swtpm_setup waits forever for a swtpm of its own that is killed."""

DESTROY = "virsh destroy"
RESOLVE = re.compile(r"swtpm-prop (transfer resolve \S+ --(?:here|there))")


START, RESTART, CLEAR, DECIDE = "1234"


class Result(NamedTuple):
    """How a case came out: where the guest is now, ``source`` or ``destination``, and what people had to do for it.

    That is: START it, stop and start it (RESTART), destroy a process that stands still (CLEAR), say ``transfer
    resolve`` and start it (DECIDE).
    """

    place: str
    took: str


class Site:
    """Two hosts with traps, and one guest that goes from one to the other."""

    def __init__(self, fleet: Fleet, faults: dict[str, Faults]) -> None:
        self.fleet = fleet
        self.hosts = [member.host for member in fleet.members.values()]
        self.faults = faults
        self.dead: list[Callable[[], object]] = []
        self.pursuits: list[Pursuit] = []
        self.begin()

    def begin(self) -> None:
        """A new guest, which nothing has happened to."""
        self.machine = self.fleet.define(self.hosts[0], Domain(name="crash", memory=64))
        self.machine.start()
        self.xml = self.machine.host.virsh("dumpxml", "--inactive", self.uuid)
        self.key = key_of(self.machine)  # goes with the guest, and is always the same
        self.identity = self.look()

    def look(self) -> Identity:
        """Whose TPM it is that the guest has where it is now."""
        return identity(state_of(self.machine), self.key)

    @property
    def uuid(self) -> str:
        return self.machine.domain.uuid

    @property
    def source(self) -> Host:
        return self.machine.host

    @property
    def destination(self) -> Host:
        return next(host for host in self.hosts if host is not self.machine.host)

    def side(self, name: str) -> Host:
        return self.source if name == "source" else self.destination

    # -- one case -------------------------------------------------------------------------------

    def run(self, side: str, state: str, fault: str) -> Result | None:
        """Migrate with the fault at the step; None if what is leaving was always gone already."""
        leaving = (fault, state) in LEAVING
        deadline = time.monotonic() + (LEAVING_PATIENCE if leaving else PATIENCE)
        while time.monotonic() < deadline:
            if result := self.attempt(side, state, fault):
                return result
        if leaving:
            return None
        raise AssertionError(f"no transfer came to '{state}' of the {side} with a {fault} to hit")

    def attempt(self, side: str, state: str, fault: str) -> Result | None:
        """Migrate once; None if there was no such step or nothing to kill."""
        source, destination = self.source, self.destination
        hit: list[bool] = []
        trap = self.faults[self.side(side).name].set(
            self.uuid, side, state, lambda writer: hit.append(self.inject(fault, side, str(writer)))
        )
        if state == "moved" or fault.startswith("lone"):
            # the source sees that it moved before it hears of it only while the destination's agent is away
            self.fleet.members[destination.name].agent.stop()
            self.dead.append(self.fleet.members[destination.name].agent.restart)
        self.migrate(source, destination)
        self.await_(trap)
        hit += [pursuit.end() for pursuit in self.pursuits]
        self.pursuits.clear()
        self.heal()
        assert not [error for each in self.faults.values() for error in each.errors]
        result = self.judge(source, destination)
        return result if hit and all(hit) else None

    def await_(self, trap: Trap) -> None:
        """Until the fault has happened, or cannot any more."""
        eventually(lambda: trap.sprung.is_set() or (not self.open() and trap.empty), pause=0.05)
        for each in self.faults.values():
            each.clear(self.uuid)

    def begin_anew(self) -> None:
        """Whatever state everything is in: switch both hosts off and on, and take the guest off them for another."""
        for each in self.faults.values():
            each.clear(self.uuid)
            each.errors.clear()
        for pursuit in self.pursuits:
            pursuit.end()
        self.pursuits.clear()
        self.dead.clear()
        self.cable("up")
        layout = Layout()
        places = (layout.guest_tpm(self.uuid).parent, layout.guest_key(self.uuid), layout.transfers / self.uuid)
        for host in self.hosts:
            self.power_on(host)
            if self.uuid in host.virsh("list", "--all", "--uuid"):
                host.virsh("undefine", self.uuid)
            self.fleet.members[host.name].agent.stop()
            host.run(["rm", "-rf", *places, layout.guest_marker(self.uuid)])
            self.fleet.members[host.name].agent.start()
        self.begin()

    def migrate(self, source: Host, destination: Host) -> None:
        """Try it; what virsh says of it is often not what came of it."""
        uri = f"qemu+tcp://{destination.name}/system"
        words = ["--live", "--p2p", "--persistent", "--undefinesource", "--unsafe"]
        line = ["virsh", "-q", "-c", "qemu:///system", "migrate", self.uuid, uri, *words]
        source.run(line, check=False, timeout=180)

    def inject(self, fault: str, writing: str, writer: str) -> bool:
        """Let it happen, now; False if what was to die is not there.

        Args:
            fault: one of FAULTS.
            writing: the side of the process that has written the state.
            writer: its number there.
        """
        if fault == "network":
            self.cable("down")
            # so long that the one who waits for the other gives up
            threading.Timer(4, self.cable, ("up",)).start()
            return True
        victim, side = fault.removeprefix("lone ").split(" of the ")
        host = self.side(side)
        agent = self.fleet.members[host.name].agent
        if victim == "power":
            host.run(["sh", "-c", "kill -9 -1"], check=False)
            self.dead.insert(0, lambda: self.power_on(host))  # before anything that needs it
        elif victim == "agent":
            self.kill(host, str(agent.pid))
            self.dead.append(agent.restart)
        elif victim == "libvirtd":
            self.kill(host, str(host.libvirtd.pid))
            self.dead.append(host.libvirtd.start)
        elif victim == "hook":
            # that which has written; or that which waits: for the other side, or for the agent beside it
            waits = side != writing or (side == "destination" and writer == str(agent.pid))
            return self.kill_all(host, [found for found in hooks(host) if waits or found == writer])
        elif not self.kill_all(host, self.mine(host, victim)):
            # whoever waits for us is about to start it: killed a moment later, in the middle of what it receives
            self.pursuits.append(Pursuit(lambda: self.kill_all(host, self.mine(host, victim))))
        return True

    def kill_all(self, host: Host, found: list[str]) -> bool:
        """Kill these; whether there are any."""
        for number in found:
            self.kill(host, number)
        return bool(found)

    def heal(self) -> None:
        """What a service manager does, and who puts the cable back."""
        assert eventually(lambda: "state UP" in self.source.run(["ip", "link", "show", self.link]).stdout)
        for revive in self.dead:
            revive()
        self.dead.clear()

    def judge(self, source: Host, destination: Host) -> Result:
        """Find the guest, see that only one host can have it, and leave it running there."""
        names = {source.name: "source", destination.name: "destination"}
        took = ""
        eventually(lambda: len(self.present()) < 2 and not self.open(), pause=0.05)
        running = self.running()
        assert len(running) < 2, "the guest runs twice"
        if not running:
            started, took = self.start_anywhere(source, destination)
            running = [started]
        here = running[0]
        elsewhere = source if here is destination else destination
        if elsewhere in self.present():
            # libvirt came back to a process that stands still after a migration, and leaves it to people
            took += self.clear_away(elsewhere)
        if self.has_something(elsewhere):
            assert not self.start(elsewhere), f"it can be started on the {names[elsewhere.name]} too"
        assert self.running() == [here]
        self.machine.host = here
        before, self.identity = self.identity, self.look()
        assert self.identity.endorsement == before.endorsement, "the guest has another TPM"
        assert self.identity.starts >= before.starts, "the guest has an older state of its TPM"
        if self.uuid in elsewhere.virsh("list", "--all", "--uuid"):
            elsewhere.virsh("undefine", self.uuid)
        assert eventually(lambda: not self.open(), 60, pause=0.05), self.open()
        if not self.mine(here, "swtpm"):  # its swtpm was the victim, which libvirt does not notice
            self.machine.destroy()
            assert self.start(here)
            took += RESTART
        return Result(names[here.name], took)

    def clear_away(self, host: Host) -> str:
        shown = host.cli("transfer", "show", self.uuid).stdout
        assert DESTROY in shown, shown + str(host.virsh("domstate", "--reason", self.uuid))
        host.virsh("destroy", self.uuid)
        return CLEAR

    def start_anywhere(self, source: Host, destination: Host) -> tuple[Host, str]:
        said = {}
        for host in (source, destination):
            if self.has_something(host):
                said[host.name] = self.start(host, refusal=True)
                if not said[host.name]:
                    return host, START
        for host in (source, destination):
            if command := RESOLVE.search(str(said.get(host.name))):
                host.cli(*command[1].split())
        for host in (source, destination):
            if self.has_something(host) and not self.start(host, refusal=True):
                return host, DECIDE
        raise AssertionError(f"no host can start the guest: {said}")

    def start(self, host: Host, refusal: bool = False) -> bool | str:
        """Define and start it; whether it starts, or (``refusal``) why it does not, empty if it does."""
        if self.uuid not in host.virsh("list", "--all", "--uuid"):
            host.put("/run/crash.xml", self.xml)
            host.virsh("define", "/run/crash.xml")
        try:
            host.virsh("start", self.uuid)
        except LabError as error:
            return str(error) if refusal else False
        return "" if refusal else True

    # -- what is there --------------------------------------------------------------------------

    def present(self) -> list[Host]:
        return [host for host in self.hosts if self.uuid in host.virsh("list", "--uuid")]

    def running(self) -> list[Host]:
        return [host for host in self.present() if host.virsh("domstate", self.uuid).strip() == "running"]

    def has_something(self, host: Host) -> bool:
        """Whether anything of the guest is on the host: without, a start there would be that of another guest."""
        layout = Layout()
        places = (layout.guest_key(self.uuid), layout.guest_tpm(self.uuid).parent)
        return self.uuid in host.virsh("list", "--all", "--uuid") or any(at(host, place).exists() for place in places)

    def open(self) -> list[Transfer]:
        """What is not finished, by the hosts' own journals: 'transfer list' says the same, and takes longer."""
        return [each for host in self.hosts for each in unfinished(host) if each.uuid == self.uuid]

    def mine(self, host: Host, victim: str) -> list[str]:
        program, word = PROGRAMS[victim]
        return [process.name for process in processes(host, program) if word in command(process)]

    def kill(self, host: Host, number: str) -> None:
        host.run(["kill", "-9", number], check=False)

    @property
    def link(self) -> str:
        return next(path.name for path in Path(self.hosts[0].root / "sys/class/net").glob("lab*"))

    def cable(self, state: str) -> None:
        self.hosts[0].run(["ip", "link", "set", self.link, state])

    def power_on(self, host: Host) -> None:
        self.fleet.members[host.name].reboot()
        self.faults[host.name].listen()


class Pursuit:
    """Kills something whenever it is there; a program that becomes a daemon is there twice."""

    def __init__(self, kill: Callable[[], bool]) -> None:
        self._ended = threading.Event()
        self._killed = False
        self._thread = threading.Thread(target=self._pursue, args=(kill,), daemon=True)
        self._thread.start()

    def end(self) -> bool:
        """Give up; whether it was killed. Nothing more is when this returns."""
        self._ended.set()
        self._thread.join()
        return self._killed

    def _pursue(self, kill: Callable[[], bool]) -> None:
        while not self._ended.wait(0.01):
            self._killed |= kill()


def hooks(host: Host) -> list[str]:
    """The processes of the product's hook."""
    return [found.name for found in (host.root / "proc").glob("[0-9]*") if b"swtpm_prop.hook" in command(found)]


def command(process: Path) -> bytes:
    """The command line of a process, by its directory below /proc; nothing if it has ended."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        work, hosts = stack.enter_context(laboratory("east", "west"))
        connect_all(hosts)
        for host in hosts:
            impatient(host)
            host.install_product()
        faults = {host.name: stack.enter_context(Faults(host)) for host in hosts}
        product = Product(work, hosts)
        product.build()
        made = Site(Fleet(work, product, hosts), faults)
        yield made
        made.machine.remove()


def impatient(host: Host) -> None:
    """Let libvirt give up on a silent host in seconds."""
    for file in ("libvirtd.conf", "qemu.conf"):
        path = f"/etc/libvirt/{file}"
        host.put(path, host.read(path) + "keepalive_interval = 1\nkeepalive_count = 2\n")


Table = dict[tuple[tuple[str, str], str], Result | None]
"""Step and fault, and how that came out."""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Filled by the cases, shown at the end."""
    results: Table = {}
    yield results
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nWhere the guest runs after a fault in the moment of a step (the source's steps are in capitals):")
        print("s source, d destination; 1 once started again, 2 once stopped and started, 3 once what stood still")
        print("was destroyed, 4 once 'transfer resolve' was said; - no such process then\n")
        print(" " * 28 + "".join(f"{state.upper() if side == 'source' else state:>10}" for side, state in STEPS))
        for fault in FAULTS:
            print(f"{fault:28}" + "".join(f"{_cell(results.get((step, fault))):>10}" for step in STEPS))


def _cell(result: Result | None) -> str:
    return "-" if result is None else result.place[0] + result.took


@pytest.mark.parametrize("step", STEPS, ids="-".join)
def test_one_host_has_the_guest_whatever_dies(site: Site, table: Table, step: tuple[str, str]):
    for fault in FAULTS:
        if step[1] in THERE.get(fault, [step[1]]):
            try:
                table[step, fault] = site.run(*step, fault)
            except Exception as error:
                error.add_note(f"{'-'.join(step)}, {fault}")
                site.begin_anew()  # the steps that follow have nothing to do with it
                raise
