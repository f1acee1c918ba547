"""Before libvirt starts the swtpm of an opted-in guest: lay out what its layer needs, or refuse the start."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from swtpm_prop import durable
from swtpm_prop.account import Account, swtpm_account
from swtpm_prop.domain.identity import Identity
from swtpm_prop.domain.log import ended_inactive
from swtpm_prop.domain.metadata import Vtpm, parse_domain
from swtpm_prop.domain.stamp import transfer
from swtpm_prop.errors import DomainError, HostError, StoreError
from swtpm_prop.hook import files
from swtpm_prop.hook.custody import Start, gate, key_for_start
from swtpm_prop.hook.warning import warn
from swtpm_prop.layout import Layout
from swtpm_prop.trust.index import Index

LAYER_VERSION = 1
"""Of layer.json; the layer refuses another."""


def lay_out(identity: Identity, xml: bytes, layout: Layout) -> None:
    """Make the start of the guest, whose domain XML speaks of us, one with the layer.

    Raises:
        Error: the guest must not start; nothing half-done stays behind.
    """
    vtpm = parse_domain(xml)
    if vtpm is None:
        raise DomainError(
            "domain.misplaced",
            "the domain XML speaks of us, but has no metadata of ours",
            "move our element right below <metadata>, or let swtpm-prop domain enable write it",
        )
    _look_at_path(layout)
    _look_at_index(layout)
    account, uuid = swtpm_account(layout), identity.uuid
    banks = ",".join(algorithm.name for algorithm in vtpm.all_banks())
    start = _start(identity, vtpm, account, layout)
    if not start.receives and _needs_activation(uuid, vtpm, banks, layout):
        # Imported here because it is seldom needed and costs a quarter of this call.
        from swtpm_prop.hook.activate import activate

        activate(layout.guest_tpm(uuid), banks, start.key, account, layout)
    _write(uuid, banks, _layer(uuid, vtpm, layout), start.key, account, layout)


def _start(identity: Identity, vtpm: Vtpm, account: Account, layout: Layout) -> Start:
    if vtpm.encrypted:
        # libvirt has the key; the guest may have been in custody before, and have left.
        gate(identity.uuid, None, transfer(identity), layout)
        return Start(None)
    return key_for_start(identity.uuid, vtpm.custody, transfer(identity), account, layout)


def _look_at_path(layout: Layout) -> None:
    """libvirt must find our programs, or the guest would start without the layer: this is the daemon's own PATH."""
    for name in ("swtpm", "swtpm_setup"):
        places = (Path(place, name) for place in os.environ.get("PATH", "").split(":"))
        found = next((place for place in places if os.access(place, os.X_OK)), None)
        ours = layout.libexec / name
        if found is None or not ours.exists() or not found.samefile(ours):
            raise HostError(
                "host.swtpm-path",
                f"libvirt would not start {ours} but {found}",
                "restart libvirtd or virtqemud if that was not done since the installation; or ask swtpm-prop doctor",
            )


def _look_at_index(layout: Layout) -> None:
    """The index must be usable. What an expired one means is the operator's choice; it says so itself in the log."""
    index = Index.open(str(layout.index))
    index.close()
    if index.expires >= max(time.time(), index.seen):
        return
    # Imported here because it is seldom needed, and tomllib costs a tenth of this call.
    from swtpm_prop import host_config

    what = "the certificate index has expired"
    mend = "run swtpm-prop store sync, or store build, with what is current"
    if host_config.load(layout.host).store.stale == "refuse":
        raise StoreError("store.stale", f"{what}, and this host's configuration refuses to start guests then", mend)
    warn(f"{what}, nothing will be certified [store.stale]: {mend}")


def _write(uuid: str, banks: str, layer: bytes, key: bytes | None, account: Account, layout: Layout) -> None:
    """Run directory, log, marker. The marker is last: it says that the banks are active."""
    for path, mode in ((layout.run, 0o755), (layout.logs, 0o755), (layout.state, 0o711), (layout.guests, 0o711)):
        files.make_directory(path, mode)
    marker = f"{banks}\n".encode()
    run = layout.guest_run(uuid)
    try:
        readable = Account(os.geteuid(), account.gid)
        files.write_directory(run, {"layer.json": layer, "pcr-banks": marker, **_keys(uuid, key, layout)}, readable)
        files.rotate_log(layout.guest_log(uuid), account)
        if _marked(uuid, layout) != banks:
            durable.replace(layout.guest_marker(uuid), marker, 0o644)
    except BaseException:
        files.discard(run)
        raise


def _keys(uuid: str, key: bytes | None, layout: Layout) -> dict[str, bytes]:
    """What the shims hand to swtpm; the hook script removes both keys at ``start``, and ``keyed`` refuses a second."""
    if key is None:
        return {}
    from swtpm_prop.custody.keys import migration_key

    paths = {layout.state_key(uuid): key, layout.migration_key(uuid): migration_key(key)}
    return {path.name: each.hex().encode() for path, each in paths.items()} | {"keyed": b""}


def _layer(uuid: str, vtpm: Vtpm, layout: Layout) -> bytes:
    banks = [
        {
            "algorithm": bank.algorithm.name,
            "pcrs": sorted(bank.pcrs),
            "visible": bank.visible,
            "properties": list(bank.properties),
        }
        for bank in vtpm.banks
    ]
    index, log = str(layout.index), str(layout.guest_log(uuid))
    layer = {"version": LAYER_VERSION, "uuid": uuid, "index": index, "log": log, "banks": banks}
    return json.dumps(layer).encode() + b"\n"


def _needs_activation(uuid: str, vtpm: Vtpm, banks: str, layout: Layout) -> bool:
    """Whether the guest has a TPM state in which the property banks may be inactive.

    A state that does not exist yet is made by libvirt through our swtpm_setup, with the right banks. Where the domain
    has active_pcr_banks, libvirt runs our swtpm_setup before every start anyway.
    """
    if vtpm.active or not (layout.guest_tpm(uuid) / "tpm2-00.permall").exists():
        return False
    if _marked(uuid, layout) == banks and not ended_inactive(layout.guest_log(uuid)):
        return False
    if vtpm.encrypted:
        raise DomainError(
            "domain.encrypted-state",
            "the property bank is not active in this guest's encrypted TPM state, which only libvirt can open",
            f"name {banks} in <active_pcr_banks> of the domain, then libvirt activates them",
        )
    return True


def _marked(uuid: str, layout: Layout) -> str:
    try:
        return layout.guest_marker(uuid).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""
