"""A secret sealed once, and the real updates of a Debian kernel after it: certified ones unseal it, others do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Pair
from product import PROPERTY, Product

from lab import guest, image
from lab.domain import Domain
from lab.machine import Machine
from lab.seal import Seal
from swtpm_prop.trust.certificate import format_time

pytestmark = pytest.mark.host

UPDATES = 8
SECRET = b"the key of a disk"
RAW, PROPERTIES = Seal("sha256", "0x81000001"), Seal("sha384", "0x81000002")
MEASURED = {0, 1, 2, 3, 4, 5, 6, 7, 9, 11}
ENOUGH = 3  # seconds to build an index before a certificate in it ends


class Boot(NamedTuple):
    """What one boot of a kernel showed; ``why`` says what its certificate was."""

    kernel: str
    why: str
    raw: str  # PCR 4 of the raw bank
    raw_unsealed: bool
    states: dict[int, str]
    unsealed: bool
    reasons: dict[str, int]  # why measurements were not certified, and how often


class History(NamedTuple):
    """A guest sealed on its first kernel, the values of then, and every boot after it."""

    value: str
    policy: str
    boots: list[Boot]

    def of(self, why: str) -> list[Boot]:
        return [boot for boot in self.boots if boot.why == why]


class Site:
    """The guest, its disk, and those who certify for it."""

    def __init__(self, product: Product, machine: Machine) -> None:
        self.product = product
        self.machine = machine
        self.certificates: list[Path] = []

    def boot(self, kernel: str) -> None:
        """Put a kernel where the firmware finds it, and boot it."""
        assert self.machine.domain.disk is not None
        image.install_kernel(self.machine.domain.disk, image.unified_kernel(kernel))
        self.machine.boot()

    def certify(self, kernel: str, *options: str) -> None:
        """Certify a kernel from its file, and let the host know."""
        certificate = self.product.certify("--uki", image.unified_kernel(kernel), *options)
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

    def seal(self, kernel: str) -> tuple[str, str]:
        """Seal the secret to both banks on the certified ``kernel``; property value and policy of the guest, in hex."""
        self.boot(kernel)
        self.machine.console.put("/run/secret", SECRET)
        for seal in (RAW, PROPERTIES):
            for line in seal.lines("/run/secret"):
                self.machine.console.check(line)
        assert self.unseals(RAW)
        assert self.unseals(PROPERTIES)
        (value,) = {self.machine.pcrs()["sha384"][pcr] for pcr in MEASURED}
        policy = self.machine.console.get(PROPERTIES.policy).hex()
        self.machine.destroy()
        return value, policy

    def try_kernel(self, kernel: str, why: str) -> Boot:
        """Boot a kernel and try to unseal."""
        self.boot(kernel)
        contents = [record["content"] for record in self.product.log(self.machine)]
        refused = [content["reason"] for content in contents if content.get("certified") is False]
        boot = Boot(
            self.machine.console.check("uname -r").strip(),
            why,
            self.machine.pcrs()["sha256"][4],
            self.unseals(RAW),
            self.product.agreed(self.machine),
            self.unseals(PROPERTIES),
            {reason: refused.count(reason) for reason in refused},
        )
        self.machine.destroy()
        return boot

    def unseals(self, seal: Seal) -> bool:
        """Whether the secret comes out; anything but it or the refusal of its policy is an error."""
        status, output = self.machine.console.run(seal.unseal)
        assert (status, output) == (0, SECRET.decode()) or (status and "policy check failed" in output)
        return not status


@pytest.fixture(scope="module")
def site(pair: Pair, product: Product) -> Iterator[Site]:
    disk = image.disk(image.unified_kernel(guest.kernels(1)[0]), pair.work / "history.raw")
    with Machine(pair.one, Domain(name="history", firmware="ovmf", disk=disk)) as machine:
        yield Site(product, machine)


@pytest.fixture(scope="module")
def history(site: Site) -> History:
    """Reference boot, opt in, seal, walk through the updates, then through kernels with nothing to show."""
    first, *updates, stranger, expiring = guest.kernels(UPDATES + 3)
    site.certify_reference(first)
    site.product.enable(site.machine)
    value, policy = site.seal(first)
    boots = []
    for kernel in updates:
        site.certify(kernel)
        boots.append(site.try_kernel(kernel, "certified"))
    site.withdraw()
    boots.append(site.try_kernel(updates[-1], "revoked"))
    boots.append(site.try_kernel(stranger, "unknown"))
    end = int(time.time()) + ENOUGH
    site.certify(expiring, "--not-after", format_time(end))
    time.sleep(max(0, end + 1 - time.time()))
    boots.append(site.try_kernel(expiring, "expired"))
    return History(value, policy, boots)


def test_certified_updates_unseal_from_the_property_bank(history: History, capsys: pytest.CaptureFixture[str]):
    with capsys.disabled():
        print(f"\n{table(history)}")
    certified = history.of("certified")
    assert len({boot.kernel for boot in certified}) == UPDATES
    assert len({boot.raw for boot in certified}) == UPDATES
    assert [boot.unsealed for boot in certified] == [True] * UPDATES
    for boot in certified:
        assert {pcr for pcr, state in boot.states.items() if state == "held"} == MEASURED
        assert "broken" not in boot.states.values()
        assert not boot.reasons


def test_no_update_unseals_from_the_raw_bank(history: History):
    assert not any(boot.raw_unsealed for boot in history.boots)


@pytest.mark.parametrize(("why", "reason"), [("unknown", "unknown"), ("revoked", "unknown"), ("expired", "expired")])
def test_kernels_without_a_certificate_do_not_unseal(history: History, why: str, reason: str):
    (boot,) = history.of(why)
    assert not boot.unsealed
    assert {pcr for pcr, state in boot.states.items() if state == "broken"} == {4, 9, 11}
    assert {pcr for pcr, state in boot.states.items() if state == "held"} == MEASURED - {4, 9, 11}
    assert boot.reasons.keys() == {reason}


def test_value_and_policy_are_known_before_anything_boots(pair: Pair, history: History):
    predict = ("pcr", "predict", "--property", PROPERTY)
    assert pair.one.cli(*predict).stdout.strip() == history.value
    policy = pair.one.cli(*predict, "--policy", "--pcrs", PROPERTIES.pcrs).stdout.strip()
    assert policy == history.policy


def table(history: History) -> str:
    """The history for people."""
    head = f"{'kernel':<29}{'certificate':<13}{'raw PCR 4':<14}{'unsealed':<10}{'property PCR 4':<16}unsealed"
    rows = [
        f"{boot.kernel:<29}{boot.why:<13}{boot.raw[:12]:<14}{('no', 'yes')[boot.raw_unsealed]:<10}"
        f"{boot.states[4]:<16}{('no', 'yes')[boot.unsealed]}"
        for boot in history.boots
    ]
    certified = history.of("certified")
    raw, kept = sum(boot.raw_unsealed for boot in certified), sum(boot.unsealed for boot in certified)
    total = f"{len(certified)} certified updates: {raw} unsealed from the raw bank, {kept} from the property bank"
    return "\n".join([head, *rows, total])
