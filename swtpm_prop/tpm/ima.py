"""What Linux IMA measures into PCR 10: template data made from a path and a file hash, and the boot aggregate.

From Linux, security/integrity/ima (6.1): ima_template_lib.c, ima_crypto.c. A measurement is the hash of its template
data, which are its fields in order, each with its length before it (4 bytes, little-endian on a little-endian machine).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

PCR = 10
"""CONFIG_IMA_MEASURE_PCR_IDX; a policy rule may name another."""

FIELDS = {
    "ima-ng": ("d-ng", "n-ng"),
    "ima-sig": ("d-ng", "n-ng", "sig"),
    "ima-buf": ("d-ng", "n-ng", "buf"),
}
"""The templates read here, with their fields: hash, path, signature (empty without one), a measured buffer."""

FILE_TEMPLATES = ("ima-ng", "ima-sig")
"""Those that measure files; ``ima-sig`` is what Debian's kernels use, ``ima-ng`` the kernel's own default."""

BOOT_AGGREGATE = b"boot_aggregate"
"""The name of the first measurement of every boot, in the place of a path."""

AGGREGATED = range(10)
"""The PCRs in a boot aggregate since Linux 5.8, for any hash but SHA-1: firmware's 0 to 7, boot loader's 8 and 9."""

_LENGTH = struct.Struct("<I")


def file_measurement(template: str, path: bytes, sha256: bytes) -> bytes:
    """The template data for an unsigned file, as a kernel with ``ima_hash=sha256`` makes them.

    Args:
        template: one of FILE_TEMPLATES.
        path: absolute, as the kernel finds it: symbolic links on the way to the file are resolved.
        sha256: of the file's content, 32 bytes.
    """
    # The kernel writes spaces as underscores, so that its text form has no space within a field.
    fields = [b"sha256:\0" + sha256, path.replace(b" ", b"_") + b"\0"]
    if template == "ima-sig":
        fields.append(b"")
    return b"".join(_LENGTH.pack(len(field)) + field for field in fields)


def boot_aggregate(pcrs: Mapping[int, bytes]) -> bytes:
    """The SHA-256 over PCR 0 to 9 of the sha256 bank, 32 bytes: the "file hash" of the boot aggregate.

    The kernel reads them once, when IMA starts (late_initcall, before any user space), so extends of these PCRs by
    user space do not count. It takes the bank of ``ima_hash``, here SHA-256; without that bank the sha256 one, and
    only without this the sha1 one (then PCR 0 to 7), which is not computed here.

    Args:
        pcrs: the raw values, 32 bytes each.
    """
    return hashlib.sha256(b"".join(pcrs[pcr] for pcr in AGGREGATED)).digest()


def boot_aggregate_measurement(template: str, pcrs: Mapping[int, bytes]) -> bytes:
    """The template data of the boot aggregate; their SHA-256 is what the sha256 bank of PCR 10 is extended with."""
    return file_measurement(template, BOOT_AGGREGATE, boot_aggregate(pcrs))
