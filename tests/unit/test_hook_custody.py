"""What the hook does with a guest's key: row by row of its matrix, on a host with a TPM, with the real swtpm."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
import syslog
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner

from swtpm_prop.cli.main import cli
from swtpm_prop.custody import keys, opening, recovery, state
from swtpm_prop.custody.form import PERMANENT, Form, form
from swtpm_prop.custody.keys import KeyRecord, migration_key
from swtpm_prop.domain.arrival import note
from swtpm_prop.errors import TransferError
from swtpm_prop.hook.custody import MATRIX, Kept, Step
from swtpm_prop.transfer import handover
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Event, Side, State
from swtpm_prop.transfer.messages import Report
from swtpm_prop.transfer.settle import HOOK, Settler
from tests.custodian import (
    APPROVED,
    OTHER,
    UUID,
    Authority,
    CustodyHost,
    domain,
    make_state,
    memory_directory,
    plain_state,
)
from tests.hardware import HardwareTpm

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HardwareTpm]:
    with HardwareTpm(tmp_path_factory.mktemp("tpm")) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[Path]:
    with plain_state() as state:
        yield state


@pytest.fixture
def host(tpm: HardwareTpm, monkeypatch: pytest.MonkeyPatch) -> Iterator[CustodyHost]:
    with memory_directory() as root:
        made = CustodyHost(root, tpm, Authority())
        monkeypatch.setenv("PATH", f"{made.layout.libexec}:{os.environ['PATH']}")
        monkeypatch.setattr(syslog, "syslog", lambda *_: None)
        yield made


@pytest.fixture
def directory(host: CustodyHost) -> Path:
    """Where libvirt keeps the guest's TPM, with nothing in it yet."""
    path = host.layout.guest_tpm(UUID)
    path.mkdir(parents=True)
    os.chown(path, *host.account)
    return path


def put(directory: Path, content: bytes, host: CustodyHost) -> None:
    """A TPM state whose banks are active already: this is not about them."""
    (directory / PERMANENT).write_bytes(content)
    os.chown(directory / PERMANENT, *host.account)
    host.layout.guests.mkdir(exist_ok=True)
    host.layout.guest_marker(UUID).write_text("sha256,sha384\n")


def handed_over(host: CustodyHost) -> bytes | None:
    """The key that this start's swtpm gets."""
    path = host.layout.state_key(UUID)
    return bytes.fromhex(path.read_text()) if path.exists() else None


def open_(host: CustodyHost, record: KeyRecord) -> bytes:
    with opening.hardware(host.layout) as tpm:
        return opening.open_(record, tpm, host.layout)


def kept(host: CustodyHost) -> KeyRecord:
    record = keys.load(UUID, host.layout)
    assert record is not None
    return record


def said(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text[text.index("[") + 1 : text.index("]")]


# -- the matrix -----------------------------------------------------------------------------------


def arrange(host: CustodyHost, directory: Path, plain: Path, have: Kept, there: Form) -> bytes | None:
    """A host that has this key and this state; the key."""
    key = None
    if have is not Kept.NONE:
        with opening.hardware(host.layout) as tpm:
            record, key = opening.create(UUID, APPROVED, tpm, host.layout)
        keys.store(record._replace(encrypted=have is Kept.BOUND), host.layout)
    if there is Form.UNREADABLE:
        put(directory, b"no TPM state", host)
    elif there is not Form.NONE:
        put(directory, plain.read_bytes(), host)
    if there is Form.ENCRYPTED:
        state.convert(state.place(UUID, host.account, host.layout), None, key or bytes(32))
    assert form(directory) is there
    return key


AFTER = {
    # Which key swtpm gets (the one kept, a new one, or none), what is kept then, which state is there then; or the
    # error's id.
    Step.NOTHING: ("none", None, None),
    Step.LOOSEN: ("none", Kept.IDLE, None),
    Step.DECRYPT: ("none", Kept.IDLE, Form.PLAIN),
    Step.CREATE: ("new", Kept.BOUND, Form.NONE),
    Step.CREATE_AND_ENCRYPT: ("new", Kept.BOUND, Form.ENCRYPTED),
    Step.ENCRYPT: ("kept", Kept.BOUND, Form.ENCRYPTED),
    Step.BIND: ("kept", Kept.BOUND, None),
    Step.OPEN: ("kept", Kept.BOUND, None),
    Step.REFUSE_WITHOUT_KEY: "custody.key-missing",
    Step.REFUSE_PLAIN: "custody.state-plain",
    Step.REFUSE_UNREADABLE: "custody.state-unreadable",
}


def test_the_matrix_is_whole() -> None:
    assert set(MATRIX) == set(product((False, True), Kept, Form))
    assert set(MATRIX.values()) == set(Step) == set(AFTER)


@pytest.mark.parametrize(("row", "step"), MATRIX.items(), ids=str)
def test_row(
    host: CustodyHost,
    directory: Path,
    plain: Path,
    capsys: pytest.CaptureFixture[str],
    row: tuple[bool, Kept, Form],
    step: Step,
) -> None:
    asked, have, there = row
    key = arrange(host, directory, plain, have, there)
    before = keys.load(UUID, host.layout), (directory / PERMANENT).exists() and (directory / PERMANENT).read_bytes()
    status = host.hook("prepare", domain(APPROVED if asked else None))
    after = AFTER[step]
    if isinstance(after, str):
        assert status == 1
        assert said(capsys) == after
        assert not host.layout.guest_run(UUID).exists()
        state_after = (directory / PERMANENT).exists() and (directory / PERMANENT).read_bytes()
        assert (keys.load(UUID, host.layout), state_after) == before
        return
    assert status == 0, capsys.readouterr().err
    given, kept_after, form_after = after
    record = keys.load(UUID, host.layout)
    assert form(directory) is (form_after or there)
    handed = handed_over(host)
    if given == "none":
        assert handed is None
    else:
        assert record is not None
        assert handed == open_(host, record)
        assert (handed == key) is (given == "kept")
    assert record is None or record.encrypted is ((kept_after or have) is Kept.BOUND)
    if form(directory) in (Form.PLAIN, Form.ENCRYPTED):
        assert state.opens(state.place(UUID, host.account, host.layout), handed)


# -- what a start finds and leaves ----------------------------------------------------------------


def test_the_keys_are_for_swtpms_group_and_gone_once_it_has_started(host: CustodyHost, directory: Path) -> None:
    assert host.hook("prepare", domain()) == 0
    for path in (host.layout.state_key(UUID), host.layout.migration_key(UUID)):
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, host.account.gid, 0o640)
    handed = handed_over(host)
    assert handed is not None
    assert host.layout.migration_key(UUID).read_text() == migration_key(handed).hex()
    assert (host.layout.guest_run(UUID) / "keyed").exists()
    assert stat.S_IMODE(host.layout.guest_run(UUID).stat().st_mode) == 0o750
    assert host.hook("release", domain()) == 0
    assert not host.layout.guest_run(UUID).exists()


def test_the_record_and_its_directory_are_roots_alone(host: CustodyHost, directory: Path) -> None:
    host.hook("prepare", domain())
    assert stat.S_IMODE(host.layout.guest_key(UUID).stat().st_mode) == 0o600
    assert stat.S_IMODE(host.layout.keys.stat().st_mode) == 0o700


def test_nowhere_on_a_disk_is_the_key_in_clear(host: CustodyHost, directory: Path, plain: Path) -> None:
    put(directory, plain.read_bytes(), host)
    assert host.hook("prepare", domain()) == 0
    key = handed_over(host)
    assert key is not None
    shown = [key, key.hex().encode(), migration_key(key), migration_key(key).hex().encode()]
    files = [path for path in host.layout.root.rglob("*") if path.is_file() and host.layout.run not in path.parents]
    files += [path for path in host.tpm.directory.rglob("*") if path.is_file() and "state" not in path.parts]
    assert len(files) > 8
    assert [path for path in files if any(each in path.read_bytes() for each in shown)] == []


def test_a_host_whose_run_directory_is_on_a_disk_is_refused(
    host: CustodyHost, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    host.layout.run = tmp_path / "run"
    assert host.hook("prepare", domain()) == 1
    assert said(capsys) == "host.run-on-disk"
    assert host.hook("prepare", domain(custody=None)) == 0


def test_on_a_host_in_no_approved_state_nothing_is_made(
    host: CustodyHost, directory: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(directory, plain.read_bytes(), host)
    for label in [approval.label for approval in host.authority.list.approvals]:
        host.authority.revoke(label)
    host.authority.install(host.layout)
    assert host.hook("prepare", domain()) == 1
    assert said(capsys) == "host.nothing-approved"
    assert keys.load(UUID, host.layout) is None
    assert form(directory) is Form.PLAIN


def test_a_state_of_the_host_that_is_not_approved_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory_directory() as root, HardwareTpm(tmp_path / "tpm") as own:
        host = CustodyHost(root, own, Authority())
        monkeypatch.setenv("PATH", f"{host.layout.libexec}:{os.environ['PATH']}")
        assert host.hook("prepare", domain()) == 0
        own.extend(4)
        assert host.hook("prepare", domain()) == 1
        assert said(capsys) == "host.state-not-approved"
        host.authority.approve("after the update", host.state())
        host.authority.install(host.layout)
        assert host.hook("prepare", domain()) == 0
        own.reboot()
        assert host.hook("prepare", domain()) == 0
        host.authority.revoke(f"here {root.name}")
        host.authority.install(host.layout)
        assert host.hook("prepare", domain()) == 1
        assert said(capsys) == "host.state-not-approved"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ("property", "custody.property-changed"),
        ("authority", "custody.authority-changed"),
        ("no authority", "approvals.no-authority"),
        ("no list", "approvals.missing"),
        ("foreign state", "custody.state-foreign"),
        ("damaged record", "custody.record-damaged"),
        ("no TPM", "tpm.unreachable"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    host: CustodyHost, directory: Path, plain: Path, capsys: pytest.CaptureFixture[str], change: str, id: str
) -> None:
    put(directory, plain.read_bytes(), host)
    assert host.hook("prepare", domain()) == 0
    host.hook("release", domain())
    match change:
        case "authority":
            other = Authority()
            other.catch_up(host.authority.list.epoch)
            other.approve("here", host.state())
            host.trust(other)
            other.install(host.layout)
        case "no authority":
            host.layout.trust.write_text("")
        case "no list":
            shutil.rmtree(host.layout.approvals)
        case "foreign state":
            put(directory, plain.read_bytes(), host)
            state.convert(state.place(UUID, host.account, host.layout), None, bytes(32))
        case "damaged record":
            host.layout.guest_key(UUID).write_bytes(host.layout.guest_key(UUID).read_bytes()[:-20])
        case "no TPM":
            host.layout.host.write_text('[tpm]\ntcti = "swtpm:port=1"\n')
    before = (directory / PERMANENT).read_bytes()
    assert host.hook("prepare", domain(OTHER if change == "property" else APPROVED)) == 1
    assert said(capsys) == id
    assert (directory / PERMANENT).read_bytes() == before
    assert not host.layout.guest_run(UUID).exists()


def test_a_guest_that_is_switched_off_altogether_gets_its_state_back_plain(
    host: CustodyHost, directory: Path, plain: Path
) -> None:
    put(directory, plain.read_bytes(), host)
    host.hook("prepare", domain())
    assert host.hook("prepare", domain(opted_in=False)) == 0
    assert form(directory) is Form.PLAIN
    assert not host.layout.guest_marker(UUID).exists()
    assert not host.layout.guest_run(UUID).exists()


def test_on_off_on_is_the_same_key_for_the_sake_of_snapshots(host: CustodyHost, directory: Path, plain: Path) -> None:
    put(directory, plain.read_bytes(), host)
    seen = []
    for custody in (APPROVED, None, APPROVED):
        assert host.hook("prepare", domain(custody)) == 0
        seen.append(handed_over(host))
    assert seen[0] == seen[2] is not None
    assert seen[1] is None


def test_once_off_a_state_that_libvirt_encrypts_is_left_alone(host: CustodyHost, directory: Path, plain: Path) -> None:
    host.hook("prepare", domain())
    host.hook("prepare", domain(custody=None))
    put(directory, plain.read_bytes(), host)
    state.convert(state.place(UUID, host.account, host.layout), None, bytes(32))
    before = (directory / PERMANENT).read_bytes()
    for xml in (domain(None, backend="<encryption secret='x'/>"), domain(opted_in=False)):
        assert host.hook("prepare", xml) == 0
        assert (directory / PERMANENT).read_bytes() == before


def test_the_property_bank_is_activated_in_an_encrypted_state(host: CustodyHost, directory: Path) -> None:
    shutil.rmtree(directory)
    make_state(directory, host.account)
    subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpm-state", directory, "--pcr-banks", "sha256", "--reconfigure"],
        user="tss", group="tss", extra_groups=[], check=True, capture_output=True, env={"PATH": os.defpath}, cwd="/",
    )  # fmt: skip
    assert host.hook("prepare", domain()) == 0
    converted = (directory / PERMANENT).read_bytes()
    assert form(directory) is Form.ENCRYPTED
    host.layout.guest_marker(UUID).unlink()
    assert host.hook("prepare", domain()) == 0
    assert form(directory) is Form.ENCRYPTED
    assert (directory / PERMANENT).read_bytes() != converted
    assert state.opens(state.place(UUID, host.account, host.layout), handed_over(host))


# -- transfers ------------------------------------------------------------------------------------

ID = "5e" * 16


def began(host: CustodyHost, side: Side, state: State, key: str = "") -> None:
    Journal(host.layout).begin(Transfer(ID, side, state, UUID, 0, "other", "127.0.0.1:1", key=key))


def arrived(host: CustodyHost) -> bytes:
    """A key came from another host, and libvirt is about to start what receives the guest."""
    with opening.hardware(host.layout) as tpm:
        record, key = opening.create(UUID, APPROVED, tpm, host.layout)
    began(host, Side.DESTINATION, State.IMPORTED, keys.serialise(record._replace(epoch=1, encrypted=True)).decode())
    return key


def test_a_key_that_lies_open_is_for_the_property_it_came_for(
    host: CustodyHost, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived(host)
    handover.leave(ID, bytes(32), host.layout)
    assert host.hook("prepare", note(domain(APPROVED + "/other", migration=True), ID)) == 1
    assert said(capsys) == "custody.property-changed"
    assert handed_over(host) is None
    assert not host.layout.arriving_key(ID).exists()


@pytest.mark.parametrize("left", [None, b"left by the hook before, opened:"])
def test_the_start_that_receives_a_guest_gets_the_key_that_came_once(
    host: CustodyHost, directory: Path, plain: Path, capsys: pytest.CaptureFixture[str], left: bytes | None
) -> None:
    put(directory, plain.read_bytes(), host)  # of an earlier stay
    key = arrived(host)
    if left is not None:
        handover.leave(ID, left, host.layout)
    xml = note(domain(migration=True), ID)
    assert host.hook("prepare", xml) == 0
    assert handed_over(host) == (left or key)
    assert not host.layout.arriving_key(ID).exists()
    assert keys.load(UUID, host.layout) is None
    (known,) = Journal(host.layout).of(UUID)
    assert known.state is State.ARRIVING
    assert host.hook("prepare", xml) == 1
    assert said(capsys) == "transfer.undecided"


def test_an_ordinary_start_does_not_pass_for_the_one_that_receives_the_guest(
    host: CustodyHost, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived(host)
    for xml in (domain(migration=True), note(domain(migration=True), "00" * 16)):
        handover.leave(ID, bytes(32), host.layout)
        assert host.hook("prepare", xml) == 1
        assert handed_over(host) is None
        assert not host.layout.arriving_key(ID).exists()
        assert said(capsys).startswith("transfer.")
        (known,) = Journal(host.layout).of(UUID)
        assert known.state is State.CANCELLED
        Journal(host.layout).remove(known)
        arrived(host)


@pytest.mark.parametrize("custody", [APPROVED, None])
@pytest.mark.parametrize("opted_in", [True, False])
@pytest.mark.parametrize(("moved", "id"), [(State.RELEASED, "transfer.elsewhere"), (State.MOVED, "transfer.undecided")])
def test_a_guest_that_went_elsewhere_does_not_start_whatever_its_metadata_says_now(
    host: CustodyHost, capsys: pytest.CaptureFixture[str], custody: str | None, opted_in: bool, moved: State, id: str
) -> None:
    host.hook("prepare", domain(migration=True))
    host.hook("release", domain(migration=True))
    began(host, Side.SOURCE, moved)
    assert host.hook("prepare", domain(custody, opted_in=opted_in)) == 1
    assert said(capsys) == id
    assert not host.layout.guest_run(UUID).exists()


@pytest.mark.parametrize("opted_in", [True, False])
def test_a_guest_that_left_in_custody_comes_back_without(
    host: CustodyHost, capfdbinary: pytest.CaptureFixture[bytes], opted_in: bool
) -> None:
    began(host, Side.SOURCE, State.RELEASED)
    plain = domain(None, opted_in=opted_in)
    assert host.hook("prepare", plain) == 1
    capfdbinary.readouterr()
    assert host.hook("migrate", plain) == 0
    sys.stdout.flush()
    xml = capfdbinary.readouterr().out
    for _ in range(2):
        assert host.hook("prepare", xml) == 0
        assert handed_over(host) is None
    # Not yet: what left its definition here would start anew with an empty TPM if this migration failed.
    assert host.hook("prepare", plain) == 1
    settler = Settler(host.layout, Journal(host.layout), HOOK, _nobody)
    settler.observe(UUID, Event.RUNS)
    assert [known.state for known in settler.journal.of(UUID)] == [State.SETTLED]
    assert host.hook("prepare", plain) == 0


def test_only_without_custody_a_guest_comes_back_without_a_key(host: CustodyHost) -> None:
    began(host, Side.SOURCE, State.RELEASED)
    assert host.hook("prepare", note(domain(migration=True), f"back-{ID}")) == 1
    assert host.hook("prepare", note(domain(None), f"back-{'0' * 32}")) == 1
    assert host.hook("prepare", note(domain(None), ID)) == 1


def _nobody(transfer: Transfer, _: Report) -> Report:
    raise TransferError("transfer.unreachable", transfer.peer)


def test_a_guest_without_custody_that_never_left_comes_as_it_is(
    host: CustodyHost, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    began(host, Side.DESTINATION, State.SETTLED)
    assert host.hook("migrate", domain(None)) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == b""


def test_the_command_of_the_message_seals_the_key_for_what_the_guest_demands_now(
    host: CustodyHost, directory: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(directory, plain.read_bytes(), host)
    assert host.hook("prepare", domain()) == 0
    host.hook("release", domain())
    assert host.hook("prepare", domain(OTHER)) == 1
    told = capsys.readouterr().err
    assert "[custody.property-changed]" in told
    done = CliRunner().invoke(cli, shlex.split(told.partition("swtpm-prop ")[2]), obj=host.layout)
    assert done.exit_code == 0, done.output
    assert host.hook("prepare", domain(OTHER)) == 0


# -- recovery -------------------------------------------------------------------------------------


def test_beside_the_state_lies_what_the_recovery_key_opens(host: CustodyHost, directory: Path) -> None:
    host.hook("prepare", domain())
    copy = keys.recovery_copy(UUID, host.layout)
    assert copy == directory.parent / "swtpm-prop-recovery.json"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    read = keys.load_recovery_copy(copy, UUID)
    assert read == (0, APPROVED, kept(host).recovery)
    assert recovery.unwrap(read.recovery, UUID, host.recovery) == handed_over(host)


def test_a_first_start_makes_the_directory_as_libvirt_would(host: CustodyHost) -> None:
    assert host.hook("prepare", domain()) == 0
    made = host.layout.guest_tpm(UUID).parent
    assert stat.S_IMODE(made.stat().st_mode) == 0o711
    assert [path.name for path in made.iterdir()] == ["swtpm-prop-recovery.json"]


def test_without_a_recovery_key_it_is_said(host: CustodyHost, capsys: pytest.CaptureFixture[str]) -> None:
    host.configure(recovery=False)
    assert host.hook("prepare", domain()) == 0
    assert said(capsys) == "custody.no-recovery"
    assert kept(host).recovery == ()
    assert host.hook("prepare", domain()) == 0
    assert capsys.readouterr().err == ""


# -- what others pay ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xml", "loaded"),
    [(domain(opted_in=False), set()), (domain(custody=None), set()), (domain(), {"tpm2_pytss", "cryptography"})],
    ids=["opted out", "no custody", "custody"],
)
def test_only_a_guest_in_custody_loads_what_talks_to_the_tpm(host: CustodyHost, xml: bytes, loaded: set[str]) -> None:
    program = (
        "import sys; from pathlib import Path; from swtpm_prop.hook.operations import run;"
        "from swtpm_prop.layout import Layout;"
        "assert run(['g', 'prepare', 'begin', '-'], sys.stdin.buffer.read(), Layout(Path(sys.argv[1]))) == 0;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'tpm2_pytss', 'cryptography', 'socket'}));"
        "print(*sorted(name for name in sys.modules if name.startswith('swtpm_prop.custody.')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, host.layout.root], input=xml, capture_output=True, check=True
    ).stdout.decode().splitlines()  # fmt: skip
    assert set(ran[0].split()) & {"tpm2_pytss", "cryptography"} == loaded
    if not loaded:
        assert set(ran[1].split()) <= {"swtpm_prop.custody.form"}
