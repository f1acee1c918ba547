"""What an installation consists of: a pure function from facts about the host to directories, files and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from string import Template

from swtpm_prop.emulator import shims
from swtpm_prop.emulator.real import PATH
from swtpm_prop.hook import script
from swtpm_prop.layout import Layout

DAEMONS = ("libvirtd", "virtqemud")
"""The daemons that start swtpm: the monolithic one and, since libvirt 5.6, the modular one."""

APPARMOR = PurePosixPath("/etc/apparmor.d")
SYSTEMD = PurePosixPath("/etc/systemd/system")


@dataclass(frozen=True)
class Host:
    """The facts a plan depends on.

    Args:
        python: interpreter that has the package, as the host names it.
        preload: the shared object that is loaded into swtpm.
        prefix: directory with that interpreter's packages.
        package: directory of this package.
        guest_profile: text of AppArmor's ``abstractions/libvirt-qemu``; None without it.
        daemon_profiles: names of the daemons' profiles below /etc/apparmor.d.
        swtpm_profile: swtpm has a profile of its own (Ubuntu) that guests' swtpm changes to.
    """

    python: Path
    preload: Path
    prefix: Path
    package: Path
    guest_profile: str | None = None
    daemon_profiles: tuple[str, ...] = ()
    swtpm_profile: bool = False


@dataclass(frozen=True)
class Directory:
    """A directory; ``mode`` is kept up only where the directory is the product's own, else None."""

    path: PurePosixPath
    mode: int | None = None


@dataclass(frozen=True)
class File:
    """A whole file."""

    path: PurePosixPath
    content: bytes
    mode: int = 0o644


@dataclass(frozen=True)
class Block:
    """Marked lines at the head of a file that others write to as well."""

    path: PurePosixPath
    content: bytes


Step = Directory | File | Block


def plan(host: Host) -> tuple[Step, ...]:
    """The steps in the order they are safe in: what is called before what calls it, the daemon's PATH last."""
    pieces = (*_programs(host), *_apparmor(host), *_sync(host), *_agent(host), *_services())
    return (*_directories(), *_parents(pieces), *pieces)


def _directories() -> Iterator[Directory]:
    """The product's own directories, that of the manifest first.

    swtpm's user must pass through them, so 0711 where it need not list.
    """
    layout = Layout()
    modes = {
        layout.state: 0o711,
        layout.index.parent: 0o755,
        layout.guests: 0o711,
        layout.etc: 0o755,
        layout.run: 0o755,
        layout.logs: 0o755,
        layout.libexec: 0o755,
    }
    for path, mode in modes.items():
        yield Directory(PurePosixPath(path), mode)


def _parents(pieces: tuple[File | Block, ...]) -> Iterator[Directory]:
    own = {d.path for d in _directories()}
    for parent in dict.fromkeys(piece.path.parent for piece in pieces):
        if parent not in own:
            yield Directory(parent)


def _programs(host: Host) -> Iterator[File]:
    layout = Layout()
    for name in ("swtpm_setup", "swtpm"):
        text = shims.render(name, host.preload, layout)
        yield File(PurePosixPath(layout.libexec / name), text.encode(), 0o755)
    yield File(PurePosixPath(layout.hook), script.render(host.python, layout).encode(), 0o755)


def _sync(host: Host) -> Iterator[File]:
    """Units that follow a store; the operator who has one enables the timer."""
    at = Layout()
    program = host.prefix / "bin/swtpm-prop"
    service = _text("sync.service", etc=at.etc, program=program, state=at.state, run=at.run)
    yield File(SYSTEMD / "swtpm-prop-sync.service", service)
    yield File(SYSTEMD / "swtpm-prop-sync.timer", _text("sync.timer"))


def _agent(host: Host) -> Iterator[File]:
    """The unit of the agent; who has a fleet enables it."""
    at = Layout()
    program = host.prefix / "bin/swtpm-prop"
    tpms = at.guest_tpm("").parent
    unit = _text("agent.service", fleet_ca=at.fleet_ca, program=program, state=at.state, run=at.run, tpms=tpms)
    yield File(SYSTEMD / "swtpm-prop-agent.service", unit)


def _services() -> Iterator[File]:
    layout = Layout()
    yield File(PurePosixPath("/etc/tmpfiles.d/swtpm-prop.conf"), _text("tmpfiles.conf", run=layout.run))
    drop_in = _text("systemd.conf", libexec=layout.libexec, path=PATH)
    for daemon in DAEMONS:
        yield File(SYSTEMD / f"{daemon}.service.d/swtpm-prop.conf", drop_in)


def _apparmor(host: Host) -> Iterator[File | Block]:
    for name in host.daemon_profiles:
        yield Block(APPARMOR / "local" / name, marked(_text("apparmor-daemon", libexec=Layout().libexec)))
    guest = _guest_rules(host)
    if host.swtpm_profile:
        yield Block(APPARMOR / "local/usr.bin.swtpm", marked(guest))
    if host.guest_profile is None:
        return
    if "abstractions/libvirt-qemu.d" in host.guest_profile:
        yield File(APPARMOR / "abstractions/libvirt-qemu.d/swtpm-prop", guest)
    else:
        yield Block(APPARMOR / "local/abstractions/libvirt-qemu", marked(guest))


def _guest_rules(host: Host) -> bytes:
    at = Layout()
    return _text(
        "apparmor-guest",
        libexec=at.libexec,
        preload=host.preload,
        prefix=host.prefix,
        package=host.package,
        state=at.state,
        run=at.run,
        logs=at.logs,
    )


def _text(name: str, **values: object) -> bytes:
    template = files("swtpm_prop.install").joinpath("texts", name).read_text(encoding="utf-8")
    return Template(template).substitute(values).encode()


BEGIN = b"# BEGIN swtpm-prop\n"
END = b"# END swtpm-prop\n"


def marked(content: bytes) -> bytes:
    """``content`` (whole lines) between the lines by which it is found again."""
    return BEGIN + content + END


def find_block(text: bytes) -> tuple[int, int] | None:
    """Where the marked lines begin and end in ``text``; None without both markers."""
    start = text.find(BEGIN)
    end = text.find(END, start)
    if start < 0 or end < 0:
        return None
    return start, end + len(END)
