"""Every command that libtpms has: none but the known few reaches a PCR that can be translated, whatever it is given.

The layer takes only those few to itself. A libtpms with one more way into a PCR must not go unnoticed.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swtpm_prop.tpm import commands as wire
from swtpm_prop.tpm.algorithms import ALGORITHMS, SHA256, SHA384, Digest
from swtpm_prop.tpm.pcr import build_pcr_read, parse_pcr_read
from swtpm_prop.translate.policy import Bank, held_value
from tests.certified import GOOD, subject
from tests.model import PASSWORD, command
from tests.swtpm import STARTUP_CLEAR, LayerHost, Tpm, bank

pytestmark = pytest.mark.root

PCR_ALLOCATE, PCR_RESET = 0x12B, 0x13D
WAYS = {
    wire.CC_PCR_EXTEND, wire.CC_PCR_EVENT, wire.CC_EVENT_SEQUENCE_COMPLETE, wire.CC_STARTUP, PCR_ALLOCATE, PCR_RESET,
}  # fmt: skip
"""What can change a PCR; test_differential.py says what each does to a translated one."""

SUCCEED = {0x121, 0x124, 0x125, 0x126, 0x12C, 0x12E, 0x139, 0x143, 0x145, 0x146, 0x17A, 0x17B, 0x181, 0x183}
"""Among others HierarchyControl, ChangeEPS, ChangePPS, Clear, PCR_SetAuthPolicy, Shutdown, PCR_SetAuthValue: the shots
below get through, so that PCRs left alone say something."""

UNLISTED = (*range(0x11F, 0x1C0), *range(0x20000000, 0x20000008))
"""Codes of the specification (part 2, section 6.5.2) and of vendors, whether the TPM admits to them or not."""

OWNER, NULL, LOCKOUT, ENDORSEMENT, PLATFORM = 0x40000001, 0x40000007, 0x4000000A, 0x4000000B, 0x4000000C
HANDLES = ((4,), (20,), (OWNER,), (NULL,), (LOCKOUT,), (ENDORSEMENT,), (PLATFORM,), (4, 4), (PLATFORM, 4))
PARAMETERS = (
    b"", b"\0", b"\1", bytes(2), bytes(4), bytes(8), bytes(64), struct.pack(">IB", OWNER, 0),
    struct.pack(">HHI", 0, 0x10, 20), struct.pack(">HH", 0, 0x10), struct.pack(">I", 4),
    struct.pack(">III", 6, 0x100, 1), wire.build_digests((Digest(SHA384, bytes(48)),)),
)  # fmt: skip


def shots(code: int) -> Iterator[bytes]:
    """Commands of this code with and without handles and passwords, with parameters that fit one or another."""
    for parameters in PARAMETERS:
        yield struct.pack(">HII", wire.NO_SESSIONS, 10 + len(parameters), code) + parameters
        for handles in HANDLES:
            bare = b"".join(handle.to_bytes(4, "big") for handle in handles) + parameters
            yield struct.pack(">HII", wire.NO_SESSIONS, 10 + len(bare), code) + bare
            yield command(code, handles, PASSWORD, parameters)
    yield from (command(code, handles, PASSWORD * 2, parameters) for handles, parameters in PAIRS)


PAIRS = tuple(itertools.product(((4, 4), (PLATFORM, 4)), PARAMETERS))


def listed(tpm: Tpm) -> set[int]:
    """The codes that the TPM says it has (TPM_CAP_COMMANDS; TPMA_CC, part 2 section 8.9)."""
    answer = tpm.send(bytes.fromhex("8001000000160000017a00000002000000000000ffff"))
    attributes = struct.unpack_from(f">{int.from_bytes(answer[15:19], 'big')}I", answer, 19)
    return {each & 0x2000FFFF for each in attributes}


def pcrs(tpm: Tpm) -> list[bytes]:
    """PCRs 0 to 15 of every bank."""
    values = []
    for algorithm, first in itertools.product(ALGORITHMS, (0, 8)):
        selection = ((algorithm, tuple(range(first, first + 8))),)
        part = parse_pcr_read(tpm.send(build_pcr_read(selection)), selection)
        assert part is not None
        values += part
    return values


@pytest.mark.parametrize("locality", [0, 4])
def test_no_other_command_reaches_a_pcr(host: LayerHost, new_base: Callable[[str], Path], locality: int) -> None:
    host.opt_in()
    held = held_value(Bank(SHA384, frozenset(), True, tuple(bank()["properties"])))
    certified = wire.build_pcr_extend(4, (Digest(SHA256, subject(GOOD).digests["sha256"]),))
    succeeded = set()
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        for code in sorted({*listed(tpm), *UNLISTED} - WAYS):
            tpm.reset()
            tpm.locality(0)
            tpm.send(STARTUP_CLEAR)
            tpm.send(certified)
            before = pcrs(tpm)
            assert held in before
            tpm.locality(locality)
            succeeded |= {code for shot in shots(code) if wire.succeeded(tpm.send(shot))}
            assert pcrs(tpm) == before, f"command {code:#x} changes a PCR"
    assert succeeded >= SUCCEED


def test_a_command_behind_a_locality_header_is_judged_like_any_other(
    host: LayerHost, new_base: Callable[[str], Path]
) -> None:
    """swtpm takes the framing of Microsoft's simulator on its data channel too: 8, locality, size, command."""
    host.opt_in()
    unknown = wire.build_pcr_extend(4, (Digest(SHA256, bytes(32)),))
    with host.tpm(new_base("tpm")) as tpm:
        tpm.up()
        assert tpm.data is not None
        tpm.data.sendall(struct.pack(">IBI", 8, 4, len(unknown)) + unknown)
        framed = tpm.data.recv(4096)
        assert wire.succeeded(framed[4:-4])
    assert [record["content"].get("state") for record in host.records()[-1:]] == ["broken"]
