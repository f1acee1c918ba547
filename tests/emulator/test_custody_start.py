"""From hook to TPM: a guest in custody started through hook, start scripts and the real swtpm, on a host with a TPM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swtpm_prop.custody.form import Form, form
from swtpm_prop.emulator import shims
from swtpm_prop.hook.script import render
from tests.custodian import APPROVED, UUID, Authority, CustodyHost, domain, make_state, memory_directory
from tests.hardware import HardwareTpm
from tests.swtpm import PATH, Tpm, TpmError, owned_directory, require_readable

pytestmark = pytest.mark.root

NV_PUBLIC_EK = bytes.fromhex("80010000000e0000017381010001")
"""TPM2_ReadPublic of the endorsement key: made at manufacture, it tells one TPM from another."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CustodyHost]:
    require_readable()
    with memory_directory() as root, HardwareTpm(tmp_path / "tpm") as tpm:
        made = CustodyHost(root, tpm, Authority())
        for name in ("swtpm", "swtpm_setup"):
            (made.layout.libexec / name).write_text(shims.render(name, shims.preload_object(), made.layout))
        (made.layout.root / "hook").write_text(render(Path("/bin/false"), made.layout))
        monkeypatch.setenv("PATH", f"{made.layout.libexec}:{PATH}")
        yield made


def libvirts_setup(host: CustodyHost) -> None:
    """What libvirt does for a guest without a state."""
    state = owned_directory(host.layout.guest_tpm(UUID))
    subprocess.run(
        [host.layout.libexec / "swtpm_setup", "--tpm2", "--tpm-state", state, "--createek", "--not-overwrite"],
        user="tss", group="tss", extra_groups=[], check=True, capture_output=True, cwd="/",
        env={"PATH": f"{host.layout.libexec}:{PATH}", "HOME": "/nonexistent"},
    )  # fmt: skip


def swtpm(host: CustodyHost) -> Tpm:
    """libvirt's swtpm, whose state is where libvirt has it."""
    base = owned_directory(host.layout.root / "swtpm")
    tpm = Tpm(base, host.layout.libexec / "swtpm", uuid=UUID, env={"PATH": f"{host.layout.libexec}:{PATH}"})
    state = host.layout.guest_tpm(UUID)
    tpm.arguments = [text.replace(str(tpm.state), str(state)) for text in tpm.arguments]
    return tpm


def one_life(host: CustodyHost, xml: bytes) -> bytes:
    """prepare, swtpm, start, a boot, release; the endorsement key that the guest saw."""
    assert host.hook("prepare", xml) == 0
    if not host.layout.guest_tpm(UUID).exists():
        libvirts_setup(host)
    with swtpm(host) as tpm:
        started = subprocess.run(
            ["/bin/sh", host.layout.root / "hook", "g", "start", "begin", "-"], input=xml, capture_output=True
        )
        assert (started.returncode, started.stderr) == (0, b"")
        assert not host.layout.state_key(UUID).exists()
        assert not host.layout.migration_key(UUID).exists()
        tpm.up()
        answer = tpm.send(NV_PUBLIC_EK)
        assert answer[6:10] == bytes(4), answer.hex()
    assert host.hook("release", xml) == 0
    assert not host.layout.guest_run(UUID).exists()
    return answer


def test_a_new_guest_has_an_encrypted_state_from_the_beginning(host: CustodyHost) -> None:
    first = one_life(host, domain())
    assert form(host.layout.guest_tpm(UUID)) is Form.ENCRYPTED
    assert one_life(host, domain()) == first


def test_custody_on_and_off_again_is_one_tpm(host: CustodyHost) -> None:
    seen = [one_life(host, domain(custody)) for custody in (None, APPROVED, APPROVED, None, APPROVED)]
    assert len(set(seen)) == 1
    assert form(host.layout.guest_tpm(UUID)) is Form.ENCRYPTED


def test_after_the_host_was_switched_off_and_on_the_guest_starts(host: CustodyHost) -> None:
    first = one_life(host, domain())
    host.tpm.reboot()
    assert one_life(host, domain()) == first


def test_the_state_opens_on_no_other_host_whatever_was_copied(host: CustodyHost, tmp_path: Path) -> None:
    """Its disk whole, records included, with a TPM of its own in the same approved state."""
    one_life(host, domain())
    with HardwareTpm(tmp_path / "other") as other:
        host.tpm = other
        host.configure()
        with other.open() as opened:
            opened.initialise()
        assert host.state() == dict.fromkeys(range(8), bytes(32))
        assert host.hook("prepare", domain()) == 1
        assert not host.layout.guest_run(UUID).exists()


def test_a_plain_state_put_in_place_of_the_encrypted_one_does_not_start(host: CustodyHost) -> None:
    one_life(host, domain())
    host.layout.guest_tpm(UUID).rename(host.layout.root / "genuine")
    make_state(host.layout.guest_tpm(UUID), host.account)
    assert host.hook("prepare", domain()) == 1


def test_without_the_hook_the_shim_starts_nothing(host: CustodyHost) -> None:
    one_life(host, domain())
    with pytest.raises(TpmError, match=r"layer\.not-prepared"), swtpm(host):
        pass


def test_a_start_that_is_refused_later_leaves_no_key(host: CustodyHost) -> None:
    """swtpm never came: libvirt calls stopped and release."""
    one_life(host, domain())
    assert host.hook("prepare", domain()) == 0
    assert host.layout.state_key(UUID).exists()
    host.hook("release", domain())
    assert not host.layout.state_key(UUID).exists()
