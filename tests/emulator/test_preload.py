"""The layer inside a real swtpm, as user tss: it comes up or no TPM does, and callers see no other difference."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import tty
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import swtpm_prop
from swtpm_prop.domain.processes import has_layer
from swtpm_prop.emulator import shims
from swtpm_prop.tpm.algorithms import ALGORITHMS, SHA256, SHA384, Digest
from swtpm_prop.tpm.commands import build_pcr_extend, response_code
from swtpm_prop.tpm.pcr import build_pcr_read, parse_pcr_read
from swtpm_prop.translate.policy import BROKEN, HELD, UNMEASURED, Bank, state
from tests.certified import GOOD, PROPERTY
from tests.swtpm import (
    PATH,
    REAL,
    REAL_SETUP,
    STARTUP_CLEAR,
    USER,
    UUID,
    LayerHost,
    Tpm,
    manufacture,
    owned_directory,
)

pytestmark = pytest.mark.root

NewBase = Callable[[str], Path]
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
PCR_RESET_16 = bytes.fromhex("80020000001b0000013d00000010000000094000000900000000 00".replace(" ", ""))
RC_FAILURE = bytes.fromhex("80010000000a00000101")
POLICY = Bank(SHA384, frozenset(range(16)), True, (PROPERTY,))


def measure(data: bytes, pcr: int = 4) -> bytes:
    digests = [Digest(a, hashlib.new(a.name, data).digest()) for a in (SHA256, SHA384)]
    return build_pcr_extend(pcr, digests)


def property_state(tpm: Tpm, pcr: int = 4) -> str:
    selection = ((SHA384, (pcr,)),)
    values = parse_pcr_read(tpm.send(build_pcr_read(selection)), selection)
    assert values is not None, "the property bank is not active"
    return state(POLICY, values[0])


def run_as_user(arguments: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": {"PATH": PATH, "LANG": "C"}, "timeout": 20, **options}
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True, text=True, user=USER, group=USER, extra_groups=[], cwd="/", **options,
    )  # fmt: skip


def mapped(pid: int) -> set[str]:
    """Paths of the files mapped into a process."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/" in line}


def proc(tpm: Tpm, name: str) -> bytes:
    assert tpm.process is not None
    return Path(f"/proc/{tpm.process.pid}/{name}").read_bytes()


# -- the layer works ------------------------------------------------------------------------------


def test_measurements_are_judged_and_logged(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        seen = [property_state(tpm)]
        for data in (GOOD, GOOD, b"nobody certified this"):
            assert response_code(tpm.send(measure(data))) == 0
            seen.append(property_state(tpm))
    assert seen == [UNMEASURED, HELD, HELD, BROKEN]
    records = host.records()
    assert [record["recnum"] for record in records] == [0, 1, 2, 3]
    contents = [record["content"] for record in records]
    assert [content["event"] for content in contents] == ["startup", *["measurement"] * 3]
    assert [content["state"] for content in contents[1:]] == [HELD, HELD, BROKEN]
    assert [content["certified"] for content in contents[1:]] == [True, True, False]
    assert contents[3]["reason"] == "unknown"


def test_a_layer_is_seen_from_outside_while_it_is_there(host: LayerHost, new_base: NewBase) -> None:
    """``domain status`` and ``doctor`` rest on it."""
    host.opt_in()
    log = host.layout.guest_log(UUID)
    assert not has_layer(log)
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        assert has_layer(log)
        log.rename(log.with_suffix(".1"))
        log.touch()
        assert not has_layer(log)
    assert not has_layer(log.with_suffix(".1"))


def test_reset_and_restore_are_logged_and_need_no_state_of_ours(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        tpm.send(measure(GOOD))
        saved = tpm.snapshot()
        tpm.reset()
        assert tpm.send(STARTUP_CLEAR)[6:10] == bytes(4)
        assert property_state(tpm) == UNMEASURED
        tpm.restore(saved)
        assert property_state(tpm) == HELD
    events = [record["content"]["event"] for record in host.records()]
    assert events == ["startup", "measurement", "startup", "resume"]
    assert host.records()[-1]["content"]["states"]["sha384"]["4"] == HELD


def test_it_runs_inside_the_seccomp_filter_without_privileges(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        status = proc(tpm, "status").decode()
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status
        # a replaced index is opened anew, inside the filter
        Path(shutil.copy(host.layout.index, f"{host.layout.index}.new")).replace(host.layout.index)
        tpm.send(measure(GOOD))
        assert property_state(tpm) == HELD


def test_a_full_disk_does_not_disturb_the_tpm(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    layer = host.layout.guest_run(UUID) / "layer.json"
    layer.write_text(layer.read_text().replace(str(host.layout.guest_log(UUID)), "/dev/full"))
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        assert response_code(tpm.send(measure(GOOD))) == 0
        assert property_state(tpm) == HELD


# -- nothing a caller can see is different --------------------------------------------------------


def test_a_guest_that_did_not_opt_in_gets_the_plain_swtpm(host: LayerHost, new_base: NewBase) -> None:
    env = {"PATH": f"{host.layout.libexec}:{PATH}", "LANG": "C", "PWD": "/", "LD_LIBRARY_PATH": "/nowhere"}
    base = new_base("tpm")
    seen = []
    for program in (REAL, host.shim):
        with Tpm(base, program, env=env) as tpm:
            tpm.up()
            assert tpm.process is not None
            environment = set(proc(tpm, "environ").split(b"\0"))
            seen.append((proc(tpm, "cmdline"), environment, mapped(tpm.process.pid), proc(tpm, "comm")))
    assert seen[0] == seen[1]


def test_the_arguments_of_an_opted_in_guest_read_as_plain(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    base = new_base("tpm")
    with Tpm(base) as plain:
        arguments = proc(plain, "cmdline")
    with host.tpm(base) as tpm:
        assert proc(tpm, "cmdline") == arguments
        assert tpm.process is not None
        assert str(shims.preload_object()) in mapped(tpm.process.pid)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        [],
        ["nonsense"],
        ["socket", "--print-capabilities"],
        ["socket", "--print-capabilities", "--tpm2"],
        ["socket", "--print-states", "--tpm2", "--tpmstate", "{state}"],
        ["socket", "--tpm2", "--tpmstate", "{state}", "--nonsense"],
        ["socket", "--tpm2", "--tpmstate", "{state}", "--fd", "5"],
        ["socket", "--tpm2", "--tpmstate", "{state}", "--pid", "fd=5", "--server", "type=tcp,fd=7"],
        ["socket", "--tpm2", "--tpmstate", "{state}", "--ctrl", "type=unixio,path=/nowhere/sock"],
        ["socket", "--tpm2", "--tpmstate", "{state}", "--ctrl", "type=nonsense"],
        ["socket", "--tpm2", "--tpmstate", "{state},mode=nonsense", "--server", "type=tcp,port=0"],
        ["chardev", "--tpm2", "--tpmstate", "{state}", "--chardev", "/nowhere"],
        ["chardev", "--tpm2", "--tpmstate", "{state}"],
    ],
)
def test_answers_and_exit_codes_are_those_of_the_plain_swtpm(
    host: LayerHost, new_base: NewBase, arguments: list[str]
) -> None:
    host.opt_in()
    state = f"dir={new_base('tpm')}/{UUID}/tpm2"
    given = [argument.format(state=state) for argument in arguments]
    plain, ours = (run_as_user([program, *given]) for program in (REAL, host.shim))
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize("ask", [["--version"], ["--print-capabilities"], ["--tpm2", "--print-capabilities"], ["--zz"]])
def test_swtpm_setup_answers_as_the_plain_one(host: LayerHost, ask: list[str]) -> None:
    plain, ours = (run_as_user([program, *ask]) for program in (REAL_SETUP, host.setup_shim))
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_daemon_keeps_its_layer(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    base = new_base("tpm")
    pid_file, data = base / "pid", base / "data.sock"
    ran = run_as_user(
        [host.shim, "socket", "--tpm2", "--daemon", "--tpmstate", f"dir={base}/{UUID}/tpm2",
         "--pid", f"file={pid_file}", "--server", f"type=unixio,path={data}",
         "--flags", "not-need-init,startup-clear", "--terminate"]
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    pid = int(pid_file.read_text())
    assert str(shims.preload_object()) in mapped(pid)
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(data))
        channel.sendall(measure(GOOD))
        assert response_code(channel.recv(4096)) == 0
    assert host.records()[-1]["content"]["state"] == HELD
    wait_for_end(pid)


def test_tcp_and_inherited_descriptors(host: LayerHost, new_base: NewBase) -> None:
    """Data on an inherited socket, process id into an inherited file, end with the peer: as swtpm_setup starts it."""
    host.opt_in()
    base = new_base("tpm")
    ours, theirs = socket.socketpair()
    pid_file = os.open(base / "pid", os.O_RDWR | os.O_CREAT)
    again = os.dup(pid_file)
    tpm = Tpm(base, host.shim, env=host.env)
    tpm.arguments = [
        str(host.shim), "socket", "--tpm2", "--tpmstate", f"dir={tpm.state}", "--pid", f"fd={again}",
        "--server", f"type=tcp,fd={theirs.fileno()}", "--flags", "not-need-init,startup-clear",
    ]  # fmt: skip
    process = tpm.spawn(
        pass_fds=[theirs.fileno(), pid_file, again], preexec_fn=lambda: fcntl.lockf(pid_file, fcntl.LOCK_EX)
    )
    theirs.close()
    ours.settimeout(10)
    ours.sendall(measure(GOOD))
    assert response_code(ours.recv(4096)) == 0
    assert int((base / "pid").read_text()) == process.pid
    assert base / "pid" in [link.readlink() for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    ours.close()
    assert process.wait(10) == 0
    process.stderr.close()  # type: ignore[union-attr]
    os.close(pid_file)
    os.close(again)


def test_tcp_ports(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tpm = Tpm(new_base("tpm"), host.shim, env=host.env)
    tpm.arguments = [
        str(host.shim), "socket", "--tpm2", "--tpmstate", f"dir={tpm.state}", "--server", f"type=tcp,port={port}",
        "--flags", "not-need-init,startup-clear",
    ]  # fmt: skip
    process = tpm.spawn()
    channel = socket.socket()
    channel.settimeout(10)
    deadline = time.monotonic() + 5
    while channel.connect_ex(("127.0.0.1", port)) != 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    channel.sendall(measure(GOOD))
    assert response_code(channel.recv(4096)) == 0
    channel.close()
    process.terminate()
    process.communicate(timeout=10)
    assert host.records()[-1]["content"]["state"] == HELD


@pytest.mark.parametrize("way", ["terminal", "descriptor"])
def test_character_device(host: LayerHost, new_base: NewBase, way: str) -> None:
    host.opt_in()
    tpm = Tpm(new_base("tpm"), host.shim, env=host.env)
    ours, theirs = pty.openpty() if way == "terminal" else (end.detach() for end in socket.socketpair())
    device = ["--fd", str(theirs)]
    if way == "terminal":
        tty.setraw(theirs)
        shutil.chown(os.ttyname(theirs), USER)
        device = ["--chardev", os.ttyname(theirs)]
    tpm.arguments = [
        str(host.shim), "chardev", "--tpm2", "--tpmstate", f"dir={tpm.state}", "--flags", "not-need-init,startup-clear",
        *device,
    ]  # fmt: skip
    process = tpm.spawn(pass_fds=[theirs])
    os.write(ours, measure(GOOD))
    assert response_code(os.read(ours, 4096)) == 0
    os.close(ours)
    os.close(theirs)
    process.terminate()
    process.communicate(timeout=10)
    assert host.records()[-1]["content"]["state"] == HELD


def test_the_end_is_that_of_the_plain_swtpm(host: LayerHost, new_base: NewBase) -> None:
    """By signal, by the control channel, by --terminate when QEMU's data channel closes."""
    host.opt_in()
    base = new_base("tpm")

    def by_signal(tpm: Tpm) -> None:
        assert tpm.process is not None
        tpm.process.send_signal(signal.SIGTERM)

    def by_channel(tpm: Tpm) -> None:
        assert tpm.data is not None
        tpm.data.close()

    for options, end in (((), by_signal), ((), Tpm.shutdown), (("--terminate",), by_channel)):
        codes = []
        for tpm in (Tpm(base, options=options), host.tpm(base, options=options)):
            with tpm:
                tpm.up()
                end(tpm)
                assert tpm.process is not None
                codes.append((tpm.process.wait(10), tpm.control_path.exists()))
        assert codes[0] == codes[1]


# -- swtpm_setup ----------------------------------------------------------------------------------


def test_setup_activates_the_property_bank(host: LayerHost, directory: Path) -> None:
    """Both ways libvirt calls it: to make a state, and to reconfigure one; it works on the real swtpm."""
    host.opt_in()
    base = owned_directory(directory / "tpm")
    new = ["--tpm2", "--tpm-state", owned_directory(base / UUID / "tpm2"), "--createek", "--lock-nvram"]
    made = run_as_user([host.setup_shim, *new, "--not-overwrite"], env={**host.env, "HOME": str(base)})
    assert made.returncode == 0, made.stdout + made.stderr
    assert host.records() == []
    with host.tpm(base) as tpm:
        assert property_state(tpm.up()) == UNMEASURED

    other = directory / "other"
    manufacture(other, "sha256")
    again = ["--tpm2", "--tpm-state", other / UUID / "tpm2", "--reconfigure", "--pcr-banks", "sha256"]
    changed = run_as_user([host.setup_shim, *again], env={**host.env, "HOME": str(base)})
    assert changed.returncode == 0, changed.stdout + changed.stderr
    with host.tpm(other) as tpm:
        assert property_state(tpm.up()) == UNMEASURED


def test_setup_leaves_other_guests_alone(host: LayerHost, directory: Path) -> None:
    base = owned_directory(directory / "tpm")
    new = ["--tpm2", "--tpm-state", owned_directory(base / UUID / "tpm2")]
    made = run_as_user([host.setup_shim, *new], env={**host.env, "HOME": str(base)})
    assert made.returncode == 0, made.stdout + made.stderr
    with Tpm(base) as tpm:
        tpm.up()
        for algorithm in ALGORITHMS:
            selection = ((algorithm, (4,)),)
            active = parse_pcr_read(tpm.send(build_pcr_read(selection)), selection) is not None
            assert active == (algorithm == SHA256)


# -- it comes up with the layer, or not at all ----------------------------------------------------


def refused(tpm: Tpm) -> str:
    """The one line of a start that failed; nothing listens."""
    ended = run_as_user(tpm.arguments, env=tpm.env)
    assert ended.returncode == 1, ended.stderr
    assert not tpm.control_path.exists()
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("swtpm-prop: ")
    return ended.stderr


def layer_json(host: LayerHost) -> Path:
    return host.layout.guest_run(UUID) / "layer.json"


DAMAGE: dict[str, tuple[str, Callable[[LayerHost], object]]] = {
    "index missing": ("store.index-missing", lambda host: host.layout.index.unlink()),
    "index unreadable": ("store.index-unreadable", lambda host: host.layout.index.chmod(0o600)),
    "index out of reach": ("store.index-unreadable", lambda host: host.layout.index.parent.chmod(0o700)),
    "index empty": ("store.index-corrupt", lambda host: host.layout.index.write_bytes(b"")),
    "index foreign": ("store.index-format", lambda host: host.layout.index.write_bytes(bytes(4096))),
    "index half-written": ("store.index-corrupt", lambda host: os.truncate(host.layout.index, 8192)),
    "configuration missing": ("layer.config-unreadable", lambda host: layer_json(host).unlink()),
    "configuration unreadable": ("layer.config-unreadable", lambda host: layer_json(host).chmod(0o600)),
    "configuration empty": ("layer.config-invalid", lambda host: layer_json(host).write_text("")),
    "configuration garbage": ("layer.config-invalid", lambda host: layer_json(host).write_bytes(os.urandom(512))),
    "configuration no object": ("layer.config-invalid", lambda host: layer_json(host).write_text("[]")),
    "configuration too long": ("layer.config-invalid", lambda host: layer_json(host).write_text(" " * 100_000)),
    "directory out of reach": ("layer.config-unreadable", lambda host: layer_json(host).parent.chmod(0o700)),
    "log missing": ("layer.log-unwritable", lambda host: host.layout.guest_log(UUID).unlink()),
    "log read-only": ("layer.log-unwritable", lambda host: host.layout.guest_log(UUID).chmod(0o400)),
    "hook did not run": ("layer.not-prepared", lambda host: shutil.rmtree(layer_json(host).parent)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_without_all_it_needs_no_tpm_comes_up(host: LayerHost, new_base: NewBase, damage: str) -> None:
    id, spoil = DAMAGE[damage]
    host.opt_in()
    tpm = host.tpm(new_base("tpm"))
    spoil(host)
    assert f" [{id}]" in refused(tpm)


def test_a_tpm_1_2_is_refused(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    tpm = host.tpm(new_base("tpm"))
    tpm.arguments.remove("--tpm2")
    assert " [layer.tpm-version]" in refused(tpm)


def with_preload(host: LayerHost, path: Path) -> None:
    host.shim.write_text(shims.render("swtpm", path, host.layout))


def copied_package(target: Path) -> Path:
    """The package as installed elsewhere; its preloaded object."""
    # without byte code, which Python would take instead of a source that it cannot read
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(swtpm_prop.__file__).parent, target / "swtpm_prop", ignore=ignore)
    return target / "swtpm_prop/emulator" / shims.preload_object().name


def test_the_package_works_from_anywhere_and_must_be_readable(
    host: LayerHost, new_base: NewBase, directory: Path
) -> None:
    host.opt_in()
    elsewhere = copied_package(directory / "pre fix")
    elsewhere = (directory / "pre fix").rename(directory / "prefix") / elsewhere.relative_to(directory / "pre fix")
    with_preload(host, elsewhere)
    base = new_base("tpm")
    with host.tpm(base) as tpm:
        assert tpm.process is not None
        assert str(elsewhere) in mapped(tpm.process.pid)
        assert property_state(tpm.up()) == UNMEASURED
    layer = elsewhere.parent / "layer.py"
    layer.chmod(0o600)
    assert " [layer.package-unreadable]" in refused(host.tpm(base))
    layer.chmod(0o644)
    (elsewhere.parents[1] / "trust/index.py").chmod(0o600)
    assert " [layer.python]" in refused(host.tpm(base))
    elsewhere.chmod(0o600)
    assert " [layer.preload-unreadable]" in refused(host.tpm(base))
    elsewhere.unlink()
    assert " [layer.preload-unreadable]" in refused(host.tpm(base))


def test_an_object_that_cannot_be_loaded_leaves_no_tpm(host: LayerHost, new_base: NewBase, directory: Path) -> None:
    """The loader says why and goes on without it; swtpm then does not know the word it was given."""
    host.opt_in()
    garbage = directory / "garbage.so"
    garbage.write_bytes(b"no object at all")
    with_preload(host, garbage)
    tpm = host.tpm(new_base("tpm"))
    ended = run_as_user(tpm.arguments, env=tpm.env)
    assert ended.returncode == 1
    assert f"object '{garbage}' from LD_PRELOAD cannot be preloaded" in ended.stderr.splitlines()[0]
    assert not tpm.control_path.exists()


def test_without_libpython_there_is_no_tpm(host: LayerHost, new_base: NewBase, directory: Path) -> None:
    host.opt_in()
    copy = directory / "preload.so"
    name = str(sysconfig.get_config_var("INSTSONAME")).encode()
    copy.write_bytes(shims.preload_object().read_bytes().replace(name, b"x" * len(name)))
    with_preload(host, copy)
    tpm = host.tpm(new_base("tpm"))
    ended = run_as_user(tpm.arguments, env=tpm.env)
    assert ended.returncode != 0
    assert "error while loading shared libraries" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not tpm.control_path.exists()


@pytest.mark.parametrize("way", ["wrapper", "set-id"])
def test_a_stripped_preload_does_not_come_up_plain(
    host: LayerHost, new_base: NewBase, directory: Path, way: str
) -> None:
    """A program that cleans the environment stands before swtpm; or the kernel marks the start as a secure one."""
    host.opt_in()
    program = directory / "bin/swtpm"
    program.parent.mkdir()
    if way == "wrapper":
        program.write_text(f'#!/usr/bin/busybox sh\nunset LD_PRELOAD\nexec {REAL} "$@"\n')
        program.chmod(0o755)
    else:
        shutil.copy(REAL, program)
        shutil.chown(program, "root", "daemon")
        program.chmod(0o2755)
    tpm = host.tpm(new_base("tpm"))
    ended = run_as_user(tpm.arguments, env={**host.env, "PATH": f"{host.layout.libexec}:{program.parent}:{PATH}"})
    assert ended.returncode == 1
    assert "Unsupported TPM interface type 'Socket'" in ended.stderr
    assert not tpm.control_path.exists()


def test_a_swtpm_without_libtpms_beneath_is_refused(host: LayerHost, new_base: NewBase) -> None:
    """Something that is no dynamically linked swtpm, here a program of another kind."""
    host.opt_in()
    env = {"LD_PRELOAD": str(shims.preload_object()), "SWTPM_PROP_LAYER": str(layer_json(host))}
    ended = run_as_user(["/usr/bin/printf", "Socket"], env=env)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert " [layer.libtpms]" in ended.stderr


def test_only_the_shim_may_start_it(host: LayerHost, new_base: NewBase) -> None:
    host.opt_in()
    env = {"LD_PRELOAD": str(shims.preload_object()), "SWTPM_PROP_LAYER": str(layer_json(host))}
    ended = run_as_user([REAL, "socket", "--version"], env=env)
    assert ended.returncode == 1
    assert " [layer.arguments]" in ended.stderr


# -- when the layer fails later -------------------------------------------------------------------


def test_an_inactive_bank_ends_every_change_of_pcrs(host: LayerHost, directory: Path) -> None:
    host.opt_in()
    base = directory / "tpm"
    manufacture(base, "sha256")
    with host.tpm(base) as tpm:
        tpm.init()
        assert tpm.send(STARTUP_CLEAR) == RC_FAILURE
        for command in (measure(GOOD), PCR_RESET_16, STARTUP_CLEAR):
            assert tpm.send(command) == RC_FAILURE
        assert response_code(tpm.send(GET_RANDOM)) == 0
        tpm.reset()
        assert tpm.send(STARTUP_CLEAR) == RC_FAILURE
    contents = [record["content"] for record in host.records()]
    assert [(content["event"], content["reason"]) for content in contents] == [("failure", "layer.bank-inactive")]
    assert "layer.bank-inactive" in (base / "swtpm.log").read_text()


def test_the_last_measured_state_survives_a_failing_resume(host: LayerHost, directory: Path, new_base: NewBase) -> None:
    """A state without the property bank, loaded into a guest that needs it."""
    host.opt_in()
    manufacture(directory / "plain", "sha256")
    with Tpm(directory / "plain") as plain:
        saved = plain.up().snapshot()
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        tpm.restore(saved)
        assert tpm.send(measure(GOOD)) == RC_FAILURE
        assert response_code(tpm.send(GET_RANDOM)) == 0


# -- the object -----------------------------------------------------------------------------------


def test_the_object_shows_only_what_it_stands_before() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", shims.preload_object()], capture_output=True, text=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert symbols == {"TPMLIB_Process", "TPMLIB_MainInit", "TPMLIB_ChooseTPMVersion"}


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "swtpm did not end"
        time.sleep(0.01)
