"""What the host's TPM refuses, and why, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tpm2_pytss import TSS2_Exception
from tpm2_pytss.constants import TPMA_OBJECT
from tpm2_pytss.types import TPMT_PUBLIC

from swtpm_prop.custody.policy import Approval
from swtpm_prop.errors import HostError

# Response codes of the TPM (TPM 2.0 Library, part 2 section 6.6) and of the library (TSS 2.0 Overview, 3.12).
_LAYER = 0x00FF0000
_OF_TPM = (0x00000000, 0x000B0000, 0x000C0000)
"""From the TPM itself or a resource manager before it."""

_INITIALIZE = 0x100
_POLICY = 0x126
_NV_UNINITIALIZED = 0x14A
_AUTH_FAIL = 0x08E
_VALUE = 0x084
_HANDLE = 0x08B
_POLICY_FAIL = 0x09D
_SIGNATURE = 0x09B
_BAD_AUTH = 0x0A2
_INTEGRITY = 0x09F

_ANOTHER_STATE = "'swtpm-prop host check' shows what differs; have this state approved, or go back to an approved one"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say what could not be done when the TPM or the way to it fails; also a decorator."""
    try:
        yield
    except TSS2_Exception as error:
        raise _named(error, what) from error


@contextmanager
def of_state(approval: Approval) -> Iterator[None]:
    """TPM2_PolicyPCR: the PCRs have other values."""
    with _when(
        (_VALUE,),
        "tpm.state-not-approved",
        f"the host's PCRs are not those of the approved state '{approval.label}'",
        _ANOTHER_STATE,
    ):
        yield


@contextmanager
def of_epoch(approval: Approval) -> Iterator[None]:
    """TPM2_PolicyNV: the counter is beyond the approval's epoch."""
    with _when(
        (_POLICY,),
        "tpm.approval-revoked",
        f"the approval '{approval.label}' of epoch {approval.epoch} is revoked: this TPM knows a later epoch",
        "get the authority's newest approval list, with 'swtpm-prop store sync' or from its file",
    ):
        yield


@contextmanager
def of_signature(approval: Approval) -> Iterator[None]:
    """TPM2_VerifySignature: somebody else signed, or something else."""
    with _when(
        (_SIGNATURE,),
        "tpm.approval-signature",
        f"the approval '{approval.label}' is not signed by the authority of this property",
        "get the authority's approval list anew, and compare its key in the trust file",
    ):
        yield


@contextmanager
def of_policy() -> Iterator[None]:
    """The command itself, with a session that does not satisfy the object's policy."""
    with _when(
        (_POLICY_FAIL, _AUTH_FAIL, _BAD_AUTH, _VALUE, 0x12F),
        "tpm.policy-denied",
        "it was sealed to another policy: another authority's word, another host property, or a state that has changed",
        _ANOTHER_STATE,
    ):
        yield


@contextmanager
def of_object(parent_changed: Callable[[], bool | None]) -> Iterator[None]:
    """TPM2_Load and TPM2_Import: not made for this TPM's parent, or changed since.

    Args:
        parent_changed: asked then, whether the TPM has another parent than this host had; None: nobody knows.
    """
    try:
        yield
    except TSS2_Exception as error:
        if _code(error) not in _FOREIGN:
            raise
        what, mend = _WHY_FOREIGN[parent_changed()]
        raise HostError("tpm.foreign-object", what, mend) from error


_FOREIGN = (_INTEGRITY, _VALUE, 0x095, 0x092, 0x0A7)

_ELSEWHERE = "start on the host whose TPM has it, or recover with a recovery key"

_WHY_FOREIGN = {
    None: ("it does not belong to this host's TPM, or is damaged", _ELSEWHERE),
    False: ("it was made below another storage parent than this host's, which is unchanged, or is damaged", _ELSEWHERE),
    True: (
        "this TPM's storage parent is not this host's any more: it was cleared or replaced, or has another key there",
        "'swtpm-prop host init' says which, and what to do",
    ),
}


@contextmanager
def of_key_file(path: Path) -> Iterator[None]:
    """TPM2_Load of a key of this host."""
    with _when(
        _FOREIGN,
        "tpm.cleared",
        f"the TPM does not load '{path}': it was cleared since, or is another one, or the file is damaged",
        f"put the right TPM or file back; if its keys are lost, move parent.pem and ak.pem out of '{path.parent}', "
        "then 'swtpm-prop host init', 'host enroll', and 'key recover' for each guest",
    ):
        yield


@contextmanager
def of_credential() -> Iterator[None]:
    """TPM2_ActivateCredential: not made for this endorsement key, or not for this attestation key."""
    with _when(
        # libtpms says "failure" where the RSA padding does not fit.
        (_INTEGRITY, _VALUE, 0x095, 0x092, 0x101),
        "tpm.foreign-credential",
        "it was made for another TPM, or is damaged",
        "take the answer to this host's own newest request",
    ):
        yield


@contextmanager
def of_handle() -> Iterator[None]:
    """Something that `Hardware.initialise` makes is not there."""
    try:
        yield
    except TSS2_Exception as error:
        if is_missing(error):
            raise _not_initialised() from error
        raise


def check_guarded(public: TPMT_PUBLIC, authorize: bytes) -> None:
    """Check that nothing opens or moves another host's object but its policy, and that this is the demanded one.

    Raises:
        HostError: ``tpm.import-policy``, ``tpm.import-attributes``.
    """
    if bytes(public.authPolicy) != authorize:
        raise HostError(
            "tpm.import-policy",
            "the key of the other host has another policy than this guest demands",
            "compare the guest's host property, and its authority's key, in both hosts' trust files",
        )
    # With userWithAuth, say, it would open here in any state.
    if public.objectAttributes != TPMA_OBJECT.NODA:
        raise HostError(
            "tpm.import-attributes",
            "the key of the other host can be opened by other means than its policy",
            "do not trust that host until its keeper knows why: this never comes of a fault",
        )


def is_missing(error: TSS2_Exception) -> bool:
    """Whether the TPM has nothing at a handle."""
    return _code(error) == _HANDLE


@contextmanager
def _when(codes: tuple[int, ...], id: str, what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except TSS2_Exception as error:
        if _code(error) in codes:
            raise HostError(id, what, mend) from error
        raise


def _named(error: TSS2_Exception, what: str) -> HostError:
    code = _code(error)
    if code is None:
        return HostError(
            "tpm.unreachable", f"{what}: {error}", "see that the TPM is there; host.toml names it as tpm.tcti"
        )
    if code == _NV_UNINITIALIZED:
        return _not_initialised()
    if code == _INITIALIZE:
        return HostError("tpm.not-started", f"{what}: no firmware has started it", "restart the host; see its firmware")
    if code in (_AUTH_FAIL, _BAD_AUTH):
        return HostError(
            "tpm.owner-password",
            f"{what}: owner or endorsement hierarchy has a password",
            "take it away for the moment: 'tpm2_changeauth -c owner', 'tpm2_changeauth -c endorsement'",
        )
    return HostError("tpm.failed", f"{what}: {error} ({error.rc:#x})", "see the TPM's documentation for the code")


def _not_initialised() -> HostError:
    return HostError(
        "tpm.not-initialised", "the host's TPM has not all keys and counters of swtpm-prop", "'swtpm-prop host init'"
    )


def _code(error: TSS2_Exception) -> int | None:
    """The TPM's response code without handle, parameter and session; None if it is not the TPM's."""
    if error.rc & _LAYER not in _OF_TPM:
        return None
    code = error.rc & 0xFFFF
    return int(code & 0x0BF) if code & 0x080 else int(code)
