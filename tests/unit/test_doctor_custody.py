"""The doctor's checks of a host that keeps guests' keys, each made to fail by the real thing, with a real TPM."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hardware import HardwareTpm

from swtpm_prop.agent import metrics
from swtpm_prop.attest import certificates
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.custody import approvals, keys, policy
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.doctor import custody
from swtpm_prop.doctor.finding import Finding, Patient, State
from swtpm_prop.errors import AttestError, HostError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Side
from swtpm_prop.transfer.machine import State as MachineState

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
PROPERTY = "https://example.org/properties/approved-host"
AUTHORITY = ec.generate_private_key(ec.SECP256R1())
DAY = 86400

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HardwareTpm]:
    with HardwareTpm(tmp_path_factory.mktemp("tpm")) as tpm:
        with tpm.open() as hardware:
            hardware.initialise()
        yield tpm


@pytest.fixture
def layout(tmp_path: Path, tpm: HardwareTpm) -> Layout:
    """An enrolled host that keeps the key of one guest and is in an approved state."""
    layout = Layout(tmp_path)
    for directory in (layout.etc, layout.host_keys, layout.run):
        directory.mkdir(parents=True)
    configure(layout, f'[tpm]\ntcti = "{tpm.tcti}"\n[custody]\nrecovery = ["recovery.pem"]\n')
    enrol(layout)
    pem = AUTHORITY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    layout.trust.write_text(
        f'[[issuer]]\nid = "https://example.org/a"\nkeys = ["""{pem}"""]\n'
        f'prefixes = ["https://example.org/properties"]\napproves-hosts = true\n'
    )
    with tpm.open() as hardware:
        approve(layout, hardware.pcrs(range(8)), hardware.epoch())
        authorize = policy.key_policy(policy.authority_name(AUTHORITY.public_key()), PROPERTY).digest
        sealed = hardware.seal(bytes(32), authorize)
    keys.store(KeyRecord(UUID, 0, PROPERTY, pem, sealed, (), True), layout)
    return layout


def configure(layout: Layout, text: str) -> None:
    layout.host.write_text(text)


def enrol(layout: Layout, age: int = 0, name: str = "alpha") -> None:
    now = int(time.time()) - age
    fleet = certificates.new_authority("fleet", ec.generate_private_key(ec.SECP256R1()), now)
    layout.fleet_ca.write_bytes(fleet.certificate.public_bytes(Encoding.PEM))
    layout.fleet_crl.write_bytes(certificates.revoke(fleet, [], 1, now))
    for kind, file, host in ((Kind.AK, "ak.crt", "alpha"), (Kind.TLS, "tls.crt", name)):
        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        der = certificates.issue(fleet, host, public, kind, now)
        (layout.host_keys / file).write_bytes(certificates.pem(der))


def approve(layout: Layout, pcrs: dict[int, bytes], epoch: int = 1) -> None:
    listed = approvals.approve(approvals.begin(AUTHORITY), AUTHORITY, "state", PROPERTY, pcrs)
    if epoch > 1:
        listed = approvals.raise_to(listed, AUTHORITY, epoch)
    approvals.install(layout, approvals.sign(listed, AUTHORITY), AUTHORITY.public_key())


def patient(layout: Layout, *, live: bool = True) -> Patient:
    return Patient(layout, live=live)


def found(findings: Iterator[Finding]) -> dict[str, State]:
    return {finding.id: finding.state for finding in findings}


def test_a_host_without_keys_need_not_know_of_them(tmp_path: Path) -> None:
    checks = (custody.tpm, custody.enrolment, custody.approvals, custody.recovery, custody.agent)
    assert [list(check(patient(Layout(tmp_path)))) for check in checks] == [[]] * 5


def test_a_whole_host(layout: Layout) -> None:
    assert found(custody.tpm(patient(layout))) == {"host.tpm": State.OK}
    assert found(custody.enrolment(patient(layout))) == {"host.enrolled": State.OK}
    assert found(custody.approvals(patient(layout))) == {"host.approved": State.OK}
    assert found(custody.recovery(patient(layout))) == {}


def test_a_host_whose_files_alone_are_looked_at(layout: Layout) -> None:
    configure(layout, '[tpm]\ntcti = "device:/dev/none"\n')
    assert found(custody.tpm(patient(layout, live=False))) == {}
    assert found(custody.approvals(patient(layout, live=False))) == {}


def test_no_tpm(layout: Layout) -> None:
    configure(layout, '[tpm]\ntcti = "device:/dev/none"\n')
    with pytest.raises(HostError) as refused:
        list(custody.tpm(patient(layout)))
    assert refused.value.id == "tpm.unreachable"
    assert found(custody.approvals(patient(layout))) == {"tpm.unreachable": State.PROBLEM}


def test_never_initialised(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    with HardwareTpm(tmp_path_factory.mktemp("new")) as new:
        configure(layout, f'[tpm]\ntcti = "{new.tcti}"\n')
        with pytest.raises(HostError) as refused:
            list(custody.tpm(patient(layout)))
    assert refused.value.id == "tpm.not-initialised"
    shutil.rmtree(layout.host_keys)
    assert found(custody.tpm(patient(layout))) == {"host.not-initialised": State.PROBLEM}


@pytest.mark.parametrize("file", ["ak.crt", "tls.crt"])
def test_never_enrolled(layout: Layout, file: str) -> None:
    (layout.host_keys / file).unlink()
    (finding,) = custody.enrolment(patient(layout))
    assert (finding.id, finding.state) == ("host.not-enrolled", State.PROBLEM)
    assert file in finding.what


def test_two_names(layout: Layout) -> None:
    enrol(layout, name="beta")
    assert found(custody.enrolment(patient(layout)))["host.two-names"] is State.PROBLEM


def test_enrolment_that_ends(layout: Layout) -> None:
    enrol(layout, age=100 * DAY)
    assert found(custody.enrolment(patient(layout))) == {"host.enrolment-ends": State.WARNING}
    enrol(layout, age=1000 * DAY)
    with pytest.raises(AttestError) as refused:
        list(custody.enrolment(patient(layout)))
    assert refused.value.id == "fleet.crl-expired"


def test_a_state_that_is_not_approved(layout: Layout, tpm: HardwareTpm) -> None:
    tpm.extend(7)
    try:
        (finding,) = custody.approvals(patient(layout))
    finally:
        tpm.reboot()
    assert (finding.id, finding.state) == ("host.state-not-approved", State.PROBLEM)
    assert UUID in finding.what


def test_epochs(layout: Layout, tpm: HardwareTpm) -> None:
    with tpm.open() as hardware:
        state, epoch = hardware.pcrs(range(8)), hardware.epoch()
    (layout.approvals / f"{approvals.begin(AUTHORITY).authority}.json").unlink()
    approve(layout, state, epoch + 1)
    assert found(custody.approvals(patient(layout))) == {"host.epoch-behind": State.WARNING}
    with tpm.open() as hardware:
        hardware.raise_epoch(epoch + 2)
    assert found(custody.approvals(patient(layout))) == {"host.epoch-ahead": State.PROBLEM}


def test_no_list(layout: Layout) -> None:
    (layout.approvals / f"{approvals.begin(AUTHORITY).authority}.json").unlink()
    assert found(custody.approvals(patient(layout))) == {"approvals.missing": State.PROBLEM}


def test_no_recovery_key(layout: Layout) -> None:
    configure(layout, "")
    assert found(custody.recovery(patient(layout))) == {"custody.no-recovery": State.WARNING}


@pytest.mark.parametrize(
    ("status", "text", "id"), [(200, "well\n", "agent.well"), (503, "libvirt is away\n", "agent.unwell")]
)
def test_the_agent_says_how_it_is(layout: Layout, status: int, text: str, id: str) -> None:
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        configure(layout, f'[agent]\nmetrics = "127.0.0.1:{listener.getsockname()[1]}"\n')
        pages = {"/health": lambda: (status, text)}
        serving = threading.Thread(target=metrics.serve, args=(listener, pages, stopped))
        serving.start()
        findings = {finding.id: finding for finding in custody.agent(patient(layout))}
        stopped.set()
        serving.join()
    assert set(findings) == {id, "agent.not-enabled"}
    assert status == 200 or "libvirt is away" in findings[id].what
    assert found(custody.agent(patient(layout)))["agent.silent"] is State.PROBLEM


def test_a_tpm_that_the_agent_may_not_open(layout: Layout) -> None:
    unit = resources.files("swtpm_prop.install") / "texts/agent.service"
    allowed = re.findall("^DeviceAllow=(.*) rw$", unit.read_text(), re.MULTILINE)
    assert tuple(allowed) == custody.DEVICES
    for device in allowed:
        configure(layout, f'[tpm]\ntcti = "device:{device}"\n')
        assert "agent.device" not in found(custody.agent(patient(layout, live=False)))
    configure(layout, '[tpm]\ntcti = "device:/dev/tpmrm1"\n')
    assert found(custody.agent(patient(layout, live=False)))["agent.device"] is State.WARNING
    drop_in = layout.root / custody.DROP_INS.lstrip("/") / "tpm.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nDeviceAllow=/dev/tpmrm1 rw\n")
    assert "agent.device" not in found(custody.agent(patient(layout, live=False)))


def test_a_transfer_that_stays_open(layout: Layout) -> None:
    offered = Transfer("a" * 32, Side.SOURCE, MachineState.OFFERED, UUID, 0, "beta", "beta:4879")
    Journal(layout).begin(offered)
    Journal(layout).begin(offered._replace(id="b" * 32, state=MachineState.CLOSED))
    assert found(custody.transfers(patient(layout))) == {}
    late = Journal(layout, lambda: time.time() - custody.TRANSFER_SECONDS - 1)
    late.begin(offered._replace(id="c" * 32))
    (finding,) = custody.transfers(patient(layout))
    assert (finding.id, finding.state) == ("transfer.open", State.WARNING)


@pytest.mark.parametrize("place", [lambda at: at.state_key(UUID), lambda at: at.arriving_key("a" * 32)])
def test_a_key_that_a_start_left(layout: Layout, place: Callable[[Layout], Path]) -> None:
    left = place(layout)
    left.parent.mkdir()
    left.write_text("key")
    assert list(custody.keys_in_memory(Patient(layout, True))) == []
    os.utime(left, (0, time.time() - custody.START_SECONDS - 1))
    (found,) = custody.keys_in_memory(Patient(layout, True))
    assert (found.id, found.state) == ("custody.key-left", State.WARNING)
    assert str(left.parent) in found.mend


def test_an_agent_that_is_enabled(layout: Layout) -> None:
    unit = layout.root / custody.UNIT.lstrip("/")
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/etc/systemd/system/swtpm-prop-agent.service")
    assert found(custody.agent(patient(layout, live=False))) == {}
