"""A publisher's store: who must sign what, what cannot come back, and what hosts see while it changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from certifier import P256, digests_of, issue, private_pem, public_pem
from click.testing import CliRunner, Result
from storekeeper import Follower, Keeper, certificate, interrupt, kill, no_space, quiet

from swtpm_prop.cli.store import command
from swtpm_prop.errors import Error, TrustError
from swtpm_prop.trust import certificate as certificates
from swtpm_prop.trust import floors
from swtpm_prop.trust.repository import Change
from swtpm_prop.trust.signers import load_public, open_signers
from swtpm_prop.trust.sources import Subject

A, B, C = b"a", b"b", b"c"


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    made = Keeper(tmp_path)
    made.init()
    return made


@pytest.fixture
def host(tmp_path: Path, keeper: Keeper) -> Follower:
    """A host that follows the store, in which A is published."""
    keeper.add(certificate(A))
    keeper.publish()
    made = Follower(tmp_path / "host", keeper)
    made.pin()
    made.sync()
    return made


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(Error) as caught:
        action()
    return caught.value.id


def versioned(name: str, *versions: str, component: str = "linux") -> bytes:
    """A certificate with one subject for each version of a component."""
    subjects = (
        Subject(name, digests_of(f"{name} {version}".encode()), {"component": component, "version": version})
        for version in versions
    )
    return certificates_of(*subjects)


def linux(version: str, content: bytes, component: str = "linux") -> Subject:
    return Subject("a file", digests_of(content), {"component": component, "version": version})


def certificates_of(*subjects: Subject) -> bytes:
    return issue(*subjects, begins=0, ends=4_000_000_000)


def identity(envelope: bytes) -> str:
    return certificates.read(envelope).id


def ids_in(keeper: Keeper) -> set[str]:
    return {identity(file.read_bytes()) for file in keeper.publisher.certificates.iterdir()}


def revoke(keeper: Keeper, *ids: str, below: tuple[str, str] | None = None) -> Any:
    limits = floors.one(*below, ()) if below else floors.NONE
    return keeper.publisher.revoke(ids, limits, quiet)


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


# -- signing ------------------------------------------------------------------------------------


def test_holders_of_keys_need_not_meet(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    keeper.init(root=2, targets=2)
    keeper.add(certificate(A))
    waiting = {}
    for name in ("root", "targets", "root-2", "targets-2"):
        done = keeper.publish(name)
        assert done.written == ()
        waiting[name] = {one.role: one.needed for one in done.missing}
    assert waiting == {
        "root": {"root": 1, "targets": 2},
        "targets": {"root": 1, "targets": 1},
        "root-2": {"targets": 1},
        "targets-2": {"snapshot": 1, "timestamp": 1},
    }
    done = keeper.publish("online")
    assert done.written == ("1.targets.json", "1.snapshot.json", "1.root.json", "timestamp.json")
    assert (done.missing, done.certificates, done.added) == ((), 1, 1)


def test_what_waits_for_a_signature_does_not_hold_up_the_timestamp(keeper: Keeper, host: Follower) -> None:
    keeper.add(certificate(B))
    done = keeper.publish("online")
    assert done.written == ("timestamp.json",)
    assert [one.role for one in done.missing] == ["targets"]
    host.sync()
    assert host.certified(A, B) == [A]
    assert keeper.publish("targets").written == ()
    assert keeper.publish("online").written == ("2.targets.json", "2.snapshot.json", "timestamp.json")
    host.sync()
    assert host.certified(A, B) == [A, B]


def test_a_change_of_mind_drops_signatures(keeper: Keeper, host: Follower) -> None:
    keeper.add(certificate(B))
    keeper.publish("targets")
    revoke(keeper, identity((keeper.publisher.directory.parent / "envelope-0").read_bytes()))
    assert keeper.publish("online").missing == ()
    assert list(keeper.publisher.drafts.iterdir()) == []
    host.sync()
    assert host.certified(A, B) == [A]


def test_what_grows_old_is_renewed_by_who_can(keeper: Keeper, host: Follower) -> None:
    assert keeper.publish("online", days=6).written == ("timestamp.json",)
    assert keeper.publish("online", days=8).written == ("2.snapshot.json", "timestamp.json")
    assert keeper.publish("targets", "online", days=30).written == ("3.snapshot.json", "timestamp.json")
    assert keeper.publish("online", days=70).written == ("4.snapshot.json", "timestamp.json")
    assert keeper.publish("targets", "online", days=70).written == (
        "2.targets.json",
        "5.snapshot.json",
        "timestamp.json",
    )


def test_a_key_that_is_none_of_the_stores(keeper: Keeper) -> None:
    assert error_of(lambda: keeper.publish("stranger")) == "store.key-foreign"


def test_a_key_with_a_passphrase(keeper: Keeper) -> None:
    path = keeper.directory / "locked.key"
    path.write_bytes(private_pem(P256, b"secret"))
    public = keeper.directory / "locked.pem"
    public.write_text(public_pem(P256))
    (signer,) = open_signers([f"file:{path}"], [load_public(public)], lambda name: "secret")
    assert signer.public_key.keyid == load_public(public).keyid
    assert (
        error_of(lambda: open_signers([str(path)], [load_public(public)], lambda name: "x")) == "trust.key-passphrase"
    )


def test_a_key_in_hardware(tmp_path: Path, token: Path) -> None:
    keeper = Keeper(tmp_path)
    others = [(role, keeper.public_key("online")) for role in ("targets", "snapshot", "timestamp")]
    keeper.publisher.init(Change(add=[("root", load_public(token)), *others]), datetime.now(UTC))
    asked = []

    def publish(uri: str, pin: str) -> Any:
        def ask(name: str) -> str:
            asked.append(name)
            return pin

        return keeper.publisher.publish([uri, keeper.key("online")], ask, datetime.now(UTC))

    assert error_of(lambda: publish("hsm:2?label=store", "9999")) == "store.signer"
    assert error_of(lambda: publish("hsm:3?label=store", "1234")) == "store.signer"
    assert error_of(lambda: publish("hsm:2?label=other", "1234")) == "store.signer"
    assert "1.root.json" in publish("hsm:2?label=store", "1234").written
    assert [name.removeprefix("pin of hsm:")[:1] for name in asked] == ["2", "3", "2", "2"]
    host = Follower(tmp_path / "host", keeper)
    host.pin()
    host.sync()


# -- certificates -------------------------------------------------------------------------------


def test_a_malformed_certificate_keeps_all_out(keeper: Keeper) -> None:
    assert error_of(lambda: keeper.add(certificate(A), b"{}")) == "trust.field"
    assert list(keeper.publisher.certificates.iterdir()) == []


def test_what_was_revoked_cannot_be_added_again(keeper: Keeper, host: Follower) -> None:
    envelope = (keeper.directory / "envelope-0").read_bytes()
    assert revoke(keeper, identity(envelope)).revoked == (identity(envelope),)
    assert error_of(lambda: keeper.add(envelope)) == "store.revoked"
    again = json.loads(envelope)
    again["added"] = "an unknown field changes the file, not the certificate"
    assert error_of(lambda: keeper.add(json.dumps(again).encode())) == "store.revoked"
    assert error_of(lambda: revoke(keeper, identity(envelope))) == "store.certificate-unknown"
    keeper.publish()
    host.sync()
    assert host.certified(A) == []
    assert keeper.publish().certificates == 0


def test_revoke_all_below_a_version(keeper: Keeper) -> None:
    old = [versioned("old", "6.1.0-1"), versioned("older", "6.1.0-1", "5.10.1-1"), versioned("tilde", "6.1.153-1~rc1")]
    good = [versioned("new", "6.1.153-1"), versioned("grub", "2.06-13", component="grub2"), certificate(A)]
    mixed = versioned("mixed", "6.1.0-1", "6.1.160-1")
    keeper.add(*old, *good, mixed)
    done = revoke(keeper, below=("linux", "6.1.153-1"))
    assert set(done.revoked) == set(map(identity, old))
    assert done.covering == (identity(mixed),)
    assert ids_in(keeper) == set(map(identity, good))
    assert error_of(lambda: keeper.add(versioned("late", "6.1.152-1"))) == "store.revoked"
    # What was good in the mixed one may come back.
    keeper.add(versioned("mixed", "6.1.160-1"))
    # A limit that is lower later does not lower the one that holds.
    assert error_of(lambda: revoke(keeper, below=("linux", "1.0"))) == "trust.component"
    assert error_of(lambda: keeper.add(versioned("late", "6.1.152-1"))) == "store.revoked"
    assert error_of(lambda: revoke(keeper, below=("linux", "no version"))) == "trust.floor"
    keeper.add(versioned("next", "6.1.170-1"))


def test_who_loses_good_things_with_a_bad_kernel_is_told(keeper: Keeper, host: Follower) -> None:
    release = certificates_of(linux("6.1.0-1", B), linux("2.06-1", C, component="grub2"))
    keeper.add(release)
    done = revoke(keeper, below=("linux", "6.1.153-1"))
    assert (done.revoked, done.covering) == ((), (identity(release),))
    keeper.add(certificates_of(linux("2.06-1", C, component="grub2")))
    keeper.publish()
    host.sync()
    assert host.certified(A, B, C) == [A, C]


def test_a_component_that_is_not_there_is_not_revoked(keeper: Keeper) -> None:
    keeper.add(versioned("signed", "6.1.192+2", component="linux-signed-amd64"), certificate(A))
    words = ("revoke", keeper.publisher.directory, "--below", "6.1.193", "--component")
    refused = run(*words, "linux").exception
    assert isinstance(refused, TrustError)
    assert (refused.id, "linux-signed-amd64" in refused.mend) == ("trust.component", True)
    assert not (keeper.publisher.directory / "revoked.json").exists()
    assert len(json.loads(run(*words, "linux-signed-amd64", "--json").stdout)["revoked"]) == 1


def test_what_a_revoked_version_was_cannot_hold_under_another_name(keeper: Keeper, host: Follower) -> None:
    """The old kernel's file, certified without its component before or after the revocation, by any of its digests."""
    old, new = linux("6.1.0-1", B), linux("6.1.160-1", C)
    keeper.add(certificates_of(old), certificates_of(new), certificate(B), certificate(C))
    keeper.publish()
    before = {identity(file.read_bytes()) for file in keeper.publisher.certificates.iterdir()}
    done = revoke(keeper, below=("linux", "6.1.153-1"))
    assert (len(done.revoked), len(done.covering)) == (1, 1)
    assert ids_in(keeper) == before - {*done.revoked, *done.covering}
    keeper.publish()
    host.sync()
    assert host.certified(A, B, C) == [A, C]
    for name, digest in digests_of(B).items():
        again = certificates_of(Subject("again", {name: digest}), Subject("c", digests_of(C)))
        assert error_of(partial(keeper.add, again)) == "store.revoked"
    # Nor past `add`.
    (keeper.publisher.certificates / f"{hashlib.sha256(again).hexdigest()}.json").write_bytes(again)
    assert error_of(keeper.publish) == "store.revoked"


def test_what_a_newer_version_still_has_is_not_condemned(keeper: Keeper) -> None:
    """Neither is its certificate reported, whether it came before the revocation or after."""
    same, later = certificates_of(linux("6.1.153-1", A), linux("6.1.153-1", C)), certificates_of(linux("6.1.160-1", B))
    keeper.add(certificates_of(linux("6.1.0-1", A), linux("6.1.0-1", B)), same, certificate(A))
    assert revoke(keeper, below=("linux", "6.1.153-1")).covering == ()
    assert error_of(lambda: keeper.add(certificate(B))) == "store.revoked"
    assert error_of(lambda: keeper.add(certificates_of(linux("7", B, component="grub2")))) == "store.revoked"
    keeper.add(later, certificate(A))
    keeper.publish()
    assert identity(later) in ids_in(keeper)


def test_what_a_revoked_certificate_covered_cannot_come_back(keeper: Keeper) -> None:
    one, other = certificate(A), certificates_of(Subject("a", digests_of(A)), Subject("b", digests_of(B)))
    keeper.add(one, other, certificate(C))
    done = revoke(keeper, identity(one))
    assert (done.revoked, done.covering) == ((identity(one),), (identity(other),))
    assert len(ids_in(keeper)) == 1
    assert error_of(lambda: keeper.add(certificate(A))) == "store.revoked"
    keeper.add(certificate(B))


def test_a_revoked_certificate_spares_what_newer_versions_have(keeper: Keeper) -> None:
    old, new = certificates_of(linux("6.1.0-1", A), linux("6.1.0-1", B)), certificates_of(linux("6.1.160-1", A))
    older = certificates_of(linux("5.10.1-1", B))
    keeper.add(old, new, older)
    done = revoke(keeper, identity(old))
    assert (done.revoked, done.covering) == ((identity(old),), (identity(older),))
    keeper.add(certificate(A))
    assert error_of(lambda: keeper.add(certificate(B))) == "store.revoked"
    record = json.loads((keeper.publisher.directory / "revoked.json").read_text())
    assert record["digests"] == {"linux": {"6.1.0-1": sorted(each.hex()[:32] for each in digests_of(B).values())}}


def test_what_cannot_be_remembered_is_not_revoked(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper.add(versioned("kernel", *map(str, range(99))))
    monkeypatch.setattr("swtpm_prop.trust.revoked.REVOKED_BYTES", 5000)
    assert error_of(lambda: revoke(keeper, below=("linux", "100"))) == "store.revoked-full"
    assert len(ids_in(keeper)) == 1
    assert not (keeper.publisher.directory / "revoked.json").exists()


def test_who_names_what_is_revoked_with_it(keeper: Keeper) -> None:
    keeper.add(certificate(A), certificate(A, begins=1))
    shown = run("revoke", keeper.publisher.directory, min(ids_in(keeper)))
    assert (shown.exit_code, shown.stdout.count("  sha256:")) == (0, 2)
    assert shown.stderr.startswith("sha256:")


def test_old_certificates_and_metadata_do_not_stay_for_ever(keeper: Keeper, host: Follower) -> None:
    (keeper_envelope,) = keeper.publisher.certificates.iterdir()
    revoke(keeper, identity(keeper_envelope.read_bytes()))
    keeper.publish()
    served = keeper.public / "targets/certificates"
    assert len(list(served.iterdir())) == 1
    for number in range(6):
        keeper.add(certificate(b"%d" % number))
        keeper.publish()
    assert len(list(served.iterdir())) == 6
    names = {path.name for path in (keeper.public / "metadata").iterdir()}
    assert names == {
        *("1.root.json", "timestamp.json"),
        *(f"{version}.{role}.json" for version in (5, 6, 7, 8) for role in ("targets", "snapshot")),
    }


# -- roots --------------------------------------------------------------------------------------


def test_a_new_root_needs_the_keys_of_the_old_one_too(keeper: Keeper, host: Follower) -> None:
    keeper.rotate(add=[("root", keeper.public_key("mine"))], remove=[("root", keeper.public_key("root").keyid[:8])])
    done = keeper.publish("mine", "targets", "online")
    assert done.written == ("timestamp.json",)
    assert [(one.role, one.keyids) for one in done.missing] == [("root", (keeper.public_key("root").keyid,))]
    done = keeper.publish("root", "online")
    assert done.written == ("timestamp.json", "2.root.json")
    host.sync()
    assert not (keeper.publisher.drafts / "root.json").exists()


def test_a_root_is_not_published_before_what_its_keys_must_have_signed(keeper: Keeper, host: Follower) -> None:
    keys = [("targets", keeper.public_key("new"))]
    keeper.rotate(add=keys, remove=[("targets", keeper.public_key("targets").keyid)])
    done = keeper.publish("root", "online")
    assert done.written == ("timestamp.json",)
    assert [one.role for one in done.missing] == ["targets"]
    host.sync()
    done = keeper.publish("new", "online")
    assert done.written == ("2.targets.json", "2.snapshot.json", "2.root.json", "timestamp.json")
    assert host.sync()[:3] == (0, 0, ())


def test_with_old_and_new_keys_at_hand_the_timestamp_satisfies_both_roots(keeper: Keeper, host: Follower) -> None:
    roles = ("snapshot", "timestamp")
    keeper.rotate(
        add=[(role, keeper.public_key("new")) for role in roles],
        remove=[(role, keeper.public_key("online").keyid) for role in roles],
    )
    done = keeper.publish("root", "new", "online")
    assert done.written == ("2.snapshot.json", "timestamp.json", "2.root.json")
    host.sync()


def test_changes_of_a_root_add_up_until_it_is_published(keeper: Keeper, host: Follower) -> None:
    keeper.rotate(add=[("root", keeper.public_key("root-2"))])
    keeper.rotate(thresholds={"root": 2}, days={"timestamp": 1})
    keeper.publish("root", "root-2", "online")
    keeper.rotate()
    assert [one.needed for one in keeper.publish("root", "online").missing] == [1]
    host.sync()


def test_a_role_never_has_fewer_keys_than_must_sign(keeper: Keeper) -> None:
    targets = keeper.public_key("targets").keyid
    assert error_of(lambda: keeper.rotate(remove=[("targets", targets)])) == "store.threshold"
    assert error_of(lambda: keeper.rotate(thresholds={"root": 2})) == "store.threshold"
    assert error_of(lambda: keeper.rotate(remove=[("targets", "")])) == "store.threshold"
    assert error_of(lambda: keeper.rotate(remove=[("targets", "nobody")])) == "store.key-unknown"


def test_a_store_is_made_once_and_damage_is_named(keeper: Keeper, host: Follower) -> None:
    assert error_of(keeper.init) == "store.exists"
    keeper.file("timestamp.json").write_text("{}")
    assert error_of(keeper.publish) == "store.metadata"
    (keeper.publisher.directory / "revoked.json").write_text("[]")
    assert error_of(lambda: keeper.add(certificate(B))) == "store.revoked-unreadable"
    shutil.rmtree(keeper.publisher.drafts)
    assert error_of(lambda: keeper.add(certificate(B))) == "store.absent"


def test_a_certificate_that_was_changed_in_place_is_not_published(keeper: Keeper, host: Follower) -> None:
    keeper.add(certificate(B))
    for file in keeper.publisher.certificates.iterdir():
        file.write_bytes(certificate(C))
    assert error_of(keeper.publish) == "store.changed"


# -- interruptions ------------------------------------------------------------------------------


def rotated(keeper: Keeper) -> tuple[str, ...]:
    """New keys for all roles: the hardest publication."""
    for role, name in (("root", "root"), ("targets", "targets"), ("snapshot", "online"), ("timestamp", "online")):
        old, new = keeper.public_key(name), keeper.public_key(f"{name}-new")
        keeper.rotate(add=[(role, new)], remove=[(role, old.keyid)])
    return tuple(f"{name}{end}" for name in ("root", "targets", "online") for end in ("", "-new"))


@pytest.mark.fault
@pytest.mark.parametrize("how", [kill, no_space])
@pytest.mark.parametrize("change", [lambda keeper: ("root", "targets", "online"), rotated])
def test_hosts_see_a_whole_store_whenever_publishing_ends(
    keeper: Keeper, host: Follower, change: Callable[[Keeper], tuple[str, ...]], how: Callable[[], None]
) -> None:
    keeper.add(certificate(B))
    names = change(keeper)
    here, start = keeper.publisher.directory, keeper.directory / "start"
    shutil.copytree(here, start)
    shutil.copytree(host.layout.root, keeper.directory / "host-start", symlinks=True)
    for number in range(1, 200):
        status = interrupt(lambda: keeper.publish(*names), number, how)
        assert status in (0, 1, 7, 9), number
        host.sync()
        assert host.certified(A, B) in ([A], [A, B]), number
        keeper.publish(*names)
        host.sync()
        assert host.certified(A, B) == [A, B], number
        assert [path for path in here.rglob(".*") if path.is_file()] == [], number
        if status == 0:
            break
        for place, origin in ((here, start), (host.layout.root, keeper.directory / "host-start")):
            shutil.rmtree(place)
            shutil.copytree(origin, place, symlinks=True)
    assert 10 < number < 199


def test_a_revocation_that_was_interrupted_is_one(keeper: Keeper, host: Follower) -> None:
    envelope = next(keeper.publisher.certificates.iterdir()).read_bytes()
    keeper.add(certificate(B))
    start = keeper.directory / "start"
    shutil.copytree(keeper.publisher.directory, start)
    for number in range(1, 50):
        status = interrupt(lambda: revoke(keeper, identity(envelope)), number, kill)
        record = keeper.publisher.directory / "revoked.json"
        done = keeper.publish()
        assert done.certificates == (1 if record.exists() else 2), number
        if status == 0:
            break
        shutil.rmtree(keeper.publisher.directory)
        shutil.copytree(start, keeper.publisher.directory)
    assert 2 < number < 49
