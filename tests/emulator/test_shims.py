"""The shell scripts: which program they start, with what, and that they change nothing on the way."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from swtpm_prop.emulator import shims
from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout

UUID = "6f1b2a34-5c6d-4e7f-8091-a2b3c4d5e6f7"
OTHER = "00000000-0000-4000-8000-000000000000"
STATE = f"dir=/var/lib/libvirt/swtpm/{UUID}/tpm2,mode=0600"
HOSTILE = ["", " ", "two words", "*", "a\nb", "$(exit 9)", "`exit 9`", "-n", "\\", "'\"", "--", f"x,{UUID},y", UUID]

# Says what it was started as; NUL between values, so that newlines in them are no matter.
RECORDER = """#!/bin/sh
printf '%s\\0' "$0" "$@"
printf '%s\\0' "LD_PRELOAD=${LD_PRELOAD-unset}" "SWTPM_PROP_LAYER=${SWTPM_PROP_LAYER-unset}" "PATH=$PATH" "PID=$$"
"""


class Shimmed:
    """Both shims below ``root``, and behind them programs of the same names that record how they were started."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.real = root / "bin"
        self.preload = root / "preload.so"
        self.preload.touch()
        for path in (self.layout.libexec, self.layout.run, self.layout.guests, self.real):
            path.mkdir(parents=True)
        for name in ("swtpm", "swtpm_setup"):
            self._program(self.layout.libexec / name, shims.render(name, self.preload, self.layout))
            self._program(self.real / name, RECORDER)

    def opt_in(self, uuid: str = UUID) -> None:
        (self.layout.guests / uuid).touch()
        run = self.layout.guest_run(uuid)
        run.mkdir()
        (run / "layer.json").touch()
        (run / "pcr-banks").write_text("sha256,sha384\n")

    def run(
        self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = f"{self.layout.libexec}:{self.real}:/usr/bin:/bin"
        return subprocess.run(
            [self.layout.libexec / name, *arguments], capture_output=True, text=True, env={"PATH": path, **(env or {})}
        )

    def started(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """Program and arguments that were started, then the variables."""
        ran = self.run(name, arguments, env)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split("\0")[:-1]

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def shimmed(tmp_path: Path) -> Shimmed:
    return Shimmed(tmp_path)


@pytest.mark.parametrize("name", ["swtpm", "swtpm_setup"])
def test_scripts_are_clean_and_hold_no_placeholder(shimmed: Shimmed, name: str) -> None:
    script = shimmed.layout.libexec / name
    assert "@" not in script.read_text().replace('"$@"', "")
    checked = subprocess.run(["shellcheck", "--shell=sh", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", ["/with space/x.so", "/with:colon/x.so", "relative.so", "/quote'/x.so", "/new\nline"])
def test_a_path_that_the_loader_would_split_is_refused(path: str) -> None:
    with pytest.raises(HostError) as refused:
        shims.render("swtpm", Path(path), Layout())
    assert refused.value.id == "shim.path"


@pytest.mark.parametrize("name", ["swtpm", "swtpm_setup"])
@pytest.mark.parametrize("opted_in", [False, True])
def test_arguments_without_the_guest_reach_the_real_program_untouched(
    shimmed: Shimmed, name: str, opted_in: bool
) -> None:
    if opted_in:
        shimmed.opt_in()
    started = shimmed.started(name, ["socket", *HOSTILE])
    assert started[: 2 + len(HOSTILE)] == [str(shimmed.real / name), "socket", *HOSTILE]
    assert started[2 + len(HOSTILE) : 4 + len(HOSTILE)] == ["LD_PRELOAD=unset", "SWTPM_PROP_LAYER=unset"]


def test_an_opted_in_guest_gets_the_layer(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    started = shimmed.started("swtpm", ["socket", "--tpmstate", STATE, *HOSTILE])
    count = 4 + len(HOSTILE)
    assert started[:count] == [str(shimmed.real / "swtpm"), "Socket", "--tpmstate", STATE, *HOSTILE]
    layer = shimmed.layout.guest_run(UUID) / "layer.json"
    assert started[count : count + 2] == [f"LD_PRELOAD={shimmed.preload}", f"SWTPM_PROP_LAYER={layer}"]


def test_what_was_preloaded_before_stays_behind_ours(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    started = shimmed.started("swtpm", ["chardev", "--tpmstate", STATE], {"LD_PRELOAD": "libm.so.6"})
    assert started[1] == "Chardev"
    assert started[4] == f"LD_PRELOAD={shimmed.preload}:libm.so.6"


@pytest.mark.parametrize("option", ["--print-capabilities", "--print-states", "--print-info", "--version", "--help"])
def test_questions_go_to_the_real_program_even_for_an_opted_in_guest(shimmed: Shimmed, option: str) -> None:
    shimmed.opt_in()
    arguments = ["socket", option, "--tpmstate", STATE]
    started = shimmed.started("swtpm", arguments)
    assert started[1:5] == arguments
    assert started[5] == "LD_PRELOAD=unset"


def test_the_guest_is_found_by_directory_never_by_name(shimmed: Shimmed) -> None:
    shimmed.opt_in(OTHER)
    names = [f"file=/var/log/swtpm/libvirt/qemu/{OTHER}-swtpm.log", f"type=unixio,path=/run/1-{OTHER},{OTHER}-s.sock"]
    started = shimmed.started("swtpm", ["socket", "--tpmstate", STATE, "--log", names[0], "--ctrl", names[1]])
    assert started[1] == "socket"


def test_a_uuid_in_the_path_that_is_no_guest_is_passed_over(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    started = shimmed.started("swtpm", ["socket", "--tpmstate", f"dir=/mnt/{OTHER}/swtpm/{UUID}/tpm2"])
    assert started[1] == "Socket"


def test_setup_activates_the_banks_and_finds_the_real_swtpm(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    arguments = ["--tpm2", "--tpm-state", f"/var/lib/libvirt/swtpm/{UUID}/tpm2", "--vmid", f"--version:{UUID}"]
    started = shimmed.started("swtpm_setup", arguments)
    assert started[1:8] == [*arguments, "--pcr-banks", "sha256,sha384"]
    assert f"PATH={shimmed.real}:/usr/bin:/bin" in started


@pytest.mark.parametrize("used", [[], [9], [3, 5, 9], [4, 5, 6, 7, 8]])
def test_the_keys_come_by_descriptors_that_the_caller_has_not_used(shimmed: Shimmed, used: list[int]) -> None:
    shimmed.opt_in()
    keys = {"state-key": "ab" * 32, "migration-key": "cd" * 32}
    for name, key in keys.items():
        (shimmed.layout.guest_run(UUID) / name).write_text(key)
    # Arguments 5 and 7 name the descriptors; what they hold is read when the files are gone.
    (shimmed.real / "swtpm").write_text(
        f"#!/bin/sh\nrm {shimmed.layout.guest_run(UUID)}/*-key\n"
        'for n in $5 $7; do n=${n#fd=}; n=${n%%,*}; eval "cat <&$n"; echo; done\n'
    )
    given = {number: os.open("/dev/null", os.O_RDONLY) for number in used}
    script = "".join(f" {number}<&{end}" for number, end in given.items())
    ran = subprocess.run(
        ["/bin/bash", "-c", f'exec "$@"{script}', "-", shimmed.layout.libexec / "swtpm", "socket", "--tpmstate", STATE],
        capture_output=True, text=True, env={"PATH": f"{shimmed.real}:/usr/bin:/bin"}, pass_fds=list(given.values()),
    )  # fmt: skip
    for end in given.values():
        os.close(end)
    assert ran.stdout.split() == list(keys.values()), ran.stderr


def test_without_a_free_descriptor_it_is_refused(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    for name in ("state-key", "migration-key"):
        (shimmed.layout.guest_run(UUID) / name).write_text("ab" * 32)
    every = " ".join(f"{number}</dev/null" for number in range(3, 10))
    ran = subprocess.run(
        ["/bin/bash", "-c", f'exec "$@" {every}', "-", shimmed.layout.libexec / "swtpm", "socket", "--tpmstate", STATE],
        capture_output=True, text=True, env={"PATH": f"{shimmed.real}:/usr/bin:/bin"},
    )  # fmt: skip
    assert ran.returncode == 1
    assert "[layer.no-descriptor]" in ran.stderr


def test_in_custody_neither_program_has_a_key_in_its_arguments(shimmed: Shimmed) -> None:
    shimmed.opt_in()
    run = shimmed.layout.guest_run(UUID)
    for name, key in (("state-key", "ab" * 32), ("migration-key", "cd" * 32)):
        (run / name).write_text(key)
    started = shimmed.started("swtpm", ["socket", "--tpmstate", STATE])
    form = "mode=aes-256-cbc,format=hex"
    keys = ["--key", f"fd=9,{form}", "--migration-key", f"fd=8,{form}"]
    assert started[1:8] == ["Socket", "--tpmstate", STATE, *keys]
    setup = shimmed.started("swtpm_setup", ["--tpm2", "--tpm-state", STATE.removeprefix("dir=")])
    keys = ["--keyfile", f"{run}/state-key", "--cipher", "aes-256-cbc"]
    assert setup[4:10] == [*keys, "--pcr-banks", "sha256,sha384"]
    assert "ab" * 32 not in "".join(started + setup)


def test_our_directory_under_another_name_is_not_the_real_program(shimmed: Shimmed, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(shimmed.layout.libexec)
    path = f"{link}:relative::{shimmed.layout.libexec}/:{shimmed.real}"
    started = shimmed.started("swtpm", ["socket"], {"PATH": path})
    assert started[0] == str(shimmed.real / "swtpm")


def test_without_a_real_program_in_path_debians_is_taken(shimmed: Shimmed) -> None:
    ran = shimmed.run("swtpm", ["--version"], {"PATH": str(shimmed.layout.libexec)})
    plain = subprocess.run(["/usr/bin/swtpm", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize(
    ("name", "lost", "id"),
    [
        ("swtpm", "preload", "layer.preload-unreadable"),
        ("swtpm", "layer.json", "layer.config-unreadable"),
        ("swtpm", "run", "layer.not-prepared"),
        ("swtpm_setup", "pcr-banks", "layer.banks-unreadable"),
        ("swtpm_setup", "run", "layer.not-prepared"),
    ],
)
def test_what_is_missing_is_refused_in_one_line(shimmed: Shimmed, name: str, lost: str, id: str) -> None:
    shimmed.opt_in()
    run = shimmed.layout.guest_run(UUID)
    if lost == "preload":
        shimmed.preload.unlink()
    elif lost == "run":
        run.rename(run.with_name("gone"))
    else:
        (run / lost).unlink()
    state = ["--tpm-state", STATE.removeprefix("dir=")] if name == "swtpm_setup" else ["--tpmstate", STATE]
    log = shimmed.real / "log"
    ran = shimmed.run(name, ["socket", *state, "--logfile", str(log)])
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("swtpm-prop: ")
    assert ran.stderr.count("\n") == 1
    assert f" [{id}]: " in ran.stderr
    if name == "swtpm_setup":
        assert log.read_text() == ran.stderr


@pytest.mark.root
@pytest.mark.parametrize("name", ["swtpm", "swtpm_setup"])
@pytest.mark.parametrize("lost", ["state-key", "migration-key"])
def test_a_key_that_cannot_be_read_is_no_start_without_one(directory: Path, name: str, lost: str) -> None:
    shimmed = Shimmed(directory)
    shimmed.opt_in()
    for key in ("state-key", "migration-key"):
        path = shimmed.layout.guest_run(UUID) / key
        path.write_text("ab" * 32)
        path.chmod(0o600 if key == lost else 0o644)
    ran = subprocess.run(
        [shimmed.layout.libexec / name, "socket", "--tpmstate", STATE],
        capture_output=True, text=True, user="tss", group="tss", extra_groups=[],
    )  # fmt: skip
    assert ran.returncode == 1
    assert "[layer.key-unreadable]" in ran.stderr


@pytest.mark.parametrize("name", ["swtpm", "swtpm_setup"])
def test_a_start_that_was_prepared_with_keys_is_none_without_them(shimmed: Shimmed, name: str) -> None:
    """The hook has removed them at ``start``, and was not asked again."""
    shimmed.opt_in()
    (shimmed.layout.guest_run(UUID) / "keyed").touch()
    ran = shimmed.run(name, ["socket", "--tpmstate", STATE])
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "[layer.key-unreadable]" in ran.stderr


@pytest.mark.root
def test_guests_that_cannot_be_looked_up_do_not_start(directory: Path) -> None:
    shimmed = Shimmed(directory)
    shimmed.layout.guests.chmod(0o700)
    ran = subprocess.run(
        [shimmed.layout.libexec / "swtpm", "socket", "--tpmstate", STATE],
        capture_output=True, text=True, user="tss", group="tss", extra_groups=[],
    )  # fmt: skip
    assert ran.returncode == 1
    assert "[layer.guests-unreadable]" in ran.stderr


@pytest.mark.parametrize("opted_in", [False, True])
def test_the_process_keeps_all_it_was_given(shimmed: Shimmed, tmp_path: Path, opted_in: bool) -> None:
    """Process id, descriptors, record locks, ignored signals: as the caller made them."""
    if opted_in:
        shimmed.opt_in()
    (shimmed.real / "swtpm").write_text("#!/bin/sh\necho ready $$; read -r go\n")
    ours = os.open(tmp_path / "pid", os.O_RDWR | os.O_CREAT)
    kept = [fcntl.fcntl(ours, fcntl.F_DUPFD, number) for number in (7, 10, 63)]

    def prepare() -> None:
        fcntl.lockf(kept[0], fcntl.LOCK_EX)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    process = subprocess.Popen(
        [shimmed.layout.libexec / "swtpm", "socket", "--tpmstate", STATE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[ours, *kept], preexec_fn=prepare,
        env={"PATH": f"{shimmed.real}:/usr/bin:/bin"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == f"ready {process.pid}\n"
    with pytest.raises(BlockingIOError):
        fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    links = {int(link.name): link.readlink() for link in Path(f"/proc/{process.pid}/fd").iterdir()}
    assert all(links[number] == tmp_path / "pid" for number in kept)
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored, blocked = (int(status.split(f"{name}:")[1].split()[0], 16) for name in ("SigIgn", "SigBlk"))
    assert ignored >> (signal.SIGUSR1 - 1) & 1
    assert blocked == 0
    process.communicate("go\n", timeout=10)
    for descriptor in (ours, *kept):
        os.close(descriptor)
