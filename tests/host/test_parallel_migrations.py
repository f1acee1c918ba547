"""Ten guests in custody leave a host at once, as when it is emptied for an update, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from fleet import Fleet, unfinished
from product import at, run_directories
from waiting import eventually

from lab.domain import Domain
from lab.machine import Machine
from swtpm_prop.custody.form import Form, form
from swtpm_prop.layout import Layout

pytestmark = pytest.mark.host

GUESTS = 10


@pytest.fixture
def machines(fleet: Fleet) -> Iterator[list[Machine]]:
    with ExitStack() as stack:
        made = []
        for number in range(GUESTS):
            machine = fleet.define(fleet.keeper, Domain(name=f"guest{number}", memory=32))
            stack.callback(machine.remove)
            machine.start()
            made.append(machine)
        yield made


def test_ten_at_once_there_and_back(fleet: Fleet, machines: list[Machine]):
    gold, silver = (fleet.members[name].host for name in ("gold", "silver"))
    layout = Layout()
    for before, here in ((gold, silver), (silver, gold)):
        with ThreadPoolExecutor(GUESTS) as pool:
            for going in [pool.submit(machine.migrate, here) for machine in machines]:
                going.result()
        assert {machine.state() for machine in machines} == {"running"}
        assert eventually(lambda here=here, before=before: not unfinished(here) + unfinished(before), 60, pause=0.2)
        for machine in machines:
            assert at(here, layout.guest_key(machine.domain.uuid)).exists()
            assert form(at(here, layout.guest_tpm(machine.domain.uuid))) is Form.ENCRYPTED
            assert not at(before, layout.guest_key(machine.domain.uuid)).exists()
            assert form(at(before, layout.guest_tpm(machine.domain.uuid))) is Form.NONE
        assert fleet.transfers(here) == fleet.transfers(before) == []
        assert eventually(lambda before=before: run_directories(before) == [])
