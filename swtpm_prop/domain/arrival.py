"""A guest that libvirt receives: its domain XML says by which transfer its key came, from migrate to prepare.

libvirt's hooks are told nothing that tells the start which receives a guest from any other start of it. But libvirt
takes the XML that the migrate hook prints in place of the source's, and hands it to the prepare hook; an ordinary
start has the XML that this host keeps.
"""

from __future__ import annotations

from lxml import etree

from swtpm_prop.domain.identity import STAMP
from swtpm_prop.domain.metadata import tree
from swtpm_prop.domain.stamp import PREFIX

_STAMP = f"{{{STAMP}}}agent"


def note(xml: bytes, transfer: str) -> bytes:
    """The domain XML, which has metadata of ours, with the transfer's id in the agent's stamp; UTF-8.

    Raises:
        DomainError: as `metadata.parse_domain`.
    """
    root = tree(xml)
    place = root.find("metadata")
    if place is None:
        place = etree.SubElement(root, "metadata")
    stamps = place.findall(_STAMP)
    stamp = stamps[0] if stamps else etree.SubElement(place, _STAMP, nsmap={PREFIX: STAMP})
    for other in stamps[1:]:
        place.remove(other)
    stamp.set("transfer", transfer)
    return etree.tostring(root, encoding="UTF-8")
