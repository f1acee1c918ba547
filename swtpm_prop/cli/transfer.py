"""``swtpm-prop transfer``: migrations of guests with custody that are under way, and how to decide an open one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
import libvirt

from swtpm_prop.agent.guests import presence_of
from swtpm_prop.cli import output
from swtpm_prop.cli.context import layout_of
from swtpm_prop.cli.guest import LOCAL, guest_argument, guest_uuid
from swtpm_prop.custody.form import Form, form
from swtpm_prop.errors import TransferError, UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.transfer.journal import Journal, Transfer
from swtpm_prop.transfer.machine import Gate, Presence, Side, State
from swtpm_prop.transfer.settle import Eyes, Settler, elsewhere
from swtpm_prop.transfer.speaker import Speaker

MEANING = {
    Side.SOURCE: {
        State.OFFERED: "the peer has got the key; whether the guest will run there is open",
        State.MOVED: "the guest has left for the peer, which has not said yet that it runs",
        State.YIELDED: "the guest runs at the peer; what is left of it here must end: virsh destroy, if it stays",
        State.RELEASED: "the guest is with the peer; its key and TPM state are destroyed here",
        State.RETURNING: "the guest was with the peer; it was to come back without custody, and did not run here yet",
        State.KEPT: "you said that the guest is here; the peer is not known to know",
        State.CANCELLED: "the guest stayed here; the peer is not known to know",
        State.CLOSED: "the guest stayed here",
        State.SETTLED: "the guest went to the peer, and came back or may be started here again by your word",
    },
    Side.DESTINATION: {
        State.ASKED: "the key is asked for, and not here",
        State.IMPORTED: "the key is here, and nothing was started with it",
        State.ARRIVING: "the guest is on its way",
        State.LEFT: "what should receive the guest has ended; whether the guest ran in it is open",
        State.ACTIVATED: "the guest is here; the peer is not known to have let go of it",
        State.CLAIMED: "you said that the guest is here; the peer is not known to know",
        State.REJECTED: "the guest stayed with the peer; what should receive it must end: virsh destroy, if it stays",
        State.OVERRULED: "the guest ran here, and somebody said at the peer that it is there",
        State.CANCELLED: "the guest did not come; the peer is not known to know",
        State.CLOSED: "the guest did not come",
        State.SETTLED: "the guest is here",
    },
}
"""What a state means to people."""

GATES = {
    Gate.START: "the guest may be started here",
    Gate.ASK_THEN_START: "the guest may be started here",
    Gate.ASK_THEN_REFUSE: "the guest can be started here if the peer says so",
    Gate.REFUSE: "the guest cannot be started here",
}


@click.group()
def command() -> None:
    """Migrations of guests whose keys this host's TPM keeps."""


@command.command("list")
@click.option("--all", "every", is_flag=True, help="Those too that are finished.")
@output.json_option
@click.pass_context
def list_(ctx: click.Context, every: bool, as_json: bool) -> None:
    """List the migrations that are not finished."""
    journal = Journal(layout_of(ctx))
    found = [transfer for uuid in journal.guests() for transfer in journal.of(uuid) if every or transfer.unfinished]
    if as_json:
        output.print_json([_for_programs(transfer) for transfer in found])
    elif found:
        columns = ("guest", "this host is", "peer", "state", "since")
        output.table(columns, [(t.uuid, t.side, t.peer, t.state, _moment(t.since)) for t in found])
    else:
        click.echo("no migration is open")


@command.command()
@guest_argument()
@output.json_option
@click.pass_context
def show(ctx: click.Context, guest: str, uri: str, as_json: bool) -> None:
    """Show what this host knows of the migrations of GUEST, the newest first.

    GUEST is a name, or a UUID: that of a guest that is not defined here any more is in 'transfer list --all'.
    """
    uuid, journal = guest_uuid(guest, uri), Journal(layout_of(ctx))
    found, gate = journal.of(uuid), journal.gate(uuid)
    if as_json:
        output.print_json({"guest": uuid, "start": gate, "transfers": [_for_programs(t) for t in found]})
        return
    if not found:
        raise TransferError(
            "transfer.none", f"nothing is known of migrations of {uuid}", "see swtpm-prop transfer list"
        )
    for transfer in found:
        peer = f"{'to' if transfer.side is Side.SOURCE else 'from'} {transfer.peer} ({transfer.endpoint})"
        click.echo(f"{transfer.id}  {peer}, {transfer.state} since {_moment(transfer.since)}")
        click.echo(f"  {MEANING[transfer.side][transfer.state]}")
    click.echo(GATES[gate])
    counting = journal.counting(uuid)
    if counting and gate in (Gate.ASK_THEN_REFUSE, Gate.REFUSE):
        click.echo(elsewhere(counting).mend)


@command.command()
@guest_argument()
@click.option("--here", is_flag=True, help="The guest is on this host.")
@click.option("--there", is_flag=True, help="The guest is on the transfer's other host.")
@click.option("--yes", is_flag=True, help="Do not ask, even if the guest's TPM state is not here.")
@output.json_option
@click.pass_context
def resolve(ctx: click.Context, guest: str, uri: str, here: bool, there: bool, yes: bool, as_json: bool) -> None:
    """Decide where GUEST is, when its other host is lost for good and no host can know.

    GUEST is a name, or a UUID: that of a guest that is not defined here any more is in 'transfer list'.

    Your word counts: see that nothing of the guest runs on the other side, nor is started there before that host has
    heard of this. Where an answer of the peer decides, your word is not taken.
    """
    if here == there:
        raise UsageError("usage.place", "it is not said where the guest is", "give --here or --there")
    uuid, layout = guest_uuid(guest, uri), layout_of(ctx)
    state = form(layout.guest_tpm(uuid))
    if here and state is Form.NONE:
        _warn_of_no_state(uuid, yes, as_json, layout)
    libvirt.registerErrorHandler(lambda *_: None, None)  # by default it prints each error itself
    settler = Settler(layout, Journal(layout), Eyes(_presence, _halt), Speaker(layout).report)
    transfer, gate = settler.resolve(uuid, here), settler.journal.gate(uuid)
    if as_json:
        about = {"guest": uuid, "start": gate, "tpmState": state.value}
        output.print_json({**about, "transfer": _for_programs(transfer)})
        return
    click.echo(f"{transfer.state}: {MEANING[transfer.side][transfer.state]}")
    click.echo(GATES[gate])


def _warn_of_no_state(uuid: str, yes: bool, as_json: bool, layout: Layout) -> None:
    """What the guest sealed is lost if it starts here so; nobody may learn that afterwards."""
    output.warn(
        f"the guest's TPM state is not here ({layout.guest_tpm(uuid)}): started here it gets a new, empty TPM, "
        "and what it sealed does not open; put a backup of the state there first, if there is one"
    )
    if yes:
        return
    if as_json:
        raise UsageError("usage.confirm", "--json cannot ask", "bring the TPM state back first, or add --yes")
    click.confirm("Is the guest here all the same?", abort=True, err=True)


def _presence(uuid: str) -> Presence:
    """What libvirt says now; UNSEEN without one."""
    try:
        domain = libvirt.open(LOCAL).lookupByUUIDString(uuid)
        presence = presence_of(*domain.state()) if domain.isActive() else Presence.GONE
        busy = presence is Presence.RUNS and domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
        return Presence.PRESENT if busy else presence
    except libvirt.libvirtError as error:
        return Presence.GONE if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN else Presence.UNSEEN


def _halt(uuid: str) -> None:
    click.secho(f"warning: guest {uuid} must not run here, destroy it: virsh destroy {uuid}", fg="yellow", err=True)


def _for_programs(transfer: Transfer) -> dict[str, Any]:
    return {
        "id": transfer.id,
        "guest": transfer.uuid,
        "side": transfer.side,
        "peer": transfer.peer,
        "endpoint": transfer.endpoint,
        "state": transfer.state,
        "meaning": MEANING[transfer.side][transfer.state],
        "since": _moment(transfer.since),
        "open": transfer.unfinished,
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
