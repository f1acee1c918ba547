"""Whom this host believes: the trust file names issuers, their keys, the properties each may speak for, and floors."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import ISSUER_KEYS, KEY_BYTES, TRUST_BYTES
from swtpm_prop.trust import floors, keys
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.floors import Floors
from swtpm_prop.trust.keys import PublicKey
from swtpm_prop.trust.uri import check_property


class Issuer(NamedTuple):
    """One issuer.

    Attributes:
        id: what its certificates say in ``verifier.id``, a URI in normal form.
        keys: its public keys, all distinct.
        prefixes: the URIs below which it may certify properties.
        threshold: how many of its keys must sign a certificate, 1 to ``len(keys)``.
        approves_hosts: whether it may also say which states of hosts have the properties, by its first P-256 key. That
            is a power of its own: its lists raise the epoch counter in the TPM of every host.
    """

    id: str
    keys: tuple[PublicKey, ...]
    prefixes: tuple[str, ...]
    threshold: int
    approves_hosts: bool = False

    def may_certify(self, uri: str) -> bool:
        """Whether the URI is one of the prefixes or below one, byte for byte, ending at a path segment."""
        return any(uri == prefix or uri.startswith(prefix.removesuffix("/") + "/") for prefix in self.prefixes)


Trust = Mapping[str, Issuer]
"""Issuer id to issuer."""


def load(path: Path) -> Trust:
    """Read a trust file; keys that are no PEM text are files relative to it.

    Raises:
        TrustError: what `read_file` raises, and what ``parse`` raises.
    """
    return parse(read_file(path, TRUST_BYTES), path.parent)


def load_floors(path: Path) -> Floors:
    """The floors of a trust file; raises as `load`."""
    return _floors(_toml(read_file(path, TRUST_BYTES)))


def parse(data: bytes, directory: Path) -> Trust:
    """The issuers in a TOML document.

    Raises:
        TrustError: ``trust.file`` (with what is wrong where), ``trust.key`` (a key that is none or of another kind).
    """
    document = _toml(data)
    _only(document, {"issuer", "floor"}, "the trust file")
    _floors(document)
    trust: dict[str, Issuer] = {}
    for table in _tables(document, "issuer"):
        issuer = _issuer(table, directory)
        if issuer.id in trust:
            raise _refused(f"issuer '{issuer.id}' is there twice")
        trust[issuer.id] = issuer
    return trust


def _tables(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _refused(f"'{name}' is no table", f"write [[{name}]] above each {name}")
    return tables


def _floors(document: dict[str, Any]) -> Floors:
    each = []
    for table in _tables(document, "floor"):
        _only(table, {"component", "below", "properties"}, "a floor")
        properties = _strings(table, "properties", "a floor") if "properties" in table else ()
        try:
            each.append(floors.one(table.get("component"), table.get("below"), properties))
        except TrustError as error:
            raise _refused(error.what, error.mend) from error
    return floors.joined(*each)


def _issuer(table: dict[str, Any], directory: Path) -> Issuer:
    name = table.get("id")
    if not isinstance(name, str):
        raise _refused("an issuer has no id")
    where = f"issuer '{name}'"
    _check_uri(name, where)
    _only(table, {"id", "keys", "prefixes", "threshold", "approves-hosts"}, where)
    public = _keys(_strings(table, "keys", where), directory, where)
    prefixes = _strings(table, "prefixes", where)
    for prefix in prefixes:
        _check_uri(prefix, where)
    threshold = table.get("threshold", 1)
    if type(threshold) is not int or not 1 <= threshold <= len(public):
        raise _refused(f"{where} has a threshold that is no number from 1 to its {len(public)} keys")
    return Issuer(name, public, prefixes, threshold, _approves_hosts(table, public, threshold, where))


def _approves_hosts(table: dict[str, Any], public: tuple[PublicKey, ...], threshold: int, where: str) -> bool:
    approves = table.get("approves-hosts", False)
    if type(approves) is not bool:
        raise _refused(f"{where} has an approves-hosts that is neither true nor false")
    # A TPM takes one signature, by a key that it can load; an issuer of which two must sign is not outwitted by one.
    if approves and (threshold != 1 or not any(isinstance(key, EllipticCurvePublicKey) for key in public)):
        raise _refused(f"{where} approves hosts, and has not threshold 1 and a P-256 key")
    return approves


def _keys(entries: tuple[str, ...], directory: Path, where: str) -> tuple[PublicKey, ...]:
    if len(entries) > ISSUER_KEYS:
        raise _refused(f"{where} has {len(entries)} keys, allowed are {ISSUER_KEYS}")
    public = tuple(_key(entry, directory, where) for entry in entries)
    # A key given twice would count twice towards the threshold.
    if len({keys.keyid(key) for key in public}) != len(public):
        raise _refused(f"{where} has the same key twice")
    return public


def _key(entry: str, directory: Path, where: str) -> PublicKey:
    inline = entry.lstrip().startswith("-----BEGIN ")
    pem = entry.encode() if inline else read_file(directory / entry, KEY_BYTES)
    try:
        return keys.load_public(pem)
    except TrustError as error:
        shown = "a key" if inline else f"the key '{entry}'"
        raise TrustError(error.id, f"{shown} of {where} is not usable: {error.what}", error.mend) from error


def _toml(data: bytes) -> dict[str, Any]:
    if len(data) > TRUST_BYTES:
        raise _refused(f"it has more than {TRUST_BYTES} bytes")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is no TOML: {error}") from None


def _strings(table: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = table.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise _refused(f"{where} needs '{name}', a list of one or more strings")
    return tuple(values)


def _only(table: dict[str, Any], known: set[str], where: str) -> None:
    """A misspelt key must not silently widen trust."""
    unknown = sorted(table.keys() - known)
    if unknown:
        raise _refused(f"{where} has an unknown key '{unknown[0]}'", f"known are {', '.join(sorted(known))}")


def _check_uri(uri: str, where: str) -> None:
    try:
        check_property(uri)
    except TrustError as error:
        raise _refused(f"{where}: {error.what}", error.mend) from error


def _refused(why: str, mend: str = "correct it; the operator's guide has an example") -> TrustError:
    return TrustError("trust.file", f"the trust file is not usable: {why}", mend)
