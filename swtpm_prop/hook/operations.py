"""libvirt's hook operations as a table, and what becomes of their errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from swtpm_prop.domain.identity import identify
from swtpm_prop.errors import Error, UsageError, printable
from swtpm_prop.hook.files import discard
from swtpm_prop.layout import Layout


def prepare(xml: bytes, layout: Layout) -> None:
    """Make the guest's start one with the layer if its XML speaks of us; else no marker may stop its plain start."""
    identity = identify(xml)
    uuid = identity.uuid
    if identity.concerned:
        # Imported here because lxml and sqlite3 would double what every other call costs.
        from swtpm_prop.hook.prepare import lay_out

        lay_out(identity, xml, layout)
    else:
        if layout.guest_key(uuid).exists() or (layout.transfers / uuid).exists():
            from swtpm_prop.account import swtpm_account
            from swtpm_prop.domain.stamp import transfer
            from swtpm_prop.hook.custody import key_for_start

            key_for_start(uuid, None, transfer(identity), swtpm_account(layout), layout)
        discard(layout.guest_run(uuid))
        layout.guest_marker(uuid).unlink(missing_ok=True)


def release(xml: bytes, layout: Layout) -> None:
    """The guest is gone; what its start needed goes too. Marker and log stay."""
    identity = identify(xml)
    discard(layout.guest_run(identity.uuid))
    if (layout.transfers / identity.uuid).exists():
        from swtpm_prop.hook.ended import tell_transfers

        tell_transfers(identity, layout)


def migrate(xml: bytes, layout: Layout) -> None:
    """A guest is to come from another host: not without its key, if that is in custody."""
    identity = identify(xml)
    if not identity.custody and not (layout.transfers / identity.uuid).exists():
        return
    from swtpm_prop.hook.door import have_let_in

    noted = have_let_in(xml, layout)
    if noted is None:
        # What speaks to hosts and TPMs takes a tenth of a second to import.
        from swtpm_prop.hook.migrate import let_in
        from swtpm_prop.transfer.speaker import Speaker

        noted = let_in(xml, layout, Speaker(layout))
    sys.stdout.buffer.write(noted)


def nothing(_xml: bytes, _layout: Layout) -> None:
    """Not our business."""


class Operation(NamedTuple):
    """What is done, and whether its failure is reported to libvirt, which then refuses what it was about to do."""

    step: Callable[[bytes, Layout], None]
    may_refuse: bool = False


OPERATIONS = {
    "prepare": Operation(prepare, may_refuse=True),  # before swtpm; start, restore, revert and incoming migration
    "start": Operation(nothing),
    "started": Operation(nothing),
    "stopped": Operation(nothing),
    "release": Operation(release),  # the last one, also after a start that was refused
    "restore": Operation(nothing),  # may rewrite the XML; prepare follows
    "migrate": Operation(migrate, may_refuse=True),  # at the destination, before anything else; prepare follows
    "reconnect": Operation(nothing),  # a refusal would kill the running guest
    "attach": Operation(nothing),
}
"""Every operation of libvirt's qemu hook (docs/hooks.rst); one that libvirt may add is none of our business."""


def run(argv: Sequence[str], xml: bytes, layout: Layout) -> int:
    """Carry out one hook call; returns the exit status, 1 only where that must stop the guest's start."""
    operation = OPERATIONS.get(argv[1], Operation(nothing)) if len(argv) > 1 else None
    try:
        if operation is None:
            raise UsageError(
                "hook.usage",
                "the hook is called by libvirt: NAME OPERATION SUBOPERATION EXTRA",
                "leave the hook to libvirt; swtpm-prop doctor says whether it works",
            )
        operation.step(xml, layout)
    except Error as error:
        say(error.line())
    except Exception as error:
        # A hook that dies with a traceback would show the user twenty lines; one must do.
        say(f"{type(error).__name__}: {error} [hook.failed]")
    else:
        return 0
    return 1 if operation is None or operation.may_refuse else 0


def say(line: str) -> None:
    """One line on standard error: libvirt shows it to the user if the hook refuses, else only its debug log has it."""
    print(f"swtpm-prop: {printable(line)}", file=sys.stderr)
