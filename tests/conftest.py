"""Makes the helpers beside this file importable in every test; a key in hardware for those that sign."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MODULE = "/usr/lib/softhsm/libsofthsm2.so"


@pytest.fixture(scope="session")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The public half of a P-256 key in a token (PKCS #11), ``hsm:2?label=store`` with PIN 1234.

    One for all: the module reads where its tokens are once in the life of a process.
    """
    directory = tmp_path_factory.mktemp("token")
    (directory / "tokens").mkdir()
    (directory / "softhsm.conf").write_text(f"directories.tokendir = {directory}/tokens\n")
    tool = f"pkcs11-tool --module {MODULE} --token-label store --login --pin 1234 --id 02"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(directory / "softhsm.conf"))
        patch.setenv("PYKCS11LIB", MODULE)
        for line in (
            "softhsm2-util --init-token --free --label store --so-pin 12345678 --pin 1234",
            f"{tool} --keypairgen --key-type EC:prime256v1",
            f"{tool} --read-object --type pubkey --output-file {directory}/token.der",
            f"openssl pkey -pubin -inform DER -in {directory}/token.der -out {directory}/token.pem",
        ):
            subprocess.run(line.split(), check=True, capture_output=True)
        yield directory / "token.pem"
