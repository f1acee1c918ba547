"""Which of two Debian versions is the later one: what "all below" means when a component is revoked."""

from __future__ import annotations

import re

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import VERSION_CHARS

# Debian Policy 5.6.12: the upstream part may have hyphens, so the last one begins the revision. Colons are not taken.
_FORM = re.compile(r"(?:([0-9]{1,9}):)?([0-9A-Za-z][0-9A-Za-z.+~\-]*?)(?:-([0-9A-Za-z.+~]+))?(?<!-)")
_PARTS = re.compile(r"([^0-9]*)([0-9]*)")
_END = 0
"""Where a text ends it is earlier than any character, but for the tilde."""

Key = tuple[object, ...]


def sort_key(version: str) -> Key:
    """Keys that compare as ``dpkg --compare-versions`` compares the versions (Debian Policy, section 5.6.12).

    Raises:
        TrustError: ``trust.version``: it is no Debian version.
    """
    parts = _FORM.fullmatch(version) if len(version) <= VERSION_CHARS else None
    if parts is None:
        raise TrustError("trust.version", f"'{version[:80]}' is no Debian version", "write it like 1:6.1.153-1")
    epoch, upstream, revision = parts.groups()
    return int(epoch or 0), _key(upstream), _key(revision or "0")


def _key(part: str) -> Key:
    """Alternating: the ranks of characters that are no digits, closed by the rank of the end, and a number."""
    return tuple((*map(_rank, text), _END) if kind else int(text or 0) for kind, text in _pieces(part))


def _pieces(part: str) -> list[tuple[bool, str]]:
    pairs = [(found[1], found[2]) for found in _PARTS.finditer(part)]
    return [piece for text, digits in pairs for piece in ((True, text), (False, digits))]


def _rank(character: str) -> int:
    """A tilde sorts before the end, a letter before everything else."""
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256
