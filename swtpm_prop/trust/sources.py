"""Where a certificate's subjects come from: files, PE images, unified kernel images, event logs of a reference boot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Subject(NamedTuple):
    """One measurable thing: a name for people, and its digests by algorithm name (SHA-256, SHA-384, SHA-512 only)."""

    name: str
    digests: Mapping[str, bytes]
