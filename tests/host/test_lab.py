"""The laboratory itself: what other tests stand on must be true of plain libvirt, swtpm and firmware."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Define, Pair
from waiting import eventually

from lab import guest, image
from lab.domain import Domain
from lab.host import laboratory
from lab.process import LabError, run

pytestmark = pytest.mark.host

ZERO = hashlib.sha256().digest_size * "00"
EXTEND = "tpm2_pcrextend 16:sha256=" + "ab" * 32


@pytest.fixture
def running(plain: Pair, direct: Domain, define: Define):
    machine = define(plain.one, direct)
    machine.boot()
    return machine


def test_a_seabios_guest_measures_the_same_each_boot(running):
    first = running.pcrs()
    assert sorted(first) == ["sha256", "sha384"]
    assert all(sorted(values) == list(range(24)) for values in first.values())
    assert first["sha256"][4] != ZERO
    running.reset()
    assert running.pcrs() == first
    running.reboot()
    assert running.pcrs() == first


def test_an_ovmf_disk_guest_measures_the_kernel_image(plain: Pair, define: Define):
    older, newer = guest.kernels(2)
    efi, update = image.unified_kernel(older), image.unified_kernel(newer)
    disk = image.disk(efi, plain.work / "esp.qcow2")
    machine = define(plain.one, Domain(firmware="ovmf", tpm="tis", disk=disk, banks=("sha256", "sha384")))
    machine.boot()
    before = machine.pcrs()["sha256"]
    assert authenticode(efi) in machine.event_log()
    machine.power_off()
    image.install_kernel(disk, update)
    machine.boot()
    after = machine.pcrs()["sha256"]
    assert authenticode(update) in machine.event_log()
    # the boot manager (4), the initrd and command line (9), IMA's first record (10), the stub's sections (11)
    assert {number for number in range(24) if before[number] != after[number]} == {4, 9, 10, 11}


def test_a_guest_migrates_there_and_back(plain: Pair, running):
    running.console.check(EXTEND)
    before = running.pcrs()
    running.migrate(plain.other)
    assert running.pcrs() == before
    running.migrate(plain.one)
    assert running.pcrs() == before


def test_pcrs_survive_save_and_daemon_restarts(plain: Pair, running):
    running.console.check(EXTEND)
    before = running.pcrs()
    running.save("/var/lib/libvirt/saved")
    running.restore("/var/lib/libvirt/saved")
    assert running.pcrs() == before
    running.managed_save()
    running.start()
    assert running.pcrs() == before
    plain.one.libvirtd.restart()
    assert running.pcrs() == before
    plain.one.libvirtd.kill()
    plain.one.libvirtd.start()
    assert running.pcrs() == before


def test_a_snapshot_brings_pcrs_back(plain: Pair, direct: Domain, define: Define, kernel_package: str):
    disk = image.disk(image.unified_kernel(kernel_package), plain.work / "snapshot.qcow2")
    machine = define(plain.one, replace(direct, disk=disk))
    machine.boot()
    before = machine.pcrs()
    machine.snapshot("first")
    machine.console.check(EXTEND)
    assert machine.pcrs() != before
    machine.revert("first")
    assert machine.pcrs() == before


def test_the_console_is_binary_safe_and_runs_each_command_once(running):
    content = bytes(range(256)) * 100
    running.console.put("/tmp/content", content)
    assert running.console.get("/tmp/content") == content
    assert running.console.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    # a kernel that talks into every frame: answers are asked for again until one comes through
    noise = "for i in $(seq 200); do echo noise >/dev/kmsg; usleep 10000; done"
    running.console.check(f"dmesg -n 8; ({noise}) >/dev/null 2>&1 &")
    for number in range(1, 20):
        assert running.console.check("echo x >>/tmp/count; wc -l </tmp/count") == f"{number}\n"
    with pytest.raises(LabError, match="no answer"):
        running.console.run("sleep 60", timeout=1)


def test_names_resolve_and_hosts_are_apart(plain: Pair):
    assert plain.one.run(["virsh", "-q", "-c", "qemu+tcp://plain2/system", "hostname"]).stdout.strip() == "plain2"
    plain.one.put("/etc/only-here", "x")
    with pytest.raises(FileNotFoundError):
        plain.other.read("/etc/only-here")
    assert not Path("/etc/only-here").exists()


def test_nothing_stays_of_a_laboratory():
    with ExitStack() as stack:
        work, (host,) = stack.enter_context(laboratory("gone"))
        pid, group = host.pid, host.cgroup
        host.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert not work.exists()
    assert group is None or not group.path.exists()
    assert str(work) not in Path("/proc/self/mounts").read_text()


def test_user_tss_reaches_a_product_in_closed_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone = tmp_path / "closed" / "clone"
    clone.mkdir(parents=True)
    (clone / "file").write_text("reached")
    clone.parent.chmod(0o700)
    assert not tmp_path.parent.stat().st_mode & 0o001
    monkeypatch.setattr("lab.host.REPOSITORY", clone)
    with laboratory("closed") as (_, (host,)):
        as_tss = ["setpriv", "--reuid=tss", "--regid=tss", "--clear-groups"]
        assert host.run([*as_tss, "cat", clone / "file"]).stdout == "reached"


def test_a_killed_laboratory_takes_its_hosts_along_and_is_swept_up_later(tmp_path: Path):
    script = (
        "import sys, time; from pathlib import Path; from lab.host import laboratory\n"
        "with laboratory('orphan', parent=Path(sys.argv[1])) as (work, (host,)):\n"
        "    print(host.pid, host.cgroup and host.cgroup.path, work, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as owner:
        assert owner.stdout is not None
        pid, group, work = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert Path(work).exists()
    os.utime(work, (0, 0))
    with laboratory("next", parent=tmp_path):
        assert not Path(work).exists()
        assert not Path(group).exists()


def authenticode(efi: Path) -> bytes:
    """The SHA-256 that firmware measures for a PE file, by another program than ours."""
    return bytes.fromhex(run(["pesign", "-h", "-d", "sha256", "-i", efi]).stdout.split()[-1])
