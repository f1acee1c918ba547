"""cert issue from packages and logs, and cert diff, as a certifier uses them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from certifier import (
    BOOT,
    ED25519,
    ISSUER,
    P256,
    digests_of,
    issue,
    names,
    private_pem,
    public_pem,
    subject,
    trust_text,
)
from click.testing import CliRunner, Result
from packaged import make_deb

from swtpm_prop.cli import cert, store
from swtpm_prop.errors import Error
from swtpm_prop.tpm import eventlog, imalog
from swtpm_prop.tpm.algorithms import SHA256, Digest
from swtpm_prop.translate import record
from swtpm_prop.translate.verdict import Verdict
from swtpm_prop.trust import certificate, dsse

DATA = Path(__file__).parent.parent / "data"
EVENT_LOG = DATA / "ovmf-uki.eventlog"
IMA_LOG = DATA / "ima-ng.imalog"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trust.toml").write_text(trust_text())
    (tmp_path / "key.pem").write_bytes(private_pem(ED25519))
    return tmp_path


def run(command: Any, *words: str | Path, typed: str | None = None) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], input=typed)


def issue_for(*words: str | Path, to: str | None = "c", typed: str | None = None) -> Result:
    given = ("issue", "--issuer", ISSUER, "--key", "key.pem", "--property", BOOT, *(("--output", to) if to else ()))
    return run(cert.command, *given, *words, typed=typed)


def subjects(path: str | Path = "c") -> dict[str, dict[str, bytes]]:
    return {s.name: dict(s.digests) for s in certificate.read(Path(path).read_bytes()).subjects}


def error(result: Result) -> Error:
    assert isinstance(result.exception, Error), result.output
    return result.exception


def package(here: Path, name: str, version: str, **files: bytes) -> Path:
    tree = here / "trees" / name / version
    for path, content in files.items():
        (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
        (tree / "usr/bin" / path).write_bytes(content)
    return make_deb(here, tree, f"{name}-{version.replace(':', '.')}", name, version)


def test_a_release_in_one_statement_or_in_one_a_package(here: Path) -> None:
    one = package(here, "one", "1:1.0", tool=b"tool", same=b"same")
    two = package(here, "two", "2.0", other=b"other")
    assert issue_for("--deb", one, "--deb", two, "--property", BOOT + "/x").exit_code == 0
    assert {name.split()[0] for name in subjects()} == {f"/usr/bin/{name}" for name in ("tool", "same", "other")}
    done = issue_for("--deb", one, "--deb", two, "--per-package", "release", "--json", to=None)
    assert done.exit_code == 0, done.output
    assert names(here / "release") == ["one_1%3a1.0.json", "two_2.0.json"]
    listed = json.loads(done.stdout)["certificates"]
    assert [(Path(entry["file"]).name, entry["subjectCount"]) for entry in listed] == [
        ("one_1%3a1.0.json", 4),
        ("two_2.0.json", 2),
    ]
    shown = run(cert.command, "show", "release/one_1%3a1.0.json")
    assert "1:1.0" in shown.stdout
    (first, *_) = json.loads(run(cert.command, "show", "release/two_2.0.json", "--json").stdout)["subjects"]
    assert first["annotations"] == {"package": "two", "component": "two", "version": "2.0"}
    assert run(cert.command, "verify", "release/two_2.0.json", "--trust", "trust.toml").exit_code == 0


def test_the_same_content_in_two_packages_is_in_both_certificates(here: Path) -> None:
    debs = [package(here, name, "1.0", tool=b"tool") for name in ("one", "two")]
    words = [word for deb in debs for word in ("--deb", deb)]
    assert issue_for(*words, "--per-package", "release", to=None).exit_code == 0
    assert subjects("release/one_1.0.json") == subjects("release/two_1.0.json")


def test_trees_and_components(here: Path) -> None:
    (here / "tree/boot").mkdir(parents=True)
    (here / "tree/boot/initrd").write_bytes(b"initrd")
    assert issue_for("--tree", "tree", "--no-ima", "--component", "image=3.1").exit_code == 0
    (only,) = certificate.read((here / "c").read_bytes()).subjects
    assert (only.name, only.digests) == ("/boot/initrd", digests_of(b"initrd"))
    assert only.annotations == {"component": "image", "version": "3.1"}
    assert issue_for("--tree", "tree", "--per-package", "release", to=None).exit_code == 0
    assert names(here / "release") == ["unpackaged.json"]
    assert error(issue_for("--tree", "tree", "--component", "image")).id == "usage.component"
    assert error(issue_for("--tree", "tree", "--component", "image=six_one")).id == "trust.version"
    assert error(issue_for("--tree", "tree", to=None)).id == "usage.output"
    assert error(issue_for("--tree", "tree", "--per-package", "release")).id == "usage.output"


def test_diff(here: Path) -> None:
    old = package(here, "thing", "1.0", same=b"same", changed=b"old", gone=b"gone")
    new = package(here, "thing", "2.0", same=b"same", changed=b"new", more=b"more")
    issue_for("--deb", old, to="old")
    issue_for("--deb", new, to="new")
    same = run(cert.command, "diff", "old", "old")
    assert (same.exit_code, same.output) == (0, "")
    differs = run(cert.command, "diff", "old", "new", "--json")
    assert differs.exit_code == 1
    said = json.loads(differs.stdout)
    found = {(c["kind"], c["name"], c["before"], c["after"]) for c in said["subjects"]}
    assert found == {
        (kind, f"/usr/bin/{name} {template}", before, after)
        for template in ("ima-ng", "ima-sig")
        for kind, name, before, after in (
            ("version", "same", "1.0", "2.0"),
            ("changed", "changed", "1.0", "2.0"),
            ("removed", "gone", "1.0", ""),
            ("added", "more", "", "2.0"),
        )
    }
    (component,) = said["components"]
    counts = {"added": 2, "removed": 2, "changed": 2}
    assert component == {"component": "thing", "before": "1.0", "after": "2.0", **counts}
    table = run(cert.command, "diff", "old", "new").stdout.splitlines()
    assert [line.split() for line in table[1:]] == [["thing", "1.0", "2.0", "2", "2", "2"]]
    every = run(cert.command, "diff", "old", "new", "--all")
    assert every.exit_code == 1
    assert every.stdout.splitlines()[: len(table)] == table
    assert len(every.stdout.splitlines()) == len(table) + 2 + len(found)
    assert error(run(cert.command, "diff", "old", "trust.toml")).id == "trust.json"


def test_diff_of_releases_in_directories(here: Path) -> None:
    for release, versions in (("old", ("1.0", "3.0", "1.0")), ("new", ("1.1", "3.0", ""))):
        debs = [
            package(here, name, version, tool=(name + version).encode(), same=name.encode())
            for name, version in zip(("one", "two", "gone"), versions, strict=True)
            if version
        ]
        words = [word for deb in debs for word in ("--deb", deb)]
        assert issue_for(*words, "--per-package", release, to=None).exit_code == 0
        (here / release / "README").write_text("what this is")
        (here / release / ".one.json").write_text("left by an editor")
    differs = run(cert.command, "diff", "old", "new")
    assert differs.exit_code == 1
    assert [line.split() for line in differs.stdout.splitlines()[1:]] == [
        ["gone", "1.0", "0", "4", "0"],
        ["one", "1.0", "1.1", "0", "0", "2"],
    ]
    same = run(cert.command, "diff", "new", "new", "--json")
    assert (same.exit_code, json.loads(same.stdout)) == (0, {"components": [], "subjects": []})
    assert run(cert.command, "diff", "new/two_3.0.json", "new").exit_code == 1
    (here / "empty").mkdir()
    assert error(run(cert.command, "diff", "old", "empty")).id == "usage.no-certificate"
    (here / "new/bad.json").write_text("nonsense")
    assert "new/bad.json" in error(run(cert.command, "diff", "old", "new")).line()


def test_diff_of_names_that_occur_twice_and_hostile_ones(here: Path) -> None:
    one, two = (subject(content)._replace(name="\x1b[2J") for content in (b"one", b"two"))
    (here / "a").write_bytes(issue(one, two))
    (here / "b").write_bytes(issue(two, one))
    (here / "c").write_bytes(issue(one))
    assert run(cert.command, "diff", "a", "b").exit_code == 0
    differs = run(cert.command, "diff", "a", "c", "--all")
    assert differs.exit_code == 1
    assert "\x1b" not in differs.output


def test_an_ima_list_is_a_source(here: Path) -> None:
    assert issue_for("--ima-log", IMA_LOG).exit_code == 0
    found = [digests["sha256"] for digests in certificate_digests(here / "c")]
    genuine = [entry for entry in imalog.parse(IMA_LOG.read_bytes()) if not entry.violation]
    assert sorted(found) == sorted({imalog.measured(entry, SHA256) for entry in genuine})
    assert "ima-ng /usr/sbin/busybox (PCR 10)" in subjects()
    assert error(issue_for("--ima-log", EVENT_LOG)).id.startswith("imalog.")


def test_violations_of_an_ima_list_are_said_to_be_left_out(here: Path) -> None:
    violations = sum(entry.violation for entry in imalog.parse(IMA_LOG.read_bytes()))
    assert violations
    said = issue_for("--ima-log", IMA_LOG, "--json")
    assert json.loads(said.stdout)["leftOut"] == {"violation": violations}
    assert f"mends it: IMA violations (the file was open for writing): {violations}\n" in said.stderr
    each = issue_for("--ima-log", IMA_LOG, "--per-package", "release", "--json", to=None)
    assert json.loads(each.stdout)["leftOut"] == {"violation": violations}
    assert "left out" not in issue_for("--event-log", EVENT_LOG).output


def test_a_key_in_hardware_signs_certificates(here: Path, token: Path) -> None:
    (here / "trust.toml").write_text(trust_text().replace(public_pem(ED25519), token.read_text()))
    debs = [package(here, name, "1.0", tool=b"tool") for name in ("one", "two")]
    words = ("issue", "--issuer", ISSUER, "--property", BOOT, "--deb", debs[0], "--deb", debs[1])

    def issue_by(key: str, *more: str | Path, pin: str = "1234") -> Result:
        return run(cert.command, *words, "--key", key, *more, "--per-package", "release", typed=f"{pin}\n")

    given = ("--public-key", token)
    assert error(issue_by("hsm:2?label=store")).id == "trust.key-foreign"
    (here / "other.pem").write_text(public_pem(P256))
    assert error(issue_by("hsm:2?label=store", "--public-key", "other.pem")).id == "trust.key-foreign"
    assert error(issue_by("hsm:3?label=store", *given)).id == "store.signer"
    assert error(issue_by("hsm:2?label=store", *given, pin="9999")).id == "store.signer"
    assert not (here / "release").exists()
    done = issue_by("hsm:2?label=store", *given)
    assert done.stderr.count("pin of hsm:2") == 1
    for file in ("one_1.0.json", "two_1.0.json"):
        assert run(cert.command, "verify", f"release/{file}", "--trust", "trust.toml").exit_code == 0
    (here / "pin").write_text("1234\n")
    both = ("--key", "file:key.pem", *given, "--passphrase-file", "pin")
    assert issue_by("hsm:2?label=store", *both).exit_code == 0
    envelope = dsse.parse((here / "release/one_1.0.json").read_bytes())
    assert len(envelope.signatures) == 2


# -- only what is not covered -------------------------------------------------------------------


def build(*words: str) -> None:
    assert run(store.command, "build", "--trust", "trust.toml", "--output", "index", *words).exit_code == 0


def build_anything() -> None:
    now = int(time.time())
    Path("anything").write_bytes(issue(begins=now - 10, ends=now + 1000))
    build("anything")


def test_only_what_no_certificate_covers_is_certified_after_a_look_at_it(here: Path) -> None:
    assert issue_for("--event-log", EVENT_LOG, to="all").exit_code == 0
    whole = certificate.read((here / "all").read_bytes()).subjects
    now = int(time.time())
    (here / "most").write_bytes(issue(*whole[2:], begins=now - 10, ends=now + 1000))
    build("most")
    asked = ("--event-log", EVENT_LOG, "--only-uncovered", "--index", "index")
    refused = issue_for(*asked, to="rest", typed="n\n")
    assert refused.exit_code == 1
    assert all(missing.name in refused.stdout for missing in whole[:2])
    assert whole[2].name not in refused.stdout
    assert not (here / "rest").exists()
    assert error(issue_for(*asked, "--json")).id == "usage.confirm"
    assert issue_for(*asked, to="rest", typed="y\n").exit_code == 0
    assert set(subjects("rest")) == {missing.name for missing in whole[:2]}
    assert issue_for(*asked, "--yes", "--json", to="again").exit_code == 0
    build("most", "rest")
    nothing = issue_for(*asked, to="none")
    assert (nothing.exit_code, (here / "none").exists()) == (0, False)
    assert issue_for(*asked, "--property", BOOT + "/other", "--yes", to="other").exit_code == 0
    assert len(certificate_digests(here / "other")) == len(whole)


def test_who_is_asked_sees_names_to_their_end(here: Path) -> None:
    end = "init=sh"
    long = Path("d" * 150, "e" * 149, end)
    assert str(long).index(end) > 300
    long.parent.mkdir(parents=True)
    long.write_bytes(b"thing")
    build_anything()
    asked = issue_for("--file", long, "--only-uncovered", "--index", "index", typed="y\n")
    assert asked.exit_code == 0, asked.output
    listed, question, shown = asked.output.partition("Certify all of these?")
    assert question
    assert end in listed
    assert end not in shown
    assert "ee…\n" in shown


def property_log(path: Path) -> list[eventlog.Event]:
    """The log of a guest that measured the first uncertified events of the event log, and other things."""
    events = [event for event in eventlog.parse(EVENT_LOG.read_bytes()).events if event.type != eventlog.EV_NO_ACTION]
    unknown, route = Verdict(False, (), "unknown", "no certificate"), Verdict(False, (), "route", "a session")
    records = [record.snapshot(record.STARTUP, {"sha384": {0: "unmeasured"}})]
    records += [record.measurement("PCR_Extend", e.pcr, e.digests, "sha384", "broken", unknown) for e in events[:2]]
    records += [record.measurement("PCR_Extend", e.pcr, e.digests, "sha384", "broken", route) for e in events[2:3]]
    held = Verdict(True, ("sha256:" + "00" * 32,))
    records += [record.measurement("PCR_Extend", e.pcr, e.digests, "sha384", "held", held) for e in events[3:4]]
    padded = (Digest(SHA256, b"\1" * 20 + bytes(12)),)
    records += [record.measurement("PCR_Extend", 10, padded, "sha384", "broken", unknown)]
    path.write_text("".join(json.dumps(r.to_json(n, "2026-01-01T00:00:00Z")) + "\n" for n, r in enumerate(records)))
    return events


def test_a_property_log_is_a_source_of_what_was_not_certified(here: Path) -> None:
    events = property_log(here / "log")
    assert issue_for("--from-log", "log", typed="n\n").exit_code == 1
    assert not (here / "c").exists()
    assert issue_for("--from-log", "log", "--yes").exit_code == 0
    expected = [{d.algorithm.name: d.value for d in e.digests if d.algorithm.name != "sha1"} for e in events[:2]]
    assert list(certificate_digests(here / "c")) == expected
    assert all("not described" in name for name in subjects())
    described = issue_for("--from-log", "log", "--event-log", EVENT_LOG, "--yes", "--json")
    assert described.exit_code == 0
    assert json.loads(described.stdout)["leftOut"] == {"route": 1, "padded": 1}
    assert "padded digests alone: 1, commands that cannot be translated: 1\n" in described.stderr
    assert list(certificate_digests(here / "c")) == expected
    assert all(name.startswith("EV_") for name in subjects())


@pytest.mark.parametrize(("word", "value"), [("violation", b"\xff" * 32), ("padded", b"\1" * 20 + bytes(12))])
def test_a_log_of_what_no_certificate_mends_is_not_called_covered(here: Path, word: str, value: bytes) -> None:
    def log(*records: record.Record) -> None:
        lines = [json.dumps(r.to_json(n, "2026-01-01T00:00:00Z")) + "\n" for n, r in enumerate(records)]
        (here / "log").write_text("".join(lines))

    def measured(value: bytes, verdict: Verdict) -> record.Record:
        return record.measurement("PCR_Extend", 10, (Digest(SHA256, value),), "sha384", "broken", verdict)

    unknown = Verdict(False, (), "unknown", "no certificate has these digests")
    hopeless = measured(value, unknown)
    held = measured(b"\2" * 32, Verdict(True, ("sha256:" + "00" * 32,)))
    log(held, hopeless)
    said = issue_for("--from-log", "log")
    assert (said.exit_code, (here / "c").exists()) == (0, False)
    assert "cover" not in said.output
    assert "nothing in it can be certified" in said.output
    log(held)
    assert "cover all of it" in issue_for("--from-log", "log").output
    log(hopeless, measured(digests_of(b"kernel")["sha256"], unknown))
    build_anything()
    both = issue_for("--from-log", "log", "--only-uncovered", "--index", "index")
    assert "cover all else" in both.output
    assert both.stderr.startswith("left out, for no certificate mends it: ")
    machine = issue_for("--from-log", "log", "--only-uncovered", "--index", "index", "--json")
    assert json.loads(machine.stdout) == {"subjectCount": 0, "leftOut": {word: 1}}


def certificate_digests(path: Path) -> list[dict[str, bytes]]:
    return [dict(subject.digests) for subject in certificate.read(path.read_bytes()).subjects]


@pytest.mark.parametrize(
    "line", [b"[]", b'{"content": 1}', b'{"content":{"event":"measurement","reason":"unknown"}}', b"nonsense"]
)
def test_damaged_property_logs(here: Path, line: bytes) -> None:
    (here / "log").write_bytes(line + b"\n")
    assert error(issue_for("--from-log", "log", "--yes")).id == "domain.log-malformed"
    assert error(issue_for("--from-log", "none", "--yes")).id == "domain.no-log"
