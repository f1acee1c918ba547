"""PCR selections: TPM2_PCR_Read and the PCR part of TPM2_GetCapability.

TPML_PCR_SELECTION is a count (4 bytes) and for each bank the algorithm (2), the number of select bytes (1) and a bit
map, PCR 0 in the lowest bit of the first byte (TPM 2.0 Library, part 2 sections 10.5.2 and 10.9.7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache

from swtpm_prop.errors import WireError
from swtpm_prop.tpm.algorithms import HashAlgorithm
from swtpm_prop.tpm.commands import CC_PCR_READ, NO_SESSIONS, RC_SUCCESS, Reader, response_code

CAP_PCRS = 0x00000005
_READ_ECHO = 14
"""Where a PCR_Read answer repeats the selection: behind header and pcrUpdateCounter."""

SELECT_BYTES = 3
"""PC Client: 24 PCRs."""

_NO_SESSIONS = NO_SESSIONS.to_bytes(2, "big")

Selection = tuple[tuple[HashAlgorithm, tuple[int, ...]], ...]
"""Banks in the order asked for, each with its PCRs in rising order."""

READ_PCRS = 8
"""Most PCRs in one TPM2_PCR_Read (libtpms: TPML_DIGEST of eight)."""


@cache
def build_selection(selection: Selection) -> bytes:
    """TPML_PCR_SELECTION with three select bytes for each bank."""
    parts = [struct.pack(">I", len(selection))]
    for algorithm, pcrs in selection:
        bits = sum(1 << pcr for pcr in pcrs)
        parts.append(struct.pack(">HB", algorithm.id, SELECT_BYTES) + bits.to_bytes(SELECT_BYTES, "little"))
    return b"".join(parts)


@cache
def build_pcr_read(selection: Selection) -> bytes:
    """TPM2_PCR_Read (part 3 section 22.4) of at most eight PCRs."""
    body = build_selection(selection)
    return struct.pack(">HII", NO_SESSIONS, 10 + len(body), CC_PCR_READ) + body


def parse_pcr_read(response: bytes, selection: Selection) -> list[bytes] | None:
    """The values of the selected PCRs in order, from a successful answer of TPM2_PCR_Read.

    The answer repeats the selection as far as it is active: None if a selected bank is not.

    Raises:
        WireError: the answer is malformed; the TPM is libtpms, so that is a fault, not an attack.
    """
    echo, fields, count = _answer(selection)
    if not response.startswith(echo, _READ_ECHO):
        return None
    if len(response) != fields.size:
        raise WireError("wire.pcr-read", f"PCR_Read answered {len(response)} bytes instead of {fields.size}")
    counted, *values = fields.unpack(response)
    if counted != count:
        raise WireError("wire.pcr-read", "a PCR_Read answer without a value for each PCR")
    return values


@cache
def _answer(selection: Selection) -> tuple[bytes, struct.Struct, int]:
    """The selection in an answer; number of values and the values, each a TPM2B; how many they must be."""
    echo = build_selection(selection)
    sizes = [algorithm.size for algorithm, pcrs in selection for _ in pcrs]
    fields = struct.Struct(f">{_READ_ECHO + len(echo)}xI" + "".join(f"2x{size}s" for size in sizes))
    return echo, fields, len(sizes)


def hide_banks(response: bytes, hidden: Iterable[HashAlgorithm]) -> bytes:
    """TPM2_GetCapability(TPM_CAP_PCRS)'s answer with no PCR allocated in the hidden banks, else unchanged.

    libtpms lists a bank that is not active with an all-zero bit map, so a hidden bank looks exactly like that. The
    answer keeps its length. An answer with sessions stays as it is: its authorisation covers it.
    """
    ids = {algorithm.id for algorithm in hidden}
    reader = Reader(response, 10)
    if response_code(response) != RC_SUCCESS or response[:2] != _NO_SESSIONS or _capability(reader) != CAP_PCRS:
        return response
    answer = bytearray(response)
    for _ in range(reader.uint(4)):
        algorithm, size = reader.uint(2), reader.uint(1)
        if algorithm in ids:
            answer[reader.offset : reader.offset + size] = bytes(size)
        reader.take(size)
    return bytes(answer)


def _capability(reader: Reader) -> int:
    reader.uint(1)  # moreData
    return reader.uint(4)
