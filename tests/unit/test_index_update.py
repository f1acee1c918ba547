"""Updates of the index: the same rows as a build of the same certificates, all of it or nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from certifier import BOOT, NOW, digests_of, issued, names, subject, with_date
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import CERTIFICATES, DIGESTS, build, hashed, made, reason

from swtpm_prop.errors import StoreError, TrustError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.trust import build as builder
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.floors import NONE, Floors
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.sources import Subject


def update(
    path: Path, *added: Certificate, removed: tuple[str, ...] = (), expires: int = NOW, limits: Floors = NONE
) -> Any:
    return builder.update(path, iter(added), removed, expires, lambda _doing, _done: None, limits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


def rows(path: Path) -> dict[str, list[Any]]:
    """Everything in the file."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")]
        return {name: db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in tables}


# -- what it holds ------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    specifications=CERTIFICATES,
    steps=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=5),
    supplied=st.lists(DIGESTS, min_size=1, max_size=4),
)
@pytest.mark.fault
def test_any_sequence_of_updates_equals_a_build(
    tmp_path_factory: pytest.TempPathFactory,
    specifications: list[tuple[list[dict[str, bytes]], set[str], tuple[int, int]]],
    steps: list[set[int]],
    supplied: list[dict[str, bytes]],
) -> None:
    """Few things, so that certificates meet in the same digests all the time."""
    updated, built = (tmp_path_factory.getbasetemp() / name for name in ("updated.sqlite", "built.sqlite"))
    certificates = [made(serial, *specification) for serial, specification in enumerate(specifications)]
    build(updated, expires=NOW)
    for number, step in enumerate(steps):
        wanted = {certificates[at].id: certificates[at] for at in step if at < len(certificates)}
        before = builder.held(updated)
        added = (wanted[id] for id in sorted(wanted.keys() - before))
        update(updated, *added, removed=tuple(before - wanted.keys()), expires=NOW + number)
        summary = build(built, *wanted.values(), expires=NOW + number)
        assert builder.held(updated) == wanted.keys()
        assert rows(updated) == rows(built)
        assert summary.entries == len(rows(updated)["entry"])
        for measured in map(hashed, supplied):
            verdicts = [Index.open(str(path)).judge((BOOT,), measured, NOW) for path in (updated, built)]
            assert verdicts[0] == verdicts[1]


def test_one_percent_of_many(path: Path, tmp_path: Path) -> None:
    certificates = [issued(*(subject(b"%d.%d" % (c, n)) for n in range(40))) for c in range(100)]
    build(path, *certificates[1:], expires=NOW)
    summary = update(path, certificates[0], removed=(certificates[7].id,), expires=NOW + 1)
    del certificates[7]
    again = build(tmp_path / "built.sqlite", *certificates, expires=NOW + 1)
    assert summary._replace(size=0) == again._replace(size=0)
    assert rows(path) == rows(tmp_path / "built.sqlite")
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_is_there_is_not_added_and_what_is_not_is_not_removed(path: Path) -> None:
    one, two = issued(subject(b"one")), issued(subject(b"two"))
    build(path, one, expires=NOW)
    before = rows(path)
    assert update(path, one, one, removed=(two.id,)).certificates == 1
    assert rows(path) == before


def test_removed_and_added_at_once_stays(path: Path) -> None:
    one = issued(subject(b"one"))
    build(path, one, expires=NOW)
    update(path, one, removed=(one.id,))
    assert reason(path, digests_of(b"one")) == ""


def test_a_removed_certificate_no_longer_covers_what_another_still_does(path: Path) -> None:
    short, long = issued(subject(b"x"), ends=NOW + 1), issued(subject(b"x"), ends=NOW + 9)
    build(path, short, long, expires=NOW + 20)
    update(path, removed=(long.id,), expires=NOW + 20)
    assert Index.open(str(path)).judge((BOOT,), digests_of(b"x"), NOW).certificates == (short.id,)
    update(path, removed=(short.id,), expires=NOW + 20)
    assert reason(path, digests_of(b"x")) == "unknown"


def test_nothing_changed_writes_nothing(path: Path) -> None:
    built = build(path, issued(), expires=NOW)
    before = path.stat()
    assert update(path) == built
    assert path.stat() == before


def test_a_new_end_alone(path: Path) -> None:
    build(path, issued(), expires=NOW - 1)
    assert reason(path, digests_of(b"kernel")) == "stale-index"
    assert update(path, expires=NOW + 5).expires == NOW + 5
    assert reason(path, digests_of(b"kernel"), now=NOW + 5) == ""


@pytest.mark.parametrize("content", [None, b"", b"foreign" * 100])
def test_without_a_usable_index_it_is_built(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    assert builder.held(path) == frozenset()
    one = issued(subject(b"one"))
    with pytest.raises(StoreError) as refused:
        update(path, one, removed=("sha256:" + "0" * 64,))
    assert refused.value.id.startswith("store.index-"), "what is added is not all that was there"
    update(path, one)
    assert builder.held(path) == {one.id}
    assert reason(path, digests_of(b"one")) == ""


# -- what goes wrong ----------------------------------------------------------------------------


def stays(path: Path, id: str, *added: Certificate, **more: Any) -> None:
    """The update is refused; the old index is untouched and nothing lies beside it."""
    before = path.read_bytes()
    with pytest.raises(StoreError) as refused:
        update(path, *added, **more)
    assert refused.value.id == id
    assert path.read_bytes() == before
    assert names(path.parent) == with_date(path)


def test_refused_as_in_a_build(path: Path) -> None:
    one = issued()
    build(path, one)
    stays(path, "store.collision", one._replace(id=one.id[:-1] + ("0" if one.id[-1] != "0" else "1")))


def test_a_crowd_that_gathers_by_and_by_is_refused(path: Path) -> None:
    digest = digests_of(b"x", "sha256")["sha256"]
    crowd = tuple(Subject("", {"sha256": digest, "sha384": n.to_bytes(48)}) for n in range(CANDIDATES))
    first = issued()._replace(subjects=crowd)
    build(path, first)
    stays(path, "store.candidates", issued(Subject("one more", {"sha256": digest})))
    again = issued(Subject("one less", {"sha256": digest}))
    update(path, again, removed=(first.id,))
    assert reason(path, {"sha256": digest}) == ""


def test_a_certificate_that_does_not_verify(path: Path) -> None:
    build(path, issued())
    before = path.read_bytes()

    def failing() -> Iterator[Certificate]:
        yield issued(subject(b"new"))
        raise TrustError("trust.refused", "one does not verify")

    with pytest.raises(TrustError):
        builder.update(path, failing(), (), NOW, lambda _doing, _done: None)
    assert path.read_bytes() == before
    assert names(path.parent) == with_date(path)


@pytest.mark.fault
def test_damage_where_the_change_is(path: Path) -> None:
    """The writer sees it; its mend is to build from all certificates."""
    certificates = [issued(*(subject(b"%d.%d" % (c, n)) for n in range(200))) for c in range(20)]
    build(path, *certificates, expires=NOW)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM entry WHERE id = (SELECT id FROM entry LIMIT 1 OFFSET 99)")
        db.commit()
    owner = next(c for c in certificates if sum(reason(path, s.digests) != "" for s in c.subjects))
    stays(path, "store.index-corrupt", removed=(owner.id,))
    build(path, *certificates, expires=NOW)
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'alias'").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(bytes(4096))
    stays(path, "store.index-corrupt", removed=(certificates[3].id,))
    build(path, *certificates, expires=NOW)
    assert update(path, removed=(certificates[3].id,)).certificates == 19


@pytest.mark.parametrize("moment", ["copy_file_range", "reading certificates", "sorting", "fsync", "replace"])
def test_killed(path: Path, moment: str) -> None:
    """By SIGKILL, as the work says what it does next, or instead of a system call."""
    build(path, issued())
    before = path.read_bytes()
    script = (
        "import os, sys\nfrom pathlib import Path\nsys.path[:0] = sys.argv[3:]\n"
        "from certifier import issued, subject\nfrom swtpm_prop.trust.build import update\n"
        "die = lambda *_: os.kill(os.getpid(), 9)\n"
        "if hasattr(os, sys.argv[2]): setattr(os, sys.argv[2], die)\n"
        "report = lambda doing, done: die() if doing == sys.argv[2] else None\n"
        "update(Path(sys.argv[1]), [issued(subject(b'new'))], (), 2000000000, report)\n"
    )
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(path), moment, str(tests), str(tests.parent)]
    assert subprocess.run(command, check=False).returncode == -9
    assert path.read_bytes() == before
    assert reason(path, digests_of(b"kernel")) == ""
    update(path, issued(subject(b"new")))
    assert names(path.parent) == with_date(path)
    assert reason(path, digests_of(b"new")) == ""


def test_a_full_disk(path: Path) -> None:
    """A file that may not grow is what a full disk looks like, wherever in the copy it strikes."""
    build(path, *(issued(*(subject(b"%d.%d" % (c, n)) for n in range(100))) for c in range(10)))
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\nsys.path[:0] = sys.argv[3:]\n"
        "from certifier import issued, subject\nfrom swtpm_prop.errors import StoreError\n"
        "from swtpm_prop.trust.build import update\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "new = issued(*(subject(b'n%d' % n) for n in range(2000)))\n"
        "try:\n    update(Path(sys.argv[1]), [new], (), 2000000000, lambda doing, done: None)\n"
        "except StoreError as error:\n    print(error.id)\n"
    )
    tests = Path(__file__).parents[1]
    for most in (4096, len(before) // 2, len(before), len(before) + 65536):
        command = [sys.executable, "-c", script, str(path), str(most), str(tests), str(tests.parent)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout == "store.write\n"
        assert path.read_bytes() == before
        assert names(path.parent) == with_date(path)


def test_guests_keep_the_file_they_opened(path: Path) -> None:
    build(path, issued(subject(b"old")), expires=NOW)
    index = Index.open(str(path))
    (old,) = builder.held(path)
    update(path, issued(subject(b"new")), removed=(old,))
    assert index.judge((BOOT,), digests_of(b"old"), NOW).certified
    index.refresh()
    assert not index.judge((BOOT,), digests_of(b"old"), NOW).certified
    assert index.judge((BOOT,), digests_of(b"new"), NOW).certified


def test_one_at_a_time(path: Path) -> None:
    build(path, issued())

    def meanwhile() -> Iterator[Certificate]:
        yield issued(subject(b"first"))
        with pytest.raises(StoreError) as refused:
            update(path, issued(subject(b"second")))
        assert refused.value.id == "store.busy"

    builder.update(path, meanwhile(), (), NOW, lambda _doing, _done: None)
    assert Index.open(str(path)).certificates == 2
