"""What the layer reads and writes: layer.json strictly, the property log within its bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swtpm_prop
from swtpm_prop.emulator import config
from swtpm_prop.emulator import log as property_log
from swtpm_prop.emulator.log import Log
from swtpm_prop.errors import LayerError
from swtpm_prop.tpm.algorithms import SHA384
from swtpm_prop.translate import record
from swtpm_prop.translate.policy import Bank

BANK = {"algorithm": "sha384", "pcrs": [0, 7], "visible": False, "properties": ["https://example.org/a"]}
LAYER = {"version": 1, "uuid": "u", "index": "/i", "log": "/l", "banks": [BANK]}


def load(path: Path, content: object) -> config.Config:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return config.load(str(path))


def test_a_configuration(tmp_path: Path) -> None:
    expected = Bank(SHA384, frozenset({0, 7}), False, ("https://example.org/a",))
    assert load(tmp_path / "layer.json", LAYER) == config.Config("u", "/i", "/l", (expected,))


def with_bank(**changes: object) -> dict[str, Any]:
    return {**LAYER, "banks": [{**BANK, **changes}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 60_000,
        "null",
        {key: value for key, value in LAYER.items() if key != "log"},
        {**LAYER, "extra": 1},
        {**LAYER, "version": 2},
        {**LAYER, "version": True},
        {**LAYER, "index": "relative"},
        {**LAYER, "log": "/with\0nul"},
        {**LAYER, "banks": []},
        {**LAYER, "banks": [BANK, BANK]},
        {**LAYER, "banks": [{**BANK, "algorithm": name} for name in ("sha256", "sha384", "sha512", "sha1")]},
        with_bank(algorithm="sha1"),
        with_bank(algorithm=["sha384"]),
        with_bank(pcrs=[]),
        with_bank(pcrs=[16]),
        with_bank(pcrs=[-1]),
        with_bank(pcrs=[True]),
        with_bank(pcrs="0"),
        with_bank(visible="no"),
        with_bank(properties=[]),
        with_bank(properties=["a"] * 17),
        with_bank(properties=["a" * 513]),
        with_bank(properties=["a\nb"]),
        with_bank(properties=[""]),
        with_bank(more=1),
    ],
)
def test_a_configuration_that_is_not_exactly_right_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(LayerError) as refused:
        load(tmp_path / "layer.json", content)
    assert refused.value.id == "layer.config-invalid"
    assert "\n" not in refused.value.line()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: json.dumps(text).encode()))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer.json"
    path.write_bytes(content)
    with pytest.raises(LayerError):
        config.load(str(path))


def test_a_log_is_never_created_nor_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "log")
    for name in ("log", "link"):
        with pytest.raises(LayerError) as refused:
            Log(str(tmp_path / name))
        assert refused.value.id == "layer.log-unwritable"


FAILURE = record.failure("layer.test", "what happened")


def test_a_full_log_ends_with_one_record_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(property_log, "LOG_BYTES", 1000)
    path = tmp_path / "log"
    path.touch()
    log = Log(str(path))
    for _ in range(50):
        log.write([FAILURE, FAILURE])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    reasons = [each["content"]["reason"] for each in records]
    assert [each["recnum"] for each in records] == list(range(len(records)))
    assert 3 <= len(records) <= 7
    assert reasons[-1] == "layer.log-full"
    assert reasons.count("layer.log-full") == 1


def test_after_a_torn_write_the_next_record_begins_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.touch()
    log = Log(str(path))
    write = os.write
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda file, data: write(file, data[:10]))
        log.write([FAILURE])
    log.write([FAILURE])
    torn, whole = path.read_text().splitlines()
    assert len(torn) == 10
    assert json.loads(whole)["content"]["reason"] == "layer.test"


DESCRIBE = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "lean":
    import swtpm_prop.emulator.lean
import swtpm_prop.emulator.layer
for name, module in sorted(sys.modules.items()):
    if name.startswith("swtpm_prop") and not name.endswith("lean"):
        for made in sorted(vars(module)):
            kind = getattr(module, made)
            if isinstance(kind, type) and issubclass(kind, tuple):
                own = sorted(key for key in vars(kind) if not key.startswith("__"))
                print(name, made, kind.__module__, kind._fields, kind._field_defaults, kind.__doc__, own)
print("typing", hasattr(sys.modules["typing"], "NamedTuple"), type(sys.modules["typing"]).__name__)
from typing import Protocol
print(Protocol)
"""


def test_the_stand_in_for_typing_makes_the_same_classes() -> None:
    parent = str(Path(swtpm_prop.__file__).parents[1])
    real, lean = (
        subprocess.run([sys.executable, "-IS", "-c", DESCRIBE, parent, way], capture_output=True, text=True, check=True)
        for way in ("real", "lean")
    )
    assert real.stdout.count("Bank") >= 1
    assert lean.stdout == real.stdout.replace("typing True module", "typing True _Typing")
