"""The Authenticode hash of a PE/COFF image: what UEFI firmware measures when it loads one.

Windows Authenticode Portable Executable Signature Format 1.0, "Calculating the PE Image Hash", in the reading of EDK2's
MeasurePeImageAndExtend (SecurityPkg, Tcg2Dxe): everything but the checksum, the certificate table's directory entry
and the certificate table itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from swtpm_prop.errors import WireError
from swtpm_prop.tpm import pe
from swtpm_prop.tpm.algorithms import STRONG, HashAlgorithm


def digest(image: bytes | memoryview, algorithm: HashAlgorithm) -> bytes:
    """The hash by one algorithm, ``algorithm.size`` bytes. Raises WireError ``pe.*`` as pe.parse."""
    state = hashlib.new(algorithm.name)
    for piece in _pieces(memoryview(image)):
        state.update(piece)
    return state.digest()


def digests(image: bytes | memoryview) -> dict[str, bytes]:
    """The hashes by every algorithm a certificate may rest on, by algorithm name. Raises WireError ``pe.*``."""
    return {algorithm.name: digest(image, algorithm) for algorithm in STRONG}


def _pieces(view: memoryview) -> Iterator[memoryview]:
    """The hashed parts in order: headers, sections by file offset, what follows them up to the certificate table.

    The firmware counts the bytes hashed and takes what follows from that offset; so do we, also for images whose
    sections overlap or leave gaps, because the result must be what the firmware extends.
    """
    headers = pe.parse(view)
    after_checksum = headers.checksum + 4
    yield view[: headers.checksum]
    if headers.security is None:
        yield view[after_checksum : headers.size]
    else:
        yield view[after_checksum : headers.security]
        yield view[headers.security + 8 : headers.size]
    hashed = headers.size
    for section in sorted(headers.sections, key=lambda section: section.raw_offset):
        yield view[section.raw_offset : section.raw_offset + section.raw_size]
        hashed += section.raw_size
    end = len(view) - headers.certificates
    if len(view) > hashed > end:
        raise WireError("pe.certificates", "the certificate table overlaps the sections")
    yield view[hashed : max(hashed, end)]
