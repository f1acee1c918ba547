"""The guest that a command line names: by the name that libvirt has for it, or by its UUID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import click
import libvirt

from swtpm_prop.domain.identity import identify
from swtpm_prop.errors import DomainError
from swtpm_prop.transfer.messages import is_uuid

LOCAL = "qemu:///system"

Function = TypeVar("Function", bound=Callable[..., Any])


class Guest(NamedTuple):
    """A domain of libvirt and its inactive XML, which is what its next start uses."""

    domain: libvirt.virDomain
    xml: bytes
    uri: str

    @property
    def uuid(self) -> str:
        """As libvirt writes it."""
        return identify(self.xml).uuid


def guest_argument(required: bool = True) -> Callable[[Function], Function]:
    """The argument GUEST, and the libvirt that knows its name; arrive as ``guest`` and ``uri``."""

    def decorate(function: Function) -> Function:
        connect = click.option(
            "--connect", "uri", default=LOCAL, envvar="LIBVIRT_DEFAULT_URI", show_default=True, help="libvirt's URI."
        )
        return click.argument("guest", required=required)(connect(function))

    return decorate


def guest_uuid(guest: str, uri: str) -> str:
    """The guest's UUID. One that is given is taken as it is: libvirt need not run, nor know it any more.

    Raises:
        DomainError: ``domain.libvirt``.
    """
    if is_uuid(guest):
        return guest
    try:
        return find(guest, uri).uuid
    except DomainError as error:
        raise DomainError(
            error.id, error.what, f"{error.mend}; a guest that is not defined here goes by its UUID"
        ) from error


def find(name: str, uri: str) -> Guest:
    """The domain of libvirt with this name.

    Raises:
        DomainError: ``domain.libvirt``.
    """
    # By default libvirt also prints each error itself.
    libvirt.registerErrorHandler(lambda *_: None, None)
    try:
        domain = libvirt.open(uri).lookupByName(name)
        return Guest(domain, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode(), uri)
    except libvirt.libvirtError as error:
        raise libvirt_failed(error) from error


def known_here(uri: str) -> dict[str, str]:
    """The names of all guests that libvirt on this host has, defined or running, by UUID.

    Raises:
        DomainError: ``domain.libvirt``, ``domain.remote``.
    """
    parts = urlsplit(uri)
    if parts.hostname or parts.path == "/session":
        raise DomainError(
            "domain.remote",
            f"the libvirt at '{uri}' does not know this host's guests",
            f"--connect {LOCAL}, on this host",
        )
    libvirt.registerErrorHandler(lambda *_: None, None)
    try:
        return {domain.UUIDString(): domain.name() for domain in libvirt.open(uri).listAllDomains()}
    except libvirt.libvirtError as error:
        raise libvirt_failed(error) from error


def libvirt_failed(error: libvirt.libvirtError) -> DomainError:
    """What libvirt would not do."""
    return DomainError("domain.libvirt", f"libvirt refuses, {error.get_error_message()}", "see virsh list --all")
