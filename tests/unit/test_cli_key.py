"""``swtpm-prop key`` on hosts with TPMs: what it shows, sealing anew, recovery on another host."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from swtpm_prop.cli.key import command
from swtpm_prop.cli.main import cli
from swtpm_prop.custody import keys, opening, state
from swtpm_prop.custody.form import PERMANENT, Form, form
from swtpm_prop.errors import Error
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Side, State
from tests.custodian import (
    APPROVED,
    OTHER,
    UUID,
    Authority,
    CustodyHost,
    domain,
    memory_directory,
    plain_state,
    private_pem,
)
from tests.hardware import HardwareTpm

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tpms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HardwareTpm, HardwareTpm]]:
    with HardwareTpm(tmp_path_factory.mktemp("a")) as first, HardwareTpm(tmp_path_factory.mktemp("b")) as second:
        yield first, second


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[CustodyHost], CustodyHost]:
    """Let this process be on a host."""

    def be_on(host: CustodyHost) -> CustodyHost:
        monkeypatch.setenv("PATH", f"{host.layout.libexec}:{os.defpath}")
        return host

    return be_on


@pytest.fixture(scope="module")
def plain() -> Iterator[Path]:
    with plain_state() as state:
        yield state


@pytest.fixture
def host(
    tpms: tuple[HardwareTpm, HardwareTpm],
    plain: Path,
    authority: Authority,
    use: Callable[[CustodyHost], CustodyHost],
) -> Iterator[CustodyHost]:
    """A host with a guest whose TPM state is encrypted."""
    with memory_directory() as root:
        made = use(CustodyHost(root, tpms[0], authority))
        made.keep_state(plain)
        assert made.hook("prepare", domain()) == 0
        yield made


@pytest.fixture
def second(host: CustodyHost, tpms: tuple[HardwareTpm, HardwareTpm], authority: Authority) -> Iterator[CustodyHost]:
    """Another host of the same authority that has got the first one's backup of the TPM state."""
    with memory_directory() as root:
        # What is in TPMs by now, the next list has to reach.
        for tpm in tpms:
            with tpm.open() as opened:
                opened.initialise()
                authority.catch_up(opened.epoch())
        authority.install(host.layout)
        tpms[1].extend(5, os.urandom(32))
        made = CustodyHost(root, tpms[1], authority)
        made.recovery = host.recovery
        made.configure()
        shutil.copytree(host.layout.guest_tpm(UUID).parent, made.layout.guest_tpm(UUID).parent)
        for path in made.layout.guest_tpm(UUID).rglob("**/*"):
            os.chown(path, *made.account)
        os.chown(made.layout.guest_tpm(UUID), *made.account)
        yield made


def call(host: CustodyHost, *argv: str | Path) -> Result:
    return CliRunner().invoke(command, [str(each) for each in argv], obj=host.layout)


def refused(host: CustodyHost, *argv: str | Path) -> str:
    error = call(host, *argv).exception
    assert isinstance(error, Error), error
    assert error.line().isprintable()
    return error.id


def key_of(layout: Layout) -> bytes:
    record = keys.load(UUID, layout)
    assert record is not None
    with opening.hardware(layout) as tpm:
        return opening.open_(record, tpm, layout)


@pytest.fixture
def recovery_key(host: CustodyHost, tmp_path: Path) -> Path:
    path = tmp_path / "recovery.pem"
    path.write_text(private_pem(host.recovery))
    return path


# -- show -----------------------------------------------------------------------------------------


def test_show_says_what_the_key_demands_and_that_it_opens(host: CustodyHost) -> None:
    shown = json.loads(call(host, "show", UUID, "--json").stdout)
    record = keys.load(UUID, host.layout)
    assert record is not None
    assert (shown["guest"], shown["opens"], shown["property"], shown["epoch"]) == (UUID, True, APPROVED, 0)
    assert shown["state"] == "encrypted"
    assert shown["recovery"] == [wrap.keyid for wrap in record.recovery]
    assert json.loads(call(host, "show", "--json").stdout) == [shown]
    for text in (call(host, "show").stdout, call(host, "show", UUID).stdout):
        assert UUID in text
        assert APPROVED in text
    every = call(host, "show", UUID).output + json.dumps(shown)
    assert key_of(host.layout).hex() not in every


def test_show_says_why_a_key_does_not_open(host: CustodyHost) -> None:
    host.trust(Authority())
    shown = call(host, "show", UUID, "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["opens"]) == (1, False)
    assert json.loads(shown.stdout)["refusal"]["id"] == "approvals.missing"
    for argv in (["show"], ["show", UUID]):
        text = call(host, *argv)
        assert text.exit_code == 1
        assert "approvals.missing" in text.stdout


def test_show_of_a_guest_without_a_key_and_of_a_host_without_keys(host: CustodyHost) -> None:
    unknown = UUID.replace("a", "b")
    assert refused(host, "show", unknown) == "custody.no-record"
    keys.destroy(UUID, host.layout)
    nothing = call(host, "show")
    assert (nothing.exit_code, nothing.stdout) == (0, "this host has no key of a guest\n")
    assert json.loads(call(host, "show", "--json").stdout) == []


def test_a_damaged_record_is_said_to_be(host: CustodyHost) -> None:
    host.layout.guest_key(UUID).write_text("{}")
    assert refused(host, "show", UUID) == "custody.record-damaged"
    assert "custody.record-damaged" in call(host, "show").stdout


# -- rebind ---------------------------------------------------------------------------------------


def test_rebind_to_another_property_keeps_the_key(host: CustodyHost) -> None:
    before = key_of(host.layout)
    assert host.hook("prepare", domain(OTHER)) == 1
    assert call(host, "rebind", UUID, "--property", OTHER).exit_code == 0
    assert host.hook("prepare", domain(OTHER)) == 0
    assert key_of(host.layout) == before
    assert host.hook("prepare", domain(APPROVED)) == 1


def test_rebind_to_another_authority(host: CustodyHost) -> None:
    other = Authority()
    other.catch_up(host.authority.list.epoch)
    other.approve("here", host.state())
    host.trust(other)
    other.install(host.layout)
    before = keys.load(UUID, host.layout)
    assert host.hook("prepare", domain()) == 1
    assert call(host, "rebind", UUID).exit_code == 0
    assert host.hook("prepare", domain()) == 0
    after = keys.load(UUID, host.layout)
    assert before is not None
    assert after is not None
    assert (after.authority != before.authority, after.encrypted) == (True, True)


def test_a_rebind_brings_no_key_back_that_goes_with_its_guest(
    host: CustodyHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, lock = threading.Event(), Journal.locked

    def locked(journal: Journal, uuid: str) -> AbstractContextManager[None]:
        waits.set()
        return lock(journal, uuid)

    with ThreadPoolExecutor() as pool:
        with Journal(host.layout).locked(UUID):
            monkeypatch.setattr(Journal, "locked", locked)
            rebinding = pool.submit(refused, host, "rebind", UUID)
            # what the agent does when the guest runs elsewhere: what `rebind` reads before it waits, it has read
            assert waits.wait(30)
            keys.destroy(UUID, host.layout)
        assert rebinding.result() == "custody.no-record"
    assert keys.load(UUID, host.layout) is None


def test_rebind_wraps_to_the_recovery_keys_of_now(host: CustodyHost) -> None:
    before = json.loads(call(host, "show", UUID, "--json").stdout)["recovery"]
    host.recovery = ec.generate_private_key(ec.SECP256R1())
    host.configure()
    after = json.loads(call(host, "rebind", UUID, "--json").stdout)["recovery"]
    assert len(after) == 1
    assert after != before
    copy = keys.load_recovery_copy(keys.recovery_copy(UUID, host.layout), UUID)
    assert [wrap.keyid for wrap in copy.recovery] == after
    host.configure(recovery=False)
    assert "no recovery key" in call(host, "rebind", UUID).stderr


@pytest.mark.parametrize(
    ("argv", "id"),
    [
        (["rebind", UUID, "--property", "approved"], "trust.uri"),
        (["rebind", UUID, "--property", "https://example.org/hosts/unapproved"], "host.nothing-approved"),
        (["rebind", UUID, "--property", "https://elsewhere.example/"], "approvals.no-authority"),
        (["rebind", UUID.replace("a", "b")], "custody.no-record"),
        (["rebind", UUID, "--accept-plain"], "custody.not-plain"),
    ],
)
def test_a_rebind_that_would_lock_the_guest_out_changes_nothing(host: CustodyHost, argv: list[str], id: str) -> None:
    before = host.layout.guest_key(UUID).read_bytes()
    assert refused(host, *argv) == id
    assert host.layout.guest_key(UUID).read_bytes() == before


def test_a_state_that_came_back_plain_is_taken_on_the_operators_word(host: CustodyHost) -> None:
    state.convert(state.place(UUID, host.account, host.layout), key_of(host.layout), None)
    assert host.hook("prepare", domain()) == 1
    assert call(host, "rebind", UUID, "--accept-plain").exit_code == 0
    assert host.hook("prepare", domain()) == 0
    assert form(host.layout.guest_tpm(UUID)) is Form.ENCRYPTED


# -- recover --------------------------------------------------------------------------------------


def test_a_backup_and_the_recovery_key_start_the_guest_on_another_host(
    host: CustodyHost, second: CustodyHost, recovery_key: Path, use: Callable[[CustodyHost], CustodyHost]
) -> None:
    lost = key_of(host.layout)
    use(second)
    assert second.hook("prepare", domain()) == 1
    recovered = json.loads(call(second, "recover", UUID, "--key", recovery_key, "--json").stdout)
    assert (recovered["epoch"], recovered["property"]) == (1, APPROVED)
    assert second.hook("prepare", domain()) == 0
    assert second.layout.state_key(UUID).read_text() == lost.hex()
    assert key_of(second.layout) == lost
    assert refused(second, "recover", UUID, "--key", recovery_key) == "custody.key-present"


@pytest.mark.parametrize("left", [State.RELEASED, State.MOVED])
def test_a_guest_comes_back_from_a_lost_host_to_one_it_has_been_on(
    host: CustodyHost, recovery_key: Path, capsys: pytest.CaptureFixture[str], left: State
) -> None:
    keys.destroy(UUID, host.layout)
    Journal(host.layout).begin(Transfer("00" * 16, Side.SOURCE, left, UUID, 0, "lost", "127.0.0.1:1"))
    assert call(host, "recover", UUID, "--key", recovery_key).exit_code == 0
    assert host.hook("prepare", domain()) == 1
    assert "[transfer." in capsys.readouterr().err
    done = CliRunner().invoke(cli, ["transfer", "resolve", UUID, "--here"], obj=host.layout)
    assert done.exit_code == 0, done.output
    assert host.hook("prepare", domain()) == 0


def test_on_the_same_host_after_its_record_or_its_tpm_was_lost(
    host: CustodyHost, recovery_key: Path, tmp_path: Path
) -> None:
    before = key_of(host.layout)
    keys.destroy(UUID, host.layout)
    assert host.hook("prepare", domain()) == 1
    assert call(host, "recover", UUID, "--key", recovery_key).exit_code == 0
    with HardwareTpm(tmp_path / "replaced") as replaced:
        host.tpm = replaced
        host.configure()
        with replaced.open() as opened:
            opened.initialise()
        assert refused(host, "rebind", UUID) == "tpm.foreign-object"
        assert call(host, "recover", UUID, "--key", recovery_key).exit_code == 0
        assert key_of(host.layout) == before


def test_a_recovery_key_with_a_passphrase(host: CustodyHost, tmp_path: Path) -> None:
    path, word = tmp_path / "recovery.pem", tmp_path / "word"
    encryption = BestAvailableEncryption(b"word")
    path.write_bytes(host.recovery.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    word.write_text("word\n")
    keys.destroy(UUID, host.layout)
    assert call(host, "recover", UUID, "--key", path, "--passphrase-file", word).exit_code == 0


def test_what_cannot_be_recovered_leaves_the_host_as_it_was(
    host: CustodyHost, recovery_key: Path, tmp_path: Path
) -> None:
    keys.destroy(UUID, host.layout)
    argv = ("recover", UUID, "--key", recovery_key)
    copy = keys.recovery_copy(UUID, host.layout)
    whole = copy.read_text()
    stranger = tmp_path / "stranger.pem"
    stranger.write_text(private_pem(ec.generate_private_key(ec.SECP256R1())))
    assert refused(host, *argv[:3], stranger) == "custody.recovery-key"
    changed = json.loads(whole)
    (keyid, ciphertext), *_ = changed["recovery"].items()
    for wrong in (ciphertext[:-2] + "00", "", "zz"):
        changed["recovery"][keyid] = wrong
        copy.write_text(json.dumps(changed))
        assert refused(host, *argv) == "custody.recovery-damaged"
    for text in ("", "[]", "{}", whole.replace(UUID, UUID.replace("a", "b"))):
        copy.write_text(text)
        assert refused(host, *argv) == "custody.recovery-damaged"
    copy.unlink()
    assert refused(host, *argv) == "trust.file-missing"
    elsewhere = tmp_path / "copy.json"
    elsewhere.write_text(whole)
    path = host.layout.guest_tpm(UUID) / PERMANENT
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert refused(host, *argv, "--from", elsewhere) == "custody.state-foreign"
    assert keys.load(UUID, host.layout) is None
    path.write_bytes(good)
    assert call(host, *argv, "--from", elsewhere).exit_code == 0


def test_a_key_wrapped_for_one_guest_is_not_taken_for_another(host: CustodyHost, recovery_key: Path) -> None:
    """The UUID is bound into the wrap, whatever the file says."""
    other = UUID.replace("a", "b")
    copy = json.loads(keys.recovery_copy(UUID, host.layout).read_text())
    moved = keys.recovery_copy(other, host.layout)
    moved.parent.mkdir(parents=True)
    moved.write_text(json.dumps({**copy, "uuid": other}))
    assert refused(host, "recover", other, "--key", recovery_key) == "custody.recovery-damaged"
