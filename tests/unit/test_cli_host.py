"""The nouns fleet and host as their keepers use them, over files, with real TPMs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certifier import APPROVES, P256, PREFIX, private_pem, trust_text
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from hardware import HardwareTpm, manufacture

from swtpm_prop.cli import fleet, host
from swtpm_prop.custody import approvals
from swtpm_prop.errors import Error
from swtpm_prop.layout import Layout
from swtpm_prop.tpm import eventlog
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.eventlog import EV_NO_ACTION

LOG = Path(__file__).parents[1] / "data/ovmf-uki.eventlog"
PROPERTY = f"{PREFIX}/approved-host"


class Host:
    """A host with a TPM, its root directory and its command line."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = f"{name}.example.org"
        self.tpm = HardwareTpm(directory / name / "tpm")
        self.root = directory / name / "root"
        self.layout = Layout(self.root)
        self.layout.etc.mkdir(parents=True)
        self.layout.state.mkdir(parents=True)
        self.log = directory / name / "eventlog"
        self.layout.host.write_text(f'[tpm]\ntcti = "{self.tpm.tcti}"\nevent-log = "{self.log}"\n')
        self.layout.trust.write_text(trust_text(P256) + APPROVES)

    def boot(self, log: bytes = LOG.read_bytes()) -> None:
        """Switch it on; its firmware measures what the log says."""
        self.tpm.reboot()
        self.log.write_bytes(log)
        for event in eventlog.parse(log).events:
            if event.type != EV_NO_ACTION:
                self.tpm.extend(event.pcr, next(d.value for d in event.digests if d.algorithm == SHA256))

    def run(self, verb: str, *words: str, typed: str | None = None) -> Result:
        return run(host.command, verb, *words, "--root", str(self.root), typed=typed)

    def json(self, verb: str, *words: str) -> Any:
        result = self.run(verb, *words, "--json")
        assert result.exit_code in (0, 1), result.output
        return json.loads(result.stdout)


def run(command: Any, *words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(command, words, input=typed)


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def error(result: Result) -> str:
    assert isinstance(result.exception, Error), result.output
    return result.exception.id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPMs as they come from their maker, each with its own certificate, and initialised."""
    directory = tmp_path_factory.mktemp("made")
    for name in "ab":
        tpm = HardwareTpm(directory / name)
        manufacture(tpm, directory / "maker")
        with tpm, tpm.open() as hardware:
            hardware.initialise()
    return directory


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "authority.pem").write_bytes(private_pem(P256))
    shutil.copytree(made / "maker", "maker")
    return tmp_path


@pytest.fixture
def a(here: Path, made: Path) -> Iterator[Host]:
    yield from on(here, made, "a")


@pytest.fixture
def b(here: Path, made: Path) -> Iterator[Host]:
    yield from on(here, made, "b")


def on(here: Path, made: Path, name: str) -> Iterator[Host]:
    machine = Host(here, name)
    shutil.copytree(made / name / "state", machine.tpm.state, dirs_exist_ok=True)
    shutil.copytree(made / name / "keys", machine.layout.host_keys)
    machine.boot()
    done(machine.run("init"))
    yield machine
    machine.tpm.stop()


def enrol(machine: Host, *vouched: str, name: str | None = None) -> Result:
    asked = machine.run("enroll", "--request", f"{machine.name}.request", "--name", name or machine.name)
    done(asked)
    given = vouched or ("--ek-roots", "maker/roots.pem")
    admitted = run(fleet.command, "admit", "fleet", f"{machine.name}.request", "-o", "answer", "--yes", *given)
    if admitted.exit_code == 0:
        done(machine.run("enroll", "--answer", "answer", "--ca", "fleet/fleet.pem"))
    return admitted


def approve(*words: str, machine: Host, typed: str = "y\n") -> Result:
    given = ("--property", PROPERTY, "--list", "list.json", "--key", "authority.pem")
    return machine.run("approve", *given, *words, typed=typed)


# -- the host's TPM -----------------------------------------------------------------------------


def test_init_shows_the_keys_and_their_files(a: Host) -> None:
    shown = a.json("init")
    files = {"storageParentFile": "parent.pem", "attestationKeyFile": "ak.pem"}
    assert {field: shown[field] for field in files} == {
        field: str(a.layout.host_keys / name) for field, name in files.items()
    }
    for value in shown.values():
        assert str(value) in done(a.run("init")) or value is True
    (a.layout.host_keys / "ak.pem").unlink()
    assert a.json("init") == shown | {"attestationKeyFile": None}
    assert "missing: put it back from a backup" in done(a.run("init"))


def test_init_on_a_new_host(a: Host, tmp_path: Path) -> None:
    with HardwareTpm(tmp_path / "new") as tpm:
        a.layout.host.write_text(f'[tpm]\ntcti = "{tpm.tcti}"\n')
        assert error(a.run("init")) == "tpm.cleared"
        shutil.rmtree(a.layout.host_keys)
        done(a.run("init"))
        assert (a.layout.host_keys.stat().st_mode & 0o777, len(list(a.layout.host_keys.iterdir()))) == (0o700, 2)


# -- fleet --------------------------------------------------------------------------------------


def test_a_fleet_from_nothing(a: Host, b: Host) -> None:
    done(run(fleet.command, "init", "fleet", "--name", "Example"))
    assert Path("fleet/ca.key").stat().st_mode & 0o777 == 0o600
    done(enrol(a))
    done(enrol(b))
    shown = json.loads(done(run(fleet.command, "list", "fleet", "--json")))
    assert [(entry["host"], entry["revoked"]) for entry in shown["admissions"]] == [(a.name, None), (b.name, None)]
    assert shown["admissions"][0]["vouchedBy"] == "CN=swtpm-localca-rootca"
    assert a.name in done(run(fleet.command, "list", "fleet"))


def test_a_protected_ca(a: Host) -> None:
    Path("secret").write_text("open sesame\n")
    done(run(fleet.command, "init", "fleet", "--passphrase-file", "secret"))
    assert "ENCRYPTED" in Path("fleet/ca.key").read_text()
    done(enrol(a, "--ek-roots", "maker/roots.pem", "--passphrase-file", "secret"))
    Path("wrong").write_text("open barley\n")
    assert error(run(fleet.command, "renew", "fleet", "--passphrase-file", "wrong")) == "trust.key-passphrase"
    assert error(run(fleet.command, "init", "fleet")) == "usage.fleet-there"


def test_who_vouches_must_be_said(a: Host) -> None:
    done(run(fleet.command, "init", "fleet"))
    done(a.run("enroll", "--request", "request", "--name", a.name))
    admit = ("admit", "fleet", "request", "-o", "answer")
    assert error(run(fleet.command, *admit)) == "usage.ek"
    assert error(run(fleet.command, *admit, "--ek-roots", "maker/roots.pem", "--trust-ek-by-hand")) == "usage.ek"
    assert error(run(fleet.command, *admit, "--trust-ek-by-hand", "--json")) == "usage.confirm"
    assert error(run(fleet.command, *admit, "--ek-roots", "authority.pem", "--yes")) == "attest.makers"
    refused = run(fleet.command, *admit, "--trust-ek-by-hand", typed="n\n")
    assert refused.exit_code == 1
    assert not Path("answer").exists()
    assert a.json("init")["endorsementKey"] in refused.output
    assert json.loads(done(run(fleet.command, "list", "fleet", "--json")))["admissions"] == []
    done(run(fleet.command, *admit, "--trust-ek-by-hand", typed="y\n"))


def test_a_name_is_one_machine_and_a_machine_one_name(a: Host, b: Host) -> None:
    done(run(fleet.command, "init", "fleet"))
    done(enrol(a))
    assert error(enrol(b, name=a.name)) == "fleet.name-taken"
    assert error(enrol(a, name="c.example.org")) == "fleet.tpm-taken"
    # Again under the same name is a renewal.
    done(enrol(a))
    # The machine broke, another takes its name.
    done(run(fleet.command, "revoke", "fleet", a.name))
    done(enrol(b, name=a.name))
    shown = json.loads(done(run(fleet.command, "list", "fleet", "--json")))
    assert [entry["revoked"] is None for entry in shown["admissions"]] == [False, False, True]


def test_revocation_comes_by_file(a: Host, b: Host) -> None:
    done(run(fleet.command, "init", "fleet"))
    done(enrol(a))
    done(enrol(b))
    done(b.run("evidence", "-o", "b.evidence"))
    words = ("--evidence", "b.evidence", "--label", "b now")
    done(approve(*words, machine=a))
    assert error(run(fleet.command, "revoke", "fleet", "c.example.org")) == "fleet.host-unknown"
    done(run(fleet.command, "revoke", "fleet", b.name))
    done(a.run("update", "fleet/fleet.crl"))
    assert error(approve(*words, machine=a)) == "fleet.revoked"
    old = shutil.copy("fleet/fleet.crl", "old.crl")
    done(run(fleet.command, "renew", "fleet"))
    done(a.run("update", "fleet/fleet.crl"))
    assert error(a.run("update", old)) == "fleet.crl-rollback"
    assert error(run(fleet.command, "revoke", "fleet", b.name)) == "fleet.host-unknown"


# -- approvals ----------------------------------------------------------------------------------


def test_approve_and_check_here(a: Host) -> None:
    shown = approve("--here", "--label", "first", machine=a)
    assert "EV_EFI_BOOT_SERVICES_APPLICATION" in done(shown)
    assert error(a.run("check")) == "host.nothing-approved"
    done(a.run("update", "list.json"))
    assert "held, as 'first'" in done(a.run("check"))
    assert a.json("check", "--property", PROPERTY)["held"] is True


def test_not_confirmed_is_not_signed(a: Host) -> None:
    assert approve("--here", machine=a, typed="n\n").exit_code == 1
    assert not Path("list.json").exists()
    assert error(approve("--here", "--json", machine=a)) == "usage.confirm"


def test_another_boot_is_named_with_what_is_new(a: Host) -> None:
    done(approve("--here", "--label", "first", machine=a))
    done(a.run("update", "list.json"))
    done(a.run("check"))
    log = LOG.read_bytes()
    event = [e for e in eventlog.parse(log).events if e.pcr == 4 and e.type != EV_NO_ACTION][-1]
    digest = next(d.value for d in event.digests if d.algorithm == SHA256)
    a.boot(log.replace(digest, bytes(range(32))))
    result = a.run("check")
    assert result.exit_code == 1
    assert "New since the last approved boot" in result.output
    (finding,) = a.json("check")["properties"]
    assert (finding["id"], list(finding["differing"])) == ("host.state-not-approved", ["4"])
    assert [new["sha256"] for new in finding["newEvents"]] == [bytes(range(32)).hex()]
    done(approve("--here", "--label", "second", machine=a))
    done(a.run("update", "list.json"))
    assert "held, as 'second'" in done(a.run("check"))


def test_revoked_state_is_dead_in_the_tpm(a: Host) -> None:
    done(approve("--here", "--label", "bad", machine=a))
    done(a.run("update", "list.json"))
    old = shutil.copy("list.json", "old.json")
    done(run(host.command, "revoke", "bad", "--list", "list.json", "--key", "authority.pem"))
    before = a.json("init")["epoch"]
    done(a.run("update", "list.json"))
    assert a.json("init")["epoch"] == before + 1
    assert error(a.run("update", old)) == "approvals.older"
    (finding,) = a.json("check", "--property", PROPERTY)["properties"]
    assert finding["id"] == "host.nothing-approved"
    assert error(run(host.command, "revoke", "bad", "--list", "list.json", "--key", "authority.pem")) == (
        "approvals.label-unknown"
    )


def test_tpm_that_counts_from_further_on(a: Host) -> None:
    """A used TPM: its counter begins above what the authority has come to."""
    done(approve("--here", "--label", "first", machine=a))
    done(a.run("update", "list.json"))
    with a.tpm.open() as hardware:
        hardware.raise_epoch(9)
    (finding,) = a.json("check")["properties"]
    assert finding["id"] == "host.epoch-ahead"
    assert "--epoch 9" in a.run("check").output
    done(a.run("approve", "--epoch", "9", "--list", "list.json", "--key", "authority.pem"))
    done(a.run("update", "list.json"))
    assert a.json("check")["held"] is True


def test_evidence_of_another_host(a: Host, b: Host) -> None:
    done(run(fleet.command, "init", "fleet"))
    done(enrol(a))
    done(enrol(b))
    done(b.run("evidence", "-o", "b.evidence"))
    fleet_files = ("--ca", "fleet/fleet.pem", "--crl", "fleet/fleet.crl")
    done(approve("--evidence", "b.evidence", *fleet_files, machine=a))
    (approval,) = approvals.read(Path("list.json").read_bytes()).approvals
    assert approval.label.startswith(b.name)
    assert sorted(approval.pcrs) == list(range(8))
    done(approve("--evidence", "b.evidence", "--pcrs", "4,7", "--label", "two", machine=a))
    assert sorted(approvals.read(Path("list.json").read_bytes()).approvals[1].pcrs) == [4, 7]
    assert error(approve("--evidence", "b.evidence", "--pcrs", "9", machine=a)) == "usage.pcrs"
    # Both boot the same, so what is approved of one is approved of the other.
    done(a.run("update", "list.json"))
    assert a.json("check")["held"] is True


def test_evidence_that_is_not_what_it_was(a: Host) -> None:
    done(run(fleet.command, "init", "fleet"))
    done(enrol(a))
    done(a.run("evidence", "-o", "evidence"))
    shown = json.loads(Path("evidence").read_text())
    for change, id in (
        ({"eventLog": ""}, "attest.certify-binding"),
        ({"evidence": {**shown["evidence"], "pcrs": {"0": "00" * 32}}}, "attest.quote-selection"),
        ({"version": 2}, "attest.report-malformed"),
        ({"evidence": {}}, "attest.evidence-malformed"),
    ):
        Path("changed").write_text(json.dumps({**shown, **change}))
        assert error(approve("--evidence", "changed", machine=a)) == id


def test_event_log_that_does_not_explain_the_state(a: Host) -> None:
    a.tpm.extend(4)
    assert error(approve("--here", machine=a)) == "attest.event-log"
    a.log.write_bytes(b"rubbish")
    assert error(approve("--here", machine=a)).startswith("eventlog.")
    a.log.unlink()
    assert error(approve("--here", machine=a)) == "host.event-log-missing"
    done(approve("--here", "--without-event-log", machine=a))
    done(a.run("update", "list.json"))
    assert "held" in done(a.run("check"))


def test_list_that_somebody_changed_is_not_signed_again(a: Host) -> None:
    """All states of the list are signed anew with each edition, so it must be the authority's own."""
    done(approve("--here", "--label", "first", machine=a))
    Path("other.pem").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    theirs = ("--list", "evil.json", "--key", "other.pem")
    done(a.run("approve", "--property", PROPERTY, "--here", "--pcrs", "7", "--label", "evil", "--yes", *theirs))
    shutil.copy("evil.json", "list.json")
    assert error(approve("--here", "--label", "next", machine=a)) == "trust.signature"
    assert error(a.run("update", "evil.json")) == "approvals.authority-unknown"


def test_usage(a: Host) -> None:
    key = ("--list", "list.json", "--key", "authority.pem")
    assert error(a.run("approve", *key)) == "usage.approve"
    assert error(a.run("approve", "--property", PROPERTY, *key)) == "usage.approve"
    assert error(a.run("approve", "--here", *key)) == "usage.approve"
    assert error(approve("--here", "--evidence", "x", machine=a)) == "usage.approve"
    assert error(approve("--here", "--pcrs", "16", machine=a)) == "usage.pcrs"
    assert error(a.run("enroll")) == "usage.enroll"
    assert error(a.run("enroll", "--request", "x", "--answer", "y")) == "usage.enroll"
    assert error(a.run("enroll", "--request", "x", "--name", "A_B")) == "fleet.host-name"


def test_without_a_tpm(a: Host) -> None:
    a.tpm.stop()
    for verb, words in (("init", ()), ("enroll", ("--request", "x", "--name", "a")), ("evidence", ("-o", "x"))):
        assert error(a.run(verb, *words)) == "tpm.unreachable"
    a.tpm.start()
