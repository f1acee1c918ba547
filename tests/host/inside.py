"""What is inside of a guest's TPM: the key of its state, as root of the host can have it, and the state opened by it.

swtpm works on a copy, so that a guest that runs notices nothing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from product import at

from lab.host import Host
from lab.machine import Machine
from swtpm_prop.custody.form import PERMANENT
from swtpm_prop.layout import Layout
from tests.swtpm import Tpm, owned_directory, world_directory

OPEN_KEY = """
from swtpm_prop.custody import keys, opening
from swtpm_prop.layout import Layout
record = keys.load("{0}", Layout())
with opening.hardware(Layout()) as tpm:
    print(opening.open_(record, tpm, Layout()).hex())
"""
READ_EK = bytes.fromhex("80010000000e0000017381010001")
"""TPM2_ReadPublic of the endorsement key that swtpm_setup leaves at 0x81010001."""
READ_CLOCK = bytes.fromhex("80010000000a00000181")
RESETS = slice(26, 30)
"""resetCount in the answer: after the header, time and clock (TPM 2.0 Library, part 2 section 10.11)."""


class Identity(NamedTuple):
    """What no other TPM has, and how often this one was started; an older state of it was so less often."""

    endorsement: bytes
    starts: int


def on(host: Host, script: str) -> str:
    """What a script of the product's own parts prints, run by the host's root."""
    return host.run([Path(sys.prefix) / "bin/python", "-P", "-c", script]).stdout.strip()


def key_of(machine: Machine) -> str:
    """The key of the guest's state in hex: what only root can have of a host in an approved state."""
    return on(machine.host, OPEN_KEY.format(machine.domain.uuid))


def state_of(machine: Machine) -> Path:
    return at(machine.host, Layout().guest_tpm(machine.domain.uuid))


def copied(world: Path, directory: Path, key: str = "") -> Tpm:
    """A TPM on a copy of the state in ``directory``, with a key in hex or none; not started."""
    copy = owned_directory(world / f"copy{len(list(world.iterdir()))}")
    tpm = Tpm(copy, options=keyed(world, "--key", key) if key else [])
    shutil.copyfile(directory / PERMANENT, tpm.state / PERMANENT)
    shutil.chown(tpm.state / PERMANENT, "tss", "tss")
    return tpm


def keyed(world: Path, option: str, key: str) -> list[str]:
    file = world / f"key{len(list(world.iterdir()))}"
    file.write_text(key)
    shutil.chown(file, "tss", "tss")
    return [option, f"file={file},mode=aes-256-cbc,format=hex"]


def identity(directory: Path, key: str) -> Identity:
    """Of the TPM whose state lies in ``directory``, whether it runs or not. Takes 20 ms.

    Raises:
        TpmError: the state does not open with the key.
    """
    with world_directory() as world, copied(world, directory, key) as tpm:
        tpm.up()
        endorsement = tpm.send(READ_EK)
        assert endorsement[6:10] == bytes(4), f"no endorsement key: {endorsement.hex()}"
        return Identity(endorsement, int.from_bytes(tpm.send(READ_CLOCK)[RESETS], "big"))
