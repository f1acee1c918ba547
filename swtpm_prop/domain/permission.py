"""What to tell of a guest that is not allowed to move: the whole command that allows it."""

from __future__ import annotations

import shlex

from swtpm_prop.domain.metadata import Vtpm
from swtpm_prop.domain.pcrs import format_pcrs
from swtpm_prop.errors import TransferError
from swtpm_prop.limits import REFUSAL_CHARS


def not_allowed(name: str, vtpm: Vtpm | None) -> TransferError:
    """The refusal to let a guest's key go.

    Args:
        name: the guest's.
        vtpm: what its metadata ask for, as it runs; None: nothing.
    """
    how = allowing(name, vtpm)
    if len(how) > REFUSAL_CHARS // 2 or (vtpm and len(vtpm.banks) > 1):
        how = _BY_HAND.format(shlex.quote(name))
    return TransferError(
        "migration.not-allowed",
        "the metadata of the guest, as it runs, do not let its key go to another host",
        f"if it may move, where it runs do this, shut it down and start it once: {how}",
    )


_BY_HAND = 'virsh edit {}, and put a <migration allow="attested"/> of our namespace behind <custody>'
"""`domain enable` writes one bank; and a command that is cut short on its way to a person would ask for something else:
libvirt cuts long messages (VIR_ERROR_MAX_LENGTH, src/util/virerror.h)."""


def allowing(name: str, vtpm: Vtpm | None) -> str:
    """The command that asks for what the metadata ask for, one bank, and for migration."""
    words = ["swtpm-prop", "domain", "enable", name]
    for bank in vtpm.banks if vtpm else ():
        words += ["--bank", bank.algorithm.name, "--pcrs", format_pcrs(bank.pcrs)]
        words += ["--hidden"] * (not bank.visible)
        words += [word for uri in bank.properties for word in ("--property", uri)]
    words += ["--property", "URI"] * (vtpm is None)
    words += ["--custody", vtpm.custody if vtpm and vtpm.custody else "URI", "--migration", "attested"]
    return shlex.join(words)
