"""The agent stamps a guest whose key becomes this host's only some time after it came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleet_ca import Ca
from hardware import HardwareTpm, two_ports
from members import UUID, Authority, Member
from waiting import eventually

from swtpm_prop.agent.daemon import Agent
from swtpm_prop.custody import keys
from swtpm_prop.domain.identity import identify
from swtpm_prop.domain.stamp import Stamp, read

pytestmark = pytest.mark.root

NODE = f"""<node><domain type='test'><name>guest</name><uuid>{UUID}</uuid><memory>8192</memory>
<os><type>hvm</type></os></domain></node>"""


@contextmanager
def agent_of(member: Member, directory: Path) -> Iterator[Agent]:
    """The agent in this process, for only there libvirt's test driver can be asked for what it changed."""
    (directory / "node.xml").write_text(NODE)
    port = two_ports()
    with member.layout.host.open("a") as file:
        file.write(f'[agent]\nlisten = "127.0.0.1:{port}"\nmetrics = "127.0.0.1:{port + 1}"\n')
        file.write(f'endpoint = "{member.endpoint}"\n')
    agent, stopped, ready = Agent(member.layout, f"test://{directory}/node.xml"), threading.Event(), threading.Event()
    thread = threading.Thread(target=agent.run, args=(stopped, ready.set, lambda: None), daemon=True)
    thread.start()
    try:
        assert ready.wait(10)
        yield agent
    finally:
        stopped.set()
        thread.join()


def stamp(agent: Agent) -> Stamp | None:
    connection = agent._guests._connection
    return read(identify(connection.lookupByUUIDString(UUID).XMLDesc().encode())) if connection else None


def test_a_guest_whose_key_could_not_be_adopted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # the agent has its own
    ca, authority = Ca(), Authority()
    with HardwareTpm(tmp_path / "a") as one, HardwareTpm(tmp_path / "b") as other:
        a, b = Member("a.example", tmp_path, one, ca, authority), Member("b.example", tmp_path, other, ca, authority)
        for member in (a, b):
            authority.approve(member, member.name)
        for member in (a, b):
            member.approve(authority)
        a.create()
        b.endpoint = "b.example:4879"
        with a.serving():
            b.fetch(a.endpoint)
        assert b.hook.arrive(UUID) is not None
        b.layout.keys.write_text("in the way")
        with agent_of(b, tmp_path) as agent:
            # It is seen to run, and settled twice in vain.
            assert eventually(lambda: agent._transfers._delays.get(UUID, 0) > 2)
            assert b.journal.of(UUID)[0].due
            assert stamp(agent) is None
            b.layout.keys.unlink()
            assert eventually(lambda: keys.load(UUID, b.layout) is not None)
            assert eventually(lambda: stamp(agent) == Stamp(b.endpoint, b.name))
