"""``transfer list``, ``show`` and ``resolve`` over a real journal."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from click.testing import CliRunner, Result
from testdriver import URI, defined

from swtpm_prop.cli.main import cli
from swtpm_prop.cli.transfer import GATES, MEANING
from swtpm_prop.custody.form import PERMANENT
from swtpm_prop.errors import DomainError, Error, UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import TABLE, Gate, Side, State

UUID = "0b7a4d6e-8f5c-4a2b-9c3d-1e2f3a4b5c6d"
OFFERED = Transfer("a" * 32, Side.SOURCE, State.OFFERED, UUID, 3, "beta", "127.0.0.1:1")
XML = f"<domain type='test'><name>g</name><uuid>{UUID}</uuid><memory>1024</memory><os><type>hvm</type></os></domain>"


@pytest.fixture
def guest() -> Iterator[libvirt.virDomain]:
    """A guest named g."""
    with defined(XML) as domain:
        yield domain


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    keep_state(layout)
    return layout


def call(layout: Layout, *words: str, typed: str = "") -> Result:
    return CliRunner().invoke(cli, ["transfer", *words], obj=layout, input=typed)


def keep_state(layout: Layout) -> None:
    """Let the guest have a TPM state here, plain and empty."""
    path = layout.guest_tpm(UUID) / PERMANENT
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack(">BBHHI", 2, 1, 10, 0, 10))


def test_every_state_and_gate_has_its_words() -> None:
    assert {side: set(table) for side, table in TABLE.items()} == {side: set(words) for side, words in MEANING.items()}
    assert set(GATES) == set(Gate)


def test_nothing_is_open(layout: Layout) -> None:
    assert call(layout, "list").output == "no migration is open\n"
    assert json.loads(call(layout, "list", "--json").output) == []
    refused = call(layout, "show", UUID).exception
    assert isinstance(refused, Error)
    assert refused.id == "transfer.none"


def test_what_is_open_is_listed(layout: Layout) -> None:
    journal = Journal(layout, lambda: 86400.0)
    journal.begin(OFFERED)
    journal.begin(OFFERED._replace(id="b" * 32, state=State.CLOSED))
    header, line = call(layout, "list").output.splitlines()
    assert header.split() == ["guest", "this", "host", "is", "peer", "state", "since"]
    assert line.split() == [UUID, "source", "beta", "offered", "1970-01-02T00:00:00Z"]
    assert len(json.loads(call(layout, "list", "--all", "--json").output)) == 2


def test_one_guest_is_shown(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    said = call(layout, "show", UUID).output
    assert "to beta (127.0.0.1:1), offered since" in said
    assert "the guest can be started here if the peer says so\n" in said
    assert said.endswith(f"there: 'swtpm-prop transfer resolve {UUID} --here'\n")
    shown = json.loads(call(layout, "show", UUID, "--json").output)
    assert shown["start"] == "ask-then-refuse"
    assert [(t["id"], t["open"]) for t in shown["transfers"]] == [("a" * 32, True)]


@pytest.mark.usefixtures("guest")
def test_a_guest_goes_by_its_name_too(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    named = ("g", "--connect", URI, "--json")
    assert json.loads(call(layout, "show", *named).output) == json.loads(call(layout, "show", UUID, "--json").output)
    assert json.loads(call(layout, "resolve", "--here", *named).output)["guest"] == UUID


def test_one_that_is_not_defined_here_goes_by_its_uuid_only(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    for argv in (["show", "g"], ["resolve", "g", "--here"]):
        refused = call(layout, *argv, "--connect", URI).exception
        assert isinstance(refused, DomainError)
        assert "by its UUID" in refused.mend
        assert call(layout, argv[0], UUID, *argv[2:], "--connect", URI).exit_code == 0


def test_the_operator_decides_what_no_host_can(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    for unsaid in ([], ["--here", "--there"]):
        assert isinstance(call(layout, "resolve", UUID, *unsaid).exception, UsageError)
    done = call(layout, "resolve", UUID, "--here")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "the guest may be started here"
    again = call(layout, "resolve", UUID, "--here").exception
    assert isinstance(again, Error)
    assert again.id == "transfer.decided"


def test_programs_hear_what_was_decided(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    said = json.loads(call(layout, "resolve", UUID, "--here", "--json").output)
    assert (said["guest"], said["start"], said["transfer"]["state"]) == (UUID, "start", "kept")
    assert said["tpmState"] == "plain"


def test_who_says_here_of_a_guest_whose_tpm_state_is_not_here_is_warned_first(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    (layout.guest_tpm(UUID) / PERMANENT).unlink()
    argv = ("resolve", UUID, "--here")
    unsure = call(layout, *argv, typed="n\n")
    assert (unsure.exit_code, "new, empty TPM" in unsure.stderr) == (1, True)
    unasked = call(layout, *argv, "--json")
    assert isinstance(unasked.exception, UsageError)
    assert "new, empty TPM" in unasked.stderr
    assert [transfer.state for transfer in Journal(layout).of(UUID)] == [State.OFFERED]
    sure = call(layout, *argv, "--json", "--yes")
    assert (json.loads(sure.stdout)["tpmState"], json.loads(sure.stdout)["transfer"]["state"]) == ("none", "kept")
    assert "new, empty TPM" in sure.stderr


def test_who_is_sure_decides_without_a_tpm_state(layout: Layout) -> None:
    Journal(layout).begin(OFFERED)
    (layout.guest_tpm(UUID) / PERMANENT).unlink()
    assert call(layout, "resolve", UUID, "--here", typed="y\n").exit_code == 0
    assert Journal(layout).of(UUID)[0].state is State.KEPT
