"""What becomes of a guest's key before a start: by its metadata, what this host has of it, and its TPM state."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from swtpm_prop.account import Account
from swtpm_prop.custody.form import Form, form
from swtpm_prop.errors import HostError
from swtpm_prop.hook.files import make_directory
from swtpm_prop.hook.warning import warn
from swtpm_prop.layout import Layout

if TYPE_CHECKING:
    from swtpm_prop.custody.keys import KeyRecord
    from swtpm_prop.custody.state import Place
    from swtpm_prop.transfer.handover import Arrival
    from swtpm_prop.transfer.journal import Transfer
    from swtpm_prop.transfer.messages import Report
    from swtpm_prop.transfer.settle import Reach


class Kept(Enum):
    """What this host has of the guest's key."""

    NONE = "none"
    IDLE = "idle"  # a key, and a state that may be plain: custody is being switched on, or was switched off
    BOUND = "bound"  # a key, and a state that is the guest's only if it is encrypted under it


class Step(Enum):
    """What is done; in words for whoever reads `MATRIX`."""

    NOTHING = "start without a key"
    LOOSEN = "note that the state may be plain, start without a key"
    DECRYPT = "note it, make the state plain, start without a key"
    CREATE = "make a key"
    CREATE_AND_ENCRYPT = "make a key, encrypt the state"
    ENCRYPT = "open the key, encrypt the state"
    BIND = "open the key, note that the state is encrypted"
    OPEN = "open the key"
    REFUSE_WITHOUT_KEY = "refuse: the key is not here"
    REFUSE_PLAIN = "refuse: this state is not the guest's"
    REFUSE_UNREADABLE = "refuse: nobody can tell what this state is"


MATRIX = {
    # Custody asked for, key here, TPM state.
    (False, Kept.NONE, Form.NONE): Step.NOTHING,
    (False, Kept.NONE, Form.PLAIN): Step.NOTHING,
    (False, Kept.NONE, Form.ENCRYPTED): Step.REFUSE_WITHOUT_KEY,
    (False, Kept.NONE, Form.UNREADABLE): Step.NOTHING,
    (False, Kept.IDLE, Form.NONE): Step.NOTHING,
    (False, Kept.IDLE, Form.PLAIN): Step.NOTHING,
    (False, Kept.IDLE, Form.ENCRYPTED): Step.DECRYPT,
    (False, Kept.IDLE, Form.UNREADABLE): Step.NOTHING,
    (False, Kept.BOUND, Form.NONE): Step.LOOSEN,
    (False, Kept.BOUND, Form.PLAIN): Step.LOOSEN,
    (False, Kept.BOUND, Form.ENCRYPTED): Step.DECRYPT,
    (False, Kept.BOUND, Form.UNREADABLE): Step.REFUSE_UNREADABLE,
    (True, Kept.NONE, Form.NONE): Step.CREATE,
    (True, Kept.NONE, Form.PLAIN): Step.CREATE_AND_ENCRYPT,
    (True, Kept.NONE, Form.ENCRYPTED): Step.REFUSE_WITHOUT_KEY,
    (True, Kept.NONE, Form.UNREADABLE): Step.REFUSE_UNREADABLE,
    (True, Kept.IDLE, Form.NONE): Step.BIND,
    (True, Kept.IDLE, Form.PLAIN): Step.ENCRYPT,
    (True, Kept.IDLE, Form.ENCRYPTED): Step.BIND,
    (True, Kept.IDLE, Form.UNREADABLE): Step.REFUSE_UNREADABLE,
    (True, Kept.BOUND, Form.NONE): Step.OPEN,
    (True, Kept.BOUND, Form.PLAIN): Step.REFUSE_PLAIN,
    (True, Kept.BOUND, Form.ENCRYPTED): Step.OPEN,
    (True, Kept.BOUND, Form.UNREADABLE): Step.REFUSE_UNREADABLE,
}
"""An ordinary start. One that receives a guest opens the key that came with it, whatever an earlier stay left here.

A key is kept before a state is encrypted under it, becomes bound when the state is, and idle again before the state is
made plain: a process that is killed in any step comes to a row that goes on with it. An idle key is never forgotten,
because saved images and snapshots of the guest are encrypted under it too.
"""


class Case(NamedTuple):
    """One start, and what there is for it.

    Attributes:
        property: the host property that the metadata demands.
    """

    uuid: str
    property: str
    account: Account
    layout: Layout

    def place(self) -> Place:
        """The guest's TPM state."""
        from swtpm_prop.custody import state

        return state.place(self.uuid, self.account, self.layout)

    def record(self) -> KeyRecord:
        """The guest's key record, which is there."""
        from swtpm_prop.custody import keys

        record = keys.load(self.uuid, self.layout)
        if record is None:
            raise _without_key(self.uuid)
        return record


class Start(NamedTuple):
    """What a start has to know.

    Attributes:
        key: of the TPM state, 32 bytes; None: it is not in custody.
        receives: the guest comes from another host and brings its state: what an earlier stay left here is replaced.
    """

    key: bytes | None
    receives: bool = False


def key_for_start(uuid: str, property: str | None, transfer: str, account: Account, layout: Layout) -> Start:
    """The key of the TPM state for this start of the guest.

    Args:
        uuid: the guest's, whose state is not one that libvirt encrypts by itself.
        property: the host property that its metadata demands; None: it does not ask for custody.
        transfer: what the migrate hook has noted in the XML: the id of the transfer by which this start receives the
            guest, see also `returning`; empty for an ordinary start.
        account: swtpm's.
        layout: of this host.

    Raises:
        Error: the guest must not start; its state is whole, under the old key or the new one.
    """
    arriving = gate(uuid, property, transfer, layout)
    case = Case(uuid, property or "", account, layout)
    if property is not None:
        _look_at_memory(layout)
    if arriving is not None:
        return Start(_arrived(case, arriving), receives=True)
    step = MATRIX[property is not None, _kept(uuid, layout), form(layout.guest_tpm(uuid))]
    return Start(_TAKEN[step](case))


def gate(uuid: str, property: str | None, transfer: str, layout: Layout) -> Arrival | None:
    """Ask the journal of transfers whether the guest may start here.

    Args:
        uuid, property, transfer, layout: as `key_for_start`.

    Returns:
        The key that came with the guest which this start receives; None for an ordinary start.

    Raises:
        TransferError: it may not: its place is another host, or nobody knows.
    """
    if not (layout.transfers / uuid).exists():
        return None
    from swtpm_prop.hook.returning import comes_back
    from swtpm_prop.transfer.journal import Journal
    from swtpm_prop.transfer.settle import HOOK, Settler

    settler = Settler(layout, Journal(layout), HOOK, _reach(layout))
    newest = settler.journal.of(uuid)[:1]
    # Another start of the same guest must not pass for the one that receives it, and run while the source's runs.
    arriving = settler.arrive(uuid) if newest and newest[0].id == transfer else None
    returns = property is None and comes_back(uuid, transfer, settler.journal)
    if returns:
        settler.come_back(uuid)
    elif arriving is None:
        settler.gate(uuid)
    return arriving


def _reach(layout: Layout) -> Reach:
    def report(known: Transfer, said: Report) -> Report:
        # Imported here: most starts have no peer to ask.
        from swtpm_prop.transfer.speaker import Speaker

        return Speaker(layout).report(known, said)

    return report


def _kept(uuid: str, layout: Layout) -> Kept:
    if not layout.guest_key(uuid).exists():
        return Kept.NONE
    # Imported here, as all that works on keys: a guest that never was in custody does not pay for it.
    from swtpm_prop.custody import keys

    record = keys.load(uuid, layout)
    return Kept.NONE if record is None else Kept.BOUND if record.encrypted else Kept.IDLE


def _look_at_memory(layout: Layout) -> None:
    """A key in a file may only ever be in memory: a disk does not forget."""
    from swtpm_prop.custody import mounts

    make_directory(layout.run, 0o755)
    if mounts.kind(layout.run) not in mounts.MEMORY:
        raise HostError(
            "host.run-on-disk",
            f"{layout.run} is not in memory: the keys of guests would be written to a disk",
            "mount a tmpfs on /run, as systemd does",
        )


# -- steps ----------------------------------------------------------------------------------------


def _nothing(_case: Case) -> None:
    """Not in custody."""


def _loosen(case: Case) -> None:
    from swtpm_prop.custody import keys

    keys.store(case.record()._replace(encrypted=False), case.layout)


def _decrypt(case: Case) -> None:
    from swtpm_prop.custody import opening, state

    with opening.hardware(case.layout) as tpm:
        key = opening.open_(case.record(), tpm, case.layout)
    # Another one's it may be once custody is off: say one that libvirt encrypts.
    if state.opens(case.place(), key):
        _loosen(case)
        state.convert(case.place(), key, None)


def _create(case: Case) -> bytes:
    return _created(case, encrypted=True)


def _create_and_encrypt(case: Case) -> bytes:
    key = _created(case, encrypted=False)
    _convert_and_bind(case, case.record(), key)
    return key


def _encrypt(case: Case) -> bytes:
    record = case.record()
    key = _unsealed(case, record)
    _convert_and_bind(case, record, key)
    return key


def _bind(case: Case) -> bytes:
    from swtpm_prop.custody import keys

    record = case.record()
    key = _open(case, record)
    keys.store(record._replace(encrypted=True), case.layout)
    return key


def _open_kept(case: Case) -> bytes:
    return _open(case, case.record())


def _refuse_without_key(case: Case) -> bytes:
    raise _without_key(case.uuid)


def _refuse_plain(case: Case) -> bytes:
    raise HostError(
        "custody.state-plain",
        "the TPM state is plain, but this guest's was encrypted: somebody has put another one in its place",
        f"put the guest's own back; if this one is right, 'swtpm-prop key rebind {case.uuid} --accept-plain'",
    )


def _refuse_unreadable(case: Case) -> bytes:
    from swtpm_prop.custody.form import PERMANENT, unreadable

    raise unreadable(case.layout.guest_tpm(case.uuid) / PERMANENT, "it is damaged, or of a swtpm unknown here")


_TAKEN: dict[Step, Callable[[Case], bytes | None]] = {
    Step.NOTHING: _nothing,
    Step.LOOSEN: _loosen,
    Step.DECRYPT: _decrypt,
    Step.CREATE: _create,
    Step.CREATE_AND_ENCRYPT: _create_and_encrypt,
    Step.ENCRYPT: _encrypt,
    Step.BIND: _bind,
    Step.OPEN: _open_kept,
    Step.REFUSE_WITHOUT_KEY: _refuse_without_key,
    Step.REFUSE_PLAIN: _refuse_plain,
    Step.REFUSE_UNREADABLE: _refuse_unreadable,
}


def _created(case: Case, encrypted: bool) -> bytes:
    """A new key, kept on this host before anything depends on it."""
    from swtpm_prop.custody import keys, opening

    with opening.hardware(case.layout) as tpm:
        record, key = opening.create(case.uuid, case.property, tpm, case.layout)
    keys.store(record._replace(encrypted=encrypted), case.layout)
    if not record.recovery:
        warn(
            f"the key of guest {case.uuid} has no recovery key, its TPM is lost with this host [custody.no-recovery]: "
            f"name recovery keys in host.toml, then 'swtpm-prop key rebind {case.uuid}'"
        )
    return key


def _convert_and_bind(case: Case, record: KeyRecord, key: bytes) -> None:
    from swtpm_prop.custody import keys, state

    state.convert(case.place(), None, key)
    keys.store(record._replace(encrypted=True), case.layout)


def _open(case: Case, record: KeyRecord) -> bytes:
    """The key; it fits the state here, if there is one."""
    from swtpm_prop.custody import state

    key = _unsealed(case, record)
    if form(case.layout.guest_tpm(case.uuid)) is Form.ENCRYPTED and not state.opens(case.place(), key):
        raise HostError(
            "custody.state-foreign",
            "the TPM state is not encrypted under the guest's key, or was changed",
            "put the guest's own state back; 'swtpm-prop key recover' if its key is an older one",
        )
    return key


def _arrived(case: Case, arrival: Arrival) -> bytes:
    _check_property(case, arrival.record)
    return arrival.key or _unsealed(case, arrival.record)


def _unsealed(case: Case, record: KeyRecord) -> bytes:
    from swtpm_prop.custody import opening

    _check_property(case, record)
    with opening.hardware(case.layout) as tpm:
        return opening.open_(record, tpm, case.layout)


def _check_property(case: Case, record: KeyRecord) -> None:
    if record.property != case.property:
        raise HostError(
            "custody.property-changed",
            f"the guest demands '{case.property}' of its host, its key was sealed for '{record.property}'",
            f"if that is right: swtpm-prop key rebind {case.uuid} --property {shlex.quote(case.property)}",
        )


def _without_key(uuid: str) -> HostError:
    return HostError(
        "custody.key-missing",
        "the guest's TPM state is encrypted, and this host does not have its key",
        f"start it on the host that has; if that is lost, 'swtpm-prop key recover {uuid} --key RECOVERY.pem'",
    )
