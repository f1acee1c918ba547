"""The agent as a process: its parts, what each does for the others, and how it ends."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from swtpm_prop import __version__, host_config
from swtpm_prop.agent import door, metrics
from swtpm_prop.agent.guests import Guests, Happening
from swtpm_prop.agent.metrics import Counts, Family, render
from swtpm_prop.agent.server import Server
from swtpm_prop.agent.stamper import Stamper
from swtpm_prop.agent.talk import Talker
from swtpm_prop.agent.transfers import Transfers
from swtpm_prop.attest import certificates
from swtpm_prop.attest.certificates import Kind
from swtpm_prop.attest.evidence import Evidence
from swtpm_prop.custody.keys import KeyRecord
from swtpm_prop.domain.stamp import Stamp, to_xml
from swtpm_prop.errors import Error, HostError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import AGENT_END_SECONDS, AGENT_PEERS_WAITING, AGENT_TALK_SECONDS, LET_IN_SECONDS
from swtpm_prop.transfer import host
from swtpm_prop.transfer.answer import Source
from swtpm_prop.transfer.journal import Journal
from swtpm_prop.transfer.machine import Event, Presence
from swtpm_prop.transfer.settle import Eyes, Settler
from swtpm_prop.transfer.speaker import Speaker

_log = logging.getLogger(__name__)

_GLANCE = 0.5
"""How soon, in seconds, a thread that waits for others sees that the agent is to end."""


class Agent:
    """The agent of this host.

    Args:
        layout: of the host.
        uri: libvirt's.

    Raises:
        HostError: ``host.config``, ``host.not-enrolled``; what the TPM says.
    """

    def __init__(self, layout: Layout, uri: str) -> None:
        self._layout = layout
        self._config = host_config.load(layout.host).agent
        self._speaker = Speaker(layout)
        self.host = certificates.read(self._speaker.identity().files.tls_certificate).host
        self._counts = Counts()
        self._journal = Journal(layout)
        self._happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._guests = Guests(uri, self._happenings.put, layout)
        self._settler = Settler(layout, self._journal, Eyes(self._presence, self._halt), self._speaker.report)
        self._transfers = Transfers(self._settler, self._counts)
        self._text = to_xml(Stamp(self._config.reached_at(self.host), self.host))
        self._stamper = Stamper(self._stamp, self._wants_stamp)

    def run(self, stopped: threading.Event, ready: Callable[[], None], ending: Callable[[], None]) -> None:
        """Be the agent until stopped.

        Args:
            stopped: is set from outside, or here when a part of the agent fails.
            ready: called once other hosts can connect.
            ending: called when it begins to end.

        Raises:
            HostError: ``agent.listen``, ``agent.failed``.
        """
        failures: list[str] = []

        def fail(arguments: threading.ExceptHookArgs) -> None:
            # Better no agent, which is started anew, than one that lacks a part.
            failures.append(f"{arguments.exc_type.__name__}: {arguments.exc_value}")
            stopped.set()

        threading.excepthook = fail
        with ExitStack() as stack:
            listener = stack.enter_context(_listen(self._config.listen))
            scraped = stack.enter_context(_listen(self._config.metrics))
            knocked = stack.enter_context(door.listening(self._layout))
            knocked.settimeout(_GLANCE)
            talker = Talker(self._speaker, self._source(), self._settler, self._counts)
            server = Server(listener, talker.talk, AGENT_TALK_SECONDS, self._connected("peers"))
            inside = door.Door(self._layout, self._speaker, self._counts, self._transfers.look)
            hooks = Server(knocked, inside.talk, LET_IN_SECONDS, self._connected("hooks"))
            pages = {"/metrics": lambda: (200, render(self._families(server))), "/health": self._health}
            self._guests.start()
            bodies: tuple[Callable[[threading.Event], None], ...] = (
                self._take_in,
                self._transfers.run,
                self._stamper.run,
                lambda stopped: metrics.serve(scraped, pages, stopped),
                server.run,
                hooks.run,
            )
            for body in bodies:
                threading.Thread(target=body, args=(stopped,), daemon=True).start()
            ready()
            _log.info("agent of %s, listening on %s", self.host, self._config.listen)
            stopped.wait()
            ending()
            self._transfers.finish()
            server.finish(AGENT_END_SECONDS)
            hooks.finish(AGENT_END_SECONDS)
            self._guests.stop()
        if failures:
            raise HostError("agent.failed", f"a part of the agent failed, {failures[0]}", "report this; start it again")

    # -- what libvirt sees ----------------------------------------------------------------------

    def _take_in(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                happening = self._happenings.get(timeout=_GLANCE)
            except queue.Empty:
                continue
            self._transfers.note(happening)
            if happening.event is Event.RUNS:
                self._warn(happening.uuid)
                self._stamper.offer(happening.uuid)

    def _warn(self, uuid: str) -> None:
        if self._layout.guest_key(uuid).exists() and self._guests.transient(uuid):
            _log.error("%s", _transient(uuid).line())

    def _presence(self, uuid: str) -> Presence:
        presence = self._guests.presence(uuid)
        return Presence.PRESENT if presence is Presence.RUNS and self._guests.busy(uuid) else presence

    def _halt(self, uuid: str) -> None:
        _log.error("guest %s runs on another host: what is left of it here is paused", uuid)
        self._counts.count("halts")
        self._guests.halt(uuid)

    def _wants_stamp(self, uuid: str) -> bool:
        # Of one that has just come, the key may become this host's later, by whoever settles its transfer then.
        return self._guests.presence(uuid) is Presence.RUNS and (
            self._transfers.open(uuid) or self._layout.guest_key(uuid).exists()
        )

    def _stamp(self, uuid: str) -> bool:
        return self._layout.guest_key(uuid).exists() and self._guests.stamp(uuid, self._text)

    # -- what peers get ---------------------------------------------------------------------------

    def _source(self) -> Source:
        """This host as a source: a key goes only where libvirt sends the guest, and it is noted whom it is given to."""
        source = host.source(self._layout, self._guests.presence)

        def judge(record: KeyRecord, shown: Evidence, binding: bytes, peer: str) -> bytes:
            self._guests.check_leaves(record.uuid)
            parent = source.judge(record, shown, binding, peer)
            _log.info("guest %s: host %s has proved '%s', it gets the key", record.uuid, peer, record.property)
            return parent

        return source._replace(judge=judge)

    def _connected(self, who: str) -> Callable[[str], None]:
        return lambda outcome: self._counts.count(who, outcome=outcome)

    # -- what people see ------------------------------------------------------------------------

    def _health(self) -> tuple[int, str]:
        ills = list(self._ills())
        return (503, "".join(f"{ill}\n" for ill in ills)) if ills else (200, "well\n")

    def _ills(self) -> Iterator[str]:
        if not self._guests.connected:
            yield "no connection to libvirt"
        try:
            files = self._speaker.identity().files
            certificates.verify(files.tls_certificate, files.ca, files.crl, Kind.TLS, int(time.time()))
            self._open_transfers()
        except Error as error:
            yield error.line()

    def _open_transfers(self) -> Counter[tuple[str, str]]:
        known = (transfer for uuid in self._journal.guests() for transfer in self._journal.of(uuid))
        return Counter((transfer.side.value, transfer.state.value) for transfer in known if transfer.unfinished)

    def _families(self, server: Server) -> Iterator[Family]:
        about = (("host", self.host), ("version", __version__))
        yield Family("swtpm_prop_agent_info", "The agent.", "gauge", [(about, 1)])
        connected = float(self._guests.connected)
        yield Family("swtpm_prop_libvirt_connected", "Whether libvirt tells of guests.", "gauge", [((), connected)])
        here = [uuid for uuid in self._guests.running() if self._layout.guest_key(uuid).exists()]
        yield Family("swtpm_prop_guests_running", "Guests with custody that run here.", "gauge", [((), len(here))])
        transient = sum(map(self._guests.transient, here))
        yield Family("swtpm_prop_guests_transient", "Those without a definition here.", "gauge", [((), transient)])
        yield Family("swtpm_prop_talks", "Peers being talked with.", "gauge", [((), server.talks)])
        for name, help in _COUNTED.items():
            yield Family(f"swtpm_prop_{name}_total", help, "counter", self._counts.samples(name))
        try:
            transfers = sorted(self._open_transfers().items())
        except Error:
            return  # said on the page of health
        samples = [((("side", side), ("state", state)), float(number)) for (side, state), number in transfers]
        yield Family("swtpm_prop_transfers_open", "Migrations that are not finished.", "gauge", samples)


_COUNTED = {
    "peers": "Connections of other hosts, by what became of them.",
    "hooks": "Connections of this host's hooks, by what became of them.",
    "arrivals": "Guests that hooks of this host were to let in, by what became of them.",
    "answers": "Talks with other hosts, by what became of them.",
    "failures": "What went wrong while transfers were settled, by id.",
    "halts": "Guests paused because they run on another host.",
}


def _transient(uuid: str) -> HostError:
    return HostError(
        "custody.transient",
        f"guest {uuid} has no definition here: when it stops, libvirt deletes its TPM state (unless persistent_state)",
        f"before that, virsh dumpxml --inactive --security-info {uuid} >guest.xml; virsh define guest.xml",
    )


def _listen(endpoint: str) -> socket.socket:
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        dual = family is socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (host, int(port)), family=family, backlog=AGENT_PEERS_WAITING, dualstack_ipv6=dual
        )
    except OSError as error:
        raise HostError(
            "agent.listen", f"cannot listen on {endpoint}: {error.strerror}", "see listen and metrics in host.toml"
        ) from error
    listener.settimeout(_GLANCE)
    return listener
