"""The lock of a directory: who holds it, and whose fault an error within is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swtpm_prop.errors import StoreError
from swtpm_prop.trust.files import exclusive, write_file


def test_one_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path, "it"):
        with pytest.raises(StoreError) as refused, exclusive(tmp_path, "it"):
            raise AssertionError
        assert refused.value.id == "store.busy"
    with exclusive(tmp_path, "it"):
        pass


def test_what_the_block_cannot_do_is_not_called_busy(tmp_path: Path) -> None:
    """A full pipe or a lock of its own says BlockingIOError, too."""
    with pytest.raises(StoreError) as refused, exclusive(tmp_path, "the thing"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    assert refused.value.id == "store.write"
    assert "the thing cannot be written" in refused.value.what


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("no", "file"):
        with pytest.raises(StoreError) as refused, exclusive(tmp_path / name, "it"):
            raise AssertionError
        assert refused.value.id == "store.directory"


def test_several_may_write_a_file_at_once(tmp_path: Path) -> None:
    """A timer and a person bring the same list; the file is always one of theirs, whole."""
    place = tmp_path / "list"
    texts = [letter * 10_000 for letter in (b"a", b"b", b"c")]
    with ThreadPoolExecutor() as pool:
        for written in [pool.submit(write_file, place, text) for text in texts * 30]:
            written.result()
            assert place.read_bytes() in texts
    assert list(tmp_path.iterdir()) == [place]
