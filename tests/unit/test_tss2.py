"""Key files: what is written comes back, other programs read it, and what they write is read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hardware import HardwareTpm
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss import ESAPI
from tpm2_pytss.tsskey import TSSPrivKey

from swtpm_prop.custody.hardware import PARENT_HANDLE
from swtpm_prop.custody.objects import ImportBlob, Sealed
from swtpm_prop.custody.tss2 import KeyFile, from_pem, to_pem
from swtpm_prop.errors import WireError

BYTES = st.binary(max_size=300)
HANDLES = st.integers(0, 2**32 - 1)
KEY_FILES = st.builds(KeyFile, st.builds(Sealed, BYTES, BYTES), HANDLES, st.booleans()) | st.builds(
    KeyFile, st.builds(ImportBlob, BYTES, BYTES, BYTES), HANDLES, st.just(False)
)


@given(key=KEY_FILES)
def test_what_is_written_comes_back(key: KeyFile) -> None:
    pem = to_pem(key)
    assert from_pem(pem) == from_pem(pem.replace(b"\n", b"\r\n")) == key
    assert max(map(len, pem.splitlines())) <= 64


@given(data=BYTES | KEY_FILES.map(to_pem).flatmap(lambda pem: st.sampled_from([pem[1:], pem[:-40], pem[:99] + pem])))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(WireError) as refused:
        from_pem(data)
    assert refused.value.id == "wire.tss2"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HardwareTpm]:
    with HardwareTpm(tmp_path / "host") as tpm:
        with tpm.open() as opened:
            opened.initialise()
        yield tpm


def tool(host: HardwareTpm, line: str) -> None:
    environment = {**os.environ, "TPM2TOOLS_TCTI": host.tcti}
    subprocess.run(line.split(), env=environment, cwd=host.directory, check=True, capture_output=True)


def signing_key(host: HardwareTpm) -> tuple[TSSPrivKey, KeyFile]:
    """A key that another library made below our parent, in its words and in ours."""
    with ESAPI(host.tcti) as esys:
        made = TSSPrivKey.create_ecc(esys, parent=PARENT_HANDLE)
    return made, KeyFile(Sealed(made.public.marshal(), made.private.marshal()), PARENT_HANDLE)


def test_another_library_reads_it(host: HardwareTpm) -> None:
    made, ours = signing_key(host)
    assert from_pem(made.to_pem()) == ours
    theirs = TSSPrivKey.from_pem(to_pem(ours))
    assert (theirs.public.marshal(), theirs.private.marshal(), theirs.parent) == (*ours.item, PARENT_HANDLE)
    assert theirs.empty_auth


def test_the_tools_read_it_and_we_read_theirs(host: HardwareTpm) -> None:
    _, ours = signing_key(host)
    (host.directory / "key.pem").write_bytes(to_pem(ours))
    tool(host, "tpm2_load -Q -r key.pem -c key.ctx")
    tool(host, "tpm2_flushcontext -t")
    (host.directory / "key.pub").write_bytes(ours.item[0])
    (host.directory / "key.priv").write_bytes(ours.item[1])
    tool(host, f"tpm2_encodeobject -C {PARENT_HANDLE:#x} -u key.pub -r key.priv -o theirs.pem")
    assert from_pem((host.directory / "theirs.pem").read_bytes()) == ours


def test_a_sealed_secret_opens_from_its_file(host: HardwareTpm) -> None:
    with host.open() as opened:
        pem = to_pem(KeyFile(opened.seal(b"secret"), PARENT_HANDLE, secret=True))
    with host.open() as opened:
        item = from_pem(pem).item
        assert isinstance(item, Sealed)
        assert opened.unseal(item) == b"secret"
