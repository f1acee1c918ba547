"""Are the guests that opted in as they should be while they run?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.install.steps import opted_in, running_guests

UUID = re.compile(r"(?<=/)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?=/)")


def guests(patient: Patient) -> Iterator[Finding]:
    """A guest that opted in and runs has what its start needs; else its TPM was started without the layer."""
    marked = opted_in(patient.layout)
    if not marked:
        return
    running = set(swtpm_guests()) if patient.live else set()
    prepared = set(running_guests(patient.layout))
    bare = sorted(running & set(marked) - prepared)
    for uuid in bare:
        mend = "shut it down, see that the daemon was restarted since swtpm-prop install, and start it again"
        yield problem("guests.without-layer", f"guest {uuid} opted in, but its TPM runs without the layer", mend)
    for uuid in sorted(prepared - running) if patient.live else ():
        mend = f"nothing, if it is just being started; else remove {patient.layout.guest_run(uuid)}"
        yield warning("guests.left-over", f"guest {uuid} does not run, but was not cleaned up after", mend)
    if not bare:
        yield ok("guests.layer", f"{len(marked)} guests opted in, {len(running & set(marked))} of them running")


def swtpm_guests() -> Iterator[str]:
    """UUIDs in the arguments of the swtpm processes here: libvirt keeps a guest's TPM in a directory of that name."""
    for process in (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        try:
            if (process / "comm").read_text().startswith("swtpm"):
                yield from UUID.findall((process / "cmdline").read_bytes().decode("utf-8", "replace"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
