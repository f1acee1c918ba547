"""Until when an index is good, and what time it is: the file beside it, mix-ups, and clocks that are set back."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from certifier import BOOT, NOW, digests_of, issued, names, subject, with_date
from test_index import build, refused_id
from test_index_update import update

from swtpm_prop.errors import StoreError
from swtpm_prop.trust.index import Index, validity, validity_line

KERNEL = digests_of(b"kernel")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "index.sqlite"
    build(made, issued(ends=NOW + 1000), expires=NOW)
    return made


def until(path: Path) -> Path:
    return Path(validity(str(path)))


def reason(index: Index, now: int) -> str:
    index.refresh()
    return index.judge((BOOT,), KERNEL, now).reason


def set_clock(monkeypatch: pytest.MonkeyPatch, now: int) -> None:
    """As those who write the index read it."""
    monkeypatch.setattr(time, "time", lambda: now)


# -- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [NOW + 5, NOW - 5])
def test_another_end_is_seen_by_who_has_the_index_open_and_leaves_it_as_it_is(path: Path, end: int) -> None:
    index = Index.open(str(path))
    before, inode = path.read_bytes(), path.stat().st_ino
    assert [reason(index, now) for now in (NOW, NOW + 1)] == ["", "stale-index"]
    assert update(path, expires=end).expires == end
    assert [reason(index, now) for now in (end, end + 1)] == ["", "stale-index"]
    assert (path.read_bytes(), path.stat().st_ino) == (before, inode)
    assert names(path.parent) == with_date(path)
    assert until(path).stat().st_mode & 0o777 == 0o644


def test_an_index_that_nothing_dates_is_none_until_it_is_made_anew(path: Path) -> None:
    index = Index.open(str(path))
    for harm in (lambda: None, lambda: until(path).write_bytes(b"\xff\n"), lambda: os.mkfifo(until(path))):
        until(path).unlink()
        harm()
        os.utime(path)
        assert refused_id(path) == "store.index-undated"
        assert reason(index, NOW) == "no-index"
        update(path, issued(ends=NOW + 1000))
        assert reason(index, NOW) == ""


def test_the_date_of_another_index_does_not_count(path: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", issued(), expires=NOW + 1000)
    shutil.copy(until(tmp_path / "other"), until(path))
    assert refused_id(path) == "store.index-undated"


def test_an_earlier_index_does_not_come_back_under_a_later_date(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "earlier")
    for number in range(2):
        update(path, issued(subject(b"%d" % number)), expires=NOW + number)
    shutil.copy(tmp_path / "earlier", path)
    assert refused_id(path) == "store.index-undated"


def test_both_are_dated_while_one_takes_the_place_of_the_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two renames, the old index serves on, with its own end."""
    index, replace = Index.open(str(path)), Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target == path:
            assert reason(Index.open(str(path)), NOW) == ""
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(StoreError, match="cannot be written"):
        update(path, issued(subject(b"new")), expires=NOW + 9)
    monkeypatch.undo()
    os.utime(path)
    assert [reason(index, now) for now in (NOW, NOW + 1)] == ["", "stale-index"]
    update(path, issued(subject(b"new")), expires=NOW + 9)
    assert reason(index, NOW + 9) == ""
    assert names(path.parent) == with_date(path)


def test_no_bit_of_it_makes_the_index_last_longer(path: Path) -> None:
    good = until(path).read_bytes()
    for at in range(len(good)):
        until(path).write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 7]) + good[at + 1 :])
        assert refused_id(path) == "store.index-undated"
    until(path).write_bytes(good)
    assert Index.open(str(path)).expires == NOW


# -- the clock ----------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_brings_nothing_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate ends; what the writer saw by then is remembered, whatever the clock says later."""
    set_clock(monkeypatch, NOW)
    update(path, issued(subject(b"short"), ends=NOW + 5), expires=NOW + 1000)
    index, short = Index.open(str(path)), digests_of(b"short")
    assert index.judge((BOOT,), short, NOW).certified
    set_clock(monkeypatch, NOW + 6)
    update(path, expires=NOW + 1000)
    for now in (NOW + 6, NOW, 0):
        set_clock(monkeypatch, now)
        update(path, expires=NOW + 1000)
        index.refresh()
        assert index.judge((BOOT,), short, now).reason == "expired"
        assert index.judge((BOOT,), KERNEL, now).certified


def test_an_index_that_has_expired_stays_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, NOW + 1)
    update(path, expires=NOW)
    assert [reason(Index.open(str(path)), now) for now in (NOW + 1, NOW, 0)] == ["stale-index"] * 3


def test_a_build_takes_the_clock_for_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, NOW + 500)
    update(path, expires=NOW)
    set_clock(monkeypatch, NOW)
    build(path, issued(), expires=NOW)
    assert reason(Index.open(str(path)), NOW) == ""


def test_times_that_nobody_wrote_are_no_reason_to_fail(path: Path) -> None:
    index = Index.open(str(path))
    for end in (10**30, -(10**30)):
        until(path).write_text(validity_line(index.id, end, 0))
        assert Index.open(str(path)).judge((BOOT,), KERNEL, NOW).reason in ("", "no-index")
