"""The wire of TPM commands, compared with the independent parser of tpm2-pytss."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss import TPML_DIGEST_VALUES, command_parser

from swtpm_prop.errors import WireError
from swtpm_prop.tpm import commands as tpm
from swtpm_prop.tpm.algorithms import ALGORITHMS, SHA1, SHA256, Digest
from swtpm_prop.tpm.pcr import CAP_PCRS, build_pcr_read, build_selection, hide_banks, parse_pcr_read

digests = st.sampled_from(ALGORITHMS).flatmap(
    lambda a: st.binary(min_size=a.size, max_size=a.size).map(lambda value: Digest(a, value))
)
digest_lists = st.lists(digests, max_size=4).map(tuple)


def oracle(command: bytes) -> command_parser.tpm2_command:
    return command_parser.read_command(io.BytesIO(command))


@given(st.integers(0, 23), digest_lists)
def test_own_extend_reads_back_with_both_parsers(pcr: int, values: tuple[Digest, ...]) -> None:
    command = tpm.build_pcr_extend(pcr, values)
    theirs = oracle(command)
    assert [int(h) for h in theirs.handles] == [pcr]
    assert [int(s.handle) for s in theirs.sessions] == [tpm.RS_PW]
    assert [d.marshal() for d in theirs.parameters[0]] == [a.id.to_bytes(2, "big") + v for a, v in values]
    ours = tpm.parse_command(command, handles=1)
    assert ours.handles == (pcr,)
    assert ours.plain_password
    assert tpm.parse_digests(ours.parameters) == values


@given(st.binary(max_size=1024))
def test_event_data_reads_as_the_oracle_reads_it(data: bytes) -> None:
    body = struct.pack(">I", 7) + struct.pack(">IIHBH", 9, tpm.RS_PW, 0, 0, 0) + struct.pack(">H", len(data)) + data
    command = struct.pack(">HII", tpm.SESSIONS, 10 + len(body), tpm.CC_PCR_EVENT) + body
    assert bytes(oracle(command).parameters[0]) == data
    assert tpm.parse_event(tpm.parse_command(command, handles=1).parameters) == data


def test_authorisation_areas_are_told_apart() -> None:
    password = struct.pack(">IHBH", tpm.RS_PW, 0, 0, 0)
    session = struct.pack(">IHBH", 0x02000000, 0, 0x81, 0)
    for area, plain in ((password, True), (password + session, False), (session, False), (b"", False)):
        body = struct.pack(">I", 4) + struct.pack(">I", len(area)) + area + struct.pack(">I", 0)
        command = struct.pack(">HII", tpm.SESSIONS, 10 + len(body), tpm.CC_PCR_EXTEND) + body
        parsed = tpm.parse_command(command, handles=1)
        assert parsed.plain_password is plain
        theirs = [(int(s.handle), bytes(s.nonce), int(s.attributes)) for s in oracle(command).sessions]
        assert [(a.handle, a.nonce, a.attributes) for a in parsed.authorisations] == theirs


def test_a_password_of_zero_bytes_is_still_a_password() -> None:
    area = struct.pack(">IHBH", tpm.RS_PW, 0, 0, 3) + bytes(3)
    body = struct.pack(">I", 4) + struct.pack(">I", len(area)) + area + struct.pack(">I", 0)
    command = struct.pack(">HII", tpm.SESSIONS, 10 + len(body), tpm.CC_PCR_EXTEND) + body
    parsed = tpm.parse_command(command, handles=1)
    assert parsed.plain_password
    assert parsed.with_parameters(parsed.parameters) == command


@given(st.integers(0, 23), digest_lists, digest_lists)
def test_replacing_parameters_keeps_everything_before_them(
    pcr: int, first: tuple[Digest, ...], second: tuple[Digest, ...]
) -> None:
    parsed = tpm.parse_command(tpm.build_pcr_extend(pcr, first), handles=1)
    assert parsed.with_parameters(tpm.build_digests(second)) == tpm.build_pcr_extend(pcr, second)


@pytest.mark.parametrize("cut", range(1, 60))
def test_every_truncation_is_refused(cut: int) -> None:
    whole = tpm.build_pcr_extend(4, (Digest(SHA256, bytes(32)),))
    short = whole[:-cut]
    with pytest.raises(WireError):
        tpm.parse_digests(tpm.parse_command(short, handles=1).parameters)
    fixed = short[:2] + struct.pack(">I", len(short)) + short[6:]
    with pytest.raises(WireError):
        tpm.parse_digests(tpm.parse_command(fixed, handles=1).parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        struct.pack(">I", 5) + (b"\0\x04" + bytes(20)) * 5,
        struct.pack(">IH", 1, 0x0012) + bytes(32),
        struct.pack(">IH", 1, SHA1.id) + bytes(21),
        struct.pack(">I", 0xFFFFFFFF),
        b"\0\0\0",
    ],
    ids=["five", "unknown-algorithm", "trailing", "huge-count", "short-count"],
)
def test_bad_digest_lists_are_refused(parameters: bytes) -> None:
    with pytest.raises(WireError):
        tpm.parse_digests(parameters)


@given(digest_lists, st.integers(0, 200), st.binary(max_size=2))
def test_the_short_way_through_a_digest_list_is_the_long_way(
    values: tuple[Digest, ...], at: int, change: bytes
) -> None:
    parameters = tpm.build_digests(values)
    assert tpm.parse_digests(parameters) == tpm._parse_any_digests(parameters) == values
    changed = parameters[:at] + change + parameters[at + len(change) :]
    assert _parsed(tpm.parse_digests, changed) == _parsed(tpm._parse_any_digests, changed)


@pytest.mark.parametrize("choice", range(16))
def test_every_choice_of_algorithms_in_order_is_read(choice: int) -> None:
    values = tuple(Digest(a, bytes([a.id]) * a.size) for bit, a in enumerate(ALGORITHMS) if choice >> bit & 1)
    assert tpm.parse_digests(tpm.build_digests(values)) == values


def _parsed(parse: Callable[[bytes], object], parameters: bytes) -> object:
    try:
        return parse(parameters)
    except WireError as error:
        return error.id, error.what


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    for parse in (
        tpm.command_code,
        tpm.response_code,
        tpm.parse_digests,
        tpm.parse_event,
        lambda d: parse_pcr_read(d, ((SHA256, (0,)),)),
        lambda d: parse_pcr_read(bytes(14) + build_selection(((SHA256, (0,)),)) + d, ((SHA256, (0,)),)),
        lambda d: tpm.parse_command(d, handles=1),
        lambda d: tpm.parse_command(b"\x80\x02" + struct.pack(">I", len(d) + 6) + d, handles=1),
    ):
        try:
            parse(data)
        except WireError as error:
            assert error.id.startswith("wire.")


def test_event_response_is_what_the_oracle_expects() -> None:
    extended = bytes.fromhex("80020000001300000000000000000000010000")
    values = tuple(Digest(a, hashlib.new(a.name, b"x").digest()) for a in ALGORITHMS)
    answer = tpm.build_event_response(extended, values)
    size = int.from_bytes(answer[10:14], "big")
    listed, used = TPML_DIGEST_VALUES.unmarshal(answer[14:])
    assert used == size
    assert [d.marshal()[2:] for d in listed] == [d.value for d in values]
    assert answer[14 + size :] == extended[14:]
    assert int.from_bytes(answer[2:6], "big") == len(answer)


def test_pcr_read_asks_as_the_oracle_reads() -> None:
    command = build_pcr_read(((SHA256, (0, 7, 23)), (SHA1, (9,))))
    selections = oracle(command).parameters[0]
    assert [(int(s.hash), bytes(s.pcrSelect[0 : s.sizeofSelect])) for s in selections] == [
        (SHA256.id, b"\x81\x00\x80"),
        (SHA1.id, b"\x00\x02\x00"),
    ]


def _capability_answer(capability: int) -> bytes:
    banks = b"".join(struct.pack(">HB", a.id, 3) + b"\xff\xff\xff" for a in ALGORITHMS)
    body = struct.pack(">BII", 0, capability, len(ALGORITHMS)) + banks
    return struct.pack(">HII", tpm.NO_SESSIONS, 10 + len(body), 0) + body


def test_a_hidden_bank_looks_like_one_that_is_not_active() -> None:
    answer = _capability_answer(CAP_PCRS)
    hidden = hide_banks(answer, [SHA256])
    parsed = command_parser.read_response(io.BytesIO(hidden), command_parser.TPM2_CC.GetCapability)
    banks = {int(s.hash): bytes(s.pcrSelect[0:3]) for s in parsed.parameters[1].data.assignedPCR}
    assert banks == {a.id: bytes(3) if a == SHA256 else b"\xff\xff\xff" for a in ALGORITHMS}


def test_other_capabilities_and_errors_stay_as_they_are() -> None:
    other = _capability_answer(CAP_PCRS + 1)
    refused = bytes.fromhex("80010000000a00000101")
    assert hide_banks(other, [SHA256]) == other
    assert hide_banks(refused, [SHA256]) == refused
