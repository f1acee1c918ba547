"""The host's configuration: what is there counts exactly, what is not there is as it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from swtpm_prop.errors import HostError
from swtpm_prop.host_config import AgentConfig, HostConfig, load
from swtpm_prop.limits import HOST_BYTES


@pytest.mark.parametrize("text", ["", "[store]\n", '[store]\nstale = "warn"\n'])
def test_as_it_comes(tmp_path: Path, text: str) -> None:
    (tmp_path / "host.toml").write_text(text)
    assert load(tmp_path / "host.toml") == load(tmp_path / "none.toml") == HostConfig()


def test_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('[store]\nstale = "refuse"\nurl = "https://example.org/store"\n')
    assert load(tmp_path / "host.toml").store == ("https://example.org/store", "refuse")


def test_what_is_said_of_tpm_custody_and_agent(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text(
        """[tpm]
        tcti = "swtpm:port=2321"
        pcrs = "14,0-4,7"
        event-log = "events"
        [custody]
        recovery = ["one.pem", "/srv/two.pem"]
        [agent]
        listen = "[::]:4880"
        endpoint = "a.example.org:4880"
        peers = ["b.example.org:4879"]
        metrics = "[::1]:1"
        """
    )
    config = load(tmp_path / "host.toml")
    assert config.tpm == ("swtpm:port=2321", (0, 1, 2, 3, 4, 7, 14), tmp_path / "events")
    assert config.custody == ((tmp_path / "one.pem", Path("/srv/two.pem")),)
    assert config.agent == ("[::]:4880", "a.example.org:4880", ("b.example.org:4879",), "[::1]:1")
    assert load(tmp_path / "none.toml").tpm.pcrs == tuple(range(8))


@pytest.mark.parametrize(
    "data",
    [
        *(b"store = 1", b"[[store]]", b"[stor]", b'[store]\nstal = "warn"', b'[store]\nstale = "Refuse"', b"\xff"),
        *(b"[store]\nstale = true", b"[store]\nurl = 1", b"[store", b"#" * (HOST_BYTES + 1), b"a=" + b"[" * 9999),
        *(b"[tpm]\npcrs = '%b'" % text for text in (b"", b"0,0", b"3-1", b"0-24", b"16", b"0-23", b"a", b"0-", b" 1")),
        *(b"[tpm]\ntcti = ''", b"[tpm]\ntcti = 1", b"[tpm]\nevent_log = 'x'", b"[tpm]\nevent-log = []"),
        *(b"[custody]\nrecovery = 'x'", b"[custody]\nrecovery = ['']", b"[custody]\nrecovery = [1]"),
        *(b"[agent]\nlisten = ''", b"[agent]\nlisten = ':1'", b"[agent]\npeers = ['b']", b"[agent]\nmetrics = 'b:'"),
        *(b"[agent]\nlisten = 'a:0'", b"[agent]\nlisten = 'a:65536'", b"agent = []"),
        *(b'[store]\nstale = ["warn"]', b"[store]\nstale = {}", b"[store]\n_fields = 1"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "host.toml").write_bytes(data)
    with pytest.raises(HostError) as refused:
        load(tmp_path / "host.toml")
    assert refused.value.id == "host.config"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.1.2", "[::1]", "::1", "localhost"])
def test_metrics_are_served_on_loopback(tmp_path: Path, host: str) -> None:
    (tmp_path / "host.toml").write_text(f'[agent]\nmetrics = "{host}:9879"\n')
    assert load(tmp_path / "host.toml").agent.metrics == f"{host}:9879"


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "[::]", "192.0.2.1", "128.0.0.1", "a.example", "localhost.a.example", "127.0.0.1.a", "127.0.0.256"],
)
def test_metrics_are_served_nowhere_else(tmp_path: Path, host: str) -> None:
    (tmp_path / "host.toml").write_text(f'[agent]\nmetrics = "{host}:9879"\n')
    with pytest.raises(HostError) as refused:
        load(tmp_path / "host.toml")
    assert refused.value.id == "host.config"
    assert "agent.metrics is not on loopback" in refused.value.what


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        load(tmp_path)


def test_where_other_hosts_reach_this_one() -> None:
    assert AgentConfig().reached_at("alpha.example") == "alpha.example:4879"
    assert AgentConfig(listen="[::]:99").reached_at("alpha") == "alpha:99"
    assert AgentConfig(endpoint="192.0.2.1:1").reached_at("alpha") == "192.0.2.1:1"
