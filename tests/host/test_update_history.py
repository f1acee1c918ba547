"""A secret sealed once, and the real updates of a Debian kernel after it: certified ones unseal it, others do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import Pair
from product import PROPERTY, Product
from updates import Site, updatable

from lab import guest
from lab.seal import Seal
from swtpm_prop.trust.certificate import format_time

pytestmark = pytest.mark.host

UPDATES = 8
SECRET = b"the key of a disk"
RAW, PROPERTIES = Seal("sha256", "0x81000001"), Seal("sha384", "0x81000002")
MEASURED = {0, 1, 2, 3, 4, 5, 6, 7, 9, 11}
HOUR = 3600  # seconds


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


@pytest.fixture(scope="module")
def history(pair: Pair, product: Product) -> Iterator[History]:
    with updatable("history", pair, product) as here:
        yield walk(here)


def walk(site: Site) -> History:
    """Reference boot, opt in, seal, walk through the updates, then through kernels with nothing to show."""
    first, *updates, stranger, expiring = guest.kernels(UPDATES + 3)
    site.certify_reference(first)
    site.product.enable(site.machine)
    value, policy = seal_both(site, first)
    boots = []
    for kernel in updates:
        site.certify(kernel)
        boots.append(try_kernel(site, kernel, "certified"))
    site.withdraw()
    boots.append(try_kernel(site, updates[-1], "revoked"))
    boots.append(try_kernel(site, stranger, "unknown"))
    now = int(time.time())
    site.certify(expiring, "--not-before", format_time(now - HOUR), "--not-after", format_time(now + 1))
    time.sleep(max(0, now + 2 - time.time()))
    boots.append(try_kernel(site, expiring, "expired"))
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


def seal_both(site: Site, kernel: str) -> tuple[str, str]:
    """Seal the secret to both banks on the certified ``kernel``; property value and policy of the guest, in hex."""
    site.boot(kernel)
    site.machine.console.put("/run/secret", SECRET)
    for seal in (RAW, PROPERTIES):
        for line in seal.lines("/run/secret"):
            site.machine.console.check(line)
    assert unseals(site, RAW)
    assert unseals(site, PROPERTIES)
    (value,) = {site.machine.pcrs()["sha384"][pcr] for pcr in MEASURED}
    policy = site.machine.console.get(PROPERTIES.policy).hex()
    site.machine.destroy()
    return value, policy


def try_kernel(site: Site, kernel: str, why: str) -> Boot:
    """Boot a kernel and try to unseal."""
    site.boot(kernel)
    contents = [record["content"] for record in site.product.log(site.machine)]
    refused = [content["reason"] for content in contents if content.get("certified") is False]
    boot = Boot(
        site.machine.console.check("uname -r").strip(),
        why,
        site.machine.pcrs()["sha256"][4],
        unseals(site, RAW),
        site.product.agreed(site.machine),
        unseals(site, PROPERTIES),
        {reason: refused.count(reason) for reason in refused},
    )
    site.machine.destroy()
    return boot


def unseals(site: Site, seal: Seal) -> bool:
    """Whether the secret comes out; anything but it or the refusal of its policy is an error."""
    status, output = site.machine.console.run(seal.unseal)
    assert (status, output) == (0, SECRET.decode()) or (status and "policy check failed" in output)
    return not status


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
