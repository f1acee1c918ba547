"""Floors: what is below one has none of the properties it is for, on hosts that follow a store and on others.

Property BOOT demands a newer kernel than property LAX does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from certifier import BOOT, ED25519, NOW, digests_of, issue, issued, trust_text
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from storekeeper import FOREVER, Follower, Keeper, quiet
from test_index import build
from test_index_update import rows, update

from swtpm_prop.cli.store import command
from swtpm_prop.errors import Error, StoreError, TrustError
from swtpm_prop.limits import FLOORS
from swtpm_prop.trust import build as builder
from swtpm_prop.trust import certificate as certificates
from swtpm_prop.trust import floors, issuers
from swtpm_prop.trust.certificate import Certificate
from swtpm_prop.trust.floors import ALL, Floors
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.sources import Subject

LAX = "https://example.org/properties/lax"
OLD, NEW, SAME = b"old kernel", b"new kernel", b"the same in both"


def linux(content: bytes, version: str | None, *names: str, component: str = "linux") -> Subject:
    versioned = {"version": version} if version is not None else {}
    return Subject(content.decode(), digests_of(content, *names), {"component": component, **versioned})


def plain(content: bytes, *names: str) -> Subject:
    return Subject("another name", digests_of(content, *names))


def envelope(*subjects: Subject, properties: tuple[str, ...] = (BOOT, LAX)) -> bytes:
    return issue(*subjects, properties=properties, **FOREVER)


def verdicts(path: Path, content: bytes, *names: str) -> tuple[str, str]:
    """The reasons for BOOT and for LAX, each empty if it is held."""
    index = Index.open(str(path))
    try:
        now = min(NOW, index.expires)
        boot, lax = (index.judge((uri,), digests_of(content, *names), now).reason for uri in (BOOT, LAX))
    finally:
        index.close()
    return boot, lax


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


FLOOR: Floors = {"linux": {BOOT: "6.1.153-1", LAX: "5.10"}}
HELD, LOW = "", "below-floor"


def built(path: Path, *certificates: Certificate, limits: Floors = FLOOR) -> None:
    builder.build(path, certificates, NOW + 99, lambda doing, done: None, limits)


# -- the rule -----------------------------------------------------------------------------------


def test_an_old_kernel_holds_what_its_version_is_enough_for(path: Path) -> None:
    built(path, issued(linux(OLD, "6.1.0-1"), linux(NEW, "6.1.153-1"), properties=(BOOT, LAX)))
    assert verdicts(path, OLD) == (LOW, HELD)
    assert verdicts(path, NEW) == (HELD, HELD)
    verdict = Index.open(str(path)).judge((LAX, BOOT), digests_of(OLD), NOW)
    assert (verdict.certified, verdict.certificates) == (False, ())
    assert verdict.detail == f"linux 6.1.0-1 is below 6.1.153-1, the lowest for {BOOT}"


def test_a_floor_without_properties_is_for_every_one(path: Path) -> None:
    built(path, issued(linux(OLD, "6.1.0-1"), properties=(BOOT, LAX)), limits={"linux": {ALL: "6.1.153-1"}})
    assert verdicts(path, OLD) == (LOW, LOW)


@pytest.mark.parametrize("limits", [{ALL: "5.9", BOOT: "6.1.153-1"}, {ALL: "6.1.153-1", BOOT: "5.9"}])
def test_the_version_that_is_needed_is_the_highest_of_all_floors(limits: dict[str, str]) -> None:
    assert floors.below({"linux": limits}, "linux", "5.8", [BOOT]) == {BOOT: "6.1.153-1"}


@pytest.mark.parametrize("version", [None, "", "no version", "1~rc1", "9_9"])
def test_what_has_no_version_is_below_every_floor(path: Path, version: str | None) -> None:
    built(path, issued(linux(OLD, version), properties=(BOOT, LAX)))
    assert verdicts(path, OLD) == (LOW, LOW)


def test_other_components_have_floors_of_their_own(path: Path) -> None:
    built(path, issued(linux(OLD, "1", component="linux2"), plain(NEW), properties=(BOOT, LAX)))
    assert verdicts(path, OLD) == verdicts(path, NEW) == (HELD, HELD)


@pytest.mark.parametrize(("first", "second"), list(product([("sha256",), ("sha384",), ("sha256", "sha512")], repeat=2)))
def test_another_name_for_the_old_kernel_does_not_help(
    path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    """Whatever digests the two certificates have, and whichever is found first."""
    old = issued(linux(OLD, "6.1.0-1", *first), properties=(BOOT, LAX))
    for other in (plain(OLD, *second), linux(OLD, "9", *second, component="other")):
        built(path, old, issued(other, properties=(BOOT, LAX)))
        assert verdicts(path, OLD) == (LOW, HELD)


def test_a_file_that_the_new_version_still_has_counts(path: Path) -> None:
    built(path, issued(linux(SAME, "6.1.0-1")), issued(linux(SAME, "6.1.160-1")), issued(plain(SAME)))
    assert verdicts(path, SAME)[0] == HELD


def test_what_an_expired_certificate_says_of_the_version_still_bars(path: Path) -> None:
    built(path, issued(linux(OLD, "6.1.0-1"), ends=NOW - 1), issued(plain(OLD)))
    assert verdicts(path, OLD)[0] == LOW


THINGS = st.sampled_from([OLD, NEW])
SUBJECTS = st.builds(
    lambda content, version, component: linux(content, version, component=component) if component else plain(content),
    THINGS,
    st.sampled_from(["1", "2", "3", None]),
    st.sampled_from(["linux", "grub", ""]),
)
SPECIFICATIONS = st.lists(
    st.tuples(st.lists(SUBJECTS, min_size=1, max_size=3), st.sets(st.sampled_from([BOOT, LAX]), min_size=1)),
    min_size=1,
    max_size=4,
)
LIMITS = st.dictionaries(
    st.sampled_from(["linux", "grub"]),
    st.dictionaries(st.sampled_from([ALL, BOOT, LAX]), st.sampled_from(["1", "2", "3"]), min_size=1),
)


@settings(max_examples=80, deadline=None)
@given(specifications=SPECIFICATIONS, first=LIMITS, then=LIMITS)
def test_verdicts_equal_those_of_a_naive_model_and_an_update_equals_a_build(
    tmp_path_factory: pytest.TempPathFactory, specifications: Any, first: Floors, then: Floors
) -> None:
    path, other = (tmp_path_factory.getbasetemp() / name for name in ("updated.sqlite", "built.sqlite"))
    made = [issued(*subjects, properties=tuple(sorted(uris))) for subjects, uris in specifications]
    built(path, *made[1:], limits=first)
    update(path, made[0], expires=NOW + 99, limits=then)
    built(other, *made, limits=then)
    assert rows(path) == rows(other)
    for content, at in product((OLD, NEW), (0, 1)):
        assert (verdicts(path, content)[at] == HELD) == model(content, (BOOT, LAX)[at], made, then)


def model(content: bytes, uri: str, made: list[Certificate], limits: Floors) -> bool:
    """Someone certifies it, and no version below a floor has it unless one of the same component that is not does."""
    having = [(s, c) for c in made if uri in c.properties for s in c.subjects if s.digests == digests_of(content)]
    low = {s.annotations["component"] for s, _ in having if is_low(s, uri, limits)}
    return any(not is_low(s, uri, limits) and low <= {s.annotations.get("component")} for s, _ in having)


def is_low(subject: Subject, uri: str, limits: Floors) -> bool:
    of = limits.get(subject.annotations.get("component", ""), {})
    return any(int(subject.annotations.get("version", "0")) < int(of.get(scope, "0")) for scope in (ALL, uri))


def test_a_new_floor_alone_is_an_update(path: Path) -> None:
    one = issued(linux(OLD, "6.1.0-1"), linux(NEW, "6.1.160-1"), properties=(BOOT, LAX))
    build(path, one, expires=NOW)
    assert verdicts(path, OLD) == (HELD, HELD)
    index = Index.open(str(path))
    update(path, limits=FLOOR)
    index.refresh()
    assert index.judge((BOOT,), digests_of(OLD), NOW).reason == LOW
    assert verdicts(path, NEW) == (HELD, HELD)
    update(path)
    assert verdicts(path, OLD) == (HELD, HELD)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a b", "\u00e9\U0001f600", "x" * 256, "'; DROP TABLE part"])
def test_any_name_a_component_may_have(path: Path, name: str) -> None:
    limits = floors.joined(floors.one(name, "2", (BOOT,)), FLOOR)
    built(path, issued(linux(OLD, "1", component=name), properties=(BOOT, LAX)), limits=limits)
    assert verdicts(path, OLD) == (LOW, HELD)


def test_half_a_character_is_no_name(path: Path) -> None:
    """The index could not keep it, and one issuer's certificate would stop every sync."""
    for said in ({"component": "\ud800"}, {"component": "linux", "version": "1\udfff"}, {"\ud800": "x"}):
        with pytest.raises(TrustError) as refused:
            issued(Subject("old", digests_of(OLD), said))
        assert refused.value.id == "trust.annotations"


# -- the trust file -----------------------------------------------------------------------------

TABLES = f"""
[[floor]]
component = "linux"
below = "6.1.153-1"
properties = ["{BOOT}"]
[[floor]]
component = "linux"
below = "5.10"
[[floor]]
component = "linux"
below = "4.19"
"""


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_a_host_without_a_store_has_floors_in_its_trust_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trust.toml").write_text(trust_text() + TABLES)
    Path("c.json").write_bytes(envelope(linux(OLD, "6.1.0-1"), linux(b"older", "4.20")))
    Path("kernel").write_bytes(OLD)
    assert run("build", "c.json", "--trust", "trust.toml", "--output", "i").exit_code == 0
    assert verdicts(Path("i"), OLD) == (LOW, HELD)
    assert verdicts(Path("i"), b"older") == (LOW, LOW)
    said = run("lookup", "kernel", "--index", "i", "--property", BOOT)
    assert said.exit_code == 1
    assert "linux 6.1.0-1 is below 6.1.153-1" in said.output
    assert "[below-floor]" in said.output
    (found,) = json.loads(run("lookup", "kernel", "--index", "i", "--json").stdout)
    assert found["certified"], "for the other property"
    assert found["certificates"][0]["belowFloor"] == {BOOT: "6.1.153-1"}
    everything = run("lookup", "kernel", "--index", "i")
    assert everything.exit_code == 0
    assert everything.stdout.splitlines()[0] == f"plain hash: certified, {LAX}"
    assert f"the lowest for {BOOT} [below-floor]" in everything.stdout.splitlines()[1]
    assert [each["reason"] for each in found["refusals"]] == ["below-floor"]
    assert json.loads(run("stats", "--index", "i", "--json").stdout)["floors"] == {
        "linux": {ALL: "5.10", BOOT: "6.1.153-1"}
    }
    assert f"linux 6.1.153-1 for {BOOT}" in run("stats", "--index", "i").stdout


@pytest.mark.parametrize(
    "text",
    [
        "[[floor]]",
        "[floor]\ncomponent = 'linux'\nbelow = '1'",
        "[[floor]]\ncomponent = 'linux'",
        "[[floor]]\ncomponent = ''\nbelow = '1'",
        "[[floor]]\ncomponent = 'linux'\nbelow = 1",
        "[[floor]]\ncomponent = 'linux'\nbelow = 'no version'",
        "[[floor]]\ncomponent = 'linux'\nbelow = '1'\nproperties = []",
        "[[floor]]\ncomponent = 'linux'\nbelow = '1'\nproperties = ['HTTPS://example.org/']",
        "[[floor]]\ncomponent = 'linux'\nbelow = '1'\nproperty = 'https://example.org/'",
    ],
)
def test_a_floor_that_is_none_refuses_the_trust_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(TrustError) as refused:
        issuers.parse((trust_text() + text).encode(), tmp_path)
    assert refused.value.id == "trust.file"


# -- a store ------------------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    made = Keeper(tmp_path)
    made.init()
    made.publish()
    return made


@pytest.fixture
def host(tmp_path: Path, keeper: Keeper) -> Follower:
    made = Follower(tmp_path / "host", keeper)
    made.pin()
    return made


def lower(keeper: Keeper, below: str, *properties: str) -> Any:
    return keeper.publisher.revoke((), floors.one("linux", below, properties), quiet)


def identity(data: bytes) -> str:
    return certificates.read(data).id


def test_one_command_revokes_an_old_kernel_for_one_property(keeper: Keeper, host: Follower) -> None:
    old, new, strict = (
        envelope(linux(OLD, "6.1.0-1")),
        envelope(linux(NEW, "6.1.160-1")),
        envelope(linux(OLD, "6.1.0-1"), properties=(BOOT,)),
    )
    named = envelope(plain(OLD), properties=(BOOT,))
    lax = envelope(plain(OLD), properties=(LAX,))
    keeper.add(old, new, strict, named, lax)
    keeper.publish()
    host.sync()
    assert verdicts(host.layout.index, OLD) == (HELD, HELD)
    words = ("--component", "linux", "--below", "6.1.153-1", "--property", BOOT)
    done = json.loads(run("revoke", keeper.publisher.directory, *words, "--json").stdout)
    assert done == {"revoked": [identity(strict)], "covering": [identity(named)], "limited": [identity(old)]}
    keeper.publish()
    assert host.sync()[:3] == (0, 2, ())
    assert verdicts(host.layout.index, OLD) == (LOW, HELD)
    assert verdicts(host.layout.index, NEW) == (HELD, HELD)
    # Certified anew, under whatever name, it is refused; for the other property it is not.
    for again in (envelope(plain(OLD)), envelope(linux(OLD, "6.1.0-1"), properties=(BOOT,))):
        with pytest.raises(StoreError) as refused:
            keeper.add(again)
        assert refused.value.id == "store.revoked"
    keeper.add(envelope(plain(OLD, "sha512"), properties=(LAX,)), envelope(linux(OLD, "6.1.1-1")))
    keeper.publish()
    assert host.sync()[:3] == (2, 0, ())
    assert verdicts(host.layout.index, OLD) == (LOW, HELD)


def test_a_floor_only_rises(keeper: Keeper, host: Follower) -> None:
    keeper.add(envelope(linux(OLD, "6.1.0-1")), envelope(linux(NEW, "6.1.160-1")))
    lower(keeper, "6.1.170-1", BOOT)
    lower(keeper, "6.1.153-1", BOOT)
    keeper.publish()
    host.sync()
    assert verdicts(host.layout.index, NEW) == (LOW, HELD)
    lower(keeper, "6.1.153-1")
    keeper.publish()
    assert host.sync().removed == 1
    assert verdicts(host.layout.index, OLD) == ("unknown", "unknown")
    assert verdicts(host.layout.index, NEW) == (LOW, HELD)


def test_the_floors_of_the_trust_file_hold_too(keeper: Keeper, host: Follower) -> None:
    keeper.add(envelope(linux(OLD, "6.1.0-1")), envelope(linux(NEW, "6.1.160-1")))
    lower(keeper, "6.1.153-1", LAX)
    keeper.publish()
    host.sync()
    assert verdicts(host.layout.index, OLD) == (HELD, LOW)
    host.layout.trust.write_text(trust_text(ED25519) + TABLES.replace("6.1.153-1", "6.1.170-1"))
    host.sync()
    assert verdicts(host.layout.index, OLD) == (LOW, LOW)
    assert verdicts(host.layout.index, NEW) == (LOW, HELD)


@pytest.mark.parametrize(
    "said",
    [
        *(1, [], {"linux": 1}, {"linux": []}, {"linux": {"": 1}}, {"linux": {"": "no version"}}, {"": {"": "1"}}),
        *({"linux": {"boot": "1"}}, {"linux": {"HTTPS://example.org/": "1"}}, {"l" * 300: {"": "1"}}),
        {"linux": {f"https://example.org/{n}": "1" for n in range(FLOORS + 1)}},
    ],
)
def test_floors_that_make_no_sense_leave_the_index_as_it_was(keeper: Keeper, host: Follower, said: object) -> None:
    keeper.add(envelope(linux(OLD, "6.1.0-1")))
    keeper.publish()
    host.sync()
    relist(keeper, lambda targets: targets.unrecognized_fields.update({"x-swtpm-prop-floors": said}))
    with pytest.raises(Error) as refused:
        host.sync()
    assert refused.value.id == "store.invalid"
    assert verdicts(host.layout.index, OLD) == (HELD, HELD)


def relist(keeper: Keeper, change: Callable[[Any], Any]) -> None:
    """Publish the third targets as who has the keys, but not our publisher, can."""
    for role, key in (("targets", "targets"), ("snapshot", "online")):
        keeper.forge(f"2.{role}.json", partial(_next, change), key, to=f"3.{role}.json")
    keeper.forge("timestamp.json", partial(_next, change), "online")


def _next(change: Callable[[Any], Any], signed: Any) -> None:
    signed.version = 3
    if signed.type == "targets":
        change(signed)
        return
    below = signed.snapshot_meta if signed.type == "timestamp" else signed.meta["targets.json"]
    vars(below).update(version=3, length=None, hashes=None)


def test_a_mirror_cannot_take_a_floor_away(keeper: Keeper, host: Follower) -> None:
    keeper.add(envelope(linux(OLD, "6.1.0-1")))
    keeper.publish()
    shutil.copytree(keeper.public, keeper.directory / "before")
    lower(keeper, "6.1.153-1", BOOT)
    keeper.publish()
    host.sync()
    shutil.rmtree(keeper.public)
    (keeper.directory / "before").rename(keeper.public)
    with pytest.raises(StoreError) as refused:
        host.sync()
    assert refused.value.id == "store.rollback"
    assert verdicts(host.layout.index, OLD) == (LOW, HELD)
