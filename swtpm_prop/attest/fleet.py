"""The fleet's CA on its keeper's machine: a directory with its key, its certificate, and who was admitted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swtpm_prop import durable
from swtpm_prop.attest import certificates, enrolment, wire
from swtpm_prop.attest.certificates import Authority, Revocation
from swtpm_prop.attest.enrolment import Admission, Applicant, Request
from swtpm_prop.errors import AttestError, UsageError
from swtpm_prop.limits import FLEET_CERTIFICATE_BYTES, FLEET_RECORD_BYTES, KEY_BYTES, REVOCATIONS_BYTES
from swtpm_prop.trust import keys, strict_json
from swtpm_prop.trust.files import exclusive, read_file, write_file
from swtpm_prop.trust.signers import Ask
from swtpm_prop.trust.strict_json import Object, member

_KEY = "ca.key"
CA = "fleet.pem"
"""The fleet's certificate, for hosts and for who approves states."""
CRL = "fleet.crl"
"""What the fleet has revoked, likewise."""
_RECORD = "hosts.json"


class Member(NamedTuple):
    """One admission of a host.

    Attributes:
        host: its name.
        ek_name: Name of its endorsement key, hex.
        vouched_by: the maker's root; empty: the keeper.
        serials: of its certificates.
        admitted: seconds since the epoch, UTC.
        not_after: when its certificates end.
        revoked: when they were revoked; None if they were not.
    """

    host: str
    ek_name: str
    vouched_by: str
    serials: tuple[int, ...]
    admitted: int
    not_after: int
    revoked: int | None


class Fleet:
    """A fleet's directory.

    Args:
        directory: made by `create`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, directory: Path, name: str, passphrase: bytes | None, now: int) -> Fleet:
        """A new fleet in a directory that is empty or not there.

        Raises:
            UsageError: ``usage.fleet-there``.
            StoreError: as `files.exclusive`.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        authority = certificates.new_authority(name, key, now)
        protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
        fleet = cls(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with fleet._alone():
            if (directory / _KEY).exists():
                raise UsageError("usage.fleet-there", f"'{directory}' has a fleet", "name another directory")
            durable.write(directory / _KEY, private)
            fleet._record([])
            write_file(directory / CA, authority.certificate.public_bytes(serialization.Encoding.PEM))
            write_file(directory / CRL, certificates.revoke(authority, [], 1, now))
        return fleet

    def members(self) -> list[Member]:
        """All admissions, the oldest first.

        Raises:
            AttestError: ``attest.fleet-malformed``.
            TrustError: as `read_file`.
        """
        data = read_file(self.directory / _RECORD, FLEET_RECORD_BYTES)
        with wire.reading("fleet"):
            return [_member(entry) for entry in member(strict_json.parse(data), "admissions", list)]

    def crl(self) -> bytes:
        """What the fleet has revoked, PEM."""
        return read_file(self.directory / CRL, REVOCATIONS_BYTES)

    def check_new(self, applicant: Applicant) -> None:
        """Refuse a name that another host has, and a host that has another name.

        Raises:
            AttestError: ``fleet.name-taken``, ``fleet.tpm-taken``.
        """
        _check_new(self.members(), applicant)

    def admit(self, request: Request, applicant: Applicant, ask: Ask, now: int) -> Admission:
        """Issue a host's certificates; they are on record before they leave.

        Raises:
            AttestError: as `check_new`.
            StoreError: as `files.exclusive`.
            TrustError: the CA's key does not open.
        """
        authority = self._authority(ask)
        with self._alone():
            members = self.members()
            _check_new(members, applicant)
            admission = enrolment.admit(request, applicant, authority, self.crl(), now)
            ek_name = applicant.ek_name.hex()
            new = Member(
                applicant.host, ek_name, applicant.vouched_by, admission.serials, now, admission.not_after, None
            )
            self._record([*members, new])
        return admission

    def revoke(self, hosts: Sequence[str], ask: Ask, now: int) -> list[Member]:
        """Revoke all certificates of these hosts; with none, sign the list of what is revoked anew.

        Raises:
            AttestError: ``fleet.host-unknown``.
            StoreError: as `files.exclusive`.
            TrustError: the CA's key does not open.
        """
        authority = self._authority(ask)
        with self._alone():
            before = self.members()
            for host in hosts:
                if not any(entry.host == host and entry.revoked is None for entry in before):
                    raise AttestError(
                        "fleet.host-unknown", f"no host '{host}' is in this fleet", "see 'swtpm-prop fleet list'"
                    )
            after = [entry._replace(revoked=now) if _hit(entry, hosts) else entry for entry in before]
            self._record(after)
            number = certificates.crl_number(certificates.load_crl(self.crl(), authority.certificate)) + 1
            # What has expired needs no revocation.
            gone = [entry for entry in after if entry.revoked is not None and entry.not_after >= now]
            revoked = [Revocation(serial, entry.revoked or now) for entry in gone for serial in entry.serials]
            write_file(self.directory / CRL, certificates.revoke(authority, revoked, number, now))
        return [entry for entry in after if entry not in before]

    def crl_ends(self) -> int:
        """Until when hosts believe the list of what is revoked, seconds since the epoch."""
        return certificates.crl_ends(certificates.load_crl(self.crl(), self._ca()))

    def _ca(self) -> Any:
        return certificates.load_ca(read_file(self.directory / CA, FLEET_CERTIFICATE_BYTES))

    def _authority(self, ask: Ask) -> Authority:
        data = read_file(self.directory / _KEY, KEY_BYTES)
        passphrase = ask(f"passphrase of {self.directory / _KEY}").encode() if b"ENCRYPTED" in data else None
        key = keys.load_private(data, passphrase)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise AttestError("fleet.ca", "the fleet's key is not on P-256", "see that ca.key is the fleet's own")
        return Authority(self._ca(), key)

    def _record(self, members: Sequence[Member]) -> None:
        entries = [{**entry._asdict(), "serials": [f"{serial:x}" for serial in entry.serials]} for entry in members]
        durable.write(self.directory / _RECORD, json.dumps({"admissions": entries}, indent=1).encode() + b"\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with exclusive(self.directory, "the fleet"):
            yield


def _check_new(members: Sequence[Member], applicant: Applicant) -> None:
    ek_name = applicant.ek_name.hex()
    for entry in members:
        if entry.revoked is not None:
            continue
        if entry.host == applicant.host and entry.ek_name != ek_name:
            raise AttestError(
                "fleet.name-taken",
                f"'{entry.host}' is another machine of this fleet",
                f"if this one replaces it, revoke that one first: swtpm-prop fleet revoke DIR {entry.host}",
            )
        if entry.host != applicant.host and entry.ek_name == ek_name:
            raise AttestError(
                "fleet.tpm-taken",
                f"this machine is '{entry.host}' in this fleet",
                f"if its name has changed, revoke the old one first: swtpm-prop fleet revoke DIR {entry.host}",
            )


def _hit(entry: Member, hosts: Sequence[str]) -> bool:
    return entry.host in hosts and entry.revoked is None


def _member(entry: Object) -> Member:
    wire.only(entry, set(Member._fields))
    revoked = entry.get("revoked")
    return Member(
        member(entry, "host", str),
        member(entry, "ek_name", str),
        member(entry, "vouched_by", str),
        tuple(int(serial, 16) for serial in strict_json.strings(entry, "serials")),
        int(entry["admitted"]),
        int(entry["not_after"]),
        None if revoked is None else int(revoked),
    )
