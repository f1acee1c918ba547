"""The host's configuration: what is there counts exactly, what is not there is as it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from swtpm_prop.errors import HostError
from swtpm_prop.host_config import HostConfig, load
from swtpm_prop.limits import HOST_BYTES


@pytest.mark.parametrize("text", ["", "[store]\n", '[store]\nstale = "warn"\n'])
def test_as_it_comes(tmp_path: Path, text: str) -> None:
    (tmp_path / "host.toml").write_text(text)
    assert load(tmp_path / "host.toml") == load(tmp_path / "none.toml") == HostConfig("", "warn")


def test_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('[store]\nstale = "refuse"\nurl = "https://example.org/store"\n')
    assert load(tmp_path / "host.toml") == HostConfig("https://example.org/store", "refuse")


@pytest.mark.parametrize(
    "data",
    [
        *(b"store = 1", b"[[store]]", b"[stor]", b'[store]\nstal = "warn"', b'[store]\nstale = "Refuse"', b"\xff"),
        *(b"[store]\nstale = true", b"[store]\nurl = 1", b"[store", b"#" * (HOST_BYTES + 1), b"a=" + b"[" * 9999),
        *(b'[store]\nstale = ["warn"]', b"[store]\nstale = {}", b"[store]\n_fields = 1"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "host.toml").write_bytes(data)
    with pytest.raises(HostError) as refused:
        load(tmp_path / "host.toml")
    assert refused.value.id == "host.config"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        load(tmp_path)
