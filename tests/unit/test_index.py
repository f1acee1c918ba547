"""The index: judgements against a naive model, and files that are damaged, foreign, cut, or replaced."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certifier import BOOT, NOW, digests_of, issued, names, subject, with_date
from hypothesis import given, settings
from hypothesis import strategies as st

from swtpm_prop.errors import StoreError, TrustError
from swtpm_prop.limits import CANDIDATES
from swtpm_prop.tpm.algorithms import ALGORITHMS, STRONG, HashAlgorithm
from swtpm_prop.translate.verdict import covers
from swtpm_prop.trust import build as builder
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.index import LAYOUTS, Index, pack, row_covers, slot, unpack, validity, validity_line
from swtpm_prop.trust.sources import Subject

OTHER = "https://example.org/properties/other"


def build(path: Path, *certificates: Certificate, expires: int | None = None) -> builder.Summary:
    return builder.build(path, iter(certificates), expires, lambda _doing, _done: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def whole(path: Path) -> Path:
    """An index of some size: a thousand things in one certificate, one with another property."""
    build(path, issued(*(subject(b"%d" % n) for n in range(1000))), issued(subject(b"other"), properties=(OTHER,)))
    return path


def reason(path: Path, measured: dict[str, bytes], *properties: str, now: int = NOW) -> str:
    verdict = Index.open(str(path)).judge(properties or (BOOT,), measured, now)
    assert verdict.certified == (verdict.reason == "")
    assert bool(verdict.certificates) == verdict.certified
    return verdict.reason


# -- judgements ---------------------------------------------------------------------------------


def test_the_reasons(path: Path) -> None:
    build(
        path,
        issued(subject(b"good")),
        issued(subject(b"old"), begins=NOW - 9, ends=NOW - 8),
        issued(subject(b"young"), begins=NOW + 8, ends=NOW + 9),
    )
    good = digests_of(b"good")
    assert reason(path, good) == ""
    assert reason(path, {**good, "sha1": bytes(20)}) == ""
    assert reason(path, {"sha384": good["sha384"]}) == ""
    assert reason(path, {"sha512": good["sha512"]}) == ""
    assert reason(path, digests_of(b"bad")) == "unknown"
    assert reason(path, {**good, "sha256": bytes(32)}) == "mismatch"
    assert reason(path, {**good, "sha512": bytes(64)}) == "mismatch"
    assert reason(path, {"sha1": bytes(20)}) == "weak"
    assert reason(path, {}) == "weak"
    assert reason(path, good, OTHER) == "property"
    assert reason(path, good, BOOT, OTHER) == "property"
    assert Index.open(str(path)).judge((), good, NOW).reason == "property"
    assert reason(path, digests_of(b"old")) == "expired"
    assert reason(path, digests_of(b"young")) == "not-yet-valid"
    assert reason(path, good, now=NOW + 10) == ""
    assert reason(path, good, now=NOW + 11) == "stale-index"
    # A property is a string of bytes, not a prefix and not a pattern.
    for near in (BOOT + "/", BOOT[:-1], BOOT.upper(), "%"):
        assert reason(path, good, near) == "property"


def test_a_digest_of_wrong_length_is_never_certified(path: Path) -> None:
    build(path, issued(subject(b"good", "sha256")))
    good = digests_of(b"good")["sha256"]
    for value in (b"", good[:-1], good + b"\0", good[:6]):
        assert reason(path, {"sha256": value}) in ("unknown", "mismatch")
    # The measurement of many a kernel without SHA-384: SHA-1 padded with zeros.
    assert reason(path, {"sha384": digests_of(b"good", "sha1")["sha1"] + bytes(28)}) == "unknown"


def test_each_property_by_a_certificate_of_its_own_the_one_that_lasts_longest(path: Path) -> None:
    short, long = issued(subject(b"x"), ends=NOW + 1), issued(subject(b"x", "sha256"), ends=NOW + 99)
    other = issued(subject(b"x", "sha512"), properties=(OTHER,))
    build(path, short, long, other)
    verdict = Index.open(str(path)).judge((OTHER, BOOT), digests_of(b"x"), NOW)
    assert verdict.certificates == tuple(sorted((long.id, other.id)))


def test_the_index_ends_with_its_last_certificate_or_when_it_was_told(path: Path) -> None:
    certificates = (issued(subject(b"x"), ends=NOW + 5), issued(subject(b"y"), ends=NOW + 50))
    assert build(path, *certificates).expires == NOW + 50
    assert build(path, *certificates, expires=NOW).expires == NOW
    assert reason(path, digests_of(b"x"), now=NOW) == ""
    assert reason(path, digests_of(b"x"), now=NOW + 1) == "stale-index"


THINGS = st.sampled_from([b"a", b"b", b"c"])
DIGESTS = st.dictionaries(st.sampled_from(["sha256", "sha384", "sha512"]), THINGS, min_size=1)
CERTIFICATES = st.lists(
    st.tuples(
        st.lists(DIGESTS, min_size=1, max_size=3),
        st.sets(st.sampled_from([BOOT, OTHER]), min_size=1),
        st.sampled_from([(NOW - 2, NOW - 1), (NOW - 1, NOW), (NOW, NOW + 1), (NOW + 1, NOW + 2)]),
    ),
    max_size=5,
)


def hashed(named: dict[str, bytes]) -> dict[str, bytes]:
    return {name: hashlib.new(name, thing).digest() for name, thing in named.items()}


def made(serial: int, subjects: list[dict[str, bytes]], properties: set[str], window: tuple[int, int]) -> Certificate:
    """Not parsed, so that subjects may contradict each other: the index must not depend on who wrote them."""
    id = "sha256:" + hashlib.sha256(b"%d" % serial).hexdigest()
    made_of = tuple(Subject("", hashed(named)) for named in subjects)
    return Certificate(id, "https://example.org/", NOW, tuple(sorted(properties)), *window, "00", made_of)


@settings(max_examples=150, deadline=None)
@given(specifications=CERTIFICATES, supplied=DIGESTS, asked=st.sets(st.sampled_from([BOOT, OTHER]), min_size=1))
def test_judgements_equal_those_of_a_naive_model(
    tmp_path_factory: pytest.TempPathFactory,
    specifications: list[tuple[list[dict[str, bytes]], set[str], tuple[int, int]]],
    supplied: dict[str, bytes],
    asked: set[str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "model.sqlite"
    certificates = [made(serial, *specification) for serial, specification in enumerate(specifications)]
    build(path, *certificates, expires=NOW + 9)
    measured = hashed(supplied)
    verdict = Index.open(str(path)).judge(sorted(asked), measured, NOW)
    covering = [c for c in certificates if any(covers(subject.digests, measured) for subject in c.subjects)]
    valid = [c for c in covering if c.not_before <= NOW <= c.not_after]
    assert verdict.certified == all(any(uri in c.properties for c in valid) for uri in asked)
    if verdict.certified:
        assert set(verdict.certificates) <= {c.id for c in valid}
        return
    named = any(d in s.digests.values() for c in certificates for s in c.subjects for d in measured.values())
    if not covering:
        assert verdict.reason == ("mismatch" if named else "unknown")
    else:
        assert verdict.reason in ("property", "expired", "not-yet-valid")


def test_digests_pack_and_unpack() -> None:
    everything = digests_of(b"x")
    for choice in range(1, 8):
        some = {a.name: everything[a.name] for bit, a in enumerate(STRONG) if choice >> bit & 1}
        assert unpack(pack(some)) == some
    assert len(LAYOUTS) == 7
    assert slot(b"\xff" * 32) + 0xFFFF == 2**63 - 1


@given(st.sets(st.sampled_from(STRONG), min_size=1), st.lists(st.sampled_from(ALGORITHMS)), st.integers(0, 7))
def test_a_row_covers_as_its_digests_do(
    certified: set[HashAlgorithm], supplied: list[HashAlgorithm], differing: int
) -> None:
    everything = digests_of(b"x") | {"sha1": hashlib.sha1(b"x").digest()}
    other = digests_of(b"y") | {"sha1": bytes(20)}
    packed = pack({algorithm.name: everything[algorithm.name] for algorithm in certified})
    measured = {a.name: (other if differing >> at & 1 else everything)[a.name] for at, a in enumerate(supplied)}
    assert row_covers(packed, measured) == covers(unpack(packed), measured)


# -- building -----------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes_in_whatever_order(path: Path) -> None:
    certificates = [issued(*(subject(b"%d.%d" % (c, n)) for n in range(50))) for c in range(20)]
    build(path, *certificates)
    first = path.read_bytes()
    build(path, *reversed(certificates), certificates[0])
    assert path.read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_build_that_fails_leaves_the_old_index_and_nothing_else(whole: Path) -> None:
    before = whole.read_bytes()

    def failing() -> Iterator[Certificate]:
        yield issued(subject(b"new"))
        raise TrustError("trust.refused", "one does not verify")

    with pytest.raises(TrustError):
        builder.build(whole, failing(), None, lambda _doing, _done: None)
    assert whole.read_bytes() == before
    assert names(whole.parent) == with_date(whole)


def test_what_a_killed_build_left_is_swept_away(path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nsys.path[:0] = sys.argv[2:]\n"
        "from certifier import issued\nfrom swtpm_prop.trust.build import build\n"
        "die = lambda doing, done: os.kill(os.getpid(), 9) if doing == 'checking' else None\n"
        "build(Path(sys.argv[1]), [issued()], None, die)\n"
    )
    tests = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", script, str(path), str(tests), str(tests.parent)], check=False)
    assert ended.returncode == -9
    assert path.name not in names(path.parent)
    assert len(names(path.parent)) == 1
    build(path, issued())
    assert names(path.parent) == with_date(path)


def test_two_builds_do_not_mix(path: Path) -> None:
    def meanwhile() -> Iterator[Certificate]:
        with pytest.raises(StoreError) as refused:
            build(path, issued())
        assert refused.value.id == "store.busy"
        yield issued()

    builder.build(path, meanwhile(), None, lambda _doing, _done: None)
    assert Index.open(str(path)).certificates == 1


def test_an_index_of_nothing_needs_an_end(path: Path) -> None:
    with pytest.raises(StoreError) as refused:
        build(path)
    assert refused.value.id == "store.no-expiry"
    build(path, expires=NOW)
    assert reason(path, digests_of(b"x")) == "unknown"


def test_a_crowd_on_one_digest_is_refused(path: Path) -> None:
    one = digests_of(b"x", "sha256")["sha256"]
    crowd = tuple(Subject("", {"sha256": one, "sha384": n.to_bytes(48)}) for n in range(CANDIDATES + 1))
    with pytest.raises(StoreError) as refused:
        build(path, issued()._replace(subjects=crowd))
    assert refused.value.id == "store.candidates"
    summary = build(path, issued()._replace(subjects=crowd[:-1]))
    assert summary.entries == CANDIDATES
    assert reason(path, {"sha256": one, "sha384": (CANDIDATES - 1).to_bytes(48)}) == ""
    assert names(path.parent) == with_date(path)


def test_certificates_whose_numbers_collide_are_refused(path: Path) -> None:
    one = issued()
    with pytest.raises(StoreError) as refused:
        build(path, one, one._replace(id=one.id[:-1] + ("0" if one.id[-1] != "0" else "1")))
    assert refused.value.id == "store.collision"


def test_a_directory_that_cannot_be_built_in(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as refused:
        build(tmp_path / "nowhere/index.sqlite", issued())
    assert refused.value.id == "store.directory"


# -- files that are not as they should be -------------------------------------------------------


def refused_id(path: Path) -> str:
    with pytest.raises(StoreError) as refused:
        Index.open(str(path))
    assert refused.value.mend
    return refused.value.id


def test_missing_and_unreadable(tmp_path: Path) -> None:
    assert refused_id(tmp_path / "no") == "store.index-missing"
    assert refused_id(tmp_path) == "store.index-unreadable"
    os.mkfifo(tmp_path / "fifo")
    assert refused_id(tmp_path / "fifo") == "store.index-unreadable"
    (tmp_path / "file").touch()
    assert refused_id(tmp_path / "file/index") == "store.index-unreadable"
    assert refused_id(tmp_path / "a\0b") == "store.index-unreadable"


def test_foreign_files(path: Path) -> None:
    path.write_bytes(b"PK\3\4" * 100)
    assert refused_id(path) == "store.index-format"
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE entry (id INTEGER PRIMARY KEY, digests BLOB, certificate INTEGER)")
    db.close()
    assert refused_id(path) == "store.index-format"


def test_another_version(whole: Path) -> None:
    change(whole, 63, b"\x01")
    assert refused_id(whole) == "store.index-format"


def test_ours_by_its_header_alone(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(f"PRAGMA application_id={0x73775049}; PRAGMA user_version=2; CREATE TABLE x (y);")
    db.close()
    assert refused_id(path) == "store.index-corrupt"


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.99, 0.99999])
def test_half_written(whole: Path, share: float) -> None:
    os.truncate(whole, int(whole.stat().st_size * share))
    assert refused_id(whole) == "store.index-corrupt"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_and_padded_to_its_size(whole: Path, share: float) -> None:
    size = whole.stat().st_size
    os.truncate(whole, int(size * share))
    os.truncate(whole, size)
    never_certified(whole)


def never_certified(path: Path) -> None:
    """Whatever is left of an index: what it never certified stays uncertified, and nothing is raised but StoreError."""
    try:
        index = Index.open(str(path))
    except StoreError:
        return
    for measured in (digests_of(b"nobody"), digests_of(b"other"), {**digests_of(b"7"), "sha512": bytes(64)}):
        assert not index.judge((BOOT,), measured, NOW).certified
    for n in range(0, 1000, 97):
        assert index.judge((BOOT,), digests_of(b"%d" % n), NOW).reason in ("", "no-index", "unknown", "mismatch")
        assert not index.judge((OTHER,), digests_of(b"%d" % n), NOW).certified
    index.close()


def change(path: Path, at: int, to: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(to)


def test_decayed_bytes_never_certify(whole: Path) -> None:
    good = whole.read_bytes()
    chance = random.Random(1)
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 1, 1, 8))):
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        whole.write_bytes(bad)
        never_certified(whole)


def test_every_byte_of_the_certificates_counts(path: Path) -> None:
    """Each bit of the smallest index: no flip turns an uncertified property, time or digest into a certified one."""
    build(path, issued(subject(b"x", "sha256"), ends=NOW - 1), issued(subject(b"y", "sha256"), properties=(OTHER,)))
    good = path.read_bytes()
    used = [at for at, byte in enumerate(good) if byte]
    for at in used:
        change(path, at, bytes([good[at] ^ 1 << at % 8]))
        try:
            index = Index.open(str(path))
        except StoreError:
            pass
        else:
            assert not index.judge((BOOT,), digests_of(b"x"), NOW).certified
            assert not index.judge((BOOT,), digests_of(b"y"), NOW).certified
            assert not index.judge((OTHER,), digests_of(b"x"), NOW).certified
            index.close()
        change(path, at, good[at : at + 1])


def test_replaced_while_open(whole: Path) -> None:
    index = Index.open(str(whole))
    assert index.judge((BOOT,), digests_of(b"7"), NOW).certified
    build(whole, issued(subject(b"new")))
    assert index.judge((BOOT,), digests_of(b"7"), NOW).certified, "the file that was opened is still whole"
    index.refresh()
    assert index.judge((BOOT,), digests_of(b"7"), NOW).reason == "unknown"
    assert index.judge((BOOT,), digests_of(b"new"), NOW).certified


@pytest.mark.parametrize("content", [None, b"", b"foreign" * 100, "half"])
def test_replaced_by_something_else_and_mended(whole: Path, content: Any) -> None:
    index = Index.open(str(whole))
    good = whole.read_bytes()
    whole.unlink()
    if content is not None:
        whole.write_bytes(good[: len(good) // 2] if content == "half" else content)
    for _ in range(2):
        index.refresh()
        verdict = index.judge((BOOT,), digests_of(b"7"), NOW)
        assert (verdict.certified, verdict.reason) == (False, "no-index")
        assert verdict.detail
    whole.unlink(missing_ok=True)
    whole.write_bytes(good)
    index.refresh()
    assert index.judge((BOOT,), digests_of(b"7"), NOW).certified


def test_cut_under_an_open_index_without_a_refresh(whole: Path) -> None:
    index = Index.open(str(whole))
    os.truncate(whole, 4096)
    for n in range(50):
        assert index.judge((BOOT,), digests_of(b"%d" % n), NOW).reason == "no-index"
    index.refresh()
    assert index.judge((BOOT,), digests_of(b"7"), NOW).reason == "no-index"


def test_a_wrong_time_is_no_reason_to_fail(whole: Path) -> None:
    """Found by an attack: an absurd end, with the right checksum."""
    Path(validity(str(whole))).write_text(validity_line(Index.open(str(whole)).id, -(2**62), 0))
    judged = Index.open(str(whole)).judge((BOOT,), {"sha256": bytes(32)}, NOW)
    assert (judged.certified, judged.reason) == (False, "no-index")


def test_closed(whole: Path) -> None:
    index = Index.open(str(whole))
    index.close()
    assert index.judge((BOOT,), digests_of(b"7"), NOW).reason == "no-index"


def test_odd_names(tmp_path: Path) -> None:
    directory = tmp_path / "a?mode=rw#%20&immutable=0"
    directory.mkdir()
    build(directory / "i%3f.sqlite", issued())
    assert reason(directory / "i%3f.sqlite", digests_of(b"kernel")) == ""
    assert names(directory) == with_date(directory / "i%3f.sqlite")


def test_lean_inside_swtpm() -> None:
    """What the reader pulls into every guest's swtpm."""
    script = "import sys, swtpm_prop.trust.index; print(*sys.modules)"
    root = str(Path(__file__).parents[2])
    loaded = subprocess.run([sys.executable, "-S", "-c", script], cwd=root, capture_output=True, text=True, check=True)
    heavy = {"dataclasses", "pathlib", "json", "cryptography", "inspect", "typing_extensions", "urllib", "tomllib"}
    assert not heavy & set(loaded.stdout.split())
