"""Taking out what was published in error, and what is no certificate at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from storekeeper import Follower, Keeper, certificate, quiet

from swtpm_prop.cli.store import command
from swtpm_prop.errors import Error, StoreError
from swtpm_prop.trust import certificate as certificates

GOOD, WRONG = b"good", b"issued in error"


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """A store with two certificates, published."""
    made = Keeper(tmp_path)
    made.init()
    made.add(certificate(GOOD), certificate(WRONG))
    made.publish()
    return made


@pytest.fixture
def host(tmp_path: Path, keeper: Keeper) -> Follower:
    made = Follower(tmp_path / "host", keeper)
    made.pin()
    made.sync()
    return made


def remove(keeper: Keeper, *names: object) -> Result:
    return CliRunner().invoke(command, ["remove", *map(str, (keeper.publisher.directory, *names))])


def error(result: Result) -> Error:
    assert isinstance(result.exception, Error), result.output
    return result.exception


def wrong(keeper: Keeper) -> Path:
    """What was added as the second."""
    return keeper.directory / "envelope-1"


@pytest.mark.parametrize("how", ["id", "prefix", "digits", "file", "copy"])
def test_by_id_by_its_beginning_or_by_file(keeper: Keeper, host: Follower, how: str) -> None:
    id = certificates.read(wrong(keeper).read_bytes()).id
    (copy,) = (f for f in keeper.publisher.certificates.iterdir() if f.read_bytes() == wrong(keeper).read_bytes())
    names = {
        "id": id,
        "prefix": id[:16],
        "digits": id.removeprefix("sha256:")[:10],
        "file": wrong(keeper),
        "copy": copy,
    }
    assert remove(keeper, names[how]).exit_code == 0
    assert keeper.publish()[1:4] == (1, 0, 1)
    host.sync()
    assert host.certified(GOOD, WRONG) == [GOOD]


def test_what_was_removed_can_be_added_again(keeper: Keeper, host: Follower) -> None:
    data = wrong(keeper).read_bytes()
    assert remove(keeper, wrong(keeper)).exit_code == 0
    keeper.publish()
    keeper.add(data)
    keeper.publish()
    host.sync()
    assert host.certified(GOOD, WRONG) == [GOOD, WRONG]


def test_all_that_are_named_or_none(keeper: Keeper) -> None:
    before = sorted(keeper.publisher.certificates.iterdir())
    for name in ("sha256:" + "0" * 64, "0000", keeper.directory / "keys/root.pem"):
        assert error(remove(keeper, wrong(keeper), name)).id == "store.certificate-unknown"
    assert error(remove(keeper, wrong(keeper), "no-such-file")).id == "trust.file-missing"
    assert sorted(keeper.publisher.certificates.iterdir()) == before


def test_a_beginning_of_several_is_not_enough(keeper: Keeper) -> None:
    keeper.add(*(certificate(b"%d" % n) for n in range(40)))
    with pytest.raises(StoreError) as refused:
        keeper.publisher.remove(["sha256:"], (), quiet)
    assert refused.value.id == "store.certificate-unknown"
    assert "more than one" in refused.value.what


@pytest.mark.parametrize(("name", "data"), [("a" * 64, b"nonsense"), ("notes", b"{}"), ("empty", b"")])
def test_a_file_that_is_no_certificate_is_named_before_anything_is_signed(
    keeper: Keeper, host: Follower, name: str, data: bytes
) -> None:
    file = keeper.publisher.certificates / f"{name}.json"
    file.write_bytes(data)
    published = {path: path.read_bytes() for path in keeper.public.rglob("*.json")}
    with pytest.raises(StoreError) as refused:
        keeper.publish()
    assert refused.value.id == "store.certificate-malformed"
    assert str(file) in refused.value.what
    assert {path: path.read_bytes() for path in keeper.public.rglob("*.json")} == published
    # The mend, as it is printed.
    program, noun, verb, directory, named = refused.value.mend.partition(": ")[2].split()
    assert (program, noun, verb) == ("swtpm-prop", "store", "remove")
    assert CliRunner().invoke(command, [verb, directory, named]).exit_code == 0
    assert keeper.publish().certificates == 2
    host.sync()
    assert host.certified(GOOD, WRONG) == [GOOD, WRONG]


def test_a_certificate_by_any_other_name_is_not_published(keeper: Keeper) -> None:
    (keeper.publisher.certificates / "mine.json").write_bytes(certificate(b"more"))
    with pytest.raises(StoreError) as refused:
        keeper.publish()
    assert refused.value.id == "store.changed"


def test_revoking_names_the_file_that_is_none(keeper: Keeper) -> None:
    file = keeper.publisher.certificates / "notes.json"
    file.write_bytes(b"{}")
    words = ["revoke", str(keeper.publisher.directory), str(wrong(keeper))]
    refused = error(CliRunner().invoke(command, words))
    assert (refused.id, str(file) in refused.what) == ("store.certificate-malformed", True)
    assert remove(keeper, wrong(keeper), file).exit_code == 0
