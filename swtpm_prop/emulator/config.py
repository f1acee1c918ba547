"""What the hook leaves for one start of a guest's TPM: strict reading of layer.json inside swtpm."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from swtpm_prop.errors import LayerError
from swtpm_prop.limits import BANK_PROPERTIES, LAYER_BYTES, PROPERTY_BANKS, URI_CHARS
from swtpm_prop.tpm.algorithms import BY_NAME, STRONG
from swtpm_prop.translate.policy import Bank

VERSION = 1
TRANSLATED_PCRS = 16
"""PCRs 0 to 15 start at zero and cannot be reset alone; the others can."""

_MEND = "shut the guest down and start it again; the hook writes this file"


class Config(NamedTuple):
    """One guest: its UUID, the absolute paths of index and property log, its property banks."""

    uuid: str
    index_path: str
    log_path: str
    banks: tuple[Bank, ...]


def load(path: str) -> Config:
    """Read and check layer.json.

    Raises:
        LayerError: ``layer.config-missing``, ``layer.config-unreadable``, ``layer.config-invalid``.
    """
    text = _read(path)
    try:
        return _config(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LayerError("layer.config-invalid", f"'{path}' is not valid: {error}", _MEND) from None


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            text = os.read(descriptor, LAYER_BYTES + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise LayerError("layer.config-missing", f"there is no '{path}'", _MEND) from None
    except OSError as error:
        raise LayerError("layer.config-unreadable", f"'{path}' cannot be read: {error.strerror}", _MEND) from None
    if len(text) > LAYER_BYTES:
        raise LayerError("layer.config-invalid", f"'{path}' has more than {LAYER_BYTES} bytes", _MEND)
    return text


def _config(raw: Any) -> Config:
    fields = _object(raw, "version", "uuid", "index", "log", "banks")
    _need(_integer(fields["version"]) == VERSION, f"its version is not {VERSION}")
    _need(isinstance(fields["banks"], list) and 1 <= len(fields["banks"]) <= PROPERTY_BANKS, "banks: their number")
    banks = tuple(_bank(each) for each in fields["banks"])
    _need(len({bank.algorithm for bank in banks}) == len(banks), "banks: an algorithm twice")
    return Config(_string(fields["uuid"]), _path(fields["index"]), _path(fields["log"]), banks)


def _bank(raw: Any) -> Bank:
    fields = _object(raw, "algorithm", "pcrs", "visible", "properties")
    algorithm = BY_NAME.get(_string(fields["algorithm"]))
    if algorithm is None or algorithm not in STRONG:
        raise ValueError("algorithm: none that can be a property bank")
    pcrs, properties = fields["pcrs"], fields["properties"]
    _need(isinstance(pcrs, list) and 1 <= len(pcrs) <= TRANSLATED_PCRS, "pcrs: their number")
    _need(all(0 <= _integer(pcr) < TRANSLATED_PCRS for pcr in pcrs), "pcrs: one that cannot be translated")
    _need(isinstance(fields["visible"], bool), "visible: neither true nor false")
    _need(isinstance(properties, list) and 1 <= len(properties) <= BANK_PROPERTIES, "properties: their number")
    _need(all(0 < len(_string(uri)) <= URI_CHARS for uri in properties), "properties: the length of one")
    _need(not any(c < " " for uri in properties for c in uri), "properties: a control character")
    return Bank(algorithm, frozenset(pcrs), fields["visible"], tuple(properties))


def _object(raw: Any, *names: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or set(raw) != set(names):
        raise ValueError(f"an object with exactly {', '.join(names)} is expected")
    return raw


def _string(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"a string is expected, not {type(raw).__name__}")
    return raw


def _integer(raw: Any) -> int:
    if type(raw) is not int:
        raise ValueError(f"an integer is expected, not {type(raw).__name__}")
    return raw


def _path(raw: Any) -> str:
    path = _string(raw)
    _need(path.startswith("/") and "\0" not in path, "a path is not absolute")
    return path


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
