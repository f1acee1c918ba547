"""Before libvirt lets a guest in from another host: fetch its key from there into this host's TPM, or refuse it."""

from __future__ import annotations

import time
from collections.abc import Callable

from swtpm_prop import host_config
from swtpm_prop.attest import certificates
from swtpm_prop.domain import arrival, permission, processes, stamp
from swtpm_prop.domain.identity import Identity, identify
from swtpm_prop.domain.metadata import parse_domain
from swtpm_prop.errors import Error, TransferError
from swtpm_prop.hook.returning import let_back
from swtpm_prop.host_config import AgentConfig
from swtpm_prop.layout import Layout
from swtpm_prop.limits import AGENT_TALK_SECONDS, FETCH_SECONDS, REACH_SECONDS
from swtpm_prop.transfer import host, talk
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Presence
from swtpm_prop.transfer.settle import Eyes, Settler
from swtpm_prop.transfer.speaker import Speaker

ELSEWHERE = frozenset(
    {"transfer.unreachable", "transfer.tls", "transfer.connection", "transfer.timeout"}
    | {"transfer.no-key", "transfer.not-running", "transfer.elsewhere", "transfer.self"}
)
"""What says no more than that the guest is not there, or not even that: the next host may be asked."""

EYES = Eyes(
    lambda uuid: Presence.PRESENT if processes.has_qemu(uuid) else Presence.GONE,
    lambda uuid: None,
)
"""libvirt calls this hook before it looks whether the guest is here already (src/qemu/qemu_migration.c,
qemuMigrationDstPrepareAny), as one that was not taken down after an earlier migration is."""


def let_in(xml: bytes, layout: Layout, speaker: Speaker) -> bytes:
    """Fetch the key of the guest that this domain XML describes, if it is in custody.

    Args:
        xml: what libvirt gives the hook.
        layout: of this host.
        speaker: this host's voice.

    Returns:
        The XML that libvirt shall go on with, in which the start that follows finds its transfer; empty: with the one
        it has.

    Raises:
        Error: libvirt must refuse the migration; the guest runs on at the source.
    """
    identity, asked = identify(xml), parse_domain(xml)
    if asked is None or asked.custody is None:
        return let_back(xml, identity.uuid, layout)
    if asked.migration is None:
        raise permission.not_allowed(identity.name, asked)
    return arrival.note(xml, _fetch(identity, asked.custody, layout, speaker).id)


def _fetch(identity: Identity, property: str, layout: Layout, speaker: Speaker) -> Transfer:
    config = host_config.load(layout.host).agent
    here = config.reached_at(certificates.read(speaker.identity().files.tls_certificate).host)
    settler = Settler(layout, Journal(layout), EYES, speaker.report)
    taken = host.destination(layout)

    def fetch(there: str, seconds: float, reaching: float) -> Transfer:
        ends = (there, here)
        return talk.fetch(
            identity.uuid, property, ends, speaker.identity(), taken, settler, seconds=seconds, reaching=reaching
        )

    return ask_in_turn(candidates(identity, config, here), fetch)


def ask_in_turn(places: list[str], fetch: Callable[[str, float, float], Transfer]) -> Transfer:
    """Ask hosts for the guest until one has it, FETCH_SECONDS in all.

    However many of them are dead, AGENT_TALK_SECONDS are left to talk with the one that is not.

    Args:
        places: ``host:port`` of their agents.
        fetch: asks one; is given the seconds that it may take, and those of them to connect in.

    Raises:
        Error: none has it; libvirt must refuse the migration.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    refused: list[Error] = []
    for number, there in enumerate(places):
        rest = deadline - time.monotonic()
        if rest <= 0:
            break
        share = (rest - AGENT_TALK_SECONDS) / (len(places) - number)
        try:
            return fetch(there, rest, max(share, REACH_SECONDS))
        except Error as error:
            if error.id not in ELSEWHERE:
                raise
            refused.append(error)
    raise _nowhere(refused)


def candidates(identity: Identity, config: AgentConfig, here: str) -> list[str]:
    """``host:port`` of the agents to ask: first of the host that the guest's metadata names, then the peers here."""
    stamped = stamp.read(identity)
    named = [stamped.endpoint] if stamped else []
    return [endpoint for endpoint in dict.fromkeys([*named, *config.peers]) if endpoint != here]


def _nowhere(refused: list[Error]) -> Error:
    """What to say when nobody had the guest: the first answer is that of the likeliest host."""
    if not refused:
        return TransferError(
            "transfer.no-source",
            "nothing says which host the guest comes from",
            "start swtpm-prop's agent there, which notes it in the guest's metadata; or name peers in host.toml here",
        )
    return next((error for error in refused if error.id != "transfer.self"), refused[0])
