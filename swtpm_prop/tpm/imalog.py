"""Linux IMA measurement lists: parse, replay into PCR values, and say what an entry is.

The binary form of ``/sys/kernel/security/ima/binary_runtime_measurements`` (Linux, ima_fs.c): PCR, SHA-1 of the
template data, template name, template data; integers are 4 bytes, little-endian. The parser is strict: every length and
the SHA-1 are checked, nothing may be left over, and any input either parses or raises WireError with an id
``imalog.*``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

from swtpm_prop import limits
from swtpm_prop.errors import WireError, printable
from swtpm_prop.tpm.algorithms import BY_NAME, SHA1, HashAlgorithm
from swtpm_prop.tpm.ima import FIELDS

_WORD = struct.Struct("<I")
_HASH_NAME = re.compile(rb"[a-z0-9-]{2,20}")
_NO_DIGEST = bytes(SHA1.size)


class Entry(NamedTuple):
    """One measurement.

    Attributes:
        number: its place in the list, from 0.
        pcr: the PCR it went into, 10 unless the policy says otherwise.
        template: one of `ima.FIELDS`.
        data: the template data; their hash is what was measured.
        algorithm, digest: hash algorithm and hash of the file or buffer, as the kernel wrote them.
        path: of the file, or the name of the buffer, without the NUL; spaces are underscores.
        violation: the file was written while it was measured: the PCR got all ones, whatever the data say.
    """

    number: int
    pcr: int
    template: str
    data: bytes
    algorithm: str
    digest: bytes
    path: bytes
    violation: bool


def parse(data: bytes) -> tuple[Entry, ...]:
    """Read a whole measurement list.

    Raises:
        WireError: ``imalog.too-big``, ``imalog.truncated``, ``imalog.pcr``, ``imalog.template`` (one that is not read
            here; the old ``ima`` rests on SHA-1 alone), ``imalog.field``, ``imalog.digest`` (the list is not what the
            kernel wrote).
    """
    if len(data) > limits.IMA_LOG_BYTES:
        raise WireError("imalog.too-big", f"IMA list of {len(data)} bytes, the limit is {limits.IMA_LOG_BYTES}")
    entries: list[Entry] = []
    at = 0
    while at < len(data):
        if len(entries) >= limits.IMA_ENTRIES:
            raise WireError("imalog.too-big", f"IMA list of more than {limits.IMA_ENTRIES} entries")
        entry, at = _entry(data, at, len(entries))
        entries.append(entry)
    return tuple(entries)


def measured(entry: Entry, algorithm: HashAlgorithm) -> bytes:
    """What the bank of ``algorithm`` was extended with, if the kernel had this hash when it did (Linux 5.8 and later).

    A kernel that does not have it pads the SHA-1 with zeros instead (ima_init_digests, ima_calc_field_array_hash).
    """
    if entry.violation:
        return b"\xff" * algorithm.size
    return hashlib.new(algorithm.name, entry.data).digest()


def replay(entries: Sequence[Entry], algorithm: HashAlgorithm) -> dict[int, bytes]:
    """The value of every PCR the list touches in the bank of ``algorithm``, from zeros on; see `measured`."""
    values: dict[int, bytes] = {}
    for entry in entries:
        start = values.get(entry.pcr, bytes(algorithm.size))
        values[entry.pcr] = hashlib.new(algorithm.name, start + measured(entry, algorithm)).digest()
    return values


def describe(entry: Entry) -> str:
    """One printable line: the path, and what is special about the entry."""
    words = printable(entry.path.decode("utf-8", "backslashreplace"))
    return f"{words} (violation)" if entry.violation else words


def _entry(data: bytes, at: int, number: int) -> tuple[Entry, int]:
    pcr, at = _word(data, at)
    if pcr >= limits.PCRS:
        raise WireError("imalog.pcr", f"entry {number} measures into PCR {pcr}, the last one is {limits.PCRS - 1}")
    sha1, at = _take(data, at, SHA1.size)
    name, at = _counted(data, at)
    template = name.decode("ascii", "replace")
    if template not in FIELDS:
        raise WireError(
            "imalog.template",
            f"entry {number} has the template '{printable(template[:20])}'",
            "boot the guest with ima_template=ima-ng or ima-sig",
        )
    content, at = _counted(data, at)
    violation = sha1 == _NO_DIGEST
    if not violation and hashlib.sha1(content, usedforsecurity=False).digest() != sha1:
        raise WireError("imalog.digest", f"entry {number} does not have the SHA-1 it says")
    return Entry(number, pcr, template, content, *_fields(content, template, number), violation), at


def _fields(content: bytes, template: str, number: int) -> tuple[str, bytes, bytes]:
    """Algorithm, digest and path of template data."""
    fields: list[bytes] = []
    at = 0
    for _ in FIELDS[template]:
        field, at = _counted(content, at)
        fields.append(field)
    algorithm, separator, digest = fields[0].partition(b":\0")
    path, end = fields[1][:-1], fields[1][-1:]
    if at != len(content) or not separator or not _HASH_NAME.fullmatch(algorithm) or end != b"\0" or b"\0" in path:
        raise WireError("imalog.field", f"entry {number} is no {template} entry")
    name = algorithm.decode()
    if name in BY_NAME and len(digest) != BY_NAME[name].size:
        raise WireError("imalog.field", f"entry {number} has a {name} of {len(digest)} bytes")
    return name, digest, path


def _counted(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _word(data, at)
    return _take(data, at, size)


def _word(data: bytes, at: int) -> tuple[int, int]:
    piece, at = _take(data, at, _WORD.size)
    return int.from_bytes(piece, "little"), at


def _take(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    end = at + size
    if end > len(data):
        raise WireError("imalog.truncated", f"IMA list ends at {len(data)}, an entry needs {end} bytes")
    return data[at:end], end
