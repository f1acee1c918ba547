"""What a real kernel measures under ima_policy=tcb is what packages certify, and what its list replays to."""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import Define, Pair

from lab import cpio, guest
from lab.debian import package
from lab.domain import Domain
from swtpm_prop.tpm import ima, imalog
from swtpm_prop.tpm.algorithms import SHA1, SHA256
from swtpm_prop.trust import packages

pytestmark = pytest.mark.host

BUSYBOX = package("busybox-static")
LIST = "/sys/kernel/security/ima/binary_runtime_measurements"
POLICY = "ima_policy=tcb rootfstype=ramfs"  # tcb leaves out tmpfs, which an initramfs is otherwise


@pytest.fixture
def initrd(pair: Pair, direct: Domain) -> Path:
    """The laboratory's, with a merged /usr/sbin beside its /bin, and a name with a space."""
    assert direct.initrd is not None
    more = {
        "sbin": cpio.link("usr/sbin"),
        "usr/sbin/busybox": cpio.program((BUSYBOX / "bin/busybox").read_bytes()),
        "with space": cpio.file(b"x"),
    }
    first = direct.initrd.read_bytes()
    path = pair.work / "ima.initrd"
    path.write_bytes(first + bytes(-len(first) % 4) + gzip.compress(cpio.archive(more)))
    return path


@pytest.mark.parametrize(("template", "option"), [("ima-ng", "ima_template=ima-ng"), ("ima-sig", "")])
def test_certified_from_the_package_is_what_the_kernel_measures(
    pair: Pair, direct: Domain, initrd: Path, define: Define, template: str, option: str
):
    command_line = f"{guest.CMDLINE} {POLICY} {option}"
    banks = ("sha1", "sha256")
    machine = define(pair.one, replace(direct, initrd=initrd, cmdline=command_line, banks=banks))
    machine.boot()
    machine.console.check("/sbin/busybox true; cat '/with space'")
    machine.console.check("for b in sha1 sha256; do cat /sys/class/tpm/tpm0/pcr-$b/10; done >/pcr")
    sha1, sha256 = (bytes.fromhex(line) for line in machine.console.get("/pcr").decode().split())
    pcrs = {pcr: bytes.fromhex(value) for pcr, value in machine.pcrs()["sha256"].items()}
    entries = whole(machine.console.get(LIST), {SHA1.name: sha1, SHA256.name: sha256})

    measured = {entry.path: imalog.measured(entry, SHA256) for entry in entries}
    take = partial(packages.from_tree, BUSYBOX, owners={}, with_ima=True)
    certified = {s.name: s.digests["sha256"] for path in packages.files(BUSYBOX) for s in take(path)}
    assert measured[b"/bin/busybox"] == certified[f"/bin/busybox {template}"]
    content = next(entry.digest for entry in entries if entry.path == b"/bin/busybox")
    merged = next(entry for entry in entries if entry.path == b"/usr/sbin/busybox")
    assert merged.data == ima.file_measurement(template, b"/usr/sbin/busybox", content)
    assert b"/sbin/busybox" not in measured
    assert b"/with_space" in measured
    assert entries[0].data == ima.boot_aggregate_measurement(template, pcrs)


def whole(data: bytes, pcr_10: dict[str, bytes]) -> tuple[imalog.Entry, ...]:
    """The list, as far as it had gone when PCR 10 was read: it grows with each program that the console starts."""
    entries = imalog.parse(data)
    for end in range(1, len(entries) + 1):
        so_far = entries[:end]
        if imalog.replay(so_far, SHA256)[ima.PCR] == pcr_10["sha256"]:
            assert imalog.replay(so_far, SHA1)[ima.PCR] == pcr_10["sha1"]
            return so_far
    raise AssertionError("no part of the list replays to PCR 10")
