"""Which guests run here, told by libvirt's events; and the stamp in their live metadata that says where.

Where a guest is we know from what the events said: a call to libvirt would wait for a guest whose hook is at work, and
that hook may just be waiting for us. libvirt is asked only about a guest that runs here, by what they said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import libvirt

from swtpm_prop.domain.job import parse_job
from swtpm_prop.domain.metadata import parse_domain
from swtpm_prop.domain.permission import not_allowed
from swtpm_prop.domain.stamp import NAMESPACE, PREFIX
from swtpm_prop.errors import DomainError, HostError, TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOMAIN_XML_BYTES, LIBVIRT_PROBE_SECONDS, LIBVIRT_PROBES, LIBVIRT_RETRY_SECONDS
from swtpm_prop.transfer.answer import unseen
from swtpm_prop.transfer.machine import Event, Presence


class Happening(NamedTuple):
    """What became of a guest.

    Attributes:
        uuid: the guest's.
        event: RUNS, MIGRATED, NEVER_RAN, or GONE for every other end.
        at: when it was seen, seconds since the epoch.
    """

    uuid: str
    event: Event
    at: float


_ARRIVES = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED)
_MIGRATED = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED)
_MIGRATES = {
    _ARRIVES,
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED),
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY),
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED),
}
_HERE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED,  # by a person; also how a guest arrives that was paused before it left
    libvirt.VIR_DOMAIN_EVENT_RESUMED,
}
_ENDED = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
"""What libvirt answers about a guest that is not, or no longer, active."""

_GONE = {libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_CRASHED}


def presence_after(event: int, detail: int) -> Presence | None:
    """What a lifecycle event (virDomainEventType and its detail) says of the guest; None for one that says nothing."""
    if (event, detail) in _MIGRATES:
        return Presence.PRESENT
    if event in _HERE:
        return Presence.RUNS
    return Presence.GONE if event in _GONE else None


class Guests:
    """Follows one libvirt; connects again when the daemon is restarted.

    Args:
        uri: libvirt's.
        tell: is given each change, in the order they happen, in the thread of events: it must neither block nor call
            libvirt. After each (re)connection it is told of every guest that runs, and of one that has become transient
            once more.
        layout: of the host, where libvirt notes what it does.
    """

    def __init__(self, uri: str, tell: Callable[[Happening], None], layout: Layout) -> None:
        self._uri = uri
        self._tell = tell
        self._layout = layout
        self._lock = threading.Lock()
        self._presence: dict[str, Presence] = {}
        self._defined: dict[str, bool] = {}  # whether libvirt keeps a definition
        self._arriving: set[str] = set()  # seen to be started for a migration, and not to run since
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

    def presence(self, uuid: str) -> Presence:
        """What events said of the guest; UNSEEN while there is no libvirt to tell.

        A guest that was seen to run counts as RUNS until the last moment of a migration, see `busy`.
        """
        with self._lock:
            return Presence.UNSEEN if self._connection is None else self._presence.get(uuid, Presence.GONE)

    def busy(self, uuid: str) -> bool:
        """Whether libvirt is at work on the guest, say migrating it; True if it cannot be asked. Waits for hooks."""
        connection = self._connection
        try:
            return connection is None or _busy(connection.lookupByUUIDString(uuid))
        except libvirt.libvirtError:
            return True

    def check_leaves(self, uuid: str) -> None:
        """See that libvirt is migrating the guest away, TPM and all, and that its live metadata let it go.

        A host that may have the guest must not get its key, nor a say in where it is, before it is sent there.

        Raises:
            TransferError: ``migration.not-allowed``, ``transfer.not-migrating``, ``transfer.unseen``; as `check_moves`.
            DomainError: as `parse_domain`.
        """
        connection = self._connection
        try:
            if connection is None:
                raise unseen("no connection to libvirt")
            domain = connection.lookupByUUIDString(uuid)
            name = domain.name()
            if not job_leaves(_job(domain)):
                raise TransferError(
                    "transfer.not-migrating", "libvirt is not migrating the guest away", "virsh migrate it --live"
                )
            if connection.getType() == "QEMU":
                check_moves(self._layout, uuid, name)
            # Of a guest that runs this is the live definition. The element alone comes without its namespace.
            asked = parse_domain(domain.XMLDesc().encode())
        except libvirt.libvirtError as error:
            raise unseen(error.get_error_message()) from error
        if asked is None or asked.migration is None:
            raise not_allowed(name, asked)

    def running(self) -> list[str]:
        """UUIDs of the guests that run here, as far as is known."""
        with self._lock:
            return sorted(uuid for uuid, presence in self._presence.items() if presence is Presence.RUNS)

    def transient(self, uuid: str) -> bool:
        """Whether the guest runs here without a definition: libvirt deletes its TPM state when it stops.

        Unless its live definition says persistent_state='yes' (src/qemu/qemu_tpm.c, qemuTPMEmulatorCleanupHost).
        """
        with self._lock:
            return self._presence.get(uuid) is Presence.RUNS and not self._defined.get(uuid, False)

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
            return bool(error.get_error_code() in _ENDED)
        return True

    def halt(self, uuid: str) -> None:
        """Stop what should not be here: pause a guest that runs, end one that was still to come. Waits for libvirt.

        Raises:
            HostError: ``agent.halt``.
        """
        connection, coming = self._connection, self.presence(uuid) is Presence.PRESENT
        if connection is None:
            raise _not_halted(uuid, "there is no connection to libvirt")
        try:
            domain = connection.lookupByUUIDString(uuid)
            if coming:
                domain.destroy()
            elif domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                domain.suspend()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in _ENDED:
                raise _not_halted(uuid, error.get_error_message()) from error

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
            self._forget()
            _close(connection)

    def _forget(self) -> None:
        with self._lock:
            self._connection = None
            self._presence, self._defined = {}, {}
            self._arriving = set()

    def _connect(self) -> libvirt.virConnect:
        connection = libvirt.open(self._uri)
        try:
            connection.registerCloseCallback(lambda *_: self._lost.set(), None)
            if connection.getType() == "QEMU":
                connection.setKeepAlive(LIBVIRT_PROBE_SECONDS, LIBVIRT_PROBES)
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
            looked = time.time()
            listed, defined = _listed(connection), _defined(connection)
        except libvirt.libvirtError:
            _close(connection)
            raise
        with self._lock:
            # What events said since is newer than the list.
            self._presence, self._defined = listed | self._presence, defined | self._defined
            self._connection = connection
            for uuid in [uuid for uuid, presence in self._presence.items() if presence is Presence.RUNS]:
                # It may have left since: what began after the look is not its business.
                self._tell(Happening(uuid, Event.RUNS, looked))
        return connection

    def _lifecycle(self, _: object, domain: libvirt.virDomain, event: int, detail: int, __: object) -> None:
        uuid = str(domain.UUIDString())
        if event in (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_UNDEFINED):
            self._definition(uuid, event == libvirt.VIR_DOMAIN_EVENT_DEFINED)
        presence = presence_after(event, detail)
        if presence is None:
            return
        with self._lock:
            before, waited = self._presence.get(uuid), uuid in self._arriving
            self._presence[uuid] = presence
            self._arriving.discard(uuid)
            if (event, detail) == _ARRIVES:
                self._arriving.add(uuid)
        if presence is Presence.GONE:
            ended = Event.MIGRATED if (event, detail) == _MIGRATED else Event.NEVER_RAN if waited else Event.GONE
            self._tell(Happening(uuid, ended, time.time()))
        elif presence is Presence.RUNS and before is not presence:
            self._tell(Happening(uuid, Event.RUNS, time.time()))

    def _definition(self, uuid: str, kept: bool) -> None:
        with self._lock:
            self._defined[uuid] = kept
        if self.transient(uuid):
            self._tell(Happening(uuid, Event.RUNS, time.time()))


def _listed(connection: libvirt.virConnect) -> dict[str, Presence]:
    found: dict[str, Presence] = {}
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            state = tuple(domain.state())
        except libvirt.libvirtError:
            continue  # it has just ended
        found[str(domain.UUIDString())] = presence_of(*state)
    return found


def _defined(connection: libvirt.virConnect) -> dict[str, bool]:
    kept = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT)
    return {str(domain.UUIDString()): True for domain in kept}


def presence_of(state: int, reason: int) -> Presence:
    """How an active guest in this state (virDomainState and its reason) is here."""
    halted = (
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
    )
    return Presence.PRESENT if state == libvirt.VIR_DOMAIN_PAUSED and reason in halted else Presence.RUNS


def _busy(domain: libvirt.virDomain) -> bool:
    """Whether a job is under way; a driver that has no jobs, libvirt's test driver, has none that takes long."""
    try:
        return bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        return False


def job_leaves(job: Mapping[str, object]) -> bool:
    """Whether a job, as virDomainGetJobStats tells of it, takes its guest to another host."""
    return bool(job.get(libvirt.VIR_DOMAIN_JOB_OPERATION) == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


def check_moves(layout: Layout, uuid: str, name: str) -> None:
    """See that a guest that is being migrated itself moves, not its definition alone.

    Only what libvirt notes for itself tells an offline migration of a guest that runs from another. It does so before
    it asks the destination (src/qemu/qemu_migration.c, qemuMigrationSrcBeginPhase). What it cannot tell, no guest
    leaves by: the guest runs on, whereas a TPM's state that was left behind may be gone for good.

    Raises:
        TransferError: ``transfer.offline``, ``transfer.unnoted``.
    """
    if "/" in name:
        raise _unnoted("its name has a slash")
    try:
        with layout.guest_status(name).open("rb") as status:
            job = parse_job(status.read(DOMAIN_XML_BYTES + 1))
    except OSError as error:
        raise _unnoted(f"{layout.guest_status(name)}: {error.strerror}") from error
    except DomainError as error:
        raise _unnoted(error.what) from error
    if (job.uuid, job.kind) != (uuid, "migration out") or not job.flags:
        raise _unnoted(f"{layout.guest_status(name)} does not speak of it")
    if job.flags & libvirt.VIR_MIGRATE_OFFLINE:
        raise TransferError(
            "transfer.offline",
            "an offline migration takes the definition of a guest that runs, but neither the guest nor its TPM",
            "virsh migrate --live, without --offline",
        )


def _unnoted(why: str) -> TransferError:
    return TransferError(
        "transfer.unnoted",
        f"this host cannot see how libvirt migrates the guest, {why}",
        "see that /run is not full, and that the agent can read libvirt's files in it",
    )


def _job(domain: libvirt.virDomain) -> Mapping[str, object]:
    try:
        found: Mapping[str, object] = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        # QEMU's driver always tells. What has no jobs, libvirt's test driver, is taken at its guests' word.
        return {libvirt.VIR_DOMAIN_JOB_OPERATION: libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT}
    return found


def _not_halted(uuid: str, why: str) -> HostError:
    return HostError(
        "agent.halt", f"guest {uuid} must not run here and cannot be paused, {why}", f"virsh destroy {uuid}"
    )


def _close(connection: libvirt.virConnect) -> None:
    try:
        connection.close()
    except libvirt.libvirtError:
        return  # the daemon has gone: there is nothing to close
