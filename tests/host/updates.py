"""A guest on a disk and its kernels: certify one, put it where the firmware finds it, take its certificate back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import Pair
from product import Product

from lab import guest, image
from lab.domain import Domain
from lab.machine import Machine


class Site:
    """A guest that boots from its disk, and those who certify its kernels; ``programs`` are in all its images."""

    def __init__(self, product: Product, machine: Machine, programs: tuple[Path, ...] = ()) -> None:
        self.product = product
        self.machine = machine
        self._programs = programs
        self.certificates: list[Path] = []

    def boot(self, kernel: str) -> None:
        """Put a kernel where the firmware finds it, and boot it."""
        assert self.machine.domain.disk is not None
        image.install_kernel(self.machine.domain.disk, image.unified_kernel(kernel, self._programs))
        self.machine.boot()

    def certify(self, kernel: str, *options: str) -> None:
        """Certify a kernel from its file, and let the host know."""
        certificate = self.product.certify("--uki", image.unified_kernel(kernel, self._programs), *options)
        self.certificates.append(certificate)
        self.product.build(*self.certificates)

    def withdraw(self) -> None:
        """Take the last certificate back."""
        self.certificates.pop()
        self.product.build(*self.certificates)

    def certify_reference(self, kernel: str) -> None:
        """One boot of the guest, not opted in yet, that its owner looked at."""
        self.boot(kernel)
        log = self.product.content("reference.log", self.machine.event_log())
        self.machine.destroy()
        self.certificates.append(self.product.certify("--event-log", log))
        self.product.build(*self.certificates)


@contextmanager
def updatable(name: str, pair: Pair, product: Product, programs: tuple[Path, ...] = ()) -> Iterator[Site]:
    """A guest called ``name`` on the first host, not started yet; gone afterwards."""
    disk = image.disk(image.unified_kernel(guest.kernels(1)[0], programs), pair.work / f"{name}.raw")
    with Machine(pair.one, Domain(name=name, firmware="ovmf", disk=disk)) as machine:
        yield Site(product, machine, programs)
