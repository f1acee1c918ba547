"""``swtpm-prop domain`` against libvirt's test driver."""

from __future__ import annotations

import json
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import libvirt
import pytest
from click.testing import CliRunner, Result
from testdriver import URI, defined

from swtpm_prop.cli import domain as domain_cli
from swtpm_prop.cli.domain import command
from swtpm_prop.domain.metadata import Vtpm, parse_domain
from swtpm_prop.errors import DomainError, WireError
from swtpm_prop.layout import Layout
from swtpm_prop.tpm import eventlog, imalog
from swtpm_prop.tpm.algorithms import SHA256, SHA384, Digest
from swtpm_prop.tpm.eventlog_text import describe, type_name
from swtpm_prop.translate import record
from swtpm_prop.translate.policy import Bank, held_value
from swtpm_prop.translate.verdict import Verdict
from swtpm_prop.trust.build import build
from swtpm_prop.trust.certificate import format_time

DATA = Path(__file__).parent.parent / "data"
EVENT_LOG = DATA / "ovmf-uki.eventlog"
IMA_LOG = DATA / "ima-ng.imalog"
UUID = "aaaaaaaa-0000-4000-8000-000000000001"
BOOT = "https://example.org/properties/boot"
BANK = Bank(SHA384, frozenset({*range(10), 11, 12, 13, 14}), True, (BOOT,))
TIME = "2026-01-01T00:00:00Z"
XML = f"""
<domain type='test'><name>%s</name><uuid>{UUID}</uuid><memory>1024</memory><os><type>hvm</type></os>
<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>
"""


@pytest.fixture
def guest() -> Iterator[libvirt.virDomain]:
    """A guest named g."""
    with defined(XML % "g") as domain:
        yield domain


def call(*argv: str, layout: Layout | None = None) -> Result:
    return CliRunner().invoke(command, [*argv, "--connect", URI], obj=layout)


def refused(*argv: str) -> str:
    error = call(*argv).exception
    assert isinstance(error, DomainError)
    return error.id


def inactive(guest: libvirt.virDomain) -> bytes:
    return guest.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode()


def test_enable_show_disable(guest: libvirt.virDomain) -> None:
    assert call("enable", "g", "--property", BOOT).exit_code == 0
    vtpm = parse_domain(inactive(guest))
    assert vtpm is not None
    assert vtpm.banks == (BANK,)
    assert b"<prop:vtpm xmlns:prop=" in inactive(guest)
    shown = json.loads(call("show", "g", "--json").stdout)
    assert shown["enabled"]
    assert shown["uuid"] == UUID
    assert shown["banks"][0]["held"] == held_value(BANK).hex()
    assert BOOT in call("show", "g").stdout
    assert call("disable", "g").exit_code == 0
    assert parse_domain(inactive(guest)) is None
    assert json.loads(call("show", "g", "--json").stdout)["banks"] == []
    assert call("disable", "g").exit_code == 0


def test_custody_is_switched_on_shown_and_not_lost_unnoticed(guest: libvirt.virDomain) -> None:
    host = "https://example.org/hosts/approved"
    on = ("--property", BOOT, "--custody", host, "--migration", "attested")
    assert call("enable", "g", *on).stderr == ""
    vtpm = parse_domain(inactive(guest))
    assert vtpm is not None
    assert (vtpm.custody, vtpm.migration) == (host, "attested")
    shown = json.loads(call("show", "g", "--json").stdout)
    assert (shown["custody"], shown["migration"]) == (host, "attested")
    assert f"custody     on hosts with {host}\nmigration   attested\n" in call("show", "g").stdout
    for again in (("enable", "g", "--property", BOOT), ("disable", "g")):
        call("enable", "g", *on)
        assert "custody ends" in call(*again).stderr
    assert json.loads(call("show", "g", "--json").stdout)["custody"] is None


@pytest.mark.parametrize(
    ("argv", "id"),
    [
        (("--migration", "attested"), "domain.migration-without-custody"),
        (("--custody", "approved"), "domain.property"),
    ],
)
def test_custody_that_a_start_would_refuse_is_refused_at_once(
    guest: libvirt.virDomain, argv: tuple[str, ...], id: str
) -> None:
    assert refused("enable", "g", "--property", BOOT, *argv) == id


def test_it_is_said_when_no_recovery_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(tmp_path)
    vtpm = Vtpm((BANK,), "https://example.org/hosts/approved")
    domain_cli._warn_if_not_recoverable(vtpm, layout)
    assert "no recovery key" in capsys.readouterr().err
    layout.etc.mkdir(parents=True)
    layout.host.write_text('[custody]\nrecovery = ["recovery.pem"]\n')
    domain_cli._warn_if_not_recoverable(vtpm, layout)
    domain_cli._warn_if_not_recoverable(Vtpm((BANK,)), Layout(tmp_path / "other"))
    assert capsys.readouterr().err == ""


def test_enable_takes_every_choice_and_replaces_the_earlier_one(guest: libvirt.virDomain) -> None:
    call("enable", "g", "--property", BOOT)
    two = ("--property", BOOT, "--property", "urn:example:b")
    made = call("enable", "g", *two, "--bank", "sha512", "--pcrs", "4,7", "--hidden", "--json")
    bank = json.loads(made.stdout)["banks"][0]
    assert (bank["algorithm"], bank["pcrs"], bank["visible"]) == ("sha512", "4,7", False)
    assert bank["properties"] == [BOOT, "urn:example:b"]


@pytest.mark.parametrize(
    ("argv", "id"),
    [
        (("--property", "boot"), "domain.property"),
        (("--property", BOOT, "--property", BOOT), "domain.property-doubled"),
        (("--property", BOOT, "--pcrs", "0-16"), "domain.pcr-not-translatable"),
        (("--property", BOOT, "--pcrs", "all"), "domain.pcrs"),
    ],
)
def test_what_a_start_would_refuse_is_refused_at_once(guest: libvirt.virDomain, argv: tuple[str, ...], id: str) -> None:
    before = inactive(guest)
    assert refused("enable", "g", *argv) == id
    assert inactive(guest) == before


def test_a_domain_without_a_fitting_tpm_is_refused() -> None:
    assert refused("enable", "test", "--property", BOOT) == "domain.tpm"


def test_a_domain_or_a_libvirt_that_is_not_there_is_said_to_be() -> None:
    assert refused("show", "no such guest") == "domain.libvirt"
    error = CliRunner().invoke(command, ["show", "g", "--connect", "test:///no/such/file"]).exception
    assert isinstance(error, DomainError)


def test_a_running_guest_is_said_to_change_later(guest: libvirt.virDomain) -> None:
    guest.create()
    assert "next start" in call("enable", "g", "--property", BOOT).stderr
    assert parse_domain(inactive(guest)) is not None
    assert parse_domain(guest.XMLDesc().encode()) is None
    assert "next start" in call("disable", "g").stderr


@pytest.mark.parametrize("name", ["--", "-", "..", "a b", "\x1b[2J", "ö<&>'\""])
def test_names_are_names(name: str) -> None:
    shown = CliRunner().invoke(command, ["show", "--connect", URI, "--", name])
    assert isinstance(shown.exception, DomainError)
    assert shown.exception.id == "domain.libvirt"
    assert shown.exception.line().isprintable()


def test_a_saved_guest_would_go_on_without_its_layer(guest: libvirt.virDomain) -> None:
    """Its saved image holds the metadata it had, and libvirt goes on from that."""
    guest.create()
    guest.managedSave()
    assert refused("enable", "g", "--property", BOOT) == "domain.saved"
    assert parse_domain(inactive(guest)) is None
    guest.managedSaveRemove()
    assert call("enable", "g", "--property", BOOT).exit_code == 0


# -- state and log ----------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path, guest: libvirt.virDomain) -> Layout:
    """A host with the log of a boot: PCR 0 held, PCR 4 unmeasured."""
    layout = Layout(tmp_path)
    layout.logs.mkdir(parents=True)
    append(layout, record.snapshot(record.STARTUP, {"sha384": {0: "unmeasured", 4: "unmeasured"}}))
    append(layout, record.measurement("PCR_Extend", 0, (), "sha384", "held", Verdict(True, ("sha256:" + "ab" * 32,))))
    return layout


def append(layout: Layout, entry: record.Record) -> None:
    with layout.guest_log(UUID).open("a") as file:
        file.write(json.dumps(entry.to_json(0, TIME)) + "\n")


def broken(layout: Layout) -> None:
    verdict = Verdict(False, (), "unknown", "no certificate \x1b[2J")
    append(layout, record.measurement("PCR_Extend", 4, (), "sha384", "broken", verdict))


def test_status_is_a_table_and_its_exit_status_the_verdict(layout: Layout) -> None:
    good = call("status", "g", layout=layout)
    assert good.exit_code == 0
    assert [line.split()[:2] for line in good.stdout.splitlines()[1:]] == [["0", "held"], ["4", "unmeasured"]]
    broken(layout)
    bad = call("status", "g", "--json", layout=layout)
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["states"] == {"sha384": {"0": "held", "4": "broken"}}


def broken_by_firmware(layout: Layout) -> eventlog.Event:
    """PCR 4 is broken by an event of a real log, then by another."""
    events = [event for event in eventlog.parse(EVENT_LOG.read_bytes()).events if event.pcr == 4]
    verdict = Verdict(False, (), "unknown", "no certificate has these digests")
    for event in events[-2:]:
        append(layout, record.measurement("PCR_Extend", 4, event.digests, "sha384", "broken", verdict))
    return events[-2]


def test_status_says_what_broke_a_pcr(layout: Layout) -> None:
    event = broken_by_firmware(layout)
    (cause,) = json.loads(call("status", "g", "--json", layout=layout).stdout)["causes"]
    assert (cause["bank"], cause["pcr"], cause["reason"], cause["type"]) == ("sha384", 4, "unknown", "")
    assert cause["digests"] == {digest.algorithm.name: digest.value.hex() for digest in event.digests}
    explained = ("--event-log", str(EVENT_LOG), "--ima-log", str(IMA_LOG))
    (cause,) = json.loads(call("status", "g", "--json", *explained, layout=layout).stdout)["causes"]
    assert (cause["type"], cause["description"]) == (type_name(event), describe(event))
    shown = call("status", "g", *explained, layout=layout)
    assert shown.exit_code == 1
    assert f"broken at {TIME}: {type_name(event)} {describe(event)}" in shown.stdout
    assert {d.algorithm.name: d.value.hex() for d in event.digests}["sha256"] in shown.stdout


def test_log_says_what_was_measured(layout: Layout) -> None:
    event = broken_by_firmware(layout)
    *_, first, _ = call("log", "g", "--event-log", str(EVENT_LOG), layout=layout).stdout.splitlines()
    assert first.endswith(f"{type_name(event)} {describe(event)}")
    *_, first, _ = call("log", "g", "--json", "--event-log", str(EVENT_LOG), layout=layout).stdout.splitlines()
    assert json.loads(first)["described"]["description"] == describe(event)
    error = call("log", "g", "--event-log", str(IMA_LOG), layout=layout).exception
    assert isinstance(error, WireError)


def test_a_long_description_is_whole_but_in_the_lines_of_the_log(layout: Layout, tmp_path: Path) -> None:
    long = "console=ttyS0 " * 40 + "init=/bin/sh"
    kernel = eventlog.Event(1, 4, 0x0D, (Digest(SHA256, b"\1" * 32),), long.encode())
    (tmp_path / "event.log").write_bytes(event_log(kernel))
    unknown = Verdict(False, (), "unknown", "no certificate")
    append(layout, record.measurement("PCR_Extend", 4, kernel.digests, "sha384", "broken", unknown))
    explained = ("--event-log", str(tmp_path / "event.log"))
    assert f": EV_IPL {long}\n" in call("status", "g", *explained, layout=layout).stdout
    (*_, last) = call("log", "g", *explained, layout=layout).stdout.splitlines()
    assert last.endswith("…")
    assert len(last) < 400
    (*_, last) = call("log", "g", "--json", *explained, layout=layout).stdout.splitlines()
    assert json.loads(last)["described"]["description"] == long


def event_log(event: eventlog.Event) -> bytes:
    """Firmware's header, which announces SHA-256, and one more record."""
    first = eventlog.parse(EVENT_LOG.read_bytes()).events[0]
    header = struct.pack("<II20sI", first.pcr, first.type, bytes(20), len(first.data)) + first.data
    digests = b"".join(struct.pack("<H", digest.algorithm.id) + digest.value for digest in event.digests)
    count = struct.pack("<III", event.pcr, event.type, len(event.digests))
    return header + count + digests + struct.pack("<I", len(event.data)) + event.data


def test_what_broke_a_pcr_is_forgotten_with_a_reset_and_found_again_in_ima_lists(layout: Layout) -> None:
    broken_by_firmware(layout)
    append(layout, record.snapshot(record.STARTUP, {"sha384": {4: "unmeasured", 10: "unmeasured"}}))
    assert json.loads(call("status", "g", "--json", layout=layout).stdout)["causes"] == []
    entry = imalog.parse(IMA_LOG.read_bytes())[2]
    digests = (Digest(SHA256, imalog.measured(entry, SHA256)), Digest(SHA384, bytes(range(20)) + bytes(28)))
    append(layout, record.measurement("PCR_Extend", 10, digests, "sha384", "broken", Verdict(False, (), "unknown")))
    append(layout, record.snapshot(record.RESUME, {"sha384": {4: "unmeasured", 10: "broken"}}))
    shown = call("status", "g", "--ima-log", str(IMA_LOG), layout=layout)
    assert f"PCR 10 sha384 broken at {TIME}: ima-ng /bin/busybox" in shown.stdout


def test_a_violation_is_called_one_and_the_ima_list_says_of_what(layout: Layout) -> None:
    ones = (Digest(SHA256, b"\xff" * 32), Digest(SHA384, b"\xff" * 48))
    append(layout, record.measurement("PCR_Extend", 10, ones, "sha384", "broken", Verdict(False, (), "unknown")))
    bare = call("status", "g", layout=layout).stdout
    assert f"PCR 10 sha384 broken at {TIME}: IMA violation: a file was read while it was open for writing\n" in bare
    listed = [imalog.describe(entry) for entry in imalog.parse(IMA_LOG.read_bytes()) if entry.violation]
    assert len(set(listed)) > 1
    which = f"ima-ng {' or '.join(dict.fromkeys(listed))}\n"
    assert f": {which}" in call("status", "g", "--ima-log", str(IMA_LOG), layout=layout).stdout
    assert call("log", "g", "--ima-log", str(IMA_LOG), layout=layout).stdout.endswith(which)


def test_status_says_that_the_index_certifies_nothing_any_more(layout: Layout) -> None:
    def said() -> tuple[str, dict[str, Any]]:
        shown = call("status", "g", layout=layout)
        assert shown.exit_code == 0  # what is held stays held
        return shown.stderr, json.loads(call("status", "g", "--json", layout=layout).stdout)["index"]

    assert "[store.index-missing]" in said()[0]
    layout.index.parent.mkdir(parents=True)
    now = int(time.time())
    build(layout.index, (), now - 5, lambda *_: None)
    warning, index = said()
    assert f"expired at {format_time(now - 5)}" in warning
    assert "[store.stale]: run swtpm-prop store sync" in warning
    assert (index["usable"], index["problem"] in warning) == (False, True)
    build(layout.index, (), now + 3600, lambda *_: None)
    warning, index = said()
    assert "store." not in warning
    assert index == {"usable": True, "problem": ""}


def test_status_after_the_layer_gave_up(layout: Layout) -> None:
    append(layout, record.failure("layer.bank-inactive", "the bank is not active"))
    shown = call("status", "g", layout=layout)
    assert shown.exit_code == 1
    assert "layer.bank-inactive" in shown.stdout


@contextmanager
def swtpm(directory: Path, log: Path) -> Iterator[None]:
    """A process of that name that has the log open, which is what a layer does."""
    program = directory / "swtpm"
    program.symlink_to("/usr/bin/sleep")
    with log.open("a") as file, subprocess.Popen([program, "60"], pass_fds=[file.fileno()]) as running:
        try:
            # The kernel names a process a moment after it has told Popen that the program runs.
            while Path(f"/proc/{running.pid}/comm").read_text() != "swtpm\n":
                time.sleep(0.001)
            yield
        finally:
            running.kill()


def test_a_guest_that_runs_without_its_layer_has_no_states(
    layout: Layout, guest: libvirt.virDomain, tmp_path: Path
) -> None:
    guest.create()
    error = call("status", "g", layout=layout).exception
    assert isinstance(error, DomainError)
    assert error.id == "domain.without-layer"
    bare = call("status", "g", "--json", layout=layout)
    said = json.loads(bare.stdout)
    assert (bare.exit_code, said["running"], said["layer"], said["states"]) == (1, True, False, {})
    assert "[domain.without-layer]" in said["failure"]
    with swtpm(tmp_path, layout.guest_log(UUID)):
        layered = call("status", "g", "--json", layout=layout)
        said = json.loads(layered.stdout)
        assert (layered.exit_code, said["layer"], said["failure"]) == (0, True, "")
        assert said["states"] == {"sha384": {"0": "held", "4": "unmeasured"}}
    assert not json.loads(call("status", "g", "--json", layout=layout).stdout)["layer"]


def test_log_says_what_each_state_rests_on(layout: Layout) -> None:
    broken(layout)
    append(layout, record.failure("layer.pcr-read", "PCR 4 cannot be read"))
    startup, held, refused, failure = call("log", "g", layout=layout).stdout.splitlines()
    assert "startup: 2 unmeasured" in startup
    assert held.split() == [TIME, "PCR", "0", "sha384", "held", "certified", "by", "sha256:" + "ab" * 8]
    assert "not certified, unknown: no certificate \\x1b[2J" in refused
    assert "failure: PCR 4 cannot be read [layer.pcr-read]" in failure
    assert all(click.unstyle(line).isprintable() for line in (startup, held, refused, failure))


def test_log_says_what_the_layer_recognised_without_a_certificate(layout: Layout) -> None:
    append(layout, record.measurement("PCR_Extend", 10, (), "sha384", "held", Verdict(True, (), "", "boot aggregate")))
    assert call("log", "g", layout=layout).stdout.splitlines()[-1].endswith("certified: boot aggregate")


def test_log_as_json_is_the_log_itself(layout: Layout) -> None:
    broken(layout)
    lines = call("log", "g", "--json", layout=layout).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        json.loads(line) for line in layout.guest_log(UUID).read_text().splitlines()
    ]


@pytest.mark.parametrize("field", ["state", "bank", "command", "reason", "time"])
def test_a_log_of_a_taken_over_swtpm_does_not_act_on_the_terminal(layout: Layout, field: str) -> None:
    lines = [json.loads(line) for line in layout.guest_log(UUID).read_text().splitlines()]
    for line in lines:
        line["content"][field] = "\x1b[2J\x1b]0;x\x07"
    layout.guest_log(UUID).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for verb in ("status", "log"):
        shown = CliRunner().invoke(command, [verb, "g", "--connect", URI], obj=layout, color=True).output
        assert "\x1b[2J" not in shown
        assert "\x1b]" not in shown


def test_without_a_log_it_says_so(guest: libvirt.virDomain, tmp_path: Path) -> None:
    for verb in ("status", "log"):
        error = call(verb, "g", layout=Layout(tmp_path)).exception
        assert isinstance(error, DomainError)
        assert error.id == "domain.no-log"


def test_the_log_of_a_remote_guest_is_on_its_host() -> None:
    for verb in ("status", "log"):
        result = CliRunner().invoke(command, [verb, "g", "--connect", "qemu+ssh://root@far.example.org/system"])
        assert isinstance(result.exception, DomainError)
        assert result.exception.id == "domain.remote"
        assert "far.example.org" in result.exception.what
