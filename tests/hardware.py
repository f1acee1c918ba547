"""A host's own TPM for tests: a real swtpm process on localhost that only this host talks to."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from swtpm import PATH, REAL, REAL_SETUP

from swtpm_prop.custody.hardware import Hardware


class HardwareTpm:
    """A TPM with its state in ``directory``; it runs as whoever runs the test.

    Args:
        directory: for state, log, lock and the host's key files; made if need be.
        address: where it listens.

    Attributes:
        tcti: how to reach it while it runs; the same over every ``reboot``.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.lock = directory / "tpm.lock"
        self.keys = directory / "keys"
        self.address = address
        self.port = two_ports(address)
        self.tcti = f"swtpm:host={address},port={self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HardwareTpm:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> HardwareTpm:
        """Switch the host on: PCRs at zero, Startup(CLEAR) done as firmware does it."""
        self.process = subprocess.Popen(
            [
                REAL, "socket", "--tpm2", "--tpmstate", f"dir={self.state}",
                "--server", f"type=tcp,bindaddr={self.address},port={self.port}",
                "--ctrl", f"type=tcp,bindaddr={self.address},port={self.port + 1}",
                "--flags", "not-need-init,startup-clear", "--log", f"file={self.directory}/swtpm.log",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 5
        while not self._listens():
            assert self.process.poll() is None, (self.directory / "swtpm.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self

    def stop(self) -> None:
        """Switch the host off; what is in NV stays."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def reboot(self) -> HardwareTpm:
        """Off and on: PCRs at zero, nothing loaded, resetCount one higher."""
        self.stop()
        return self.start()

    def open(self) -> Hardware:
        """What the product uses; a context manager."""
        return Hardware(self.tcti, self.lock, self.keys)

    def extend(self, pcr: int, digest: bytes = bytes(range(32))) -> None:
        """TPM2_PCR_Extend of the SHA-256 bank, as firmware or kernel do it."""
        pcr_handle = pcr.to_bytes(4, "big")
        password = bytes.fromhex("00000009 40000009 0000 00 0000")
        body = pcr_handle + password + bytes.fromhex("00000001 000b") + digest
        answer = self.send(bytes.fromhex("8002") + (10 + len(body)).to_bytes(4, "big") + b"\0\0\x01\x82" + body)
        assert answer[6:10] == bytes(4), answer.hex()

    def send(self, command: bytes) -> bytes:
        """One command, its answer; for what the product never does."""
        with socket.create_connection((self.address, self.port), 10) as connection:
            connection.sendall(command)
            answer = connection.recv(4096)
            while len(answer) < int.from_bytes(answer[2:6], "big"):
                answer += connection.recv(4096)
        return answer

    def _listens(self) -> bool:
        # The data port opens last; swtpm would take a connection for that of its one client.
        sockets = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        return any(each[1].endswith(f":{self.port:04X}") and each[3] == "0A" for each in sockets)


def manufacture(tpm: HardwareTpm, authority: Path, banks: str = "sha256") -> Path:
    """Give a TPM that never ran an endorsement key and its certificate, as a manufacturer does.

    Args:
        authority: directory of the manufacturer's CA; made if need be.
        banks: PCR banks that are active, separated by commas.

    Returns:
        The manufacturer's root and intermediate certificates, one PEM file.
    """
    authority.mkdir(parents=True, exist_ok=True)
    config = authority / "swtpm-localca.conf"
    config.write_text(
        f"statedir = {authority}\nsigningkey = {authority}/signkey.pem\n"
        f"issuercert = {authority}/issuercert.pem\ncertserial = {authority}/certserial\n"
    )
    options = authority / "swtpm-localca.options"
    options.write_text("--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n")
    setup = authority / "swtpm_setup.conf"
    setup.write_text(
        f"create_certs_tool = {shutil.which('swtpm_localca', path=PATH)}\n"
        f"create_certs_tool_config = {config}\ncreate_certs_tool_options = {options}\n"
    )
    subprocess.run(
        [REAL_SETUP, "--tpm2", "--tpm-state", tpm.state, "--createek", "--create-ek-cert", "--lock-nvram",
         "--pcr-banks", banks, "--config", setup],
        check=True, capture_output=True, env={"PATH": PATH, "HOME": tempfile.gettempdir()},
    )  # fmt: skip
    bundle = authority / "roots.pem"
    bundle.write_bytes(b"".join(path.read_bytes() for path in sorted(authority.glob("*cert.pem"))))
    return bundle


def two_ports(address: str = "127.0.0.1") -> int:
    """A free port with a free one behind it, where TPM libraries look for the control channel.

    Below those that the kernel gives to connections (ip_local_port_range): one of them may be taken at any moment.
    """
    while True:
        port = random.randrange(10000, 32000, 2)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind((address, port))
                second.bind((address, port + 1))
            except OSError:
                continue
            return port
