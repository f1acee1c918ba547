"""The host's own TPM: its keys, its epoch counter, and secrets that open only here (by tpm2-tss, ESAPI)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tpm2_pytss import ESAPI, TCTILdr, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_EO, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_DIGEST,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_NAME,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMS_NV_PUBLIC,
    TPMS_SENSITIVE_CREATE,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
)

from swtpm_prop.custody import locks, policy, refusals
from swtpm_prop.custody.objects import Attestation, ImportBlob, Sealed
from swtpm_prop.custody.policy import Authorization
from swtpm_prop.custody.refusals import naming
from swtpm_prop.errors import HostError
from swtpm_prop.limits import EPOCH_STEPS, TPM_LOCK_SECONDS
from swtpm_prop.tpm.algorithms import SHA256
from swtpm_prop.tpm.commands import CC_GET_CAPABILITY, NO_SESSIONS
from swtpm_prop.tpm.pcr import READ_PCRS, build_selection

PARENT_HANDLE = 0x81005350
"""Below this storage key lie all secrets of this software; persistent, in the owner's range."""

AK_HANDLE = 0x81005351
"""The attestation key."""

EK_HANDLE = 0x81010001
"""Where a manufacturer's RSA endorsement key lies (TCG registry of reserved handles, table 4)."""

SECRET_BYTES = 128
"""Largest secret a TPM must be able to seal (part 2, MAX_SYM_DATA)."""

_CC_FLUSH_CONTEXT = 0x00000165
_CAP_HANDLES = 1
_FLUSHED = (0x80000000, 0x02000000)
"""First transient object, first loaded session."""

_NO_SCHEME = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
_NO_WRAP = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)


class Hardware:
    """The TPM, for one process at a time; a context manager.

    Everything it loads is flushed again. A transient object or session that is there when it begins was left behind by
    a process that was killed, and is flushed too: where a resource manager stands in between (``/dev/tpmrm0``) none
    is ever seen.

    Args:
        tcti: how to reach it (Tss2_TctiLdr_Initialize).
        lock: file that is locked meanwhile.
        keys: directory of this host's key files. Who initialises has to name it; who else does, hears whether the
            storage parent itself is another one when something does not belong below it.

    Raises:
        HostError: on entry ``tpm.busy``, ``tpm.unreachable``; in every method ``tpm.unreachable``, ``tpm.not-started``,
            ``tpm.not-initialised``, ``tpm.owner-password``, ``tpm.failed``.
    """

    def __init__(self, tcti: str, lock: Path, keys: Path | None = None) -> None:
        self._tcti = tcti
        self._lock = lock
        self._keys = keys
        self._stack = ExitStack()

    def __enter__(self) -> Hardware:
        # The library prints what it meets on standard error, which libvirt shows; errors are said in one line here.
        os.environ.setdefault("TSS2_LOG", "all+none")
        with ExitStack() as stack:
            stack.enter_context(_locked(self._lock))
            with naming(f"the TPM '{self._tcti}' cannot be reached"):
                tcti = TCTILdr.parse(self._tcti)
                stack.callback(tcti.close)
                _flush_left_over(tcti)
                self._tpm = stack.enter_context(ESAPI(tcti))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- what the host is -----------------------------------------------------------------------

    @naming("the TPM cannot be initialised")
    def initialise(self) -> None:
        """Make what is missing of parent, attestation key, endorsement key and epoch counter.

        Parent and attestation key are kept in files too: what is lost of a handle comes back from there. The
        endorsement key is a primary key: made anew it is the same.

        Raises:
            HostError: ``tpm.handle-taken``; as `host_keys.settle`.
            TrustError: as `host_keys.settle`.
        """
        # Imported here, for no start of a guest reads key files.
        from swtpm_prop.custody import host_keys

        if self._keys is None:
            raise ValueError("no directory for key files")
        host_keys.settle(self._tpm, self._keys)
        if not self._there(EK_HANDLE):
            with self._flushed(self._tpm.create_primary(None, self._endorsement[1], ESYS_TR.ENDORSEMENT)[0]) as key:
                self._tpm.evict_control(ESYS_TR.OWNER, key, EK_HANDLE)
        if not self._there(policy.COUNTER_HANDLE):
            public, _ = TPMS_NV_PUBLIC.unmarshal(policy.counter_public(written=False))
            self._tpm.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public))
        if not self._counts():
            self._raise()

    @property
    def parent_public(self) -> bytes:
        """The storage parent's TPM2B_PUBLIC."""
        return self._public(PARENT_HANDLE)

    @property
    def ak_public(self) -> bytes:
        """The attestation key's TPM2B_PUBLIC."""
        return self._public(AK_HANDLE)

    @property
    def ek_public(self) -> bytes:
        """The endorsement key's TPM2B_PUBLIC (TCG EK Credential Profile 2.5, B.3.3 template L-1)."""
        return self._public(EK_HANDLE)

    @naming("the endorsement certificate cannot be read")
    def ek_certificate(self) -> bytes | None:
        """The manufacturer's certificate in DER (NV index 0x01c00002), None where there is none."""
        certificate = self._endorsement[0]
        return None if certificate is None else _der(bytes(certificate))

    @naming("the PCRs cannot be read")
    def pcrs(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """These PCRs of the SHA-256 bank."""
        rest = sorted(set(numbers))
        values: dict[int, bytes] = {}
        while rest:
            _, _, digests = self._tpm.pcr_read(_selection(rest[:READ_PCRS]))
            if len(digests) != len(rest[:READ_PCRS]):
                raise HostError(
                    "tpm.no-sha256-bank", "the TPM's SHA-256 bank is not active", "activate it in the firmware's set-up"
                )
            values |= zip(rest, map(bytes, digests), strict=False)
            rest = rest[READ_PCRS:]
        return values

    # -- epoch ----------------------------------------------------------------------------------

    @naming("the epoch counter cannot be read")
    def epoch(self) -> int:
        """The newest epoch this TPM has heard of; approvals of an earlier one do not count any more."""
        counter = self._handle(policy.COUNTER_HANDLE)
        return int.from_bytes(bytes(self._tpm.nv_read(counter, policy.COUNTER_BYTES)), "big")

    @naming("the epoch counter cannot be raised")
    def raise_epoch(self, to: int) -> None:
        """Raise the epoch counter to at least ``to``; it never goes back.

        Raises:
            HostError: ``tpm.epoch-far``: that takes more steps than an NV cell should be asked for.
        """
        missing = to - self.epoch()
        if missing > EPOCH_STEPS:
            raise HostError(
                "tpm.epoch-far",
                f"epoch {to} is {missing} steps ahead of this TPM's counter, allowed are {EPOCH_STEPS}",
                "see that the approval list is genuine; its authority should count in single steps",
            )
        for _ in range(missing):
            self._raise()

    # -- attestation ----------------------------------------------------------------------------

    @naming("the TPM cannot quote its PCRs")
    def quote(self, numbers: Iterable[int], qualifying: bytes) -> Attestation:
        """These PCRs of the SHA-256 bank and ``qualifying`` (at most 64 bytes), signed by the attestation key."""
        attest, signature = self._tpm.quote(self._handle(AK_HANDLE), _selection(sorted(set(numbers))), qualifying)
        return Attestation(bytes(attest), signature.marshal())

    @naming("the TPM cannot certify its storage key")
    def certify_parent(self, qualifying: bytes) -> Attestation:
        """The storage parent's Name and ``qualifying`` (at most 64 bytes), signed by the attestation key."""
        attest, signature = self._tpm.certify(self._parent, self._handle(AK_HANDLE), qualifying, _NO_SCHEME)
        return Attestation(bytes(attest), signature.marshal())

    @naming("the TPM cannot certify its epoch counter")
    def certify_epoch(self, qualifying: bytes) -> Attestation:
        """The whole epoch counter and ``qualifying`` (at most 64 bytes), signed by the attestation key."""
        counter = self._handle(policy.COUNTER_HANDLE)
        attest, signature = self._tpm.nv_certify(
            self._handle(AK_HANDLE), counter, qualifying, _NO_SCHEME, policy.COUNTER_BYTES, 0, counter
        )
        return Attestation(bytes(attest), signature.marshal())

    @naming("the credential cannot be opened")
    def activate(self, credential_blob: bytes, secret: bytes) -> bytes:
        """TPM2_ActivateCredential: what was encrypted for this TPM's endorsement key and attestation key together.

        Args:
            credential_blob: TPM2B_ID_OBJECT.
            secret: TPM2B_ENCRYPTED_SECRET.

        Raises:
            HostError: ``tpm.foreign-credential``.
        """
        blob, _ = TPM2B_ID_OBJECT.unmarshal(credential_blob)
        seed, _ = TPM2B_ENCRYPTED_SECRET.unmarshal(secret)
        with self._session(TPM2_SE.HMAC) as answer, self._session(TPM2_SE.POLICY) as endorsed:
            # of the sessions of a command one alone may hide its parameters
            self._tpm.trsess_set_attributes(endorsed, TPMA_SESSION.CONTINUESESSION)
            self._tpm.policy_secret(ESYS_TR.ENDORSEMENT, endorsed, expiration=0)
            ak, ek = self._handle(AK_HANDLE), self._handle(EK_HANDLE)
            with refusals.of_credential():
                opened = self._tpm.activate_credential(ak, ek, blob, seed, session1=answer, session2=endorsed)
        return bytes(opened)

    # -- secrets --------------------------------------------------------------------------------

    @naming("the secret cannot be sealed")
    def seal(self, secret: bytes, authorize: bytes | None = None) -> Sealed:
        """Seal at most SECRET_BYTES below the parent.

        Args:
            secret: travels encrypted to the TPM.
            authorize: the policy digest to open it and to take it to another TPM (`policy.key_policy`); None: it opens
                in this TPM at any time, and never leaves it.
        """
        attributes = "noda" if authorize else "noda|fixedtpm|fixedparent|userwithauth"
        template = TPM2B_PUBLIC(publicArea=TPMT_PUBLIC.parse("keyedhash", objectAttributes=attributes))
        template.publicArea.authPolicy = authorize or b""
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=secret))
        with self._session(TPM2_SE.HMAC) as session:
            private, public, *_ = self._tpm.create(self._parent, sensitive, template, session1=session)
        return Sealed(public.marshal(), private.marshal())

    @naming("the sealed secret cannot be opened")
    def unseal(self, sealed: Sealed, authorization: Authorization | None = None) -> bytes:
        """Open a sealed secret; the answer travels encrypted.

        Args:
            authorization: for what was sealed to a policy.

        Raises:
            HostError: ``tpm.state-not-approved``, ``tpm.approval-revoked``, ``tpm.approval-signature``,
                ``tpm.policy-denied`` (it was sealed to another authority or property), ``tpm.foreign-object``.
        """
        with (
            self._authorized(authorization, TPM2_CC.Unseal) as session,
            self._loaded(sealed) as item,
            refusals.of_policy(),
        ):
            return bytes(self._tpm.unseal(item, session1=session))

    @naming("the key cannot be encrypted to the other host")
    def duplicate(self, sealed: Sealed, authorization: Authorization, parent_public: bytes) -> ImportBlob:
        """Encrypt a sealed secret to another TPM's storage parent; only that TPM can open what comes out.

        Args:
            parent_public: its TPM2B_PUBLIC; that it is a genuine parent is for the caller to know (attest.evidence).

        Raises:
            HostError: as `unseal`.
        """
        public, _ = TPM2B_PUBLIC.unmarshal(parent_public)
        with (
            self._authorized(authorization, TPM2_CC.Duplicate) as session,
            self._loaded(sealed) as item,
            self._flushed(self._tpm.load_external(public)) as parent,
            refusals.of_policy(),
        ):
            _, private, seed = self._tpm.duplicate(item, parent, None, _NO_WRAP, session1=session)
        return ImportBlob(sealed.public, private.marshal(), seed.marshal())

    @naming("the key of the other host cannot be imported")
    def import_(self, blob: ImportBlob, authorize: bytes | None = None) -> Sealed:
        """Take over what another TPM encrypted to this one's parent.

        Args:
            authorize: the policy digest that it must have.

        Raises:
            HostError: ``tpm.import-policy``, ``tpm.import-attributes``, ``tpm.foreign-object``.
        """
        public, _ = TPM2B_PUBLIC.unmarshal(blob.public)
        if authorize is not None:
            refusals.check_guarded(public.publicArea, authorize)
        private, _ = TPM2B_PRIVATE.unmarshal(blob.duplicate)
        seed, _ = TPM2B_ENCRYPTED_SECRET.unmarshal(blob.seed)
        with self._belonging():
            own = self._tpm.import_(self._parent, b"", public, private, seed, _NO_WRAP)
        return Sealed(blob.public, own.marshal())

    # -- inside ---------------------------------------------------------------------------------

    @cached_property
    def _parent(self) -> Any:
        return self._handle(PARENT_HANDLE)

    @cached_property
    def _endorsement(self) -> tuple[bytes | None, Any]:
        """Certificate and template as the manufacturer left them in NV, else the profile's."""
        from tpm2_pytss.utils import NVReadEK, create_ek_template

        certificate, template = create_ek_template("EK-RSA2048", NVReadEK(self._tpm))
        return certificate, template

    @contextmanager
    def _authorized(self, authorization: Authorization | None, command: Any) -> Iterator[Any]:
        """A session for the command; the objects come after it, for a TPM may have room for three."""
        with self._session(TPM2_SE.POLICY if authorization else TPM2_SE.HMAC) as session:
            if authorization:
                self._authorize(session, authorization, command)
            yield session

    def _authorize(self, session: Any, authorization: Authorization, command: Any) -> None:
        """Satisfy `policy.key_policy` for the command."""
        authority, property, approval = authorization
        with refusals.of_state(approval):
            self._tpm.policy_pcr(session, policy.pcr_digest(approval.pcrs), _selection(sorted(approval.pcrs)))
        counter = self._handle(policy.COUNTER_HANDLE)
        with refusals.of_epoch(approval):
            self._tpm.policy_nv(counter, counter, session, policy.epoch_operand(approval.epoch), TPM2_EO.UNSIGNED_LE, 0)
        ticket = self._verified(authorization)
        name = TPM2B_NAME(policy.authority_name(authority))
        with refusals.of_policy():
            self._tpm.policy_authorize(session, approval.policy(), name, ticket, policy.policy_ref(property))
            self._tpm.policy_command_code(session, command)
            branches = policy.key_policy(bytes(name), property).branches
            self._tpm.policy_or(session, TPML_DIGEST([TPM2B_DIGEST(branch) for branch in branches]))

    def _verified(self, authorization: Authorization) -> Any:
        """The TPM's ticket that the authority signed the approval."""
        authority, property, approval = authorization
        public, _ = TPMT_PUBLIC.unmarshal(policy.authority_public(authority))
        key = self._tpm.load_external(TPM2B_PUBLIC(publicArea=public), hierarchy=ESYS_TR.OWNER)
        with self._flushed(key), refusals.of_signature(approval):
            digest, _ = self._tpm.hash(policy.to_sign(approval.policy(), property), TPM2_ALG.SHA256)
            return self._tpm.verify_signature(key, digest, _signature(approval.signature))

    @contextmanager
    def _session(self, kind: Any) -> Iterator[Any]:
        """A session whose secret only this TPM's parent can read; it hides the first parameter both ways."""
        cipher = TPMT_SYM_DEF.parse("aes128cfb")
        session = self._tpm.start_auth_session(self._parent, ESYS_TR.NONE, kind, cipher, TPM2_ALG.SHA256)
        try:
            both = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
            self._tpm.trsess_set_attributes(session, both | TPMA_SESSION.CONTINUESESSION)
            yield session
        finally:
            self._tpm.flush_context(session)

    @contextmanager
    def _loaded(self, sealed: Sealed) -> Iterator[Any]:
        public, _ = TPM2B_PUBLIC.unmarshal(sealed.public)
        private, _ = TPM2B_PRIVATE.unmarshal(sealed.private)
        with self._belonging():
            item = self._tpm.load(self._parent, private, public)
        with self._flushed(item):
            yield item

    @contextmanager
    def _flushed(self, item: Any) -> Iterator[Any]:
        try:
            yield item
        finally:
            self._tpm.flush_context(item)

    def _belonging(self) -> AbstractContextManager[None]:
        """While something is loaded or imported below the parent."""
        return refusals.of_object(self._parent_changed)

    def _parent_changed(self) -> bool | None:
        from swtpm_prop.custody import host_keys

        return None if self._keys is None else host_keys.parent_changed(self._tpm, self._keys)

    def _counts(self) -> bool:
        counter = self._handle(policy.COUNTER_HANDLE)
        name = bytes(self._tpm.nv_read_public(counter)[1])
        if name not in (policy.COUNTER_NAME, policy.name(policy.counter_public(written=False))):
            raise HostError(
                "tpm.handle-taken",
                f"another NV index lies at {policy.COUNTER_HANDLE:#x}",
                f"if nothing needs it, 'tpm2_nvundefine {policy.COUNTER_HANDLE:#x}' removes it",
            )
        return name == policy.COUNTER_NAME

    def _raise(self) -> None:
        counter = self._handle(policy.COUNTER_HANDLE)
        self._tpm.nv_increment(counter, counter)

    def _there(self, handle: int) -> bool:
        try:
            self._tpm.tr_close(self._tpm.tr_from_tpmpublic(handle))
        except TSS2_Exception as error:
            if refusals.is_missing(error):
                return False
            raise
        return True

    def _handle(self, handle: int) -> Any:
        with refusals.of_handle():
            return self._tpm.tr_from_tpmpublic(handle)

    @naming("a key of the TPM cannot be read")
    def _public(self, handle: int) -> bytes:
        public, _, _ = self._tpm.read_public(self._handle(handle))
        return bytes(public.marshal())


def _selection(numbers: list[int]) -> Any:
    return TPML_PCR_SELECTION.unmarshal(build_selection(((SHA256, tuple(numbers)),)))[0]


def _signature(der: bytes) -> Any:
    """TPMT_SIGNATURE of a DER Ecdsa-Sig-Value."""
    sizes = (number.to_bytes(32, "big") for number in decode_dss_signature(der))
    body = b"".join(struct.pack(">H", len(number)) + number for number in sizes)
    return TPMT_SIGNATURE.unmarshal(struct.pack(">HH", TPM2_ALG.ECDSA, TPM2_ALG.SHA256) + body)[0]


def _der(padded: bytes) -> bytes:
    """The certificate without what fills its NV index (X.690, section 8.1.3)."""
    if padded[:2] != b"\x30\x82":
        return padded
    return padded[: 4 + int.from_bytes(padded[2:4], "big")]


def _flush_left_over(tcti: Any) -> None:
    for first in _FLUSHED:
        answer = _exchange(tcti, struct.pack(">HIIIII", NO_SESSIONS, 22, CC_GET_CAPABILITY, _CAP_HANDLES, first, 64))
        # Behind the header: moreData (1 byte), the capability (4), a count (4), handles (4 each).
        for (handle,) in struct.iter_unpack(">I", answer[19:]):
            _exchange(tcti, struct.pack(">HIII", NO_SESSIONS, 14, _CC_FLUSH_CONTEXT, handle))


def _exchange(tcti: Any, command: bytes) -> bytes:
    tcti.transmit(command)
    return bytes(tcti.receive())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o755)  # guests' swtpm must get through
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
        if not locks.take(file.fileno(), TPM_LOCK_SECONDS):
            raise HostError(
                "tpm.busy",
                f"another process has used the host's TPM for {TPM_LOCK_SECONDS} seconds",
                f"see who holds it: fuser {path}",
            )
        yield
