"""The one written form of a property URI, so that equal properties are equal bytes wherever they are compared."""

from __future__ import annotations

import re

from swtpm_prop.errors import TrustError
from swtpm_prop.limits import URI_CHARS

# RFC 3986, section 2: unreserved, percent-encoded, sub-delims, ":" and "@" make a path character.
_UNRESERVED = r"A-Za-z0-9\-._~"
_PCHAR = rf"(?:[{_UNRESERVED}!$&'()*+,;=:@]|%[0-9A-F]{{2}})"
_PARTS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.\-]*):"
    r"(?://(?P<host>[a-z0-9](?:[a-z0-9.\-]*[a-z0-9])?)(?::(?P<port>[1-9][0-9]{0,4}))?(?=[/?#]|\Z))?"
    rf"(?P<path>(?:{_PCHAR}|/)*)"
    rf"(?:\?(?:{_PCHAR}|[/?])*)?"
    rf"(?:#(?:{_PCHAR}|[/?])*)?"
)
_PERCENT = re.compile("%([0-9A-F]{2})")
_UNRESERVED_CHAR = re.compile(rf"[{_UNRESERVED}]")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_MEND = "write it absolute and in normal form, for example https://example.org/properties/boot"


def check_property(uri: str) -> None:
    """Refuse a property URI that is not absolute and in normal form (RFC 3986, sections 4.3 and 6.2.2, 6.2.3).

    Normal form: ASCII of 1 to ``URI_CHARS`` characters; scheme and host in lower case; percent-encoding in upper
    case and only where it is needed; no ``.`` or ``..`` segment; no default port; no user information; an http(s)
    URI has a host and a path that starts with a slash.

    Raises:
        TrustError: ``trust.uri``.
    """
    if not 1 <= len(uri) <= URI_CHARS:
        raise _refused(uri, f"it has {len(uri)} characters, allowed are 1 to {URI_CHARS}")
    parts = _PARTS.fullmatch(uri)
    if parts is None:
        raise _refused(uri, "it is no absolute URI in normal form")
    scheme, host, port, path = parts["scheme"], parts["host"], parts["port"], parts["path"]
    if scheme in _DEFAULT_PORTS and (host is None or not path.startswith("/")):
        raise _refused(uri, "an http or https URI needs a host and a path that starts with a slash")
    if port is not None and (int(port) > 65535 or port == _DEFAULT_PORTS.get(scheme)):
        raise _refused(uri, "its port is the default one or out of range")
    if host is None and (not path or path.startswith("//")):
        raise _refused(uri, "nothing that identifies a property follows its scheme")
    if {".", ".."} & set(path.split("/")):
        raise _refused(uri, "its path has a '.' or '..' segment")
    if any(_UNRESERVED_CHAR.fullmatch(chr(int(code, 16))) for code in _PERCENT.findall(uri)):
        raise _refused(uri, "it percent-encodes a character that needs no encoding")


def _refused(uri: str, why: str) -> TrustError:
    shown = uri if len(uri) <= 80 else uri[:77] + "..."
    return TrustError("trust.uri", f"property URI '{shown}' is not acceptable, {why}", _MEND)
