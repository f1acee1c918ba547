"""The hook script under a real sh: whom it calls, with what, and what becomes of the answer."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from swtpm_prop.hook.script import render
from swtpm_prop.layout import Layout

ENTRY = "from swtpm_prop.hook.entry import main; main()"
UUID = "aaaaaaaa-0000-4000-8000-000000000001"
PLAIN = (
    f"<domain id='1'>\n  <name>g</name>\n  <uuid>{UUID}</uuid>\n  <description>&lt;uuid&gt;x</description>\n</domain>\n"
)
OPTED_IN = PLAIN.replace("</domain>", "<metadata><p:vtpm xmlns:p='urn:swtpm-prop:domain:1'/></metadata></domain>")
HOSTILE_NAMES = [
    "g",
    "-",
    "--",
    "..",
    "-c",
    "a b",
    "a\tb",
    "$(touch x)",
    "`id`",
    "'",
    '"',
    "\\",
    "*",
    "\x1b[2J",
    "ö",
    "%s",
]


class Hook:
    """An installed hook whose Python is a stub that notes what it is called with and exits as it is told."""

    def __init__(self, root: Path, status: int = 0) -> None:
        self.layout = Layout(root / "it's a host")
        self.layout.run.mkdir(parents=True)
        self.layout.guests.mkdir(parents=True)
        self.noted = root / "noted"
        self.python = root / "a python"
        self.python.write_text(
            f"#!{sys.executable} -I\nimport json, os, sys\n"
            f"json.dump([sys.argv[1:], sys.stdin.read(), dict(os.environ)], open({str(self.noted)!r}, 'w'))\n"
            f"sys.exit({status})\n"
        )
        self.python.chmod(0o755)
        self.script = root / "hook"
        self.script.write_text(render(self.python, self.layout))
        self.script.chmod(0o755)

    def call(self, operation: str, xml: str, name: str = "g") -> subprocess.CompletedProcess[str]:
        argv = [str(self.script), name, operation, "begin", "-"]
        return subprocess.run(
            argv, input=xml, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )

    def seen(self) -> tuple[list[str], str] | None:
        """Arguments and standard input of the stub's last call."""
        if not self.noted.exists():
            return None
        argv, xml, environment = json.loads(self.noted.read_text())
        self.noted.unlink()
        assert "domain" not in "".join(argv) + "".join(environment.values())
        return argv, xml


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


@pytest.mark.parametrize("operation", ["prepare", "release", "migrate"])
def test_an_opted_in_guest_goes_to_python_with_its_xml_on_a_pipe(hook: Hook, operation: str) -> None:
    done = hook.call(operation, OPTED_IN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert hook.seen() == (["-I", "-c", ENTRY, "g", operation, "begin", "-"], OPTED_IN)


@pytest.mark.parametrize("operation", ["prepare", "release", "migrate"])
def test_a_guest_that_did_not_opt_in_never_reaches_python(hook: Hook, operation: str) -> None:
    (hook.layout.guests / UUID.replace("1", "2")).touch()
    assert hook.call(operation, PLAIN).returncode == 0
    assert hook.seen() is None


@pytest.mark.parametrize("operation", ["started", "stopped", "restore", "reconnect", "attach", ""])
def test_other_operations_end_at_once(hook: Hook, operation: str) -> None:
    done = hook.call(operation, OPTED_IN * 10000)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert hook.seen() is None


def test_a_start_goes_on_only_if_the_layer_holds_its_log(hook: Hook) -> None:
    assert hook.call("start", OPTED_IN).returncode == 0  # a guest for which nothing was laid out
    hook.layout.guest_run(UUID).mkdir()
    hook.layout.logs.mkdir(parents=True)
    log = hook.layout.guest_log(UUID)
    for make in (lambda: None, log.touch):
        make()
        refused = hook.call("start", OPTED_IN)
        assert refused.returncode == 1
        assert "[hook.no-layer]" in refused.stderr
        assert refused.stderr.count("\n") == 1
    with log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = hook.call("start", OPTED_IN)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert hook.seen() is None


def test_once_the_layer_is_there_the_keys_of_the_state_are_gone(hook: Hook) -> None:
    keys = [hook.layout.state_key(UUID), hook.layout.migration_key(UUID)]
    hook.layout.guest_run(UUID).mkdir()
    hook.layout.logs.mkdir(parents=True)
    hook.layout.guest_log(UUID).touch()
    for key in keys:
        key.write_text("ab" * 32)
    assert hook.call("start", OPTED_IN).returncode == 1  # release follows and takes the whole directory
    with hook.layout.guest_log(UUID).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for _ in range(2):
            done = hook.call("start", OPTED_IN)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert not any(key.exists() for key in keys)
    assert hook.layout.guest_run(UUID).is_dir()


def test_what_an_earlier_start_left_is_cleared_by_python(hook: Hook) -> None:
    marker = hook.layout.guest_marker(UUID)
    marker.touch()
    hook.call("prepare", PLAIN)
    assert hook.seen() is not None
    marker.unlink()
    hook.layout.guest_run(UUID).mkdir()
    hook.call("release", PLAIN)
    assert hook.seen() is not None


def test_xml_without_a_sane_uuid_is_no_path(hook: Hook) -> None:
    for wrong in ("", "..", "../run", "*", f"{UUID}/.."):
        assert hook.call("prepare", PLAIN.replace(UUID, wrong)).returncode == 0
        assert hook.seen() is None
    assert hook.call("prepare", "").returncode == 0


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_arrive_as_they_are(hook: Hook, name: str) -> None:
    assert hook.call("prepare", OPTED_IN, name).returncode == 0
    seen = hook.seen()
    assert seen is not None
    assert seen[0][3] == name


def test_only_prepare_refuses(tmp_path: Path) -> None:
    hook = Hook(tmp_path, status=1)
    assert hook.call("prepare", OPTED_IN).returncode == 1
    assert hook.call("release", OPTED_IN).returncode == 0


def test_without_its_interpreter_an_opted_in_guest_does_not_start(hook: Hook) -> None:
    hook.python.unlink()
    refused = hook.call("prepare", OPTED_IN)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "[hook.python]" in refused.stderr
    assert hook.call("release", OPTED_IN).returncode == 0
    assert hook.call("prepare", PLAIN).returncode == 0


def test_a_large_domain_is_no_burden(hook: Hook) -> None:
    assert hook.call("prepare", PLAIN.replace("&lt;", "s" * 4_000_000)).returncode == 0
    assert hook.call("prepare", OPTED_IN.replace("&lt;", "s" * 4_000_000)).returncode == 0
    seen = hook.seen()
    assert seen is not None
    assert len(seen[1]) > 4_000_000


def test_the_script_is_plain_posix_sh(hook: Hook) -> None:
    checked = subprocess.run(
        ["shellcheck", "--shell=sh", str(hook.script)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
