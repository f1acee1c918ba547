"""Any event log, IMA list or PE image is parsed, or refused with the one error type; nothing else happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab import debian
from swtpm_prop.errors import TrustError, WireError
from swtpm_prop.tpm import authenticode, devicepath, eventlog, imalog, pe
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.eventlog import Event
from swtpm_prop.tpm.eventlog_text import TYPES, describe, type_name
from swtpm_prop.trust import sources

DATA = Path(__file__).parent.parent / "data"
LOGS = [path.read_bytes() for path in sorted(DATA.glob("*.eventlog"))]
IMA_LISTS = [path.read_bytes() for path in sorted(DATA.glob("*.imalog"))]
BOUNDARIES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF]


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes], reach: int) -> bytes:
    """A real file with a few fields overwritten within its first ``reach`` bytes, sometimes cut off or continued."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, min(len(data), reach) - 1))
        number = draw(st.sampled_from(BOUNDARIES) | st.integers(0, 2**32))
        field = number.to_bytes(8, "little")[: draw(st.sampled_from([1, 2, 4, 8]))]
        data[at : at + len(field)] = field
    end = draw(st.none() | st.integers(0, len(data)))
    return bytes(data[:end]) + draw(st.just(b"") | st.binary(max_size=64))


def check_log(data: bytes) -> None:
    try:
        log = eventlog.parse(data)
        for algorithm in log.algorithms:
            eventlog.replay(log, algorithm)
    except WireError as error:
        assert error.id.startswith("eventlog.")
        assert error.line().isprintable()
        return
    for event in log.events:
        assert type_name(event)
        words = describe(event)
        assert words == "" or words.isprintable()


def check_image(data: bytes) -> None:
    for parser in (authenticode.digests, pe.sections):
        try:
            parser(data)
        except WireError as error:
            assert error.id.startswith("pe.")
            assert error.line().isprintable()


@given(st.binary(max_size=400))
@example(b"")
def test_any_bytes_as_event_log(data: bytes) -> None:
    check_log(data)


@given(damaged(LOGS, 20_000))
@settings(max_examples=300)
def test_damaged_event_logs(data: bytes) -> None:
    check_log(data)


@given(st.sampled_from([*TYPES, 0x99]), damaged([e.data for log in LOGS for e in eventlog.parse(log).events], 4096))
@settings(max_examples=500)
def test_any_data_of_any_type_can_be_described(kind: int, data: bytes) -> None:
    words = describe(Event(0, 0, kind, (), data))
    assert words == "" or words.isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_as_device_path(data: bytes) -> None:
    assert isinstance(devicepath.text(data), str)


@given(damaged(LOGS, 20_000))
def test_subjects_of_damaged_event_logs(data: bytes) -> None:
    try:
        subjects = list(sources.from_event_log(data, Counter()))
    except (WireError, TrustError):
        return
    for subject in subjects:
        assert set(subject.digests) <= {"sha256", "sha384", "sha512"}
        assert subject.name.isprintable()


def check_ima_list(data: bytes) -> None:
    try:
        entries = imalog.parse(data)
    except WireError as error:
        assert error.id.startswith("imalog.")
        assert error.line().isprintable()
        return
    imalog.replay(entries, SHA256)
    for entry in entries:
        assert imalog.describe(entry).isprintable()


@given(st.binary(max_size=400))
def test_any_bytes_as_ima_list(data: bytes) -> None:
    check_ima_list(data)


@given(damaged(IMA_LISTS, 4000))
@settings(max_examples=300)
def test_damaged_ima_lists(data: bytes) -> None:
    check_ima_list(data)


def images() -> list[bytes]:
    boot = debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi"
    return [path.read_bytes() for path in sorted(boot.glob("*x64.efi*"))]


@given(st.binary(max_size=400) | st.binary(max_size=300).map(lambda tail: b"PE\0\0" + tail))
def test_any_bytes_as_image(data: bytes) -> None:
    check_image(data)


@given(damaged(images(), 1024))
@settings(max_examples=200, deadline=None)
def test_damaged_images(data: bytes) -> None:
    check_image(data)
