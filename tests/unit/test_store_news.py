"""Approvals of hosts' states and lists of revoked hosts travel in a store, and count on hosts that may believe them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certifier import APPROVES, ED25519, P256, PREFIX, trust_text
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from fleet_ca import Ca, enrolled
from hardware import HardwareTpm
from storekeeper import Follower, Keeper, certificate

from swtpm_prop.attest import membership
from swtpm_prop.attest.news import identify, install
from swtpm_prop.cli import store
from swtpm_prop.custody import approvals
from swtpm_prop.custody.approvals import ApprovalList
from swtpm_prop.errors import Error
from swtpm_prop.trust.files import exclusive
from swtpm_prop.trust.keys import keyid

PROPERTY = f"{PREFIX}/approved-host"
CA = Ca()
STATE = {0: bytes(32), 7: bytes(range(32))}


def run(*words: str) -> Result:
    return CliRunner().invoke(store.command, words)


def done(result: Result) -> Any:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def error(result: Result) -> str:
    assert isinstance(result.exception, Error), result.output
    return result.exception.id


class Net:
    """A store, and a host with a TPM of its own that follows it."""

    def __init__(self, directory: Path, tpm: HardwareTpm) -> None:
        self.directory = directory
        self.tpm = tpm
        self.keeper = Keeper(directory)
        self.keeper.init()
        self.keeper.add(certificate(b"kernel"))
        self.keeper.publish()
        self.host = Follower(directory / "host", self.keeper)
        self.host.pin()
        layout = self.host.layout
        layout.state.mkdir(parents=True, exist_ok=True)
        layout.trust.write_text(trust_text(ED25519, P256) + APPROVES)
        layout.host.write_text(f'[store]\nurl = "{self.host.url}"\n[tpm]\ntcti = "{tpm.tcti}"\n')
        shutil.copytree(enrolled(CA, tpm), layout.host_keys)
        membership.install_fleet(layout, CA.ca)

    def add(self, name: str, data: bytes) -> Result:
        (self.directory / name).write_bytes(data)
        return run("add", str(self.directory / "store"), str(self.directory / name), "--json")

    def sync(self) -> Result:
        return run("sync", "--root", str(self.host.layout.root), "--json")

    def epoch(self) -> int:
        with self.tpm.open() as hardware:
            return hardware.epoch()


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with HardwareTpm(tmp_path / "tpm") as tpm:
        yield Net(tmp_path, tpm)


@pytest.fixture
def approved() -> ApprovalList:
    return approvals.approve(approvals.begin(P256), P256, "good", PROPERTY, STATE)


def signed(listed: ApprovalList) -> bytes:
    return approvals.sign(listed, P256)


def test_lists_arrive_and_count(net: Net, approved: ApprovalList) -> None:
    assert done(net.add("list.json", signed(approved))) == {"added": 0, "editions": 1}
    assert done(net.add("fleet.crl", CA.revoking(number=2)))["editions"] == 1
    assert done(net.add("kernel.json", certificate(b"another kernel"))) == {"added": 1, "editions": 0}
    published = net.keeper.publish()
    assert (published.certificates, published.added) == (2, 1)
    assert len(done(net.sync())["installed"]) == 2
    layout = net.host.layout
    installed = approvals.verify(
        (layout.approvals / f"{keyid(P256.public_key())}.json").read_bytes(), P256.public_key()
    )
    assert installed.approvals[0].label == "good"
    assert layout.fleet_crl.read_bytes() == (net.directory / "fleet.crl").read_bytes()


def test_revocation_raises_the_epoch_of_the_tpm(net: Net, approved: ApprovalList) -> None:
    net.add("list.json", signed(approved))
    net.keeper.publish()
    done(net.sync())
    before = net.epoch()
    net.add("list.json", signed(approvals.revoke(approved, P256, "good")))
    net.keeper.publish()
    done(net.sync())
    assert net.epoch() == before + 1


def test_the_next_edition_takes_the_place_of_the_last(net: Net, approved: ApprovalList) -> None:
    net.add("list.json", signed(approved))
    net.keeper.publish()
    later = approvals.raise_to(approved, P256, 2)
    done(net.add("later.json", signed(later)))
    assert done(net.add("later.json", (net.directory / "later.json").read_bytes()))["editions"] == 0
    assert error(net.add("list.json", signed(approved))) == "store.older"
    net.keeper.publish()
    names = [path.name for path in (net.keeper.public / "targets/news").iterdir()]
    # The last edition stays for hosts that are just fetching it, until the publication after.
    assert len(names) == 2
    net.keeper.publish(days=10)
    assert len(list((net.keeper.public / "targets/news").iterdir())) == 1
    assert len(list((net.directory / "store/news").iterdir())) == 1


def test_older_edition_from_another_store(net: Net, approved: ApprovalList) -> None:
    """The host remembers what it has seen, whatever a store says."""
    later = signed(approvals.raise_to(approved, P256, 2))
    net.add("later.json", later)
    net.add("fleet.crl", CA.revoking(number=5))
    net.keeper.publish()
    done(net.sync())
    for data in (signed(approved), CA.revoking(number=4)):
        (net.directory / "store" / identify(data).name).write_bytes(data)
    net.keeper.publish()
    result = net.sync()
    assert result.exit_code == 1
    refused = {refusal["id"] for refusal in json.loads(result.stdout)["refused"]}
    assert refused == {"approvals.older", "fleet.crl-rollback"}
    assert (net.host.layout.approvals / f"{keyid(P256.public_key())}.json").read_bytes() == later


def test_lists_of_strangers_are_left_out_and_named(net: Net) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    theirs = approvals.approve(approvals.begin(stranger), stranger, "evil", PROPERTY, STATE)
    net.add("list.json", approvals.sign(theirs, stranger))
    net.add("fleet.crl", Ca().crl)
    net.keeper.publish()
    result = net.sync()
    assert result.exit_code == 1
    refused = {refusal["id"] for refusal in json.loads(result.stdout)["refused"]}
    assert refused == {"approvals.authority-unknown", "fleet.crl-foreign"}
    assert net.host.certified(b"kernel") == [b"kernel"]


def test_host_without_keys_in_its_tpm_has_no_use_for_them(net: Net, approved: ApprovalList) -> None:
    shutil.rmtree(net.host.layout.host_keys)
    net.add("list.json", signed(approved))
    net.keeper.publish()
    assert done(net.sync())["installed"] == []
    assert not net.host.layout.approvals.exists()


def test_host_that_joins_later_gets_them_with_the_next_sync(net: Net, approved: ApprovalList) -> None:
    net.host.layout.host_keys.rename(net.directory / "later")
    net.add("list.json", signed(approved))
    net.keeper.publish()
    done(net.sync())
    (net.directory / "later").rename(net.host.layout.host_keys)
    assert len(done(net.sync())["installed"]) == 1


def test_unreachable_tpm_is_named_and_tried_again(net: Net, approved: ApprovalList) -> None:
    net.add("list.json", signed(approvals.raise_to(approved, P256, net.epoch() + 1)))
    net.keeper.publish()
    net.tpm.stop()
    result = net.sync()
    assert (result.exit_code, [r["id"] for r in json.loads(result.stdout)["refused"]]) == (1, ["tpm.unreachable"])
    net.tpm.start()
    before = net.epoch()
    done(net.sync())
    assert net.epoch() == before + 1


def test_what_is_taken_out_of_the_directory_is_published_no_more(net: Net, approved: ApprovalList) -> None:
    net.add("list.json", signed(approved))
    net.keeper.publish()
    done(net.sync())
    (net.directory / "store" / identify(signed(approved)).name).unlink()
    net.keeper.publish()
    assert done(net.sync())["installed"] == []
    assert list((net.host.layout.store / "news").iterdir()) == []
    # What counts on the host stays: nobody un-says an approval by silence.
    assert len(list(net.host.layout.approvals.iterdir())) == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"-----BEGIN X509 CRL-----\n", b"urn:swtpm-prop:host-approvals:1"])
def test_what_is_neither(data: bytes, net: Net) -> None:
    assert error(net.add("rubbish", data)).startswith(("trust.", "fleet."))


def test_a_mirror_that_exchanges_them(net: Net, approved: ApprovalList) -> None:
    net.add("list.json", signed(approved))
    net.keeper.publish()
    (target,) = (net.keeper.public / "targets/news").iterdir()
    target.write_bytes(target.read_bytes()[::-1])
    assert error(net.sync()) == "store.mismatch"


def test_two_that_install_at_once_do_not_bring_an_older_edition_back(net: Net) -> None:
    with exclusive(net.host.layout.state, "what the fleet says"), pytest.raises(Error) as refused:
        install(net.host.layout, CA.crl)
    assert refused.value.id == "store.busy"


def test_a_build_names_who_takes_lists(tmp_path: Path, approved: ApprovalList) -> None:
    (tmp_path / "certificates").mkdir()
    (tmp_path / "certificates/list.json").write_bytes(signed(approved))
    (tmp_path / "trust.toml").write_text(trust_text(ED25519, P256) + APPROVES)
    built = run(
        "build",
        str(tmp_path / "certificates"),
        "--trust",
        str(tmp_path / "trust.toml"),
        "--output",
        str(tmp_path / "i"),
    )
    assert built.exit_code == 1
    assert "[trust.predicate-type]: take it by 'swtpm-prop host update'" in built.stderr
    assert not (tmp_path / "i").exists()
