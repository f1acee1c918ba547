"""The property log: folding its records to states, reading what is whole, refusing what is not."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop.cli import property_log
from swtpm_prop.domain.log import Standing, ended_inactive, fold, parse_line, read
from swtpm_prop.errors import DomainError
from swtpm_prop.limits import LOG_LINE_BYTES
from swtpm_prop.tpm.algorithms import SHA256, Digest
from swtpm_prop.translate import record
from swtpm_prop.translate.verdict import Verdict

TIME = "2026-01-01T00:00:00Z"


def start(event: str = record.STARTUP, word: str = "unmeasured") -> dict[str, Any]:
    return record.snapshot(event, {"sha384": {0: word, 4: word}}).to_json(0, TIME)


def measured(pcr: int, word: str, number: int = 1) -> dict[str, Any]:
    verdict = Verdict(True, ("sha256:" + "ab" * 32,)) if word == "held" else Verdict(False, (), "unknown", "\x1b[2J")
    digests = (Digest(SHA256, bytes(32)),)
    return record.measurement("PCR_Extend", pcr, digests, "sha384", word, verdict).to_json(number, TIME)


def gave_up(reason: str = "layer.bank-inactive") -> dict[str, Any]:
    return record.failure(reason, "the bank is not active").to_json(2, TIME)


def write(path: Path, *records: dict[str, Any], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + end)
    return path


def through_json(*records: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(r)) for r in records]


def test_the_standing_is_the_last_word_on_each_pcr() -> None:
    standing = fold(through_json(start(), measured(0, "held"), measured(4, "held"), measured(4, "broken")))
    assert standing == Standing({"sha384": {0: "held", 4: "broken"}}, "", TIME)
    assert standing.broken()


def test_a_startup_or_a_resume_says_the_state_of_all() -> None:
    assert not fold(through_json(start(), measured(4, "broken"), start())).broken()
    assert fold(through_json(start(record.RESUME, "held"))).states == {"sha384": {0: "held", 4: "held"}}


def test_a_layer_that_gave_up_counts_as_broken() -> None:
    standing = fold(through_json(start(), gave_up()))
    assert standing.broken()
    assert "layer.bank-inactive" in standing.failure


def test_an_empty_log_has_no_states() -> None:
    assert fold([]) == Standing({})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"content": {}},
        {"pcr": 4, "content": {"event": "measurement", "time": TIME}},
        {"pcr": 4, "content": {"event": "other", "time": TIME}},
        {"pcr": None, "content": {"event": "startup", "time": TIME, "states": []}},
        {"pcr": None, "content": {"event": "startup", "time": TIME, "states": {"sha384": {"x": "held"}}}},
        {"pcr": None, "content": [], "recnum": "\x1b"},
    ],
)
def test_other_records_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DomainError) as refused:
        fold([wrong])
    assert refused.value.id == "domain.log-malformed"


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8)
)
def test_any_record_is_folded_or_refused(content: Any) -> None:
    try:
        fold([{"pcr": 4, "content": content}])
    except DomainError as refused:
        assert refused.line().isprintable()


@given(st.binary())
def test_any_line_is_a_record_or_refused(line: bytes) -> None:
    try:
        parse_line(line)
    except DomainError as refused:
        assert refused.id == "domain.log-malformed"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "log", start(), measured(4, "held"), end='\n{"recnum":')
    assert [r["recnum"] for r in read(path)] == [0, 1]


def test_a_log_that_is_missing_or_damaged_is_said_to_be(tmp_path: Path) -> None:
    for content, id in (
        (None, "domain.no-log"),
        (b"[]\n", "domain.log-malformed"),
        (b"\xff\n", "domain.log-malformed"),
        (b"[" * (LOG_LINE_BYTES + 1), "domain.log-malformed"),
        (b"[" * 30000 + b"\n", "domain.log-malformed"),
    ):
        path = tmp_path / "log"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DomainError) as refused:
            list(read(path))
        assert refused.value.id == id


def test_only_a_log_that_ends_with_an_inactive_bank_asks_for_activation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert not ended_inactive(path)
    assert ended_inactive(write(path, gave_up()))
    assert ended_inactive(write(path, *[measured(4, "held")] * 1000, gave_up()))
    assert not ended_inactive(write(path, gave_up("layer.pcr-read")))
    assert not ended_inactive(write(path, gave_up(), start()))
    for damaged in ("", "\n", "{}\n", "[]\n", "null\n", "x"):
        path.write_text(damaged)
        assert not ended_inactive(path)


def test_following_goes_on_through_restarts_of_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "log", start(), end="\n")

    def append(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    text = json.dumps(measured(4, "held", 1))
    happens = iter(
        [
            lambda: append(text[:20]),
            lambda: append(text[20:] + "\n" + text[:20].replace("1", "2")),
            lambda: path.rename(tmp_path / "log.1"),
            lambda: write(path, measured(4, "held", 8), measured(4, "held", 9)),
            lambda: None,  # it has read the rest of the old one
        ]
    )
    # Each time it has seen all there is, the next thing happens.
    monkeypatch.setattr(property_log, "time", SimpleNamespace(sleep=lambda seconds: next(happens)()))
    assert [entry["recnum"] for entry in islice(property_log.follow(path), 4)] == [0, 1, 8, 9]
