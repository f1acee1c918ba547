"""A guest of libvirt's test driver, which keeps what it has in this process, as long as a connection to it is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import libvirt

URI = "test:///default"


@contextmanager
def defined(xml: str) -> Iterator[libvirt.virDomain]:
    """A guest that is defined; at the end it is not any more."""
    connection = libvirt.open(URI)
    domain = connection.defineXML(xml)
    yield domain
    with suppress(libvirt.libvirtError):  # the test has undefined it
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
    connection.close()
