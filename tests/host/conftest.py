"""Two connected libvirt hosts for the whole session, and guests that are gone after their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from fleet import Fleet, connect_all
from product import Product

from lab import guest
from lab.debian import kernel
from lab.domain import Domain
from lab.host import Host, laboratory
from lab.machine import Machine

Define = Callable[[Host, Domain], Machine]


class Pair(NamedTuple):
    """Two hosts, each with a daemon and a way to the other; ``work`` is seen by both and by their guests."""

    work: Path
    one: Host
    other: Host


@pytest.fixture(scope="session")
def plain() -> Iterator[Pair]:
    """Hosts as Debian leaves them."""
    with laboratory("plain1", "plain2") as (work, (one, other)):
        yield Pair(work, one, other)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Hosts with the product installed."""
    with laboratory("alpha", "beta") as (work, (one, other)):
        one.install_product()
        other.install_product()
        yield Pair(work, one, other)


@pytest.fixture(scope="session")
def product(pair: Pair) -> Product:
    """A certifier whom both of ``pair`` trust, and their index, which certifies nothing yet."""
    made = Product(pair.work, (pair.one, pair.other))
    made.build()
    return made


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Two hosts in an approved state and a stranger, members of one fleet, each with a way to every other."""
    with laboratory("gold", "silver", "stranger") as (work, hosts):
        connect_all(hosts)
        for host in hosts:
            host.install_product()
        product = Product(work, hosts)
        product.build()
        yield Fleet(work, product, hosts[:2], hosts[2:])


@pytest.fixture(scope="session")
def kernel_package() -> str:
    """A current cloud kernel, of Debian 12's own series, which boots quickest."""
    return guest.kernels(1, "6.1")[0]


@pytest.fixture(scope="session")
def direct(kernel_package: str) -> Domain:
    """A guest whose kernel libvirt loads itself: the quickest to its shell. Make variants with ``replace``."""
    image, initrd = kernel(kernel_package), guest.initramfs(kernel_package)
    return Domain(kernel=image, initrd=initrd, cmdline=guest.CMDLINE, banks=("sha256", "sha384"))


@pytest.fixture
def define() -> Iterator[Define]:
    """Defines guests on hosts, and takes them away after the test, wherever they then are."""
    with ExitStack() as stack:
        yield lambda host, domain: stack.enter_context(Machine(host, domain))
