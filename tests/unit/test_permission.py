"""What a guest is told that may not move: the command that it is told lets it, and changes nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import libvirt
import pytest
from click.testing import CliRunner
from testdriver import URI, defined

from swtpm_prop.cli.domain import command
from swtpm_prop.domain.metadata import NAMESPACE, PREFIX, Vtpm, parse_domain, to_xml
from swtpm_prop.domain.permission import not_allowed
from swtpm_prop.tpm.algorithms import SHA256, SHA384
from swtpm_prop.translate.policy import Bank

APPROVED = "https://example.org/hosts/approved?a&b='c'"
PLAIN = Bank(SHA384, frozenset({*range(10), 11, 12, 13, 14}), True, ("https://example.org/properties/boot",))
ODD = Bank(SHA256, frozenset({0, 4, 7}), False, ("https://example.org/a", "https://example.org/b;c"))
NAME = "a 'guest' $(false)"
XML = """
<domain type='test'><name>a 'guest' $(false)</name><memory>1024</memory><os><type>hvm</type></os>
<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>
"""


@pytest.fixture
def guest() -> Iterator[libvirt.virDomain]:
    with defined(XML) as domain:
        yield domain


@pytest.mark.parametrize("bank", [PLAIN, ODD], ids=["as usual", "of its own"])
def test_the_command_of_the_message_lets_the_guest_move(guest: libvirt.virDomain, bank: Bank) -> None:
    before = Vtpm((bank,), APPROVED)
    guest.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        to_xml(before, prefix=""),
        PREFIX,
        NAMESPACE,
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    argv = shlex.split(not_allowed(NAME, before).mend.partition("swtpm-prop domain ")[2])
    done = CliRunner().invoke(command, [*argv, "--connect", URI])
    assert done.exit_code == 0, done.output
    assert parse_domain(guest.XMLDesc().encode()) == before._replace(migration="attested")


def test_where_a_command_would_lose_something_none_is_told() -> None:
    many = PLAIN._replace(properties=tuple(f"https://example.org/properties/{number}" for number in range(9)))
    for banks in ((PLAIN, ODD), (many,)):
        assert "virsh edit web" in not_allowed("web", Vtpm(banks, APPROVED)).mend
    # Nothing is known of what it should have: whoever reads it has to say.
    for vtpm in (None, Vtpm((PLAIN,))):
        assert " --custody URI --migration attested" in not_allowed("web", vtpm).mend
