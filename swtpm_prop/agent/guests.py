"""Which guests run here, told by libvirt's events; and the stamp in their live metadata that says where.

What peers ask is answered from what the events said: a call to libvirt would wait for a guest whose hook is at work,
and that hook may just be waiting for us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import libvirt

from swtpm_prop.domain.stamp import NAMESPACE, PREFIX
from swtpm_prop.errors import HostError
from swtpm_prop.limits import LIBVIRT_PROBE_SECONDS, LIBVIRT_PROBES, LIBVIRT_RETRY_SECONDS

LOCAL = "qemu:///system"


class Presence(StrEnum):
    """How a guest is here, if it is.

    RUNS: its processors are this host's; a person may have paused them.
    HALTED: a migration holds them: it comes and does not run yet, or goes and may run elsewhere already.
    """

    RUNS = "runs"
    HALTED = "halted"


class Happening(StrEnum):
    """What changed: a guest came to run here, libvirt moved it away, or it ended here for another reason."""

    RUNS = "runs"
    MOVED = "moved"
    ENDED = "ended"


class Event(NamedTuple):
    """A change of one guest, by its UUID."""

    uuid: str
    happening: Happening


_HALTED = {
    (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED),
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED),
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY),
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED),
}
_HERE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED,  # by a person; also how a guest arrives that was paused before it left
    libvirt.VIR_DOMAIN_EVENT_RESUMED,
}


def presence_after(event: int, detail: int) -> tuple[bool, Presence | None]:
    """Whether a lifecycle event (virDomainEventType and its detail) says where the guest is, and what it says."""
    if (event, detail) in _HALTED:
        return True, Presence.HALTED
    if event in _HERE:
        return True, Presence.RUNS
    return event in (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_CRASHED), None


class Guests:
    """Follows one libvirt; connects again when the daemon is restarted.

    Args:
        uri: libvirt's.
        tell: is given each change, in the order they happen, in the thread of events: it must neither block nor call
            libvirt. After each (re)connection it is told of every guest that runs.
    """

    def __init__(self, uri: str, tell: Callable[[Event], None]) -> None:
        self._uri = uri
        self._tell = tell
        self._lock = threading.Lock()
        self._presence: dict[str, Presence | None] = {}  # None: it was here
        self._connection: libvirt.virConnect | None = None
        self._lost = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to follow libvirt, in threads of its own."""
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        # Wakes the loop, so that it sees the end.
        libvirt.virEventAddTimeout(LIBVIRT_RETRY_SECONDS * 1000, lambda *_: None, None)
        for body in (self._loop, self._follow):
            threading.Thread(target=body, name=f"libvirt{body.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Let go of libvirt."""
        self._stopped.set()
        self._lost.set()

    @property
    def connected(self) -> bool:
        """Whether libvirt tells us what happens."""
        return self._connection is not None

    def presence(self, uuid: str) -> Presence | None:
        """How the guest is here; None: it is not.

        Raises:
            HostError: ``agent.no-libvirt``: nobody knows at the moment.
        """
        with self._lock:
            if self._connection is None:
                raise _unknown("the agent has no connection to libvirt")
            return self._presence.get(uuid)

    def running(self) -> list[str]:
        """UUIDs of the guests that run here, as far as is known."""
        with self._lock:
            return sorted(uuid for uuid, presence in self._presence.items() if presence is Presence.RUNS)

    def stamp(self, uuid: str, xml: str) -> bool:
        """Put the element ``xml`` (without a namespace) into the live metadata of a guest; False: later.

        libvirt lets that wait for a migration that is under way, and no migration wait for it longer than for any other
        question. It is not even asked while there is a job.
        """
        connection = self._connection
        if connection is None:
            return False
        try:
            domain = connection.lookupByUUIDString(uuid)
            if _busy(domain):
                return False
            element, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
            domain.setMetadata(element, xml, PREFIX, NAMESPACE, live)
        except libvirt.libvirtError as error:
            # A guest that has ended meanwhile needs no stamp.
            return bool(error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID))
        return True

    # -- threads ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stopped.is_set():
            libvirt.virEventRunDefaultImpl()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            self._lost.clear()
            try:
                connection = self._connect()
            except libvirt.libvirtError:
                self._stopped.wait(LIBVIRT_RETRY_SECONDS)
                continue
            self._lost.wait()
            with self._lock:
                self._connection = None
                self._presence = {}
            _close(connection)

    def _connect(self) -> libvirt.virConnect:
        connection = libvirt.open(self._uri)
        try:
            connection.registerCloseCallback(lambda *_: self._lost.set(), None)
            if connection.getType() == "QEMU":
                connection.setKeepAlive(LIBVIRT_PROBE_SECONDS, LIBVIRT_PROBES)
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
            listed = _listed(connection)
        except libvirt.libvirtError:
            _close(connection)
            raise
        with self._lock:
            # What events said since is newer than the list.
            self._presence = listed | self._presence
            self._connection = connection
            for uuid in [uuid for uuid, presence in self._presence.items() if presence is Presence.RUNS]:
                self._tell(Event(uuid, Happening.RUNS))
        return connection

    def _lifecycle(self, _: object, domain: libvirt.virDomain, event: int, detail: int, __: object) -> None:
        says, presence = presence_after(event, detail)
        if not says:
            return
        uuid = str(domain.UUIDString())
        with self._lock:
            before = self._presence.get(uuid)
            self._presence[uuid] = presence
        moved = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED)
        if presence is None:
            self._tell(Event(uuid, Happening.MOVED if (event, detail) == moved else Happening.ENDED))
        elif presence is Presence.RUNS and before is not presence:
            self._tell(Event(uuid, Happening.RUNS))


def _listed(connection: libvirt.virConnect) -> dict[str, Presence | None]:
    found: dict[str, Presence | None] = {}
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            state = tuple(domain.state())
        except libvirt.libvirtError:
            continue  # it has just ended
        found[str(domain.UUIDString())] = presence_of(*state)
    return found


def presence_of(state: int, reason: int) -> Presence:
    """How an active guest in this state (virDomainState and its reason) is here."""
    halted = (
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
    )
    return Presence.HALTED if state == libvirt.VIR_DOMAIN_PAUSED and reason in halted else Presence.RUNS


def _busy(domain: libvirt.virDomain) -> bool:
    """Whether a job is under way; a libvirt that cannot tell has none that take long."""
    try:
        return bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
    except libvirt.libvirtError:
        return False


def _close(connection: libvirt.virConnect) -> None:
    try:
        connection.close()
    except libvirt.libvirtError:
        return  # the daemon has gone: there is nothing to close


def _unknown(why: str) -> HostError:
    return HostError("agent.no-libvirt", why, "see that libvirtd or virtqemud runs, and try again")
