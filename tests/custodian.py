"""A host for tests of custody: a TPM, an authority that approved its state, recovery keys; directories in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swtpm_prop.account import Account, swtpm_account
from swtpm_prop.custody import approvals
from swtpm_prop.custody.form import PERMANENT
from swtpm_prop.hook.operations import run
from swtpm_prop.layout import Layout
from swtpm_prop.trust.build import build
from tests.hardware import HardwareTpm

UUID = "aaaaaaaa-0000-4000-8000-000000000001"
BOOT = "https://example.org/properties/boot"
APPROVED = "https://example.org/hosts/approved"
OTHER = "https://example.org/hosts/other"
PCRS = range(8)


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


class Authority:
    """Who says which host states have a property, and the newest edition of its list."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.list = approvals.begin(self.key)

    def approve(self, label: str, state: dict[int, bytes], property: str = APPROVED) -> None:
        self.list = approvals.approve(self.list, self.key, label, property, state)

    def revoke(self, label: str) -> None:
        self.list = approvals.revoke(self.list, self.key, label)

    def catch_up(self, epoch: int) -> None:
        if epoch > self.list.epoch:
            self.list = approvals.raise_to(self.list, self.key, epoch)

    def install(self, layout: Layout) -> None:
        approvals.install(layout, approvals.sign(self.list, self.key), self.key.public_key())


class CustodyHost:
    """One host below ``root``, which is in memory; its TPM runs, and its state is approved for APPROVED and OTHER."""

    def __init__(self, root: Path, tpm: HardwareTpm, authority: Authority) -> None:
        self.layout = Layout(root)
        self.tpm = tpm
        self.authority = authority
        self.recovery = ec.generate_private_key(ec.SECP256R1())
        for name in ("swtpm", "swtpm_setup"):
            path = self.layout.libexec / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("#!/bin/sh\nexit 7\n")
            path.chmod(0o755)
        self.layout.index.parent.mkdir(parents=True)
        self.layout.state.chmod(0o711)
        build(self.layout.index, (), 4_000_000_000, lambda *_: None)
        self.layout.qemu_conf.parent.mkdir(parents=True)
        self.layout.qemu_conf.write_text('swtpm_user = "tss"\n')
        self.layout.etc.mkdir()
        self.configure()
        self.trust(authority)
        with tpm.open() as opened:
            opened.initialise()
            authority.catch_up(opened.epoch())
        for label, property in (("here", APPROVED), ("other", OTHER)):
            authority.approve(f"{label} {root.name}", self.state(), property)
        authority.install(self.layout)

    def configure(self, recovery: bool = True) -> None:
        (self.layout.etc / "recovery.pem").write_text(public_pem(self.recovery))
        named = '"recovery.pem"' if recovery else ""
        self.layout.host.write_text(f'[tpm]\ntcti = "{self.tpm.tcti}"\n[custody]\nrecovery = [{named}]\n')

    def trust(self, authority: Authority) -> None:
        self.layout.trust.write_text(
            '[[issuer]]\nid = "https://example.org/authority"\nprefixes = ["https://example.org/hosts"]\n'
            "approves-hosts = true\n"
            f"keys = ['''{public_pem(authority.key)}''']\n"
        )

    def state(self) -> dict[int, bytes]:
        with self.tpm.open() as opened:
            return opened.pcrs(PCRS)

    def keep_state(self, plain: Path) -> None:
        """Give the guest this plain TPM state, whose banks are those that the domain needs."""
        directory = self.layout.guest_tpm(UUID)
        directory.mkdir(parents=True)
        os.chown(directory, *self.account)
        os.chown(shutil.copy(plain, directory), *self.account)
        self.layout.guests.mkdir()
        self.layout.guests.chmod(0o711)
        self.layout.guest_marker(UUID).write_text("sha256,sha384\n")

    @property
    def account(self) -> Account:
        return swtpm_account(self.layout)

    def hook(self, operation: str, xml: bytes) -> int:
        return run(["g", operation, "begin", "-"], xml, self.layout)


def domain(
    custody: str | None = APPROVED,
    *,
    opted_in: bool = True,
    backend: str = "",
    migration: bool = False,
    uuid: str = UUID,
) -> bytes:
    """The XML of a guest."""
    inner = f"<p:bank algorithm='sha384' pcrs='4'><p:property uri='{BOOT}'/></p:bank>"
    inner += f"<p:custody host-property='{custody}'/>" if custody else ""
    inner += "<p:migration allow='attested'/>" if migration else ""
    vtpm = f"<p:vtpm xmlns:p='urn:swtpm-prop:domain:1'>{inner}</p:vtpm>" if opted_in else ""
    return (
        f"<domain><name>g</name><uuid>{uuid}</uuid><metadata>{vtpm}</metadata><devices><tpm>"
        f"<backend type='emulator' version='2.0'>{backend}</backend></tpm></devices></domain>"
    ).encode()


def make_state(directory: Path, account: Account) -> None:
    """A plain TPM state with the banks that the domain above needs."""
    directory.mkdir(parents=True)
    directory.parent.chmod(0o711)
    os.chown(directory, *account)
    subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpm-state", directory, "--pcr-banks", "sha256,sha384"],
        user=account.uid, group=account.gid, extra_groups=[], check=True, capture_output=True, cwd="/",
        env={"PATH": os.defpath},
    )  # fmt: skip


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory on a tmpfs, as /run is, that user tss can search."""
    path = Path(tempfile.mkdtemp(prefix="swtpm-prop-", dir="/dev/shm"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def plain_state() -> Iterator[Path]:
    """The file of a plain TPM state with the banks that the domain above needs."""
    with memory_directory() as directory:
        make_state(directory / "tpm2", swtpm_account(Layout(directory)))
        yield directory / "tpm2" / PERMANENT
