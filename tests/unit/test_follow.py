"""A host that follows a store: what it takes, and what is left when a sync is interrupted."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from certifier import ED25519, P256, trust_text
from storekeeper import Follower, Keeper, certificate, interrupt, kill, no_space, quiet

from swtpm_prop.errors import Error
from swtpm_prop.trust import certificate as certificates
from swtpm_prop.trust.index import Index

OLD, NEW = b"old kernel", b"new kernel"
NEWS = f"news/fleet-{40 * 'a'}.crl"


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """A store that certifies the old kernel."""
    made = Keeper(tmp_path)
    made.init()
    made.add(certificate(OLD))
    made.publisher.place(NEWS, b"old")
    made.publish()
    return made


@pytest.fixture
def host(tmp_path: Path, keeper: Keeper) -> Follower:
    """A host that trusts the store and its issuer, and has not synced yet."""
    made = Follower(tmp_path / "host", keeper)
    made.pin()
    return made


def refused(host: Follower) -> str:
    """The id with which a sync fails; the index stays byte for byte as it was."""
    before = host.layout.index.read_bytes() if host.layout.index.exists() else b""
    with pytest.raises(Error) as caught:
        host.sync()
    assert (host.layout.index.read_bytes() if host.layout.index.exists() else b"") == before
    return caught.value.id


def replace(keeper: Keeper) -> None:
    """Revoke the old kernel, certify the new one."""
    old = certificates.read(next(keeper.publisher.certificates.iterdir()).read_bytes())
    keeper.publisher.revoke([old.id], {}, quiet)
    keeper.add(certificate(NEW))
    keeper.publisher.place(NEWS, b"new")
    keeper.publish()


# -- following ----------------------------------------------------------------------------------


def test_what_is_published_is_certified_and_what_is_revoked_no_longer(keeper: Keeper, host: Follower) -> None:
    assert host.sync()[:3] == (1, 0, ())
    assert host.certified(OLD, NEW) == [OLD]
    replace(keeper)
    assert host.sync()[:3] == (1, 1, ())
    assert host.certified(OLD, NEW) == [NEW]
    assert len(list((host.layout.store / "certificates").iterdir())) == 1


def test_a_sync_without_news_leaves_the_index_alone(host: Follower) -> None:
    host.sync()
    before = host.layout.index.stat()
    assert host.sync()[:3] == (0, 0, ())
    after = host.layout.index.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size), "written neither anew nor in place"


def test_the_index_ends_with_the_first_role_that_ends(keeper: Keeper, host: Follower) -> None:
    host.sync()
    end = Index.open(str(host.layout.index)).expires
    assert 0 < time.time() + 3 * 86400 - end < 60
    assert host.certified(OLD, now=end) == [OLD]
    assert host.certified(OLD, now=end + 1) == []
    keeper.rotate(days={"targets": 2})
    keeper.add(certificate(NEW))
    keeper.publish()
    host.sync()
    assert 0 < time.time() + 2 * 86400 - Index.open(str(host.layout.index)).expires < 60


def test_a_new_timestamp_prolongs_the_index(keeper: Keeper, host: Follower) -> None:
    host.sync()
    before = Index.open(str(host.layout.index)).expires
    keeper.publish("online", days=1)
    assert host.sync()[:3] == (0, 0, ())
    assert 86390 < Index.open(str(host.layout.index)).expires - before < 86460


def test_what_was_verified_is_not_verified_again_unless_the_trust_file_changes(
    keeper: Keeper, host: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    verify = certificates.verify
    monkeypatch.setattr(certificates, "verify", lambda *args: verified.append(1) or verify(*args))
    host.sync()
    keeper.add(certificate(NEW))
    keeper.publish()
    host.sync()
    assert len(verified) == 2
    host.layout.trust.write_text("# a comment\n" + trust_text(ED25519))
    host.sync()
    assert len(verified) == 2
    host.layout.trust.write_text(trust_text(ED25519, P256))
    host.sync()
    assert len(verified) == 4


def test_who_is_no_longer_trusted_is_no_longer_certified(host: Follower) -> None:
    host.sync()
    host.layout.trust.write_text(trust_text(P256))
    outcome = host.sync()
    assert [refusal.error.id for refusal in outcome.refused] == ["trust.signature"]
    assert (outcome.removed, host.certified(OLD)) == (1, [])


def test_a_lost_or_damaged_index_or_cache_is_made_again(host: Follower) -> None:
    def lose_index() -> None:
        host.layout.index.unlink()

    def damage_index() -> None:
        host.layout.index.write_bytes(b"nothing")

    def damage_record() -> None:
        (host.layout.store / "verified.json").write_text('{"trust": 1}')

    def lose_cache() -> None:
        shutil.rmtree(host.layout.store)

    host.sync()
    for harm in (lose_index, damage_index, damage_record, lose_cache):
        harm()
        host.sync()
        assert host.certified(OLD) == [OLD], harm.__name__


def test_a_spoilt_copy_of_a_certificate_is_fetched_again(host: Follower) -> None:
    host.sync()
    (copy,) = (host.layout.store / "certificates").iterdir()
    copy.write_bytes(certificate(NEW))
    host.layout.index.unlink()
    assert refused(host) == "store.damaged"
    host.sync()
    assert host.certified(OLD, NEW) == [OLD]


def test_two_syncs_do_not_mix(host: Follower) -> None:
    host.sync()
    other = os.open(host.layout.store, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refused(host) == "store.busy"
    finally:
        os.close(other)


def test_without_root_trust_or_store_nothing_happens(keeper: Keeper, host: Follower) -> None:
    root = host.layout.store_root.read_bytes()
    host.layout.store_root.unlink()
    assert refused(host) == "store.root-missing"
    host.layout.store_root.write_bytes(b"{}")
    assert refused(host) == "store.invalid"
    host.layout.store_root.write_bytes(root)
    keeper.public.rename(keeper.directory / "away")
    assert refused(host) == "store.download"
    host.layout.trust.unlink()
    assert refused(host) == "trust.file-missing"


# -- interruptions ------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("how", [kill, no_space])
def test_interrupted_anywhere_the_old_index_serves_and_the_next_sync_succeeds(
    keeper: Keeper, host: Follower, tmp_path: Path, how: Callable[[], None]
) -> None:
    host.sync()
    replace(keeper)
    start = tmp_path / "start"
    shutil.copytree(host.layout.root, start, symlinks=True)
    for number in range(1, 200):
        status = interrupt(host.sync, number, how)
        assert status in (0, 1, 7, 9), number
        assert host.certified(OLD, NEW) in ([OLD], [NEW]), number
        (told,) = host.sync().news
        assert (host.certified(OLD, NEW), told.read_bytes()) == ([NEW], b"new"), number
        files = (file for file in host.layout.root.rglob("*") if file.is_file())
        left = [file.name for file in files if file.name.startswith((".", "tmp", "new"))]
        assert left == [], number
        if status == 0:
            break
        shutil.rmtree(host.layout.root)
        shutil.copytree(start, host.layout.root, symlinks=True)
    assert 20 < number < 199


@pytest.mark.parametrize("size", [0, 100, 700, 2000, 5000, 15000])
def test_disk_full(keeper: Keeper, host: Follower, size: int) -> None:
    host.sync()
    replace(keeper)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        host.sync()

    assert interrupt(limited, 0, kill) == 7
    assert host.certified(OLD, NEW) == [OLD]
    host.sync()
    assert host.certified(OLD, NEW) == [NEW]
