"""The nouns cert, store and pcr as a certifier and an operator use them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certifier import BOOT, ED25519, ISSUER, P256, digests_of, issue, names, private_pem, subject, trust_text, with_date
from click.testing import CliRunner, Result

from swtpm_prop.cli import cert, pcr, store
from swtpm_prop.errors import Error, TrustError, UsageError
from swtpm_prop.tpm.algorithms import BY_NAME, SHA384
from swtpm_prop.translate.policy import Bank, held_value, unmeasured_value
from swtpm_prop.trust.index import Index

BANK = Bank(SHA384, frozenset({4}), True, (BOOT,))
PE = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trust.toml").write_text(trust_text())
    (tmp_path / "key.pem").write_bytes(private_pem(ED25519))
    (tmp_path / "kernel").write_bytes(b"kernel")
    return tmp_path


def run(command: Any, *words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(command, words, input=typed)


def issue_for(*words: str, typed: str | None = None, key: str = "key.pem", to: str = "c.dsse") -> Result:
    given = ("issue", "--issuer", ISSUER, "--key", key, "--property", BOOT, "--output", to)
    return run(cert.command, *given, *words, typed=typed)


def build(*words: str) -> Result:
    return run(store.command, "build", "--trust", "trust.toml", "--output", "index.sqlite", *words)


def error(result: Result) -> Error:
    assert isinstance(result.exception, Error), result.output
    return result.exception


def test_issue_verify_build_lookup(here: Path) -> None:
    assert issue_for("--file", "kernel", "--pe", str(PE)).exit_code == 0
    assert run(cert.command, "verify", "c.dsse", "--trust", "trust.toml").exit_code == 0
    assert build("c.dsse").exit_code == 0
    for what in ("kernel", digests_of(b"kernel")["sha384"].hex(), "sha256:" + digests_of(b"kernel")["sha256"].hex()):
        found = run(store.command, "lookup", what, "--index", "index.sqlite", "--property", BOOT)
        assert found.exit_code == 0, found.output
        assert ISSUER in found.output
    by_firmware = json.loads(run(store.command, "lookup", str(PE), "--index", "index.sqlite", "--json").output)
    assert {answer["measured"]: answer["certified"] for answer in by_firmware} == {
        "plain hash": False,
        "Authenticode": True,
    }


def test_lookup_says_why_not(here: Path) -> None:
    issue_for("--file", "kernel")
    build("c.dsse")
    for words, reason in (
        (("00" * 32,), "unknown"),
        (("00" * 20,), "weak"),
        (("kernel", "--property", BOOT + "/more"), "property"),
    ):
        result = run(store.command, "lookup", *words, "--index", "index.sqlite")
        assert result.exit_code == 1
        assert f"[{reason}]" in result.output
    for nonsense in ("00", "sha384:" + "00" * 32, "no-such-file", ""):
        assert error(run(store.command, "lookup", nonsense, "--index", "index.sqlite")).id == "usage.digest"
    assert error(run(store.command, "lookup", "kernel", "--index", "none")).id == "store.index-missing"


def test_lookup_advises_by_the_reason(here: Path) -> None:
    def line(*more: str) -> str:
        return run(store.command, "lookup", "kernel", "--index", "index.sqlite", *more).output.splitlines()[0]

    now = int(time.time())
    kernel = subject(b"kernel")
    mixed = kernel._replace(digests={**kernel.digests, "sha512": bytes(range(64))})
    advice = {}
    for reason, data, expires in (
        ("unknown", issue(subject(b"other"), begins=now - 9, ends=now + 99), "2099-01-01T00:00:00Z"),
        ("mismatch", issue(mixed, begins=now - 9, ends=now + 99), "2099-01-01T00:00:00Z"),
        ("expired", issue(kernel, begins=now - 9, ends=now - 5), "2099-01-01T00:00:00Z"),
        ("not-yet-valid", issue(kernel, begins=now + 50, ends=now + 99), "2099-01-01T00:00:00Z"),
        ("stale-index", issue(kernel, begins=now - 9, ends=now + 99), "2020-01-01T00:00:00Z"),
    ):
        (here / "c.dsse").write_bytes(data)
        assert build("c.dsse", "--expires", expires).exit_code == 0
        what, reason_found, advice[reason] = line().partition(f"[{reason}]: ")
        assert reason_found, what
    assert "have it certified" not in advice["stale-index"]
    assert "store sync or store build" in advice["stale-index"]
    build("c.dsse")
    advice["property"] = line("--property", BOOT + "/more").partition("[property]: ")[2]
    assert all(advice.values())
    assert len(set(advice.values())) == len(advice)


def test_an_expired_certificate_is_indexed_with_its_end_so_that_guests_say_so(here: Path) -> None:
    issue_for("--file", "kernel", "--not-before", "2020-01-01T00:00:00Z", "--not-after", "2020-02-01T00:00:00Z")
    assert error(run(cert.command, "verify", "c.dsse", "--trust", "trust.toml")).id == "trust.expired"
    built = build("c.dsse", "--expires", "2099-01-01T00:00:00Z")
    assert built.exit_code == 0
    assert "[trust.expired]" in built.stderr
    assert "[expired]" in run(store.command, "lookup", "kernel", "--index", "index.sqlite").output


def test_build_is_all_or_nothing_and_names_every_bad_certificate(here: Path) -> None:
    certificates = here / "certificates"
    certificates.mkdir()
    (certificates / "a.json").write_bytes(issue(begins=0, ends=4_000_000_000))
    assert build("certificates").exit_code == 0
    before = (here / "index.sqlite").read_bytes()
    (certificates / "b\x1b[31m.json").write_bytes(issue(signers=(P256,)))
    (certificates / "c.json").write_bytes(issue(properties=("https://example.net/x",)))
    (certificates / "d.json").write_bytes(b"nonsense")
    (certificates / ".hidden.json").write_bytes(b"left by an editor")
    refused = build("certificates")
    assert error(refused).id == "trust.refused"
    for id in ("trust.signature", "trust.prefix", "trust.json"):
        assert f"[{id}]" in refused.stderr
    assert "\x1b[31mb" not in refused.stderr
    assert (here / "index.sqlite").read_bytes() == before
    assert names(here) == ["certificates", *with_date(here / "index.sqlite"), "kernel", "key.pem", "trust.toml"]


def test_of_a_directory_only_json_files_are_taken(here: Path) -> None:
    certificates = here / "certificates"
    certificates.mkdir()
    (certificates / "README").write_text("whose these are")
    (certificates / "old.json").mkdir()
    # Nothing to build from is not an index that certifies nothing.
    assert error(build("certificates")).id == "store.no-expiry"
    (certificates / "a.json").write_bytes(issue(begins=0, ends=4_000_000_000))
    assert json.loads(build("certificates", "--json").stdout)["certificates"] == 1


def test_revoking_is_building_without_it(here: Path) -> None:
    (here / "one").write_bytes(issue(subject(b"one"), begins=0, ends=4_000_000_000))
    (here / "two").write_bytes(issue(subject(b"two"), begins=0, ends=4_000_000_000))
    build("one", "two")
    index = Index.open("index.sqlite")
    assert index.judge((BOOT,), digests_of(b"one"), int(time.time())).certified
    build("two")
    index.refresh()
    assert index.judge((BOOT,), digests_of(b"one"), int(time.time())).reason == "unknown"
    assert index.judge((BOOT,), digests_of(b"two"), int(time.time())).certified


def test_stats(here: Path) -> None:
    issue_for("--file", "kernel")
    build("c.dsse")
    stats = json.loads(run(store.command, "stats", "--index", "index.sqlite", "--json").output)
    assert (stats["certificates"], stats["entries"], stats["list"][0]["entries"]) == (1, 1, 1)
    assert ISSUER in run(store.command, "stats", "--index", "index.sqlite").output


def test_stats_name_the_component_of_a_certificate_that_has_but_one(here: Path) -> None:
    linux = subject(b"kernel")._replace(annotations={"component": "linux", "version": "6.1-1"})
    (here / "certs").mkdir()
    for name, subjects in (("one", [linux]), ("two", [linux, subject(b"other")])):
        (here / f"certs/{name}.json").write_bytes(issue(*subjects, begins=0, ends=4_000_000_000))
    assert build("certs").exit_code == 0
    stats = json.loads(run(store.command, "stats", "--index", "index.sqlite", "--json").output)
    named = {one["entries"]: (one.get("component"), one.get("version")) for one in stats["list"]}
    assert named == {1: ("linux", "6.1-1"), 2: (None, None)}
    assert " linux      6.1-1 " in run(store.command, "stats", "--index", "index.sqlite").output


def test_passphrases_come_from_a_prompt_or_a_file_never_from_the_command_line(here: Path) -> None:
    (here / "key.pem").write_bytes(private_pem(ED25519, b"secret"))
    (here / "word").write_text("secret\n")
    (here / "wrong").write_text("terces\n")
    assert issue_for("--file", "kernel", typed="secret\n").exit_code == 0
    assert issue_for("--file", "kernel", "--passphrase-file", "word").exit_code == 0
    assert error(issue_for("--file", "kernel", "--passphrase-file", "wrong")).id == "trust.key-passphrase"
    assert "secret" not in issue_for("--file", "kernel", typed="secret\n").output


def test_issue_refuses_nonsense_and_writes_nothing(here: Path) -> None:
    assert error(issue_for()).id == "usage.no-subject"
    assert error(issue_for("--file", "none")).id == "source.unreadable"
    assert error(issue_for("--pe", "kernel")).id.startswith("pe.")
    assert error(issue_for("--event-log", "kernel")).id.startswith("eventlog.")
    assert error(issue_for("--file", "kernel", "--not-after", "soon")).id == "trust.time"
    both = ("--not-after", "2099-01-01T00:00:00Z", "--valid-days", "1")
    assert isinstance(error(issue_for("--file", "kernel", *both)), UsageError)
    assert error(issue_for("--file", "kernel", "--property", "boot")).id == "trust.uri"
    assert error(issue_for("--file", "kernel", key="trust.toml")).id == "trust.key"
    assert error(issue_for("--file", "kernel", to="none/c.dsse")).id == "trust.file-unwritable"
    assert names(here) == ["kernel", "key.pem", "trust.toml"]


def test_show_hides_nothing_and_shows_hostile_names_harmlessly(here: Path) -> None:
    (here / "c.dsse").write_bytes(issue(*(subject(b"\x1b]0;%d" % n) for n in range(1000))))
    shown = run(cert.command, "show", "c.dsse")
    assert shown.exit_code == 0
    assert "\x1b]" not in shown.output
    assert all(f";{n}" in shown.output for n in range(1000))
    as_json = json.loads(run(cert.command, "show", "c.dsse", "--json").output)
    assert as_json["subjectCount"] == 1000
    assert len(as_json["subjects"]) == 1000


def test_one_long_name_does_not_widen_every_row(here: Path) -> None:
    (here / "c.dsse").write_bytes(issue(subject(b"n" * 100_000), *(subject(b"%d" % n) for n in range(100))))
    assert len(run(cert.command, "show", "c.dsse").output) < 100_000


def test_verify_names_the_file_and_the_reason(here: Path) -> None:
    (here / "c.dsse").write_bytes(issue(signers=(P256,)))
    refused = error(run(cert.command, "verify", "c.dsse", "--trust", "trust.toml"))
    assert isinstance(refused, TrustError)
    assert refused.id == "trust.signature"
    assert "c.dsse" in refused.line()


def test_as_a_program(here: Path) -> None:
    root = str(Path(__file__).parents[2])

    def program(*words: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "swtpm_prop.cli.main", *words]
        if not (Path(root) / "swtpm_prop/__main__.py").exists():
            call = [sys.executable, "-c", "from swtpm_prop.cli.main import main; main()", *words]
        return subprocess.run(call, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False)

    issued = program("cert", "issue", "--issuer", ISSUER, "--key", "key.pem", "--property", BOOT)
    assert issued.returncode == 2
    words = ("--issuer", ISSUER, "--key", "key.pem", "--property", BOOT, "--file", "kernel", "--output", "c")
    assert program("cert", "issue", *words).returncode == 0
    assert program("cert", "verify", "c", "--trust", "trust.toml").returncode == 0
    (here / "trust.toml").write_text(trust_text(P256))
    refused = program("cert", "verify", "c", "--trust", "trust.toml")
    assert refused.returncode == 1
    assert "[trust.signature]" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# -- pcr ----------------------------------------------------------------------------------------


def test_predict_prints_the_value_alone() -> None:
    held = run(pcr.command, "predict", "--property", BOOT)
    assert held.output == held_value(BANK).hex() + "\n"
    none = run(pcr.command, "predict", "--property", BOOT, "--state", "unmeasured", "--bank", "sha256")
    assert none.output == "00" * 32 + "\n"


def test_predict_for_a_domain(tmp_path: Path) -> None:
    domain = tmp_path / "domain.xml"
    domain.write_text(
        f"""<domain type="qemu"><name>g</name><uuid>6c2f1a3e-0000-4000-8000-000000000001</uuid><metadata>
        <prop:vtpm xmlns:prop="urn:swtpm-prop:domain:1"><prop:bank algorithm="sha384" pcrs="0-4,7">
        <prop:property uri="{BOOT}"/></prop:bank></prop:vtpm></metadata>
        <devices><tpm model="tpm-crb"><backend type="emulator" version="2.0"/></tpm></devices></domain>"""
    )
    words = ("predict", "--domain-xml", str(domain), "--json")
    (bank,) = json.loads(run(pcr.command, *words).output)
    assert (bank["bank"], bank["pcrs"], bank["value"]) == ("sha384", [0, 1, 2, 3, 4, 7], held_value(BANK).hex())
    (bank,) = json.loads(run(pcr.command, *words, "--pcrs", "4,7", "--policy").output)
    assert bank["policy"] == pcr.policy_pcr(BY_NAME["sha256"], SHA384, dict.fromkeys((4, 7), held_value(BANK))).hex()
    assert error(run(pcr.command, *words, "--pcrs", "4,8")).id == "usage.pcrs"


def test_predict_refuses_nonsense() -> None:
    for words in ((), ("--property", BOOT, "--domain-xml", "x"), ("--property", BOOT, "--policy")):
        assert isinstance(error(run(pcr.command, "predict", *words)), UsageError)
    assert error(run(pcr.command, "predict", "--property", "boot")).id == "trust.uri"
    assert error(run(pcr.command, "predict", "--property", BOOT, "--pcrs", "4,24")).id == "usage.pcrs"


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[str]:
    """A plain swtpm with a sha384 bank; the TCTI to reach it."""
    (tmp_path / "state").mkdir()
    sockets = tmp_path / "tpm"
    ends = ("--server", f"type=unixio,path={sockets}", "--ctrl", f"type=unixio,path={sockets}.ctrl")
    with subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}/state", "--flags", "startup-clear", *ends]
    ) as swtpm:
        while not Path(f"{sockets}.ctrl").exists():
            assert swtpm.poll() is None
            time.sleep(0.01)
        yield f"swtpm:path={sockets}"
        swtpm.terminate()


@pytest.mark.root
@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
def test_the_policy_is_the_one_a_tpm_makes(tpm: str, tmp_path: Path, algorithm: str) -> None:
    assert shutil.which("tpm2_createpolicy")
    values, policy = tmp_path / "values", tmp_path / "policy"
    values.write_bytes(held_value(BANK) * 2 + unmeasured_value(BANK))
    pcrs = "sha384:4,7,14"
    given = ["--policy-pcr", "-l", pcrs, "-f", str(values), "-g", algorithm, "-L", str(policy)]
    subprocess.run(["tpm2_createpolicy", "-T", tpm, *given], check=True, capture_output=True)
    expected = {4: held_value(BANK), 7: held_value(BANK), 14: unmeasured_value(BANK)}
    assert pcr.policy_pcr(BY_NAME[algorithm], SHA384, expected) == policy.read_bytes()
    values.write_bytes(held_value(BANK) * 2)
    given[2] = "sha384:4,7"
    subprocess.run(["tpm2_createpolicy", "-T", tpm, *given], check=True, capture_output=True)
    words = ("predict", "--property", BOOT, "--pcrs", "7,4", "--policy", "--policy-hash", algorithm)
    assert run(pcr.command, *words).output.strip() == policy.read_bytes().hex()
