"""The metadata element that opts a guest in: strict reading from a domain XML, and writing.

Reading never yields less protection than the metadata asks for: what cannot be honoured is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lxml import etree

from swtpm_prop.domain.identity import OURS, STAMP, scan
from swtpm_prop.domain.pcrs import format_pcrs, parse_pcrs
from swtpm_prop.errors import DomainError, TrustError
from swtpm_prop.limits import BANK_PROPERTIES, METADATA_BYTES, PROPERTY_BANKS
from swtpm_prop.tpm.algorithms import BY_NAME, SHA1, STRONG, HashAlgorithm
from swtpm_prop.translate.policy import Bank
from swtpm_prop.trust.uri import check_property

NAMESPACE = "urn:swtpm-prop:domain:1"
PREFIX = "prop"

_SCHEMA = Path(__file__).with_name("domain.rng")
_FORM = (
    'write <bank algorithm="sha256|sha384|sha512" pcrs="0-9,11-14" visible="yes|no"> with <property uri="..."/> '
    "inside, once for each bank (schemas/domain.rng)"
)


class Vtpm(NamedTuple):
    """What a guest's metadata asks for, and what of the rest of its domain XML decides how that is done.

    Attributes:
        banks: the property banks, each with another algorithm; not empty.
        custody: the property a host must have to get the guest's state key, or None.
        migration: ``attested``: to hosts that prove to have the property. None: as libvirt allows, which with custody
            is nowhere, since no other host gets the key.
        active: libvirt's own ``<active_pcr_banks>``; empty if the domain has none. Where there are some, libvirt
            runs swtpm_setup before every start that is no restore and no migration (src/qemu/qemu_tpm.c).
        encrypted: libvirt encrypts the TPM state with a secret that only it can read.
    """

    banks: tuple[Bank, ...]
    custody: str | None = None
    migration: str | None = None
    active: tuple[HashAlgorithm, ...] = ()
    encrypted: bool = False

    def raw_banks(self) -> tuple[HashAlgorithm, ...]:
        """The banks that go on recording plain digests: libvirt's list without the property banks.

        There always is one, for whoever must fall back to plain digests: where the list leaves none, the first that
        is free of SHA-256, SHA-384, SHA-512 and SHA-1.
        """
        taken = {bank.algorithm for bank in self.banks}
        listed = tuple(algorithm for algorithm in self.active if algorithm not in taken)
        return listed or tuple(algorithm for algorithm in (*STRONG, SHA1) if algorithm not in taken)[:1]

    def all_banks(self) -> tuple[HashAlgorithm, ...]:
        """Every bank that must be active in the TPM, in the order of their TPM_ALG_ID."""
        return tuple(sorted({*self.raw_banks(), *(bank.algorithm for bank in self.banks)}))


def parse_domain(xml: bytes) -> Vtpm | None:
    """Read a whole domain XML; None if no element or attribute in it is in a namespace of ours.

    Raises:
        DomainError: ``domain.*``; never anything else, whatever the bytes.
    """
    if not scan(xml).concerned:
        return None
    root = tree(xml)
    return _fitted(_vtpm(_only_element(root)), root)


def parse_element(xml: bytes) -> Vtpm:
    """Read the metadata element alone, for a domain that has no ``<active_pcr_banks>``. Raises as `parse_domain`."""
    scan(xml, METADATA_BYTES)
    return _vtpm(tree(xml))


def fit(vtpm: Vtpm, xml: bytes) -> Vtpm:
    """Check ``vtpm`` by all rules for the domain ``xml``, whose own metadata is not looked at, as if it stood there.

    Raises:
        DomainError: as `parse_domain`.
    """
    scan(xml)
    return _fitted(_vtpm(tree(to_xml(vtpm).encode())), tree(xml))


def to_xml(vtpm: Vtpm, prefix: str = PREFIX) -> str:
    """The metadata element, indented.

    With the empty prefix its elements are in no namespace: the form that virDomainSetMetadata takes, which adds
    prefix and namespace itself (libvirt, src/util/virxml.c, virXMLInjectNamespace).
    """
    space = f"{{{NAMESPACE}}}" if prefix else ""
    top = etree.Element(f"{space}vtpm", nsmap={prefix: NAMESPACE} if prefix else None)
    for bank in vtpm.banks:
        attributes = {"algorithm": bank.algorithm.name, "pcrs": format_pcrs(bank.pcrs)}
        if not bank.visible:
            attributes["visible"] = "no"
        child = etree.SubElement(top, f"{space}bank", attributes)
        for uri in bank.properties:
            etree.SubElement(child, f"{space}property", {"uri": uri})
    if vtpm.custody is not None:
        etree.SubElement(top, f"{space}custody", {"host-property": vtpm.custody})
    if vtpm.migration is not None:
        etree.SubElement(top, f"{space}migration", {"allow": vtpm.migration})
    return etree.tostring(top, pretty_print=True, encoding="unicode").rstrip("\n")


# -- the element ----------------------------------------------------------------------------------


def tree(xml: bytes) -> etree._Element:
    """Parse XML that `scan` has been through: it has no document type declaration."""
    parser = etree.XMLParser(
        encoding="UTF-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        return etree.fromstring(xml, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise DomainError(
            "domain.xml-malformed",
            f"XML is not well-formed, {error}",
            "correct it, or let swtpm-prop domain enable write it",
        ) from error


def _only_element(root: etree._Element) -> etree._Element:
    """Our one element in its place; anything else in a namespace of ours is a mistake that must not go unnoticed."""
    place = root.findall(f"metadata/{{{NAMESPACE}}}vtpm") if root.tag == "domain" else []
    if len(place) > 1:
        raise DomainError("domain.doubled", "the domain has more than one vtpm metadata element", "leave one")
    inside = set(place[0].iter()) if place else set()
    for element in root.iter():
        for name in (element.tag, *element.attrib):
            space, _, local = str(name)[1:].rpartition("}")
            if OURS in space and space != STAMP and element not in inside:
                raise _stray(space, local)
    if not place:
        raise DomainError("domain.misplaced", "the domain names a namespace of ours, but has no vtpm element", _FORM)
    return place[0]


def _stray(space: str, local: str) -> DomainError:
    if space != NAMESPACE:
        what = f"'{local[:80]}' is in the unknown namespace '{space[:80]}'"
        return DomainError("domain.namespace", what, f"this version reads {NAMESPACE}")
    mend = "only one vtpm element directly below <metadata> of the domain is read"
    return DomainError("domain.misplaced", f"'{local[:80]}' is not in its place", mend)


def _vtpm(element: etree._Element) -> Vtpm:
    """Read and check the element for itself."""
    size = len(etree.tostring(element, with_tail=False))
    if size > METADATA_BYTES:
        raise DomainError("domain.size", f"vtpm metadata has {size} bytes", f"at most {METADATA_BYTES} are read")
    _refuse_invalid(element)
    custody = element.find(f"{{{NAMESPACE}}}custody")
    migration = element.find(f"{{{NAMESPACE}}}migration")
    vtpm = Vtpm(
        banks=_banks(element.findall(f"{{{NAMESPACE}}}bank")),
        custody=None if custody is None else _property(_attribute(custody, "host-property")),
        migration=None if migration is None else _attribute(migration, "allow"),
    )
    _refuse_migration_alone(vtpm)
    return vtpm


def _refuse_invalid(element: etree._Element) -> None:
    schema = etree.RelaxNG(etree.parse(str(_SCHEMA)))
    if not schema.validate(element):
        error = schema.error_log[0]
        raise DomainError("domain.schema", f"vtpm metadata is not valid, line {error.line}: {error.message}", _FORM)


def _banks(elements: Sequence[etree._Element]) -> tuple[Bank, ...]:
    banks = tuple(_bank(element) for element in elements)
    if len({bank.algorithm for bank in banks}) < len(banks):
        raise DomainError("domain.bank-doubled", "two property banks have the same algorithm", "give each its own")
    if len(banks) > PROPERTY_BANKS:
        raise DomainError("domain.bank-count", f"more than {PROPERTY_BANKS} property banks", "remove some")
    return banks


def _bank(element: etree._Element) -> Bank:
    uris = tuple(_property(_attribute(child, "uri")) for child in element)
    if len(uris) > BANK_PROPERTIES:
        raise DomainError("domain.property-count", f"a bank has {len(uris)} properties", f"at most {BANK_PROPERTIES}")
    if len(set(uris)) < len(uris):
        raise DomainError("domain.property-doubled", "a bank names one property twice", "remove one")
    return Bank(
        algorithm=BY_NAME[_attribute(element, "algorithm")],
        pcrs=parse_pcrs(_attribute(element, "pcrs")),
        visible=_attribute(element, "visible") != "no",
        properties=uris,
    )


def _attribute(element: etree._Element, name: str) -> str:
    return str(element.get(name, ""))


def _property(uri: str) -> str:
    try:
        check_property(uri)
    except TrustError as error:
        raise DomainError("domain.property", error.what, error.mend) from error
    return uri


def _refuse_migration_alone(vtpm: Vtpm) -> None:
    """The destination proves itself to get the key; where the host has no key in custody, nothing would be proven."""
    if vtpm.migration is not None and vtpm.custody is None:
        raise DomainError(
            "domain.migration-without-custody",
            "the domain asks for attested migration, but not for custody of its key",
            'add <custody host-property="..."/> before <migration>, or remove <migration>',
        )


# -- the rest of the domain -----------------------------------------------------------------------


def _fitted(vtpm: Vtpm, root: etree._Element) -> Vtpm:
    backend = _emulator(root)
    encrypted = backend.find("encryption") is not None
    if encrypted and vtpm.custody is not None:
        raise DomainError(
            "domain.custody-and-secret",
            "the domain asks for custody of its TPM's key, and for a TPM encrypted with a secret of libvirt",
            "remove <encryption> of the TPM's backend, or <custody>; a state that libvirt encrypted only it can open",
        )
    return vtpm._replace(active=_active(backend.findall("active_pcr_banks/*")), encrypted=encrypted)


def _emulator(root: etree._Element) -> etree._Element:
    """The backend element of the one TPM that we can work in."""
    backends = root.findall("devices/tpm/backend")
    if root.tag != "domain" or len(root.findall("devices/tpm")) != 1 or len(backends) != 1:
        raise DomainError(
            "domain.tpm",
            "the domain has not exactly one TPM",
            "give it <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
        )
    backend = backends[0]
    if backend.get("type") != "emulator" or backend.get("version") != "2.0":
        raise DomainError(
            "domain.tpm-kind",
            f"the TPM is of type '{backend.get('type')}' and version '{backend.get('version')}'",
            "only <backend type='emulator' version='2.0'/> can record properties",
        )
    if backend.find("source") is not None:
        raise DomainError(
            "domain.tpm-source", "the TPM state has a path of its own", "remove <source>; the path must hold the UUID"
        )
    return backend


def _active(elements: Iterable[etree._Element]) -> tuple[HashAlgorithm, ...]:
    names = [str(element.tag) for element in elements]
    unknown = sorted(set(names) - set(BY_NAME))
    if unknown:
        raise DomainError("domain.active-banks", f"active_pcr_banks names '{unknown[0]}'", "name sha1 to sha512")
    return tuple(sorted({BY_NAME[name] for name in names}))
