"""PCR selections: TPM2_PCR_Read and the PCR part of TPM2_GetCapability.

TPML_PCR_SELECTION is a count (4 bytes) and for each bank the algorithm (2), the number of select bytes (1) and a bit
map, PCR 0 in the lowest bit of the first byte (TPM 2.0 Library, part 2 sections 10.5.2 and 10.9.7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from swtpm_prop.errors import WireError
from swtpm_prop.tpm.algorithms import ALGORITHMS, BY_ID, HashAlgorithm
from swtpm_prop.tpm.commands import CC_PCR_READ, NO_SESSIONS, RC_SUCCESS, Reader, response_code

CAP_PCRS = 0x00000005
SELECT_BYTES = 3
"""PC Client: 24 PCRs."""

_NO_SESSIONS = NO_SESSIONS.to_bytes(2, "big")

Selection = Mapping[HashAlgorithm, frozenset[int]]


def build_selection(selection: Selection) -> bytes:
    """TPML_PCR_SELECTION with three select bytes for each bank."""
    parts = [struct.pack(">I", len(selection))]
    for algorithm, pcrs in selection.items():
        bits = sum(1 << pcr for pcr in pcrs)
        parts.append(struct.pack(">HB", algorithm.id, SELECT_BYTES) + bits.to_bytes(SELECT_BYTES, "little"))
    return b"".join(parts)


def build_pcr_read(selection: Selection) -> bytes:
    """TPM2_PCR_Read (part 3 section 22.4); the TPM answers with the first eight of the selected PCRs."""
    body = build_selection(selection)
    return struct.pack(">HII", NO_SESSIONS, 10 + len(body), CC_PCR_READ) + body


def parse_pcr_read(response: bytes) -> dict[tuple[HashAlgorithm, int], bytes]:
    """The values in a successful answer of TPM2_PCR_Read; PCRs of a bank that is not active are missing.

    Raises:
        WireError: the answer is malformed; the TPM is libtpms, so that is a fault, not an attack.
    """
    reader = Reader(response, 10)
    reader.uint(4)  # pcrUpdateCounter
    selected = [(algorithm, pcr) for algorithm, pcrs in _selections(reader) for pcr in sorted(pcrs)]
    values = [reader.sized() for _ in range(reader.uint(4))]
    reader.end()
    if len(values) != len(selected):
        raise WireError("wire.pcr-read", f"{len(values)} values for {len(selected)} PCRs")
    return dict(zip(selected, values, strict=True))


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


def _selections(reader: Reader) -> list[tuple[HashAlgorithm, frozenset[int]]]:
    count = reader.uint(4)
    if count > len(ALGORITHMS):
        raise WireError("wire.selection", f"{count} banks in a PCR selection")
    return [_selection(reader) for _ in range(count)]


def _selection(reader: Reader) -> tuple[HashAlgorithm, frozenset[int]]:
    algorithm = BY_ID.get(reader.uint(2))
    if algorithm is None:
        raise WireError("wire.algorithm", "unknown hash algorithm in a PCR selection")
    bits = int.from_bytes(reader.take(reader.uint(1)), "little")
    return algorithm, frozenset(pcr for pcr in range(bits.bit_length()) if bits >> pcr & 1)
