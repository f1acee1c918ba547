"""Are the guests that opted in as they should be while they run?"""

from __future__ import annotations

from collections.abc import Iterator

from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.domain.processes import has_layer, swtpm_guests
from swtpm_prop.install.steps import opted_in, running_guests


def guests(patient: Patient) -> Iterator[Finding]:
    """A guest that opted in and runs has what its start needs, and a layer that writes its log."""
    marked = opted_in(patient.layout)
    if not marked:
        return
    running = set(swtpm_guests()) if patient.live else set()
    prepared = set(running_guests(patient.layout))
    layered = {uuid for uuid in running & prepared if has_layer(patient.layout.guest_log(uuid))}
    bare = sorted(running & set(marked) - layered)
    for uuid in bare:
        mend = "shut it down, see that the daemon was restarted since swtpm-prop install, and start it again"
        yield problem("guests.without-layer", f"guest {uuid} opted in, but its TPM runs without the layer", mend)
    for uuid in sorted(prepared - running) if patient.live else ():
        mend = f"nothing, if it is just being started; else remove {patient.layout.guest_run(uuid)}"
        yield warning("guests.left-over", f"guest {uuid} does not run, but was not cleaned up after", mend)
    if not bare:
        yield ok("guests.layer", f"guests that opted in: {len(marked)}, of these running: {len(running & set(marked))}")
