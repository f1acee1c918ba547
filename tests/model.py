"""A model of the PCRs of a TPM, just enough to drive the layer's generators without a process."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from swtpm_prop.errors import WireError
from swtpm_prop.tpm import commands as tpm
from swtpm_prop.tpm.algorithms import ALGORITHMS, BY_ID, BY_NAME, Digest, HashAlgorithm
from swtpm_prop.tpm.pcr import build_selection
from swtpm_prop.translate.layer import Outcome, Steps

HMAC_SESSION = struct.pack(">IHBH", 0x02000000, 0, 1, 0)
PASSWORD = struct.pack(">IHBH", tpm.RS_PW, 0, 0, 0)
SUCCESS = bytes.fromhex("80020000001300000000000000000000010000")


def command(code: int, handles: tuple[int, ...], area: bytes, parameters: bytes) -> bytes:
    body = b"".join(struct.pack(">I", h) for h in handles) + struct.pack(">I", len(area)) + area + parameters
    return struct.pack(">HII", tpm.SESSIONS, 10 + len(body), code) + body


def extend(pcr: int, digests: tuple[Digest, ...], area: bytes = PASSWORD) -> bytes:
    return command(tpm.CC_PCR_EXTEND, (pcr,), area, tpm.build_digests(digests))


def refusal(code: int) -> bytes:
    return struct.pack(">HII", tpm.NO_SESSIONS, 10, code)


class ModelTpm:
    """PCRs of the active banks; sessions are accepted whatever they say."""

    def __init__(self, *banks: HashAlgorithm) -> None:
        self.pcrs = {(bank, pcr): bytes(bank.size) for bank in banks for pcr in range(24)}
        self.started = True
        self.executed: list[bytes] = []
        self.answer: Callable[[bytes], bytes | None] = lambda command: None

    def run(self, steps: Steps) -> Outcome:
        try:
            request = next(steps)
            while True:
                request = steps.send(self.execute(request))
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome

    def execute(self, request: bytes) -> bytes:
        self.executed.append(request)
        answer = self.answer(request)
        if answer is not None:
            return answer
        if not self.started:
            return refusal(0x100)
        code = tpm.command_code(request)
        if code == tpm.CC_PCR_READ:
            return self._read(request)
        if code == tpm.CC_STARTUP:
            return bytes.fromhex("80010000000a00000000")
        try:
            return self._change(code, request)
        except WireError:
            return refusal(0x1D5)

    def value(self, bank: str, pcr: int) -> bytes:
        return self.pcrs[BY_NAME[bank], pcr]

    def _change(self, code: int, request: bytes) -> bytes:
        if code == tpm.CC_PCR_EXTEND:
            parsed = tpm.parse_command(request, handles=1)
            self._extend(parsed.handles[0], tpm.parse_digests(parsed.parameters))
            return SUCCESS
        parsed = tpm.parse_command(request, handles=1 if code == tpm.CC_PCR_EVENT else 2)
        data = parsed.parameters
        digests = tuple(Digest(a, hashlib.new(a.name, data).digest()) for a in ALGORITHMS)
        self._extend(parsed.handles[0], digests)
        return tpm.build_event_response(SUCCESS, digests)

    def _extend(self, pcr: int, digests: tuple[Digest, ...]) -> None:
        for algorithm, value in digests:
            if (algorithm, pcr) in self.pcrs:
                old = self.pcrs[algorithm, pcr]
                self.pcrs[algorithm, pcr] = hashlib.new(algorithm.name, old + value).digest()

    def _read(self, request: bytes) -> bytes:
        reader = tpm.Reader(request, 10)
        chosen = []
        values = []
        for _ in range(reader.uint(4)):
            algorithm = BY_ID[reader.uint(2)]
            bits = int.from_bytes(reader.take(reader.uint(1)), "little")
            pcrs = [p for p in range(24) if bits >> p & 1 and (algorithm, p) in self.pcrs][: 8 - len(values)]
            chosen.append((algorithm, tuple(pcrs)))
            values += [self.pcrs[algorithm, p] for p in pcrs]
        body = struct.pack(">I", 1) + build_selection(tuple(chosen)) + struct.pack(">I", len(values))
        body += b"".join(struct.pack(">H", len(v)) + v for v in values)
        return struct.pack(">HII", tpm.NO_SESSIONS, 10 + len(body), 0) + body
