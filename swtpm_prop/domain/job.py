"""What libvirt notes of the job it has with a guest that runs: the one place where it says how it migrates a guest."""

from __future__ import annotations

from typing import NamedTuple

from swtpm_prop.domain.identity import scan
from swtpm_prop.domain.metadata import tree
from swtpm_prop.errors import DomainError


class Job(NamedTuple):
    """A job, as it stands in the status of its guest.

    Attributes:
        uuid: the guest's.
        kind: ``migration out``, ``save`` ... (src/conf/virdomainjob.c, virDomainAsyncJob); ``none`` if there is none.
        flags: what its caller asked for; of a migration virDomainMigrateFlags, of which each has some. 0 until the
            job's first phase: libvirt notes a job before it knows of its flags (virDomainObjBeginAsyncJob).
    """

    uuid: str
    kind: str
    flags: int


def parse_job(status: bytes) -> Job:
    """Read the status that libvirt writes of a running guest, for itself after a restart.

    Its form outlives a version, for a new daemon takes over the guests of an old one (src/qemu/qemu_domainjob.c,
    qemuDomainObjPrivateXMLFormatJob; tests/qemustatusxml2xmldata).

    Raises:
        DomainError: ``domain.status``; ``domain.xml-size``, ``domain.xml-malformed``, ``domain.xml-doctype``.
    """
    scan(status)
    root = tree(status)
    if root.tag != "domstatus":
        raise _strange("another form than is known")
    uuid, job = root.findtext("domain/uuid", ""), root.find("job")
    if job is None:
        return Job(uuid, "none", 0)
    try:
        return Job(uuid, job.get("async", "none"), int(job.get("flags", "0"), 16))
    except ValueError as error:
        raise _strange("flags that are no number") from error


def _strange(what: str) -> DomainError:
    return DomainError("domain.status", f"libvirt's status of the guest has {what}", "report this")
