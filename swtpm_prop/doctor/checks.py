"""All checks in the order a person should read their findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from swtpm_prop.doctor import access, confinement, custody, daemon, guests, index, installation, rehearsal, swtpm
from swtpm_prop.doctor.finding import Finding, Patient, problem, warning
from swtpm_prop.errors import Error

CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    installation.installed,
    installation.programs,
    installation.interpreter,
    swtpm.programs,
    swtpm.preload,
    swtpm.local_ca,
    access.readable,
    rehearsal.rehearsal,
    index.index,
    index.store,
    daemon.daemons,
    confinement.apparmor,
    confinement.selinux,
    guests.guests,
    custody.tpm,
    custody.enrolment,
    custody.approvals,
    custody.recovery,
    custody.transfers,
    custody.keys_in_memory,
    custody.agent,
)


def examine(patient: Patient) -> list[Finding]:
    """Run every check; one that cannot be finished is a finding itself and keeps no other from running."""
    return list(dict.fromkeys(finding for check in CHECKS for finding in _run(check, patient)))


def _run(check: Callable[[Patient], Iterator[Finding]], patient: Patient) -> Iterator[Finding]:
    try:
        yield from check(patient)
    except Error as error:
        yield problem(error.id, error.what, error.mend)
    except PermissionError as error:
        yield warning("doctor.not-checked", f"{check.__name__} cannot be checked: {error}", "run this as root")
    except OSError as error:
        yield problem(
            "doctor.not-checked", f"{check.__name__} cannot be checked: {error}", "see whether the disk fails"
        )
