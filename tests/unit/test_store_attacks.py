"""Who attacks a host through the store that it follows: mirrors, thieves of keys, issuers; a clock that is set back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_follow
from certifier import BOOT, ED25519, P256, subject
from click.testing import CliRunner
from storekeeper import Follower, Keeper, certificate
from test_follow import NEW, OLD, refused, replace
from tuf.api.metadata import TargetFile
from tuf.ngclient._internal import trusted_metadata_set

from swtpm_prop.cli.store import command
from swtpm_prop.trust import build
from swtpm_prop.trust import certificate as certificates
from swtpm_prop.trust.certificate import Claim
from swtpm_prop.trust.index import Index, validity
from swtpm_prop.trust.repository import ROLES

keeper = test_follow.keeper
host = test_follow.host


# -- attacks on the store -----------------------------------------------------------------------


def test_rollback_of_everything(keeper: Keeper, host: Follower) -> None:
    before = keeper.directory / "before"
    shutil.copytree(keeper.public, before)
    replace(keeper)
    host.sync()
    shutil.rmtree(keeper.public)
    before.rename(keeper.public)
    assert refused(host) == "store.rollback"
    assert host.certified(OLD, NEW) == [NEW]


def test_clock_that_goes_backwards(keeper: Keeper, host: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has expired stays so: a certificate, the index, and the store that a mirror still shows."""
    now = int(time.time())
    keeper.add(certificate(NEW, ends=now + 3600))
    keeper.publish()
    host.sync()
    assert host.certified(OLD, NEW) == [OLD, NEW]
    set_clock(monkeypatch, timedelta(hours=2))
    host.sync()
    set_clock(monkeypatch, timedelta())
    assert host.certified(OLD, NEW, now=now) == [OLD]
    host.sync()
    assert host.certified(OLD, NEW, now=now) == [OLD]
    before = keeper.directory / "before"
    shutil.copytree(keeper.public, before)
    # It saw a later timestamp; then its clock is set back and its copy of the store is lost.
    keeper.publish("online", days=5)
    set_clock(monkeypatch, timedelta(days=5))
    host.sync()
    set_clock(monkeypatch, timedelta())
    shutil.rmtree(host.layout.store)
    shutil.rmtree(keeper.public)
    before.rename(keeper.public)
    assert refused(host) == "store.expired"


def test_a_host_whose_clock_is_wrong_for_a_while(
    keeper: Keeper, host: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead, it refuses what is good; set back, it takes nothing older than it has seen, expired or not."""
    before = keeper.directory / "before"
    shutil.copytree(keeper.public, before)
    set_clock(monkeypatch, timedelta(days=4))
    assert refused(host) == "store.expired"
    set_clock(monkeypatch, timedelta())
    replace(keeper)
    host.sync()
    shutil.rmtree(keeper.public)
    before.rename(keeper.public)
    for ago in (1, 4, 400):
        set_clock(monkeypatch, timedelta(days=-ago))
        assert refused(host) == "store.rollback"
    assert host.certified(OLD, NEW) == [NEW]


def set_clock(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """Set the clock by so much from the right time, for the TUF client and for the index."""
    monkeypatch.undo()
    right = time.time
    monkeypatch.setattr(build.time, "time", lambda: right() + by.total_seconds())
    clock = SimpleNamespace(now=lambda zone: datetime.now(zone) + by)
    monkeypatch.setattr(trusted_metadata_set, "datetime", SimpleNamespace(datetime=clock, timezone=timezone))


def test_rollback_of_the_snapshot_by_who_has_the_online_key(keeper: Keeper, host: Follower) -> None:
    replace(keeper)
    host.sync()

    def back(timestamp: Any) -> None:
        timestamp.version += 1
        timestamp.snapshot_meta.version = 1
        timestamp.snapshot_meta.length = timestamp.snapshot_meta.hashes = None

    keeper.forge("timestamp.json", back, "online")
    assert refused(host) == "store.rollback"


def test_rollback_of_the_targets_by_who_has_the_online_key(keeper: Keeper, host: Follower) -> None:
    replace(keeper)
    host.sync()

    def back(snapshot: Any) -> None:
        snapshot.version = 3
        snapshot.meta["targets.json"].version = 1
        snapshot.meta["targets.json"].length = snapshot.meta["targets.json"].hashes = None

    def point(timestamp: Any) -> None:
        timestamp.version += 1
        timestamp.snapshot_meta.version = 3
        timestamp.snapshot_meta.length = timestamp.snapshot_meta.hashes = None

    keeper.forge("2.snapshot.json", back, "online", to="3.snapshot.json")
    keeper.forge("timestamp.json", point, "online")
    assert refused(host) == "store.rollback"
    assert host.certified(OLD, NEW) == [NEW]


def test_freeze(keeper: Keeper, host: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who withholds what is new stops nothing: the index ends by itself, and the store it shows is soon refused."""
    host.sync()
    left = timedelta(seconds=Index.open(str(host.layout.index)).expires - time.time())
    set_clock(monkeypatch, left - timedelta(hours=1))
    host.sync()
    assert host.certified(OLD) == [OLD]
    set_clock(monkeypatch, left + timedelta(seconds=2))
    assert refused(host) == "store.expired"
    assert host.certified(OLD) == []
    keeper.publish("online", days=4)
    host.sync()
    assert host.certified(OLD) == [OLD]


@pytest.mark.parametrize("role", ROLES)
def test_expired_role(keeper: Keeper, host: Follower, role: str) -> None:
    host.sync()
    ago = {"root": -366, "targets": -121, "snapshot": -15, "timestamp": -4}[role]
    names = ("root", "targets", "online")
    keeper.rotate(days={one: 1000 for one in ROLES if one != role})
    keeper.publish(*names, days=0)
    if role == "root":
        keeper.forge("2.root.json", lambda r: setattr(r, "expires", r.expires.replace(year=2020)), *names)
        assert refused(host) == "store.expired"
        return
    keeper.add(certificate(NEW))
    keeper.publish(*names, days=ago)
    assert refused(host) == "store.expired"
    assert host.certified(OLD, NEW) == [OLD]


def test_mix_and_match(keeper: Keeper, host: Follower) -> None:
    replace(keeper)
    shutil.copy(keeper.file("1.targets.json"), keeper.file("2.targets.json"))
    assert refused(host) == "store.mismatch"
    shutil.copy(keeper.file("1.snapshot.json"), keeper.file("2.snapshot.json"))
    assert refused(host) == "store.mismatch"


def test_mirror_that_exchanges_certificates(keeper: Keeper, host: Follower) -> None:
    keeper.add(certificate(NEW))
    keeper.publish()
    one, other = (keeper.public / "targets/certificates").iterdir()
    shutil.copy(one, other)
    assert refused(host) in ("store.mismatch", "store.too-large")
    assert not host.layout.index.exists()


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(("make", "id"), [(endless, "too-large"), (fifo, "download"), (device, "download")])
@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "2.root.json", "target"])
def test_endless_data(keeper: Keeper, host: Follower, name: str, make: Callable[[Path], None], id: str) -> None:
    path = keeper.file(name)
    if name == "target":
        (path,) = (keeper.public / "targets/certificates").iterdir()
    elif not path.exists():
        path.touch()
    make(path)
    assert refused(host) == f"store.{id}"


@pytest.mark.parametrize("signed", [("targets",), ("targets-2",), ("online", "root"), ()])
def test_fewer_signatures_than_the_threshold(tmp_path: Path, signed: tuple[str, ...]) -> None:
    keeper = Keeper(tmp_path)
    keeper.init(targets=2)
    keeper.add(certificate(OLD))
    keeper.publish("root", "targets", "targets-2", "online")
    host = Follower(tmp_path / "host", keeper)
    host.pin()
    data = keeper.forge("1.targets.json", lambda targets: None, *signed)

    def point(snapshot: Any) -> None:
        snapshot.meta["targets.json"].length = len(data)
        snapshot.meta["targets.json"].hashes = {"sha256": hashlib.sha256(data).hexdigest()}

    data_of_snapshot = keeper.forge("1.snapshot.json", point, "online")

    def to(timestamp: Any) -> None:
        timestamp.snapshot_meta.length = len(data_of_snapshot)
        timestamp.snapshot_meta.hashes = {"sha256": hashlib.sha256(data_of_snapshot).hexdigest()}

    keeper.forge("timestamp.json", to, "online")
    assert refused(host) == "store.signature"


def test_the_same_signature_twice_counts_once(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    keeper.init(root=2)
    keeper.publish("root", "root-2", "targets", "online")
    host = Follower(tmp_path / "host", keeper)
    host.pin()
    keeper.rotate()
    assert keeper.publish("root", "targets", "online").missing
    root = json.loads((keeper.publisher.drafts / "root.json").read_bytes())
    root["signatures"] *= 2
    keeper.file("2.root.json").write_text(json.dumps(root))
    assert refused(host) == "store.invalid"
    root["signatures"][1] = {**root["signatures"][0], "keyid": keeper.public_key("root-2").keyid}
    keeper.file("2.root.json").write_text(json.dumps(root))
    assert refused(host) == "store.signature"


def test_roots_are_followed_over_several_versions(keeper: Keeper, host: Follower) -> None:
    for generation in range(3):
        last, next_ = (f"root{n or ''}" for n in (generation, generation + 1))
        keeper.rotate(add=[("root", keeper.public_key(next_))], remove=[("root", keeper.public_key(last).keyid)])
        keeper.publish(last, next_, "targets", "online")
    host.sync()
    assert host.certified(OLD) == [OLD]
    assert sorted(path.name for path in (host.layout.store / "metadata/root_history").iterdir()) == [
        f"{version}.root.json" for version in (1, 2, 3, 4)
    ]


def test_a_root_that_the_old_keys_did_not_sign(keeper: Keeper, host: Follower) -> None:
    host.sync()
    keeper.rotate(add=[("root", keeper.public_key("mine"))], remove=[("root", keeper.public_key("root").keyid)])
    keeper.publish("root", "mine", "targets", "online")
    keeper.forge("2.root.json", lambda root: None, "mine")
    assert refused(host) == "store.signature"


def test_a_missing_root_in_the_chain(keeper: Keeper, host: Follower) -> None:
    for name in ("online2", "online3"):
        roles = ("snapshot", "timestamp")
        last = "online" if name == "online2" else "online2"
        keeper.rotate(
            add=[(role, keeper.public_key(name)) for role in roles],
            remove=[(role, keeper.public_key(last).keyid) for role in roles],
        )
        keeper.publish("root", "targets", name)
    keeper.file("2.root.json").unlink()
    assert refused(host) == "store.signature"


def test_a_revoked_online_key_signs_nothing_any_more(keeper: Keeper, host: Follower) -> None:
    host.sync()
    roles = ("snapshot", "timestamp")
    keeper.rotate(
        add=[(role, keeper.public_key("fresh")) for role in roles],
        remove=[(role, keeper.public_key("online").keyid) for role in roles],
    )
    keeper.publish("root", "targets", "fresh")
    host.sync()
    keeper.forge("timestamp.json", lambda timestamp: setattr(timestamp, "version", 9), "online")
    assert refused(host) == "store.signature"


PATHS = ["../../../etc/shadow", "/etc/shadow", "certificates/../../x.json", "certificates/x.json", "other", ""]


@pytest.mark.parametrize("path", [*PATHS, "news/../x.crl", f"news/fleet-{40 * 'a'}.crl/x", "news/x.crl", "news/"])
def test_target_paths_cannot_leave_their_place(keeper: Keeper, host: Follower, path: str) -> None:
    data = b"evil"
    relist(keeper, lambda targets: targets.update({path: TargetFile.from_data(path, data)}))
    before = {file for file in keeper.directory.rglob("*") if host.layout.store not in file.parents}
    outcome = host.sync()
    assert [(refusal.target, refusal.error.id) for refusal in outcome.refused] == [(path, "store.target")]
    assert host.certified(OLD) == [OLD]
    after = {file for file in keeper.directory.rglob("*") if host.layout.store not in file.parents}
    assert after - before == {host.layout.store, host.layout.index, Path(validity(str(host.layout.index)))}


@pytest.mark.parametrize("hashes", [{}, {"sha512": "0" * 128}, {"../../x": "../../x"}])
def test_targets_have_the_one_hash_that_names_them(keeper: Keeper, host: Follower, hashes: dict[str, str]) -> None:
    name = hashlib.sha256(b"evil").hexdigest()
    evil = TargetFile(4, {**hashes, "sha256": name}, f"certificates/{name}.json")
    if not hashes:
        evil = TargetFile(4, {"sha256": "0" * 64}, f"certificates/{name}.json")
    relist(keeper, lambda targets: targets.update({evil.path: evil}))
    assert [refusal.error.id for refusal in host.sync().refused] == ["store.target"]


@pytest.mark.parametrize(
    "hashes", [{"sha512": "0" * 128}, {"sha256": "../../x"}, {"sha256": "0" * 64, "sha512": "0" * 128}]
)
def test_news_have_one_hash_and_its_form(keeper: Keeper, host: Follower, hashes: dict[str, str]) -> None:
    evil = TargetFile(4, hashes, f"news/fleet-{40 * 'b'}.crl")
    relist(keeper, lambda targets: targets.update({evil.path: evil}))
    assert [refusal.error.id for refusal in host.sync().refused] == ["store.target"]


def test_news_of_100_megabytes_are_not_even_fetched(keeper: Keeper, host: Follower) -> None:
    large = TargetFile(100 * 1024 * 1024, {"sha256": "0" * 64}, f"news/fleet-{40 * 'b'}.crl")
    relist(keeper, lambda targets: targets.update({large.path: large}))
    assert [refusal.error.id for refusal in host.sync().refused] == ["store.too-large"]


def relist(keeper: Keeper, change: Callable[[dict[str, TargetFile]], None]) -> None:
    """Publish targets that the publisher would not make; all keys are the attacker's."""
    loose = {"length": None, "hashes": None}

    def relisted(targets: Any) -> None:
        change(targets.targets)

    def loosen(of: str) -> Callable[[Any], None]:
        def change(signed: Any) -> None:
            vars(signed.meta["targets.json"] if of == "snapshot" else signed.snapshot_meta).update(loose)

        return change

    keeper.forge("1.targets.json", relisted, "targets")
    keeper.forge("1.snapshot.json", loosen("snapshot"), "online")
    keeper.forge("timestamp.json", loosen("timestamp"), "online")


def test_a_certificate_of_100_megabytes_is_not_even_fetched(keeper: Keeper, host: Follower) -> None:
    name = "0" * 64
    big = TargetFile(100_000_000, {"sha256": name}, f"certificates/{name}.json")
    relist(keeper, lambda targets: targets.update({big.path: big}))
    outcome = host.sync()
    assert [(refusal.target, refusal.error.id) for refusal in outcome.refused] == [(big.path, "store.too-large")]
    assert host.certified(OLD) == [OLD]


def test_a_store_larger_than_a_host_keeps_is_refused_whole(keeper: Keeper, host: Follower) -> None:
    names = [f"{number:064x}" for number in range(400)]
    many = {f"certificates/{n}.json": TargetFile(64_000_000, {"sha256": n}, f"certificates/{n}.json") for n in names}
    relist(keeper, lambda targets: targets.update(many))
    assert refused(host) == "store.too-large"


# -- attacks by issuers -------------------------------------------------------------------------


def test_what_this_host_does_not_accept_is_left_out_and_named(keeper: Keeper, host: Follower) -> None:
    elsewhere = "https://example.net/property"
    stranger = Claim("https://example.net/stranger", (BOOT,), (subject(b"c"),), 0, 4_000_000_000)
    bad = {
        "trust.signature": certificate(b"a", signers=(P256,)),
        "trust.prefix": certificate(b"b", properties=(BOOT, elsewhere)),
        "trust.issuer-unknown": certificates.issue(stranger, [ED25519], 0),
    }
    keeper.add(*bad.values(), certificate(NEW))
    keeper.publish()
    outcome = host.sync()
    assert sorted(refusal.error.id for refusal in outcome.refused) == sorted(bad)
    assert host.certified(OLD, NEW, b"a", b"b", b"c") == [OLD, NEW]
    said = CliRunner().invoke(command, ["sync", "--root", str(host.layout.root), "--url", str(keeper.public)])
    assert said.exit_code == 1
    assert all(f"[{id}]" in said.output for id in bad)


def test_nonsense_with_a_right_name_is_left_out(keeper: Keeper, host: Follower) -> None:
    listed: list[TargetFile] = []
    for data in (b"", b"{}", b"[" * 100_000, b"\xff" * 100):
        name = hashlib.sha256(data).hexdigest()
        (keeper.public / f"targets/certificates/{name}.{name}.json").write_bytes(data)
        listed.append(TargetFile(len(data), {"sha256": name}, f"certificates/{name}.json"))
    relist(keeper, lambda targets: targets.update({one.path: one for one in listed}))
    outcome = host.sync()
    assert {refusal.error.id for refusal in outcome.refused} <= {"trust.json", "trust.field"}
    assert len(outcome.refused) == 4
    assert host.certified(OLD) == [OLD]


def test_an_expired_certificate_is_taken_and_never_counts(keeper: Keeper, host: Follower) -> None:
    keeper.add(certificate(NEW, begins=0, ends=1))
    keeper.publish()
    assert host.sync()[:3] == (2, 0, ())
    assert host.certified(OLD, NEW) == [OLD]
