"""``swtpm-prop key forget``: destroy the key of a guest that is gone for good, and of no other."""

from __future__ import annotations

import click

from swtpm_prop.cli import output
from swtpm_prop.cli.context import layout_of
from swtpm_prop.cli.guest import guest_argument, guest_uuid, known_here
from swtpm_prop.custody import keys
from swtpm_prop.custody.form import Form, form
from swtpm_prop.custody.rebinding import without_record
from swtpm_prop.errors import HostError, TransferError, UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal


@click.command()
@guest_argument()
@click.option("--leave-state", is_flag=True, help="Its TPM state lies here, and stays: another host may use it too.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.json_option
@click.pass_context
def forget(ctx: click.Context, guest: str, uri: str, leave_state: bool, yes: bool, as_json: bool) -> None:
    """Destroy the key of GUEST, which is gone for good.

    GUEST is its UUID: 'key show' says whose guests are not defined here any more. Saved images and snapshots of it open
    nowhere after that, nor does a backup of its TPM state, but by a recovery key.
    """
    if as_json and not yes:
        raise UsageError("usage.confirm", "--json cannot ask", "look at 'key show' first, then add --yes")
    uuid, layout = guest_uuid(guest, uri), layout_of(ctx)
    _check_gone(uuid, uri, leave_state, layout)
    if not yes:
        output.warn(
            f"saved images, snapshots and backups of guest {uuid} open nowhere after this, but by a recovery key"
        )
        click.confirm("Destroy its key?", abort=True, err=True)
    journal = Journal(layout)
    with journal.locked(uuid):
        # Again: while somebody thought about it, the guest may have been defined anew or have been on its way here.
        _check_gone(uuid, uri, leave_state, layout)
        # A former host that asks hears from now on that the guest is not here: it may be begun anew there. The key goes
        # last: without it nothing is found here to forget, if this is cut off.
        journal.forget(uuid)
        keys.destroy(uuid, layout)
    if as_json:
        output.print_json({"guest": uuid, "forgotten": True})
    else:
        click.echo(f"this host has no key of guest {uuid} any more")


def _check_gone(uuid: str, uri: str, leave_state: bool, layout: Layout) -> None:
    """Check that nothing here needs the guest's key; a damaged record may go like any other.

    Raises:
        HostError: ``custody.no-record``, ``custody.guest-here``, ``custody.state-here``.
        TransferError: ``transfer.open``; the journal cannot be read.
        DomainError: libvirt cannot be asked.
    """
    if not layout.guest_key(uuid).exists():
        raise without_record(uuid)
    name = known_here(uri).get(uuid)
    if name is not None:
        raise HostError(
            "custody.guest-here",
            f"libvirt here has the guest, its name is '{name}'",
            "if it is gone for good, destroy and undefine it first",
        )
    for transfer in Journal(layout).of(uuid):
        if transfer.unfinished:
            raise TransferError(
                "transfer.open",
                f"a migration of the guest with host '{transfer.peer}' is not finished ({transfer.state})",
                f"see 'swtpm-prop transfer show {uuid}'",
            )
    directory = layout.guest_tpm(uuid)
    if not leave_state and form(directory) is not Form.NONE:
        raise HostError(
            "custody.state-here",
            f"the guest's TPM state is here still, in '{directory.parent}'",
            "if nobody needs it, remove it first; if it is another host's too, on shared storage, add --leave-state",
        )
