"""TPM 2.0 commands and responses as the layer needs them: bytes in, values out, and back.

All integers are big endian (TPM 2.0 Library, part 1 section 4.1). Parsers are strict: every byte must be accounted
for, otherwise ``WireError``. Codes and structures: TPM 2.0 Library, part 2 section 6.5.2 and part 3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from swtpm_prop.errors import WireError
from swtpm_prop.limits import COMMAND_BYTES, EVENT_BYTES, EXTEND_DIGESTS
from swtpm_prop.tpm.algorithms import ALGORITHMS, BY_WIRE, Digest, Digests, HashAlgorithm

NO_SESSIONS = 0x8001
SESSIONS = 0x8002

CC_PCR_EVENT = 0x0000013C
CC_STARTUP = 0x00000144
CC_GET_CAPABILITY = 0x0000017A
CC_PCR_READ = 0x0000017E
CC_PCR_EXTEND = 0x00000182
CC_EVENT_SEQUENCE_COMPLETE = 0x00000185

RC_SUCCESS = 0x000
RC_RETRY = 0x922
RS_PW = 0x40000009

_SUCCESS = RC_SUCCESS.to_bytes(4, "big")
_HEADER = struct.Struct(">HII")
_FRONTS = {1: struct.Struct(">HIIII"), 2: struct.Struct(">HIIIII")}
"""Header, handles and authorizationSize by the number of handles."""

_EMPTY_PASSWORD = struct.pack(">IHBH", RS_PW, 0, 0, 0)
"""The authorisation area of 9 bytes that firmware and kernels send."""


class Authorisation(NamedTuple):
    """One TPMS_AUTH_COMMAND (part 2 section 10.13.2)."""

    handle: int
    nonce: bytes
    attributes: int
    hmac: bytes


_PASSWORD_ALONE = (Authorisation(RS_PW, b"", 0, b""),)


class Command(NamedTuple):
    """A command taken apart; ``front`` is everything before the parameters, so that they alone can be replaced."""

    code: int
    handles: tuple[int, ...]
    authorisations: tuple[Authorisation, ...]
    front: bytes
    parameters: bytes

    @property
    def plain_password(self) -> bool:
        """True if TPM_RS_PW stands alone in the authorisation area: only then may parameters be replaced."""
        return len(self.authorisations) == 1 and self.authorisations[0].handle == RS_PW

    def with_parameters(self, parameters: bytes) -> bytes:
        """The same command bytes with other parameters and the size that follows from them."""
        size = len(self.front) + len(parameters)
        return self.front[:2] + size.to_bytes(4, "big") + self.front[6:] + parameters


class Reader:
    """Takes fields off the front of bytes; every shortage is one ``WireError``."""

    __slots__ = ("data", "offset")

    def __init__(self, data: bytes, offset: int = 0) -> None:
        self.data = data
        self.offset = offset

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        end = self.offset + size
        if end > len(self.data):
            raise WireError("wire.truncated", f"{size} bytes needed at offset {self.offset} of {len(self.data)}")
        field = self.data[self.offset : end]
        self.offset = end
        return field

    def uint(self, size: int) -> int:
        """The next ``size`` bytes as an unsigned integer."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then that many bytes."""
        return self.take(self.uint(2))

    def end(self) -> None:
        """Refuse what is left over."""
        if self.offset != len(self.data):
            raise WireError("wire.trailing", f"{len(self.data) - self.offset} bytes left over")


def command_code(command: bytes) -> int:
    """TPM_CC of a command, from bytes 6 to 9 of its header."""
    if len(command) < _HEADER.size:
        raise WireError("wire.truncated", "a command is at least 10 bytes")
    return int.from_bytes(command[6:10], "big")


def response_code(response: bytes) -> int:
    """TPM_RC of a response, from bytes 6 to 9 of its header."""
    if len(response) < _HEADER.size:
        raise WireError("wire.truncated", "a response is at least 10 bytes")
    return int.from_bytes(response[6:10], "big")


def succeeded(response: bytes) -> bool:
    """True for TPM_RC_SUCCESS."""
    return response[6:10] == _SUCCESS


def parse_command(command: bytes, handles: int) -> Command:
    """Take a command with sessions apart.

    Args:
        command: the whole command; its size field must equal its length.
        handles: how many 4-byte handles its code has, 1 or 2 (part 3, command tables).

    Raises:
        WireError: ``wire.*``; the TPM refuses such a command too, with a code of its own.
    """
    front = _FRONTS[handles]
    if len(command) < front.size:
        raise WireError("wire.truncated", f"{len(command)} bytes are no command with {handles} handles and sessions")
    tag, size, code, *numbers, area_size = front.unpack_from(command)
    if tag != SESSIONS or size != len(command) or size > COMMAND_BYTES:
        raise WireError("wire.header", f"tag {tag:#06x}, size field {size}, {len(command)} bytes")
    end = front.size + area_size
    if end > size:
        raise WireError("wire.truncated", f"an authorisation area of {area_size} bytes does not fit")
    authorisations = _parse_area(command[front.size : end])
    return Command(code, tuple(numbers), authorisations, command[:end], command[end:])


def _parse_area(area: bytes) -> tuple[Authorisation, ...]:
    if area == _EMPTY_PASSWORD:
        return _PASSWORD_ALONE
    reader = Reader(area)
    authorisations = []
    while reader.offset < len(area):
        authorisations.append(Authorisation(reader.uint(4), reader.sized(), reader.uint(1), reader.sized()))
    return tuple(authorisations)


class _DigestList(NamedTuple):
    """A digest list of these algorithms.

    Attributes:
        fields: tag and value in turn; the first tag is the count and the first algorithm, the others are algorithms.
        tags: what the tags must be.
    """

    algorithms: tuple[HashAlgorithm, ...]
    fields: struct.Struct
    tags: tuple[bytes, ...]


def _ordered_lists() -> dict[int, _DigestList]:
    """Each choice of algorithms in the order that firmware and kernels use, by its length in bytes, its own alone."""
    lists = {}
    for choice in range(1, 1 << len(ALGORITHMS)):
        chosen = tuple(a for bit, a in enumerate(ALGORITHMS) if choice >> bit & 1)
        first, *others = (algorithm.wire for algorithm in chosen)
        fields = struct.Struct("6s" + "s2s".join(str(algorithm.size) for algorithm in chosen) + "s")
        lists[fields.size] = _DigestList(chosen, fields, (struct.pack(">I", len(chosen)) + first, *others))
    return lists


_ORDERED_LISTS = _ordered_lists()


def parse_digests(parameters: bytes) -> Digests:
    """TPML_DIGEST_VALUES as the only parameter: at most four digests of known algorithms, nothing behind."""
    ordered = _ORDERED_LISTS.get(len(parameters))
    if ordered is not None:
        fields = ordered.fields.unpack(parameters)
        if fields[::2] == ordered.tags:
            return tuple(zip(ordered.algorithms, fields[1::2]))  # noqa: B905 - as many by construction
    return _parse_any_digests(parameters)


def _parse_any_digests(parameters: bytes) -> Digests:
    """Digest by digest, whatever their order and number."""
    count = int.from_bytes(parameters[:4], "big")
    if count > EXTEND_DIGESTS:
        raise WireError("wire.digest-count", f"{count} digests, at most {EXTEND_DIGESTS}")
    digests = []
    offset = 4
    for _ in range(count):
        algorithm = BY_WIRE.get(parameters[offset : offset + 2])
        if algorithm is None:
            raise WireError("wire.algorithm", "unknown hash algorithm in a digest list")
        end = offset + 2 + algorithm.size
        digests.append(Digest(algorithm, parameters[offset + 2 : end]))
        offset = end
    if offset != len(parameters):
        raise WireError("wire.digest-size", f"the digest list takes {offset} bytes of {len(parameters)}")
    return tuple(digests)


def build_digests(digests: Digests) -> bytes:
    """TPML_DIGEST_VALUES (part 2 section 10.9.6)."""
    return len(digests).to_bytes(4, "big") + b"".join([algorithm.wire + value for algorithm, value in digests])


def parse_event(parameters: bytes) -> bytes:
    """The data of TPM2_PCR_Event: a TPM2B of at most 1024 bytes and nothing behind."""
    reader = Reader(parameters)
    data = reader.sized()
    reader.end()
    if len(data) > EVENT_BYTES:
        raise WireError("wire.event-size", f"event of {len(data)} bytes, at most {EVENT_BYTES}")
    return data


def build_pcr_extend(pcr: int, digests: Digests) -> bytes:
    """TPM2_PCR_Extend (part 3 section 22.2) authorised by the empty password."""
    body = struct.pack(">II", pcr, len(_EMPTY_PASSWORD)) + _EMPTY_PASSWORD + build_digests(digests)
    return _HEADER.pack(SESSIONS, _HEADER.size + len(body), CC_PCR_EXTEND) + body


def build_event_response(extended: bytes, digests: Digests) -> bytes:
    """The answer of TPM2_PCR_Event, made from the successful answer of the PCR_Extend that stood in for it.

    A response with sessions is header, parameterSize (4 bytes), parameters, authorisations (part 1 section 18.9):
    PCR_Extend has no parameters, PCR_Event has TPML_DIGEST_VALUES, the rest is the same.
    """
    reader = Reader(extended, _HEADER.size)
    if reader.uint(4) != 0:
        raise WireError("wire.response", "PCR_Extend answered with parameters")
    parameters = build_digests(digests)
    body = struct.pack(">I", len(parameters)) + parameters + extended[reader.offset :]
    return _HEADER.pack(SESSIONS, _HEADER.size + len(body), RC_SUCCESS) + body
