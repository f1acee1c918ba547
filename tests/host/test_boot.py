"""A guest certified from its reference boot: property PCRs held, raw PCRs as without us, on all firmware and TPMs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Pair
from product import TRANSLATED, Product, expected, read_bank

from lab.domain import Domain
from lab.machine import Machine
from swtpm_prop.tpm import eventlog

pytestmark = pytest.mark.host

MATRIX = (("seabios", "crb"), ("ovmf", "crb"), ("seabios", "tis"), ("ovmf", "tis"))
ZERO = "00" * 32


class Reference(NamedTuple):
    """A guest that is not opted in, off again after one boot: what that measured, and its certificate."""

    machine: Machine
    raw: dict[int, str]
    measured: list[tuple[int, str]]  # PCR and SHA-256 of each measurement into a translated PCR
    certificate: Path

    @property
    def touched(self) -> set[int]:
        """The translated PCRs that the boot measured into."""
        return {pcr for pcr in TRANSLATED if self.raw[pcr] != ZERO}


@pytest.fixture(scope="module", params=MATRIX, ids="-".join)
def reference(request: pytest.FixtureRequest, pair: Pair, product: Product, direct: Domain) -> Iterator[Reference]:
    firmware, tpm = request.param
    # libvirt's own list of banks takes another way through swtpm_setup: one of the two TPMs goes it
    banks = ("sha256",) if tpm == "tis" else ()
    domain = replace(direct, name=f"{firmware}-{tpm}", firmware=firmware, tpm=tpm, banks=banks)
    with Machine(pair.one, domain) as machine:
        with running(machine):
            assert machine.pcrs().keys() == {"sha256"}
            raw = machine.pcrs()["sha256"]
            log = machine.event_log()
        certificate = product.certify("--event-log", product.content(f"{domain.name}.eventlog", log))
        yield Reference(machine, raw, measurements(log), certificate)


def measurements(log: bytes) -> list[tuple[int, str]]:
    events = eventlog.parse(log).events
    return [
        (event.pcr, digest.value.hex())
        for event in events
        for digest in event.digests
        if digest.algorithm.name == "sha256" and event.pcr in TRANSLATED and event.type != eventlog.EV_NO_ACTION
    ]


@pytest.mark.parametrize("reference", MATRIX[:2], indirect=True, ids="-".join)
def test_without_certificates_all_that_is_measured_is_broken(product: Product, reference: Reference):
    product.build()
    product.enable(reference.machine)
    with running(reference.machine) as machine:
        assert product.agreed(machine) == expected(broken=reference.touched)
        assert read_bank(machine, "sha256") == reference.raw
        reasons = {record["content"]["reason"] for record in product.log(machine)[1:]}
        assert reasons == {"unknown"}


@pytest.mark.parametrize("visible", [True, False], ids=["visible", "hidden"])
def test_certified_by_its_reference_boot(product: Product, reference: Reference, visible: bool):
    product.build(reference.certificate)
    product.enable(reference.machine, *([] if visible else ["--hidden"]))
    assert reference.touched >= set(range(8))
    with running(reference.machine) as machine:
        assert product.agreed(machine) == expected(held=reference.touched)
        assert read_bank(machine, "sha256") == reference.raw

        startup, *records = product.log(machine)
        assert startup["content"]["event"] == "startup"
        assert all(record["content"]["certified"] for record in records)
        digests = [{d["hashAlg"]: d["digest"] for d in record["digests"]} for record in records]
        assert [(r["pcr"], d["sha256"]) for r, d in zip(records, digests, strict=True)] == reference.measured

        shown = {"sha256", "sha384"} if visible else {"sha256"}
        assert listed(machine) == shown
        seen = machine.pcrs()
        assert seen.keys() == shown
        assert all(seen[bank] == read_bank(machine, bank) for bank in shown)


@contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    """The guest, booted; off again afterwards, also if the test fails."""
    machine.boot()
    try:
        yield machine
    finally:
        machine.destroy()


def listed(machine: Machine) -> set[str]:
    """The banks that ``tpm2_getcap`` finds."""
    lines = machine.console.check("tpm2_getcap pcrs").splitlines()
    return {line.split()[1].rstrip(":") for line in lines if line.startswith("  - ") and "[ ]" not in line}
