"""The translation layer: what to do with each command that can change a PCR.

Without I/O: every handler is a generator that yields TPM commands to execute, is sent their responses, and returns
the response for the guest. The TPM is the only state: before the layer acts on a PCR it reads it.

Two ways lead into a translated PCR. A command that a plain password alone authorises is rewritten: the digests of the
property bank are replaced by the property's own. Every other way is executed as it is and breaks the PCR afterwards,
so that ``held`` can come from translation only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import NamedTuple

from swtpm_prop.errors import LayerError, WireError
from swtpm_prop.limits import EXTEND_DIGESTS, OWN_TRIES
from swtpm_prop.tpm import commands as tpm
from swtpm_prop.tpm import ima
from swtpm_prop.tpm.algorithms import ALGORITHMS, Digest, Digests, HashAlgorithm
from swtpm_prop.tpm.pcr import READ_PCRS, Selection, build_pcr_read, hide_banks, parse_pcr_read
from swtpm_prop.translate import record
from swtpm_prop.translate.aggregate import expecting_aggregate
from swtpm_prop.translate.policy import BROKEN, HELD, UNMEASURED, Bank, Judge, broken_digest, held_digest, state
from swtpm_prop.translate.record import Record
from swtpm_prop.translate.verdict import Verdict

Banks = tuple[Bank, ...]


class Outcome(NamedTuple):
    """The response for the guest, and what the property log has to say."""

    response: bytes
    records: tuple[Record, ...] = ()


Steps = Generator[bytes, bytes, Outcome]
"""Yields a command for the TPM, is sent its response."""


def codes(banks: Banks) -> tuple[int, ...]:
    """The command codes that must come here; everything else goes straight to the TPM."""
    always = (tpm.CC_PCR_EXTEND, tpm.CC_PCR_EVENT, tpm.CC_EVENT_SEQUENCE_COMPLETE, tpm.CC_STARTUP)
    return always if all(bank.visible for bank in banks) else (*always, tpm.CC_GET_CAPABILITY)


def breaks(banks: Banks) -> tuple[bytes, ...]:
    """Commands that break every translated PCR in every bank: the last that is done when the layer cannot go on."""
    return tuple(
        tpm.build_pcr_extend(
            pcr, tuple(Digest(bank.algorithm, broken_digest(bank)) for bank in _target(banks, pcr).banks)
        )
        for pcr in sorted(frozenset().union(*(bank.pcrs for bank in banks)))
    )


def handle(command: bytes, banks: Banks, judge: Judge) -> Steps:
    """Execute one command of the guest.

    Args:
        command: the guest's bytes, whatever they are; malformed ones get the TPM's own answer.
        banks: the property banks, of distinct algorithms.
        judge: says whether a measurement has a bank's properties.

    Raises:
        LayerError: the layer cannot keep its promise; the TPM must refuse from now on whatever changes a PCR.
    """
    code = tpm.command_code(command)
    if code == tpm.CC_PCR_EXTEND:
        return _extend(command, banks, judge)
    if code == tpm.CC_PCR_EVENT:
        return _event(command, banks, judge)
    if code == tpm.CC_EVENT_SEQUENCE_COMPLETE:
        return _pass_and_break(command, "EventSequenceComplete", banks)
    if code == tpm.CC_STARTUP:
        return _startup(command, banks)
    return _show(command, [bank.algorithm for bank in banks if not bank.visible and code == tpm.CC_GET_CAPABILITY])


def resumed(banks: Banks) -> Steps:
    """Look at the PCRs after a state was loaded; a TPM that waits for its Startup has none to look at."""
    first = yield build_pcr_read(((banks[0].algorithm, (0,)),))
    if not tpm.succeeded(first):
        return Outcome(first)
    return Outcome(first, ((yield from _snapshot(record.RESUME, banks)),))


# -- the commands -------------------------------------------------------------------------------


def _extend(command: bytes, banks: Banks, judge: Judge) -> Steps:
    try:
        parsed = tpm.parse_command(command, handles=1)
        digests = tpm.parse_digests(parsed.parameters)
    except WireError:
        return (yield from _pass_and_break(command, "PCR_Extend", banks))
    pcr = parsed.handles[0]
    target = _target(banks, pcr)
    if not target.banks or not digests:
        return Outcome((yield command))
    if not parsed.plain_password:
        return (yield from _extend_by_session(command, pcr, digests, target.banks, judge))
    values = _values((yield target.read), target.selection)
    if values is None:
        return (yield from _pass_and_break(command, "PCR_Extend", banks))
    if _may_be_aggregate(pcr, target, values):
        judge = yield from expecting_aggregate(judge)
    raw, own, records = _translate("PCR_Extend", pcr, digests, target, values, judge)
    # Where they would be more digests than the TPM takes, a second command.
    fits = len(raw) + len(own) <= EXTEND_DIGESTS
    response = yield parsed.with_parameters(tpm.build_digests(raw + own if fits else raw))
    if not tpm.succeeded(response):
        return Outcome(response)
    if not fits:
        yield from _own_extend(pcr, own)
    return Outcome(response, records)


def _extend_by_session(command: bytes, pcr: int, digests: Digests, touched: Banks, judge: Judge) -> Steps:
    """Executed as it is: its authorisation covers the digests. Only a hidden bank that it leaves alone may follow."""
    response = yield command
    if not tpm.succeeded(response):
        return Outcome(response)
    named = {algorithm for algorithm, _ in digests}
    follow = tuple(bank for bank in touched if not bank.visible and bank.algorithm not in named)
    broken = tuple(bank for bank in touched if bank not in follow)
    records = yield from _break("PCR_Extend", pcr, digests, broken)
    if follow:
        target = _target(follow, pcr)
        values = _values((yield target.read), target.selection)
        if values is None:
            raise LayerError("layer.pcr-read", f"PCR {pcr} cannot be read after it was extended")
        if _may_be_aggregate(pcr, target, values):
            judge = yield from expecting_aggregate(judge)
        _, own, translated = _translate("PCR_Extend", pcr, digests, target, values, judge)
        yield from _own_extend(pcr, own)
        records += translated
    return Outcome(response, records)


def _event(command: bytes, banks: Banks, judge: Judge) -> Steps:
    """PCR_Event by password becomes the PCR_Extend that it stands for; its answer lists all four digests."""
    try:
        parsed = tpm.parse_command(command, handles=1)
        data = tpm.parse_event(parsed.parameters)
    except WireError:
        return (yield from _pass_and_break(command, "PCR_Event", banks))
    pcr = parsed.handles[0]
    target = _target(banks, pcr)
    if not target.banks or not parsed.plain_password:
        return (yield from _pass_and_break(command, "PCR_Event", banks))
    values = _values((yield target.read), target.selection)
    if values is None:
        return (yield from _pass_and_break(command, "PCR_Event", banks))
    digests = tuple(Digest(a, hashlib.new(a.name, data).digest()) for a in ALGORITHMS)
    raw, own, records = _translate("PCR_Event", pcr, digests, target, values, judge)
    extend = tpm.CC_PCR_EXTEND.to_bytes(4, "big")
    instead = parsed._replace(front=parsed.front[:6] + extend + parsed.front[10:])
    response = yield instead.with_parameters(tpm.build_digests(raw + own))
    if not tpm.succeeded(response):
        return Outcome(response)
    return Outcome(tpm.build_event_response(response, digests), records)


def _startup(command: bytes, banks: Banks) -> Steps:
    response = yield command
    if not tpm.succeeded(response):
        return Outcome(response)
    return Outcome(response, ((yield from _snapshot(record.STARTUP, banks)),))


def _show(command: bytes, hidden: Sequence[HashAlgorithm]) -> Steps:
    """What changes no PCR: as it is, but for the hidden banks in TPM_CAP_PCRS."""
    response = yield command
    return Outcome(hide_banks(response, hidden) if hidden else response)


def _pass_and_break(command: bytes, name: str, banks: Banks) -> Steps:
    """Let the TPM decide; if it succeeds, whatever it did to a translated PCR was no translation."""
    response = yield command
    if not tpm.succeeded(response):
        return Outcome(response)
    pcr = int.from_bytes(command[10:14], "big")
    return Outcome(response, (yield from _break(name, pcr, (), _target(banks, pcr).banks)))


# -- their parts --------------------------------------------------------------------------------


class _Target(NamedTuple):
    """What a PCR is to the banks: those that translate it, and how to read it in them."""

    banks: Banks
    algorithms: tuple[HashAlgorithm, ...]
    selection: Selection
    read: bytes


@lru_cache(maxsize=64)
def _target(banks: Banks, pcr: int) -> _Target:
    touched = tuple(bank for bank in banks if pcr in bank.pcrs)
    selection = tuple((bank.algorithm, (pcr,)) for bank in touched)
    return _Target(touched, tuple(bank.algorithm for bank in touched), selection, build_pcr_read(selection))


def _translate(
    name: str, pcr: int, digests: Digests, target: _Target, values: Sequence[bytes], judge: Judge
) -> tuple[Digests, Digests, tuple[Record, ...]]:
    """Digests for the banks the guest keeps, digests of the layer's own, and the records if the TPM accepts them.

    Args:
        values: the PCR's value in each bank of the target.
    """
    own = []
    records = []
    for bank, value in zip(target.banks, values, strict=True):
        verdict = _judge(bank, digests, judge)
        after, digest = _step(bank, state(bank, value), verdict)
        if digest:
            own.append(Digest(bank.algorithm, digest))
        records.append(record.measurement(name, pcr, digests, bank.algorithm.name, after, verdict))
    raw = tuple([digest for digest in digests if digest[0] not in target.algorithms])
    return raw, tuple(own), tuple(records)


def _may_be_aggregate(pcr: int, target: _Target, values: Sequence[bytes]) -> bool:
    """Whether this is the first measurement into IMA's PCR."""
    return pcr == ima.PCR and UNMEASURED in map(state, target.banks, values)


def _step(bank: Bank, before: str, verdict: Verdict) -> tuple[str, bytes]:
    """State and verdict to the next state and the digest that leads there (empty: stay)."""
    if not verdict.certified:
        return BROKEN, broken_digest(bank)
    if before == UNMEASURED:
        return HELD, held_digest(bank)
    return before, b""


def _judge(bank: Bank, digests: Digests, judge: Judge) -> Verdict:
    measured = {algorithm.name: value for algorithm, value in digests}
    if len(measured) != len(digests):
        return Verdict(False, (), "ambiguous", "one command extends the same bank twice")
    return judge(bank, measured)


def _break(name: str, pcr: int, digests: Digests, banks: Banks) -> Generator[bytes, bytes, tuple[Record, ...]]:
    if not banks:
        return ()
    yield from _own_extend(pcr, tuple(Digest(bank.algorithm, broken_digest(bank)) for bank in banks))
    verdict = Verdict(False, (), "route", f"{name} did not come by a plain password and cannot be translated")
    return tuple(record.measurement(name, pcr, digests, bank.algorithm.name, BROKEN, verdict) for bank in banks)


def _own_extend(pcr: int, digests: Digests) -> Generator[bytes, bytes, None]:
    if not digests:
        return
    command = tpm.build_pcr_extend(pcr, digests)
    code = tpm.RC_RETRY
    for _ in range(OWN_TRIES):
        if code == tpm.RC_RETRY:
            code = tpm.response_code((yield command))
    if code != tpm.RC_SUCCESS:
        raise LayerError("layer.extend-refused", f"the TPM refused the layer's own extend of PCR {pcr}: {code:#x}")


def _snapshot(event: str, banks: Banks) -> Generator[bytes, bytes, Record]:
    states = {}
    for bank in banks:
        pcrs = sorted(bank.pcrs)
        values: list[bytes] = []
        for start in range(0, len(pcrs), READ_PCRS):
            selection = ((bank.algorithm, tuple(pcrs[start : start + READ_PCRS])),)
            part = _values((yield build_pcr_read(selection)), selection)
            if part is None:
                raise LayerError("layer.pcr-read", "the PCRs cannot be read after Startup")
            values += part
        states[bank.algorithm.name] = {pcr: state(bank, value) for pcr, value in zip(pcrs, values, strict=True)}
    return record.snapshot(event, states)


def _values(response: bytes, selection: Selection) -> Sequence[bytes] | None:
    """The values of a PCR_Read; None if the TPM refused, as it does before Startup."""
    if not tpm.succeeded(response):
        return None
    values = parse_pcr_read(response, selection)
    if values is None:
        names = " or ".join(algorithm.name for algorithm, _ in selection)
        raise LayerError(
            "layer.bank-inactive",
            f"the property bank {names} is not active in this TPM",
            "shut the guest down and start it again; the start activates the bank",
        )
    return values
