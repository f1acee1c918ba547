"""A host that keeps guests' keys: its TPM, its place in the fleet, what is approved here, its agent, open transfers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from swtpm_prop import host_config
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.errors import Error
from swtpm_prop.limits import DOCTOR_SECONDS

UNIT = "/etc/systemd/system/multi-user.target.wants/swtpm-prop-agent.service"
"""What ``systemctl enable swtpm-prop-agent.service`` makes."""

DROP_INS = "/etc/systemd/system/swtpm-prop-agent.service.d"
"""Where an operator adds to the agent's unit."""

DEVICES = ("/dev/tpm0", "/dev/tpmrm0")
"""What the unit allows, see install/texts/agent.service."""

SOON = 30 * 86400
"""How long before its end, in seconds, a certificate of the fleet should be renewed."""


TRANSFER_SECONDS = 600
"""How long a transfer may be open; a large guest with much to copy takes minutes."""


START_SECONDS = 300
"""How long a guest's start may take from its preparation to that of its TPM; it takes a second."""


def concerned(patient: Patient) -> bool:
    """Whether this host keeps keys, or was meant to; others need not know of all this."""
    layout = patient.layout
    return layout.host_keys.exists() or layout.fleet_ca.exists() or any(layout.keys.glob("*.json"))


def tpm(patient: Patient) -> Iterator[Finding]:
    """The host's own TPM answers and has this host's keys.

    Raises:
        HostError: it does not; the error's own words are the finding.
    """
    if not concerned(patient):
        return
    if not patient.layout.host_keys.is_dir():
        yield problem("host.not-initialised", "this host has no keys in its TPM", "swtpm-prop host init")
    elif patient.live:
        # Imported here because tpm2_pytss takes longer than all other checks, and few hosts need it.
        from swtpm_prop.custody import opening

        with opening.hardware(patient.layout) as hardware:
            found = hardware.ak_public, hardware.parent_public
        yield ok("host.tpm", f"the host's TPM answers and has this host's {len(found)} keys")


def enrolment(patient: Patient) -> Iterator[Finding]:
    """The fleet's CA says who this host is, and will go on saying so for a while.

    Raises:
        AttestError: it does not; the error's own words are the finding.
    """
    if not concerned(patient):
        return
    from swtpm_prop.attest import certificates
    from swtpm_prop.attest.certificates import Kind

    layout, now = patient.layout, int(time.time())
    files = {Kind.AK: layout.host_keys / "ak.crt", Kind.TLS: layout.host_keys / "tls.crt"}
    missing = [path for path in (layout.fleet_ca, layout.fleet_crl, *files.values()) if not path.exists()]
    if missing:
        mend = "swtpm-prop host enroll; the fleet's files come from its keeper, or by swtpm-prop store sync"
        yield problem("host.not-enrolled", f"this host has no place in a fleet: {missing[0]} is missing", mend)
        return
    ca, crl = layout.fleet_ca.read_bytes(), layout.fleet_crl.read_bytes()
    found = {kind: certificates.der(path.read_bytes()) for kind, path in files.items()}
    names = {certificates.verify(der, ca, crl, kind, now) for kind, der in found.items()}
    if len(names) > 1:
        yield problem(
            "host.two-names", f"its certificates name {' and '.join(sorted(names))}", "swtpm-prop host enroll"
        )
    ends = {certificates.read(der).not_after: "this host's certificates" for der in found.values()}
    ends[certificates.crl_ends(certificates.load_crl(crl, certificates.load_ca(ca)))] = "the fleet's revocation list"
    first = min(ends)
    if first < now + SOON:
        what = f"{ends[first]} can be used for {(first - now) // 86400} more days"
        yield warning("host.enrolment-ends", what, "swtpm-prop host enroll, or a new fleet.crl from the fleet's keeper")
    else:
        yield ok("host.enrolled", f"the fleet knows this host as {', '.join(sorted(names))}")


def approvals(patient: Patient) -> Iterator[Finding]:
    """Each guest's key opens in the state that this host is in now."""
    from swtpm_prop.custody import keys

    uuids = sorted(path.stem for path in patient.layout.keys.glob("*.json"))
    if not uuids or not patient.live:
        return
    records = [record for record in (keys.load(uuid, patient.layout) for uuid in uuids) if record]
    for property in sorted({record.property for record in records}):
        guests = [record.uuid for record in records if record.property == property]
        yield _judge(patient, property, guests)


def _judge(patient: Patient, property: str, guests: list[str]) -> Finding:
    from swtpm_prop.custody import approvals, opening
    from swtpm_prop.trust import issuers

    layout = patient.layout
    others = f" and {len(guests) - 1} more" if guests[1:] else ""
    who = f"the keys of guest {guests[0]}{others}"
    try:
        public, listed = approvals.load(layout, issuers.load(layout.trust), property)
        with opening.hardware(layout) as hardware:
            state, epoch = hardware.pcrs(listed.pcrs(property)), hardware.epoch()
        approvals.authorize(listed, public, property, state)
    except Error as error:
        return problem(error.id, f"{who} do not open: {error.what}", error.mend)
    if epoch > listed.epoch:
        what = f"{who} do not open: the TPM counts epoch {epoch}, the newest list of '{property}' is of {listed.epoch}"
        return problem(
            "host.epoch-ahead", what, f"swtpm-prop store sync; or its authority: host approve --epoch {epoch}"
        )
    if epoch < listed.epoch:
        what = f"what was revoked for '{property}' still counts: the TPM counts epoch {epoch} of {listed.epoch}"
        return warning("host.epoch-behind", what, "swtpm-prop store sync")
    return ok("host.approved", f"{who} open: this state is approved for '{property}'")


def recovery(patient: Patient) -> Iterator[Finding]:
    """When this host burns down, its guests' keys burn with it, unless there is a recovery key."""
    if concerned(patient) and not host_config.load(patient.layout.host).custody.recovery:
        where = f"[custody] recovery of {patient.layout.host}"
        mend = f"name public keys in {where}, then 'swtpm-prop key rebind GUEST' for each that 'key show' lists"
        yield warning("custody.no-recovery", "no recovery key is named: a guest's key is lost with this host", mend)


def transfers(patient: Patient) -> Iterator[Finding]:
    """A migration that nothing has decided for a while; agents decide most within seconds."""
    from swtpm_prop.transfer.journal import Journal

    journal = Journal(patient.layout)
    known = [transfer for uuid in journal.guests() for transfer in journal.of(uuid) if transfer.unfinished]
    for transfer in known:
        if journal.now() - transfer.since > TRANSFER_SECONDS:
            what = f"the migration of guest {transfer.uuid} ({transfer.side}, peer {transfer.peer}) is {transfer.state}"
            mend = (
                f"see that the agents run on both hosts; swtpm-prop transfer show {transfer.uuid} says what to do else"
            )
            yield warning("transfer.open", what, mend)


def keys_in_memory(patient: Patient) -> Iterator[Finding]:
    """A key lies in a file from a start's preparation until its TPM has started, unless libvirtd ends in between.

    One that came by a migration lies in another from before that; the agent removes it if nothing starts.
    """
    for path in sorted([*patient.layout.run.glob("*/state-key"), *patient.layout.arriving.glob("*")]):
        if time.time() - path.stat().st_mtime <= START_SECONDS:
            continue
        if path.name == "state-key":
            what = f"a start of guest {path.parent.name} was cut off, and its key still lies in {path.parent}"
            yield warning("custody.key-left", what, f"start the guest; or remove {path.parent} while it is off")
        else:
            what = f"the arrival of a guest was cut off, and its key still lies in {path}"
            yield warning("custody.key-left", what, f"see that swtpm-prop's agent runs, then remove {path}")


def agent(patient: Patient) -> Iterator[Finding]:
    """Other hosts find somebody here."""
    if not concerned(patient):
        return
    if patient.live:
        yield _health(host_config.load(patient.layout.host).agent.metrics)
    yield from _device(patient)
    if not patient.at(UNIT).is_symlink():
        mend = "systemctl enable --now swtpm-prop-agent.service, unless something else runs swtpm-prop agent"
        yield warning("agent.not-enabled", "nothing starts the agent when this host starts", mend)


def _device(patient: Patient) -> Iterator[Finding]:
    """The agent's unit lets it open these devices only; every other command opens what host.toml names."""
    kind, _, device = host_config.load(patient.layout.host).tpm.tcti.partition(":")
    if kind != "device" or device in ("", *DEVICES):
        return
    if not any(f"DeviceAllow={device}" in path.read_text() for path in patient.at(DROP_INS).glob("*.conf")):
        what = f"host.toml names {device}, and nothing lets the agent open it"
        mend = f"[Service] DeviceAllow={device} rw in {DROP_INS}/tpm.conf; systemctl daemon-reload; restart the agent"
        yield warning("agent.device", what, mend)


def _health(endpoint: str) -> Finding:
    host, _, port = endpoint.rpartition(":")
    mend = "systemctl status swtpm-prop-agent.service says why"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), DOCTOR_SECONDS) as agent:
            agent.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            head, _, body = _all(agent).partition(b"\r\n\r\n")
    except OSError as error:
        return problem("agent.silent", f"the agent does not answer on {endpoint}: {error}", mend)
    if head.split(b" ")[1:2] == [b"200"]:
        return ok("agent.well", "the agent runs and is well")
    said = ", ".join(body.decode("utf-8", "replace").splitlines()) or "nothing that makes sense"
    return problem("agent.unwell", f"the agent says: {said}", mend)


def _all(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < 65536 and (more := connection.recv(4096)):
        data += more
    return data
