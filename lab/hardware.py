"""The TPM a laboratory host has as its hardware: a swtpm of its own, with the certificate its maker gave it."""

from __future__ import annotations

import hashlib
import shutil
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab.host import Host
from lab.process import LabError, run
from lab.tpmrm import message
from swtpm_prop.tpm.algorithms import SHA256, Digest
from swtpm_prop.tpm.commands import build_pcr_extend, response_code

PORT = 2321
TCTI = f"mssim:host=127.0.0.1,port={PORT}"
PLACE = "/var/lib/lab-tpm"  # below the host's own tree: state, sockets, event log
EVENT_LOG = f"{PLACE}/event.log"
PROGRAM = "hardware-tpm"  # swtpm under another name, so that no test takes it for a guest's
READY = 5.0  # seconds

EV_NO_ACTION, EV_SEPARATOR, EV_S_CRTM_VERSION, EV_IPL = 0x3, 0x4, 0x8, 0xD
SETUP = """create_certs_tool = /usr/bin/swtpm_localca
create_certs_tool_config = {0}/localca.conf
create_certs_tool_options = /etc/swtpm-localca.options
active_pcr_banks = sha256
"""
AUTHORITY = """statedir = {0}
signingkey = {0}/signkey.pem
issuercert = {0}/issuer.pem
certserial = {0}/serial
"""


class Measurement(NamedTuple):
    """What the firmware measures: PCR, TCG event type, data."""

    pcr: int
    type: int
    data: bytes


def boot_of(kernel: str, firmware: str = "firmware 1.0") -> list[Measurement]:
    """The measurements of a host that boots ``kernel``."""
    return [
        Measurement(0, EV_S_CRTM_VERSION, firmware.encode("utf-16-le") + b"\0\0"),
        *(Measurement(pcr, EV_SEPARATOR, bytes(4)) for pcr in range(8)),
        Measurement(4, EV_IPL, f"{kernel}\0".encode()),
    ]


STOCK = boot_of("linux 6.1.0-50")


class Maker:
    """Who makes the TPMs: an authority, below ``work``, that certifies the endorsement key of each."""

    def __init__(self, work: Path, name: str = "maker") -> None:
        self._place = work / name
        self._place.mkdir()
        for file, text in (("setup.conf", SETUP), ("localca.conf", AUTHORITY)):
            (self._place / file).write_text(text.format(self._place))

    @property
    def roots(self) -> Path:
        """The certificates that lead to its TPMs', in one PEM file; there after the first."""
        roots = self._place / "roots.pem"
        parts = ("swtpm-localca-rootca-cert.pem", "issuer.pem")
        roots.write_text("".join((self._place / part).read_text() for part in parts))
        return roots

    def make(self, state: Path, serial: str) -> None:
        """A new TPM in the directory ``state``."""
        options = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", serial)
        run(["swtpm_setup", "--tpm2", "--tpm-state", state, "--config", self._place / "setup.conf", *options])


class HardwareTpm:
    """The TPM of ``host``, which must be open; reached by ``TCTI`` in the host. ``boot`` switches it on."""

    def __init__(self, host: Host, maker: Maker) -> None:
        self.host = host
        self.maker = maker
        self._here("state").mkdir(parents=True)
        maker.make(self._here("state"), host.name)
        shutil.copyfile("/usr/bin/swtpm", self._here(PROGRAM))
        self._here(PROGRAM).chmod(0o755)

    def boot(self, measurements: Sequence[Measurement] = STOCK) -> None:
        """Power on (off first if it is on): PCRs begin anew, what is kept is kept; measure, and leave the event log."""
        self.power_off()
        control, server = (f"type=unixio,path={PLACE}/{name}" for name in ("control", "socket"))
        words = ["--tpm2", "--tpmstate", f"dir={PLACE}/state", "--flags", "not-need-init,startup-clear"]
        words += ["--pid", f"file={PLACE}/tpm.pid", "--log", f"file={PLACE}/log", "--daemon"]
        self.host.run([f"{PLACE}/{PROGRAM}", "socket", "--ctrl", control, "--server", server, *words])
        log = _header()
        with socket.socket(socket.AF_UNIX) as tpm:
            tpm.connect(str(self._here("socket")))
            for each in measurements:
                log += self._measure(tpm, each)
        self._here("event.log").write_bytes(log)
        manager = [sys.executable, "-I", str(Path(__file__).with_name("tpmrm.py")), str(PORT), f"{PLACE}/socket"]
        line = f'echo $$ >{PLACE}/manager.pid && exec "$@" >{PLACE}/manager.log 2>&1'
        self.host.run(["setsid", "-f", "sh", "-c", line, "sh", *manager])
        self._wait()

    def power_off(self) -> None:
        """Cut the power; nothing wrong if it is off."""
        for file in ("manager.pid", "tpm.pid"):
            if self._here(file).exists():
                number = self._here(file).read_text().strip()
                self.host.run(["kill", "-9", number], check=False)
                self._here(file).unlink()
                while (self.host.root / f"proc/{number}").exists():
                    time.sleep(0.002)
        self._here("socket").unlink(missing_ok=True)

    def extend(self, pcr: int, data: bytes) -> None:
        """Let something be measured after the boot; the event log does not know it."""
        digest = hashlib.sha256(data).hexdigest()
        self.host.run(["tpm2_pcrextend", "-T", TCTI, f"{pcr}:sha256={digest}"])

    def _here(self, name: str) -> Path:
        return self.host.root / f"{PLACE}/{name}".lstrip("/")

    def _measure(self, tpm: socket.socket, each: Measurement) -> bytes:
        """Extend PCR; the log's record of it (TCG PC Client firmware profile, section 10.2.2)."""
        value = hashlib.sha256(each.data).digest()
        tpm.sendall(build_pcr_extend(each.pcr, (Digest(SHA256, value),)))
        code = response_code(message(tpm))
        if code:
            raise LabError(f"the TPM of {self.host.name} does not extend PCR {each.pcr}: {code:#x}")
        return struct.pack("<IIIH32sI", each.pcr, each.type, 1, SHA256.id, value, len(each.data)) + each.data

    def _wait(self) -> None:
        deadline = time.monotonic() + READY
        while self.host.run(["tpm2_getrandom", "-T", TCTI, "--hex", "1"], check=False).returncode:
            if time.monotonic() > deadline:
                raise LabError(f"the TPM of {self.host.name} does not answer: {self._here('manager.log').read_text()}")
            time.sleep(0.02)


def _header() -> bytes:
    """The Spec ID record of a log with SHA-256 digests alone (section 10.4.5.1)."""
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 105, 2, 1, SHA256.id, SHA256.size, 0)
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(data)) + data
