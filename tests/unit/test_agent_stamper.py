"""Stamping goes on until libvirt takes the stamp, and holds nothing else up; the service manager is told."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from waiting import eventually

from swtpm_prop.agent import stamper
from swtpm_prop.agent.notify import notify
from swtpm_prop.agent.stamper import Stamper


class Libvirt:
    """Takes a stamp at the third time; of ``gone`` it never does."""

    def __init__(self, gone: str = "") -> None:
        self.tried: list[str] = []
        self.gone = gone

    def stamp(self, uuid: str) -> bool:
        self.tried.append(uuid)
        return uuid != self.gone and self.tried.count(uuid) == 3


def test_tries_until_it_is_taken_or_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamper, "STAMP_SECONDS", 0.01)
    libvirt, wanted, asked = Libvirt(gone="c"), {"a", "b", "c"}, []

    def wants(uuid: str) -> bool:
        asked.append(uuid)
        return uuid in wanted

    stamps, stopped = Stamper(libvirt.stamp, wants), threading.Event()
    thread = threading.Thread(target=stamps.run, args=(stopped,))
    thread.start()
    for uuid in ("a", "b", "c", "unwanted"):
        stamps.offer(uuid)
    assert eventually(lambda: libvirt.tried.count("c") > 5)
    wanted.discard("c")
    # Whoever is offered after that is looked at after it.
    stamps.offer("x")
    assert eventually(lambda: "x" in asked)
    tried, looks = len(libvirt.tried), asked.count("c")
    stamps.offer("y")
    assert eventually(lambda: "y" in asked)
    assert (len(libvirt.tried), asked.count("c")) == (tried, looks)
    stopped.set()
    thread.join()
    assert [libvirt.tried.count(uuid) for uuid in ("a", "b", "unwanted")] == [3, 3, 0]


@pytest.mark.parametrize("abstract", [True, False])
def test_tells_the_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify("STOPPING=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("STOPPING=1")
