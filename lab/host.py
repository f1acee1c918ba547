"""One libvirt host in namespaces of its own; of the machine it only reads."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lab import cgroup
from lab.libvirtd import Libvirtd
from lab.process import ENVIRONMENT, LabError, run

REPOSITORY = Path(__file__).resolve().parent.parent
GRAFTS = ("/var/lib", "/var/log", "/var/cache", "/usr/libexec")
NOT_FROM_THE_MACHINE = tuple(
    f"{place}/{name}" for place in GRAFTS for name in ("libvirt", "swtpm", "swtpm-localca", "swtpm-prop")
)
NOT_IN_ETC = ("libvirt", "swtpm-prop", "systemd/system/libvirtd.service.d", "systemd/system/virtqemud.service.d")
DIRECTORIES = (  # as the Debian packages leave them: path, mode, owner
    ("etc/libvirt/hooks", 0o755, "root"),
    ("var/lib/libvirt", 0o755, "root"),
    ("var/lib/libvirt/images", 0o711, "root"),
    ("var/lib/libvirt/qemu", 0o750, "libvirt-qemu"),
    ("var/lib/swtpm-localca", 0o750, "tss"),
    ("var/log/libvirt/qemu", 0o755, "root"),
    ("var/cache/libvirt/qemu", 0o711, "root"),
    ("usr/libexec", 0o755, "root"),
)
QEMU_CONF = """security_driver = "none"
stdio_handler = "file"
remember_owner = 0
cgroup_controllers = [ %s ]
"""

PREFIX = "swtpm-prop-lab."
SETTLED = 60.0  # seconds after which a laboratory's work directory without an owner has lost it

_links = itertools.count(1)


class Host:
    """A host: ``open()`` makes its namespaces, ``close()`` ends every process in them.

    It has its own /etc, /run, libvirt and swtpm directories, host name, network and processes, and shares the rest
    of the file system. ``libvirtd`` is its daemon. When the laboratory's process dies, so does the host.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self.tree = work / "hosts" / name
        self.libvirtd = Libvirtd(self)
        self._unshare: subprocess.Popen[str] | None = None
        self.pid = 0
        self.cgroup: cgroup.Cgroup | None = None

    def __enter__(self) -> Host:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """The host's file system, seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def open(self) -> None:
        self.cgroup = cgroup.create(f"{self.tree.parent.parent.name}.{self.name}")
        self._furnish()
        plan = {
            "name": self.name,
            "root": str(self.tree),
            "grafts": [*GRAFTS, *self._closed_directories()],
            "private": NOT_FROM_THE_MACHINE,
            "cgroup": self.cgroup and self.cgroup.version,
        }
        namespaces = ["-m", "-n", "-p", "-u", "-i"] + (["-C"] if self.cgroup else [])
        init = [sys.executable, "-I", str(Path(__file__).with_name("init.py")), json.dumps(plan)]
        unshare = ["unshare", *namespaces, "--fork", "--kill-child", "--mount-proc", "--propagation", "private", *init]
        self._unshare = subprocess.Popen(
            cgroup.joined(self.cgroup.root if self.cgroup else None, unshare),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            _, errors = self._unshare.communicate()
            raise LabError(f"host {self.name}: namespaces could not be made\n{errors}")
        parent = self._unshare.pid
        self.pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())

    def close(self) -> None:
        """End process 1 of the host, with it everything; safe to call twice."""
        if self._unshare is not None:
            assert self._unshare.stdin is not None
            self._unshare.stdin.close()
            try:
                self._unshare.wait(5)
            except subprocess.TimeoutExpired:
                self._unshare.kill()
                self._unshare.wait()
            for stream in (self._unshare.stdout, self._unshare.stderr):
                assert stream is not None
                stream.close()
            self._unshare = None
        if self.cgroup is not None:
            self.cgroup.remove()
            self.cgroup = None

    def inside(self, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs ``argv`` in this host (working directory ``/``)."""
        if not self.pid:
            raise LabError(f"host {self.name} is not open")
        flags = ["-m", "-n", "-p", "-u", "-i"] + (["-C"] if self.cgroup else [])
        return ["nsenter", "-t", str(self.pid), *flags, "--", *map(str, argv)]

    def run(
        self, argv: Sequence[str | Path], *, check: bool = True, stdin: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this host, with a plain environment."""
        return run(self.inside(argv), check=check, stdin=stdin, env=ENVIRONMENT, timeout=timeout)

    def virsh(self, *words: str) -> str:
        """What ``virsh`` answers; LabError with libvirt's message where it refuses."""
        return self.run(["virsh", "-q", "-c", "qemu:///system", *words]).stdout

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run this environment's swtpm-prop in the host."""
        return self.run([Path(sys.prefix) / "bin/swtpm-prop", *words], check=check)

    def install_product(self, *words: str) -> None:
        """Put the product into this host's libvirt, as its operator would, and let the daemon see it."""
        self.cli("install", *words)
        if self.libvirtd.pid is not None:
            self.libvirtd.restart()

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the host (absolute path; directories are made)."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def read(self, path: str) -> str:
        """A text file of the host."""
        return (self.root / path.lstrip("/")).read_text(errors="replace")

    def _furnish(self) -> None:
        etc = self.tree / "etc"
        etc.mkdir(parents=True)
        run(["cp", "-a", "/etc/.", etc])
        for name in NOT_IN_ETC:
            shutil.rmtree(etc / name, ignore_errors=True)
        for path, mode, owner in DIRECTORIES:
            directory = self.tree / path
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
            shutil.chown(directory, owner)
        (etc / "machine-id").write_text(self._identity().hex + "\n")
        (etc / "hostname").write_text(self.name + "\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost {self.name}\n")
        (etc / "libvirt/libvirtd.conf").write_text(self.libvirtd.configuration(self._identity()))
        (etc / "libvirt/qemu.conf").write_text(QEMU_CONF % ('"cpu"' if self.cgroup else ""))

    def _identity(self) -> uuid.UUID:
        return uuid.uuid5(uuid.NAMESPACE_DNS, self.name)

    def _closed_directories(self) -> list[str]:
        """Directories on the way to the product that user tss may not pass, such as a clone's /root: opened here.

        The deepest come first: each takes what is below it along.
        """
        closed = {
            str(parent)
            for path in (Path(sys.prefix), REPOSITORY)
            for parent in path.parents
            if not parent.stat().st_mode & 0o001
        }
        for directory in closed:
            (self.tree / directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return sorted(closed, reverse=True)


def connect(one: Host, other: Host) -> None:
    """Join two hosts by a cable (a veth pair); each then resolves the other's name."""
    number = next(_links)
    ends = ((one, f"10.99.{number}.1"), (other, f"10.99.{number}.2"))
    name = f"lab{number}"
    one.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"])
    # the peer is moved from outside: only there do both hosts have process ids
    run(["nsenter", "-t", str(one.pid), "-n", "ip", "link", "set", f"{name}p", "netns", str(other.pid)])
    other.run(["ip", "link", "set", f"{name}p", "name", name])
    for host, address in ends:
        host.run(["ip", "addr", "add", f"{address}/24", "dev", name])
        host.run(["ip", "link", "set", name, "up"])
        hosts = host.read("/etc/hosts") + "".join(f"{a} {h.name}\n" for h, a in ends if h is not host)
        host.put("/etc/hosts", hosts)


@contextmanager
def laboratory(*names: str, parent: Path = Path("/var/tmp")) -> Iterator[tuple[Path, tuple[Host, ...]]]:
    """Hosts of these names with their daemons, each connected with the next; yields the work directory and the hosts.

    The work directory is made below ``parent`` and removed at the end; user tss and the emulator's user can pass it.
    What a laboratory that was killed left there is removed first.
    """
    _sweep(parent)
    work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    work.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work)
        stack.enter_context(_owned(work))
        hosts = tuple(stack.enter_context(Host(name, work)) for name in names)
        for one, other in itertools.pairwise(hosts):
            connect(one, other)
        for host in hosts:
            host.libvirtd.start()
        yield work, hosts


@contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Hold a lock on a work directory; BlockingIOError where a living laboratory has it."""
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{PREFIX}*"):
        # owned by a living laboratory, or just gone with one
        with suppress(BlockingIOError, FileNotFoundError):
            if left.stat().st_mtime < time.time() - SETTLED:
                with _owned(left):
                    for group in cgroup.left(left.name):
                        group.remove()
                    shutil.rmtree(left)
