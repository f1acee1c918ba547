"""A property bank and the values its PCRs take: what to extend, what to seal to, what to expect in a quote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from swtpm_prop.tpm.algorithms import HashAlgorithm
from swtpm_prop.translate.verdict import Verdict

UNMEASURED = "unmeasured"
HELD = "held"
BROKEN = "broken"


class Bank(NamedTuple):
    """One property bank.

    Attributes:
        algorithm: which PCR bank records properties.
        pcrs: the translated PCRs, each 0 to 15.
        visible: False removes the bank from the guest's view of TPM_CAP_PCRS.
        properties: the URIs that a measurement must all have; not empty.
    """

    algorithm: HashAlgorithm
    pcrs: frozenset[int]
    visible: bool
    properties: tuple[str, ...]


Judge = Callable[[Bank, Mapping[str, bytes]], Verdict]
"""Bank and measured digests (algorithm name to bytes) to verdict; the index and the clock stand behind it."""


def canonical(properties: Sequence[str]) -> bytes:
    """The URIs without doubles, sorted by their UTF-8 bytes, joined by one newline."""
    return b"\n".join(sorted({uri.encode() for uri in properties}))


@cache
def held_digest(bank: Bank) -> bytes:
    """What the layer extends for the first certified measurement, ``bank.algorithm.size`` bytes."""
    return _marker(bank, b"held")


@cache
def broken_digest(bank: Bank) -> bytes:
    """What the layer extends for a measurement that is not certified, ``bank.algorithm.size`` bytes."""
    return _marker(bank, b"broken")


def unmeasured_value(bank: Bank) -> bytes:
    """The PCR before anything was measured: all zeros."""
    return bytes(bank.algorithm.size)


@cache
def held_value(bank: Bank) -> bytes:
    """The PCR while every measurement so far is certified; known in advance from the properties alone."""
    return hashlib.new(bank.algorithm.name, unmeasured_value(bank) + held_digest(bank)).digest()


def state(bank: Bank, value: bytes) -> str:
    """``unmeasured``, ``held`` or ``broken``: anything that is neither of the first two is broken."""
    return _states(bank).get(value, BROKEN)


@cache
def _states(bank: Bank) -> dict[bytes, str]:
    return {unmeasured_value(bank): UNMEASURED, held_value(bank): HELD}


def _marker(bank: Bank, word: bytes) -> bytes:
    return hashlib.new(bank.algorithm.name, b"swtpm-prop/v1/" + word + b"\0" + canonical(bank.properties)).digest()
