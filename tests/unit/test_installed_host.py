"""Install, examine, break and uninstall on a running system: this one, with private copies of what that changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.root

COPIED = ("/etc", "/usr/libexec", "/var/log", "/var/lib/libvirt", "/var/lib/swtpm-localca")
PRIVATE = ("/etc", "/usr/libexec", "/var/log", "/var/lib")
BUILD_INDEX = """
import sys, time
from swtpm_prop.layout import Layout
from swtpm_prop.trust.build import build
build(Layout().index, [], int(time.time()) + 30 * 86400, lambda what, done: None)
"""


class System:
    """A shell in mount and process namespaces of its own, in which commands run one after the other."""

    def __init__(self, base: Path) -> None:
        self._shell = subprocess.Popen(
            ["unshare", "-m", "-p", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        copy = "".join(f"mkdir -p {base}{Path(path).parent}; cp -a {path} {base}{path}\n" for path in COPIED)
        self.run(copy + "".join(f"mount --bind {base}{path} {path}\n" for path in PRIVATE) + "mount -t tmpfs run /run")

    def run(self, script: str) -> str:
        """Run shell commands; what they print."""
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.write(f"( set -e\n{script}\n) </dev/null; status=$?; echo; echo done-$status\n")
        self._shell.stdin.flush()
        lines = []
        for line in self._shell.stdout:
            if line.startswith("done-"):
                lines[-1:] = [] if lines[-1:] == ["\n"] else lines[-1:]
                self.status = int(line[5:])
                return "".join(lines)
            lines.append(line)
        raise AssertionError("the shell ended")

    def prop(self, *words: str) -> Any:
        """The command line with --json; what it prints, read."""
        code = "from swtpm_prop.cli.main import main; main()"
        text = self.run(f"{sys.executable} -P -c '{code}' {' '.join(words)} --json")
        return json.loads(text) if text.strip() else None

    def problems(self) -> dict[str, str]:
        """What the doctor finds to mend."""
        return {finding["id"]: finding["what"] for finding in self.prop("doctor") if finding["state"] != "ok"}

    def close(self) -> None:
        """End it and all that runs in it."""
        self._shell.kill()
        self._shell.wait()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    started = System(tmp_path_factory.mktemp("system"))
    try:
        yield started
    finally:
        started.close()


def test_from_nothing_to_healthy_and_back(system: System) -> None:
    before = system.run("find /etc /usr/libexec /run | sort")
    assert system.problems().keys() >= {"install.absent", "store.index-missing"}
    assert system.status == 1
    done = system.prop("install")
    assert {"action": "wrote", "path": "/etc/libvirt/hooks/qemu.d/swtpm-prop"} in done["done"]
    system.run(f"{sys.executable} -P -c '{BUILD_INDEX}'")
    assert system.problems() == {}
    assert system.status == 0
    assert system.prop("install")["done"] == []
    system.prop("uninstall", "--purge")
    assert system.status == 0
    assert system.run("find /etc /usr/libexec /run | sort") == before


def test_layer_that_does_not_load_is_found(system: System) -> None:
    system.prop("install")
    system.run(f"{sys.executable} -P -c '{BUILD_INDEX}'")
    system.run("sed -i 's/^export LD_PRELOAD/: export LD_PRELOAD/' /usr/libexec/swtpm-prop/swtpm")
    found = system.problems()
    assert found.keys() == {"install.file-changed", "preload.does-not-load"}
    system.run("mv /usr/libexec/swtpm-prop/swtpm /tmp/changed && rm /tmp/changed")
    system.prop("install")
    assert system.problems() == {}
    assert system.run("ls /run/swtpm-prop") == ""


def test_daemon_that_was_not_restarted_is_found(system: System) -> None:
    system.prop("install")
    system.run(f"{sys.executable} -P -c '{BUILD_INDEX}'")
    system.run("cp /bin/sleep /run/libvirtd; /run/libvirtd 600 >/dev/null 2>&1 & sleep 0.2")
    assert system.problems().keys() == {"daemon.path"}
    system.run("rm /usr/libexec/swtpm-prop/swtpm")
    assert system.prop("install")["remaining"] == ["restart libvirtd with the PATH of its service drop-in"]
