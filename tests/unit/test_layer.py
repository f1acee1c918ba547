"""The translation layer on a model TPM: every route, every state, every failure."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop.errors import LayerError
from swtpm_prop.tpm import commands as tpm
from swtpm_prop.tpm.algorithms import ALGORITHMS, SHA1, SHA256, SHA384, SHA512, Digest
from swtpm_prop.tpm.ima import boot_aggregate_measurement
from swtpm_prop.translate.layer import breaks, codes, handle, resumed
from swtpm_prop.translate.policy import (
    BROKEN,
    HELD,
    UNMEASURED,
    Bank,
    broken_digest,
    canonical,
    held_digest,
    held_value,
    state,
)
from swtpm_prop.translate.verdict import Verdict, covers
from tests.model import HMAC_SESSION, PASSWORD, ModelTpm, command, extend, refusal

BANK = Bank(SHA384, frozenset({0, 4, 7}), True, ("https://example.org/p",))
HIDDEN = BANK._replace(visible=False)
GOOD = b"good"
BAD = b"bad"


def digests(data: bytes, *algorithms: object) -> tuple[Digest, ...]:
    return tuple(Digest(a, hashlib.new(a.name, data).digest()) for a in ALGORITHMS if a in algorithms)


ALL = (SHA1, SHA256, SHA384, SHA512)


def judge(bank: Bank, measured: Mapping[str, bytes]) -> Verdict:
    certified = {a.name: hashlib.new(a.name, GOOD).digest() for a in ALL}
    return Verdict(True, ("sha256:00",)) if covers(certified, measured) else Verdict(False, (), "unknown")


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm(SHA256, SHA384)


def run(model: ModelTpm, request: bytes, *banks: Bank) -> list[str]:
    outcome = model.run(handle(request, banks or (BANK,), judge))
    return [r.content["state"] for r in outcome.records]


def state_of(model: ModelTpm, pcr: int, bank: Bank = BANK) -> str:
    return state(bank, model.value(bank.algorithm.name, pcr))


def raw(model: ModelTpm, pcr: int) -> bytes:
    return model.value("sha256", pcr)


def test_certified_measurements_hold_whatever_their_number(model: ModelTpm) -> None:
    assert run(model, extend(4, digests(GOOD, *ALL))) == [HELD]
    once = model.value("sha384", 4)
    assert run(model, extend(4, digests(GOOD, *ALL))) == [HELD]
    assert model.value("sha384", 4) == once == held_value(BANK)


def test_one_uncertified_measurement_breaks_for_good(model: ModelTpm) -> None:
    assert run(model, extend(4, digests(GOOD, *ALL))) == [HELD]
    assert run(model, extend(4, digests(BAD, *ALL))) == [BROKEN]
    assert run(model, extend(4, digests(GOOD, *ALL))) == [BROKEN]
    assert state_of(model, 4) == BROKEN


def test_raw_banks_get_exactly_what_the_guest_sent(model: ModelTpm) -> None:
    plain = ModelTpm(SHA256, SHA384)
    for data in (GOOD, BAD, GOOD):
        request = extend(4, digests(data, *ALL))
        run(model, request)
        plain.execute(request)
    assert raw(model, 4) == raw(plain, 4)


@pytest.mark.parametrize("algorithms", [(SHA256,), (SHA384,), (SHA256, SHA512), (SHA1, SHA256, SHA384)])
def test_the_property_bank_need_not_be_named(model: ModelTpm, algorithms: tuple[object, ...]) -> None:
    assert run(model, extend(4, digests(GOOD, *algorithms))) == [HELD]
    assert state_of(model, 4) == HELD


@pytest.mark.parametrize("bank_algorithm", [SHA256, SHA384, SHA512])
def test_sha1_alone_never_counts(bank_algorithm: object, model: ModelTpm) -> None:
    assert run(model, extend(4, digests(GOOD, SHA1))) == [BROKEN]


def test_disagreeing_digests_are_not_certified(model: ModelTpm) -> None:
    mixed = (*digests(GOOD, SHA256), *digests(BAD, SHA384))
    assert run(model, extend(4, mixed)) == [BROKEN]


def test_the_same_algorithm_twice_is_ambiguous(model: ModelTpm) -> None:
    twice = digests(GOOD, SHA256) * 2
    outcome = model.run(handle(extend(4, twice), (BANK,), judge))
    assert outcome.records[0].content["reason"] == "ambiguous"
    assert state_of(model, 4) == BROKEN


def test_four_foreign_digests_get_a_second_command(model: ModelTpm) -> None:
    four = digests(GOOD, SHA256) * 4
    assert run(model, extend(4, four)) == [BROKEN]
    extends = [c for c in model.executed if tpm.command_code(c) == tpm.CC_PCR_EXTEND]
    assert [len(tpm.parse_digests(tpm.parse_command(c, 1).parameters)) for c in extends] == [4, 1]


def test_nothing_measured_changes_nothing(model: ModelTpm) -> None:
    assert run(model, extend(4, ())) == []
    assert state_of(model, 4) == UNMEASURED
    assert len(model.executed) == 1


def test_a_guest_that_extends_the_held_digest_itself_is_broken(model: ModelTpm) -> None:
    forged = (Digest(SHA384, held_digest(BANK)),)
    for area in (PASSWORD, HMAC_SESSION, PASSWORD + HMAC_SESSION):
        fresh = ModelTpm(SHA256, SHA384)
        assert run(fresh, extend(4, forged, area)) == [BROKEN]
        assert state_of(fresh, 4) == BROKEN


@pytest.mark.parametrize("area", [HMAC_SESSION, PASSWORD + HMAC_SESSION, HMAC_SESSION + PASSWORD])
def test_sessions_break_even_certified_measurements(model: ModelTpm, area: bytes) -> None:
    assert run(model, extend(4, digests(GOOD, *ALL), area)) == [BROKEN]
    assert model.executed[0] == extend(4, digests(GOOD, *ALL), area)


def test_a_hidden_bank_follows_a_session_extend_that_leaves_it_alone(model: ModelTpm) -> None:
    request = extend(4, digests(GOOD, SHA256), HMAC_SESSION)
    assert run(model, request, HIDDEN) == [HELD]
    assert run(model, extend(4, digests(BAD, SHA256), HMAC_SESSION), HIDDEN) == [BROKEN]
    assert model.executed[0] == request


def test_a_hidden_bank_named_under_a_session_breaks(model: ModelTpm) -> None:
    assert run(model, extend(4, digests(GOOD, SHA256, SHA384), HMAC_SESSION), HIDDEN) == [BROKEN]


def test_an_event_by_password_is_translated(model: ModelTpm) -> None:
    request = command(tpm.CC_PCR_EVENT, (4,), PASSWORD, struct.pack(">H", 4) + GOOD)
    outcome = model.run(handle(request, (BANK,), judge))
    assert state_of(model, 4) == HELD
    assert raw(model, 4) == hashlib.sha256(bytes(32) + hashlib.sha256(GOOD).digest()).digest()
    assert outcome.response == tpm.build_event_response(model.run(_extend_only()), digests(GOOD, *ALL))


def _extend_only():
    response = yield extend(23, ())
    from swtpm_prop.translate.layer import Outcome

    return Outcome(response).response


def test_events_by_session_and_sequences_break(model: ModelTpm) -> None:
    event = struct.pack(">H", 4) + GOOD
    assert run(model, command(tpm.CC_PCR_EVENT, (4,), HMAC_SESSION, event)) == [BROKEN]
    both = PASSWORD + PASSWORD
    assert run(model, command(tpm.CC_EVENT_SEQUENCE_COMPLETE, (7, 0x80000000), both, event)) == [BROKEN]
    assert state_of(model, 7) == BROKEN


def test_pcrs_that_are_not_translated_pass_untouched(model: ModelTpm) -> None:
    for pcr in (1, 16, 23):
        request = extend(pcr, digests(BAD, *ALL))
        assert run(model, request) == []
        assert model.executed[-1] == request


def test_a_refused_command_changes_and_logs_nothing(model: ModelTpm) -> None:
    refused = refusal(0x98E)
    requests = (
        extend(4, digests(GOOD, *ALL)),
        extend(4, digests(GOOD, *ALL), HMAC_SESSION),
        command(tpm.CC_PCR_EVENT, (4,), PASSWORD, struct.pack(">H", 4) + GOOD),
    )
    model.answer = lambda c: None if tpm.command_code(c) == tpm.CC_PCR_READ else refused
    for request in requests:
        outcome = model.run(handle(request, (BANK,), judge))
        assert (outcome.response, outcome.records) == (refused, ())


def test_before_startup_the_guest_gets_the_tpms_own_answer(model: ModelTpm) -> None:
    model.started = False
    for request in (extend(4, digests(GOOD, *ALL)), command(tpm.CC_PCR_EVENT, (4,), PASSWORD, b"\0\0")):
        assert model.run(handle(request, (BANK,), judge)).response == refusal(0x100)
        assert model.executed[-1] == request
    assert model.run(resumed((BANK,))).records == ()


def test_startup_and_resume_log_the_states(model: ModelTpm) -> None:
    startup = bytes.fromhex("80010000000c000001440000")
    first = model.run(handle(startup, (BANK,), judge)).records[0].content
    assert first == {"event": "startup", "states": {"sha384": dict.fromkeys((0, 4, 7), UNMEASURED)}}
    run(model, extend(4, digests(GOOD, *ALL)))
    run(model, extend(7, digests(BAD, *ALL)))
    second = model.run(resumed((BANK,))).records[0].content
    assert second == {"event": "resume", "states": {"sha384": {0: UNMEASURED, 4: HELD, 7: BROKEN}}}


def test_a_property_bank_that_is_not_active_stops_everything() -> None:
    model = ModelTpm(SHA256)
    for steps in (
        handle(bytes.fromhex("80010000000c000001440000"), (BANK,), judge),
        handle(extend(4, digests(GOOD, *ALL)), (BANK,), judge),
        resumed((BANK,)),
    ):
        with pytest.raises(LayerError, match=r"layer\.bank-inactive"):
            model.run(steps)


def test_a_refused_own_extend_stops_everything(model: ModelTpm) -> None:
    request = extend(4, digests(GOOD, *ALL), HMAC_SESSION)
    model.answer = lambda c: None if c == request else refusal(0x101)
    with pytest.raises(LayerError, match=r"layer\.extend-refused"):
        model.run(handle(request, (BANK,), judge))


def test_an_own_extend_is_tried_again_when_the_tpm_asks(model: ModelTpm) -> None:
    request = extend(4, digests(GOOD, *ALL), HMAC_SESSION)
    answers = iter([None, refusal(tpm.RC_RETRY), None])
    model.answer = lambda c: next(answers)
    assert run(model, request) == [BROKEN]
    assert state_of(model, 4) == BROKEN


def test_a_pcr_that_did_not_start_at_zero_is_broken(model: ModelTpm) -> None:
    model.pcrs[SHA384, 0] = bytes(47) + b"\x03"
    assert run(model, extend(0, digests(GOOD, *ALL))) == [BROKEN]
    assert state_of(model, 0) == BROKEN


def test_banks_are_judged_each_for_itself() -> None:
    model = ModelTpm(SHA256, SHA384, SHA512)
    other = Bank(SHA512, frozenset({4}), True, ("https://example.org/q",))

    def only_first(bank: Bank, measured: Mapping[str, bytes]) -> Verdict:
        return judge(bank, measured) if bank == BANK else Verdict(False, (), "property")

    model.run(handle(extend(4, digests(GOOD, *ALL)), (BANK, other), only_first))
    assert (state_of(model, 4), state_of(model, 4, other)) == (HELD, BROKEN)
    assert raw(model, 4) != bytes(32)


def test_only_hidden_banks_need_get_capability() -> None:
    assert tpm.CC_GET_CAPABILITY not in codes((BANK,))
    assert tpm.CC_GET_CAPABILITY in codes((BANK, HIDDEN))


def test_values_follow_from_the_properties_alone() -> None:
    uris = ("https://example.org/b", "https://example.org/a")
    bank = BANK._replace(properties=uris)
    text = b"https://example.org/a\nhttps://example.org/b"
    assert canonical(uris) == canonical((*reversed(uris), uris[0])) == text
    assert held_digest(bank) == hashlib.sha384(b"swtpm-prop/v1/held\0" + text).digest()
    assert broken_digest(bank) == hashlib.sha384(b"swtpm-prop/v1/broken\0" + text).digest()
    assert held_value(bank) == hashlib.sha384(bytes(48) + held_digest(bank)).digest()


routes = st.sampled_from(["password", "session", "mixed", "event", "sequence", "forge"])
lists = st.lists(st.sampled_from(ALL), unique=True).map(tuple)


@given(st.lists(st.tuples(routes, st.sampled_from([GOOD, BAD]), lists), max_size=8), st.booleans())
def test_held_means_every_measurement_was_certified(
    steps: list[tuple[str, bytes, tuple[object, ...]]], visible: bool
) -> None:
    bank = BANK._replace(visible=visible)
    model = ModelTpm(SHA256, SHA384)
    expected = UNMEASURED
    for route, data, algorithms in steps:
        values = digests(data, *algorithms)
        request, certified = _request(route, data, values, bank)
        run(model, request, bank)
        if certified is not None:
            expected = BROKEN if not certified or expected == BROKEN else HELD
        assert state_of(model, 4, bank) == expected


def _request(route: str, data: bytes, values: tuple[Digest, ...], bank: Bank) -> tuple[bytes, bool | None]:
    """A command by one route, and whether it must keep the PCR held (None: it measures nothing)."""
    strong = {d.algorithm for d in values} - {SHA1}
    good = data == GOOD and bool(strong)
    event = struct.pack(">H", len(data)) + data
    if route == "password":
        return extend(4, values), good if values else None
    if route in ("session", "mixed"):
        area = HMAC_SESSION if route == "session" else PASSWORD + HMAC_SESSION
        follows = not bank.visible and SHA384 not in strong
        return extend(4, values, area), (good and follows) if values else None
    if route == "event":
        return command(tpm.CC_PCR_EVENT, (4,), PASSWORD, event), data == GOOD
    if route == "sequence":
        return command(tpm.CC_EVENT_SEQUENCE_COMPLETE, (4, 0x80000000), PASSWORD * 2, event), False
    return extend(4, (Digest(SHA384, held_digest(bank)),)), False


def test_the_boot_aggregate_is_recognised_by_recomputing_it() -> None:
    bank = BANK._replace(pcrs=frozenset({4, 10}))
    expected = _aggregate_after_a_boot(bank, ModelTpm(SHA256, SHA384))
    for name, algorithms, first, wanted in (
        ("the first measurement", (SHA1, SHA256), b"", HELD),
        ("not the first", (SHA1, SHA256), GOOD, BROKEN),
        ("padded beside it", (SHA256, SHA384), b"", HELD),
        ("padded alone", (SHA384,), b"", BROKEN),
        ("only SHA-1", (SHA1,), b"", BROKEN),
    ):
        model = ModelTpm(SHA256, SHA384)
        assert _aggregate_after_a_boot(bank, model) == expected
        if first:
            run(model, extend(10, digests(first, *ALL)), bank)
        values = tuple(Digest(a, expected if a == SHA256 else bytes(a.size)) for a in algorithms)
        run(model, extend(10, values), bank)
        assert state_of(model, 10, bank) == wanted, name


def test_a_violation_breaks_imas_pcr(model: ModelTpm) -> None:
    """IMA extends all ones where a file was written while it was read (security/integrity/ima, 6.1)."""
    bank = BANK._replace(pcrs=frozenset({10}))
    violation = tuple(Digest(a, b"\xff" * a.size) for a in (SHA1, SHA256, SHA384))
    run(model, extend(10, (Digest(SHA256, _aggregate_after_a_boot(bank, model)),)), bank)
    assert state_of(model, 10, bank) == HELD
    assert run(model, extend(10, violation), bank) == [BROKEN]


def test_a_boot_aggregate_of_another_boot_or_another_pcr_breaks(model: ModelTpm) -> None:
    bank = BANK._replace(pcrs=frozenset({4, 10}))
    expected = Digest(SHA256, _aggregate_after_a_boot(bank, model))
    assert run(model, extend(4, (expected,)), bank) == [BROKEN]
    assert run(model, extend(10, (expected,)), bank) == [BROKEN]


def test_without_a_usable_index_no_boot_aggregate_counts(model: ModelTpm) -> None:
    bank = BANK._replace(pcrs=frozenset({10}))
    expected = Digest(SHA256, _aggregate_after_a_boot(bank, model))

    def stale(bank: Bank, measured: Mapping[str, bytes]) -> Verdict:
        return Verdict(False, (), "stale-index")

    model.run(handle(extend(10, (expected,)), (bank,), stale))
    assert state_of(model, 10, bank) == BROKEN


def test_a_hidden_bank_recognises_it_under_a_session_too(model: ModelTpm) -> None:
    bank = HIDDEN._replace(pcrs=frozenset({4, 10}))
    expected = Digest(SHA256, _aggregate_after_a_boot(bank, model))
    assert run(model, extend(10, (expected,), HMAC_SESSION), bank) == [HELD]


def _aggregate_after_a_boot(bank: Bank, model: ModelTpm) -> bytes:
    """The SHA-256 that IMA extends into PCR 10 after something was measured into PCR 4."""
    run(model, extend(4, digests(GOOD, *ALL)), bank)
    pcrs = {pcr: raw(model, pcr) for pcr in range(10)}
    return hashlib.sha256(boot_aggregate_measurement("ima-sig", pcrs)).digest()


def test_the_last_commands_break_every_translated_pcr(model: ModelTpm) -> None:
    run(model, extend(4, digests(GOOD, *ALL)))
    before = raw(model, 4)
    for last in breaks((BANK,)):
        model.execute(last)
    assert [state_of(model, pcr) for pcr in sorted(BANK.pcrs)] == [BROKEN] * len(BANK.pcrs)
    assert raw(model, 4) == before
