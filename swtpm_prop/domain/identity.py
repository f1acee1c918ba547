"""Which guest a domain XML describes and whether it speaks of us: cheap, standard library only, for every hook call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from xml.parsers import expat

from swtpm_prop.errors import DomainError
from swtpm_prop.limits import DOMAIN_XML_BYTES

OURS = "swtpm-prop"
"""What every namespace of ours contains, in whatever version."""

STAMP = "urn:swtpm-prop:agent:1"
"""The namespace in which the agent notes where a guest runs: the one of ours that asks for nothing."""

UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Of a guest, as libvirt writes it."""


class Identity(NamedTuple):
    """What one pass over the XML shows.

    Attributes:
        uuid: the guest's UUID in lower case, as libvirt writes it; empty if the XML has none.
        concerned: an element or attribute is in a namespace of ours, other than the agent's stamp.
        custody: such an element asks for custody, rightly or not.
        stamp: the attributes of the agent's stamp; empty where the metadata has none, or several.
        name: the guest's name, which may be anything without a slash or a line's end.
    """

    uuid: str
    concerned: bool
    custody: bool = False
    stamp: Mapping[str, str] = MappingProxyType({})
    name: str = ""


def scan(xml: bytes, most: int = DOMAIN_XML_BYTES) -> Identity:
    """Look through at most ``most`` bytes of XML, read as UTF-8, which is what libvirt writes.

    A document type declaration is refused where it begins: no entity is ever declared, let alone expanded.

    Raises:
        DomainError: ``domain.xml-size``, ``domain.xml-malformed``, ``domain.xml-doctype``.
    """
    if len(xml) > most:
        raise DomainError("domain.xml-size", f"XML has {len(xml)} bytes, at most {most} are read", "make it smaller")
    found = _Scan()
    found.run(xml)
    uuid = "".join(found.uuid).strip()
    stamp = found.stamps[0] if len(found.stamps) == 1 else {}
    return Identity(uuid if UUID.fullmatch(uuid) else "", found.concerned, found.custody, stamp, "".join(found.name))


def identify(xml: bytes) -> Identity:
    """As `scan`, for a whole domain XML: it must have a UUID (libvirt, src/conf/schemas/domaincommon.rng).

    Raises:
        DomainError: as `scan`, and ``domain.uuid``.
    """
    identity = scan(xml)
    if not identity.uuid:
        raise DomainError(
            "domain.uuid",
            "the domain XML has no UUID that libvirt would write",
            "let libvirt call the hook, or correct the UUID with virsh edit",
        )
    return identity


class _Scan:
    """One pass of expat over a document."""

    def __init__(self) -> None:
        self.concerned = False
        self.custody = False
        self.uuid: list[str] = []
        self.name: list[str] = []
        self.stamps: list[dict[str, str]] = []
        self._path: list[str] = []

    def run(self, xml: bytes) -> None:
        parser = expat.ParserCreate("UTF-8", " ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        try:
            parser.Parse(xml, True)
        except expat.ExpatError as error:
            raise DomainError(
                "domain.xml-malformed",
                f"XML is not well-formed, {error}",
                "correct the XML; virsh dumpxml prints what libvirt has",
            ) from error

    def _doctype(self, *_: object) -> None:
        raise DomainError(
            "domain.xml-doctype", "XML has a document type declaration", "remove it; metadata needs no DTD"
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        # With a separator, expat writes a name in a namespace as "URI name".
        spaces = {n.rpartition(" ")[0] for n in (name, *attributes)}
        self.concerned = self.concerned or any(OURS in space for space in spaces - {STAMP})
        self.custody = self.custody or (OURS in name and name.endswith(" custody"))
        if self._path == ["domain", "metadata", f"{STAMP} agent"]:
            self.stamps.append(attributes)

    def _end(self, _name: str) -> None:
        self._path.pop()

    def _text(self, text: str) -> None:
        if self._path == ["domain", "uuid"]:
            self.uuid.append(text)
        elif self._path == ["domain", "name"]:
            self.name.append(text)
