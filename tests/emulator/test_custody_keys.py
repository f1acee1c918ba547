"""A guest whose key is in custody, behind the real shims and the layer: who sees the key, and what opens without it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swtpm_prop.custody.form import PERMANENT, Form, form
from swtpm_prop.custody.keys import migration_key
from tests.swtpm import USER, UUID, VOLATILE, LayerHost, Tpm, TpmError, owned_directory

pytestmark = pytest.mark.root

KEY = bytes(range(0x40, 0x60))
MIGRATION_ENCRYPTED = 2
"""Of the flags in a blob's header (swtpm, src/swtpm/swtpm_nvstore.c)."""
READ_4 = bytes.fromhex("8001000000140000017e00000001000c03100000")
"""PCR_Read of PCR 4 in the SHA-384 bank."""
EXTEND_4 = bytes.fromhex("80020000005100000182000000040000000940000009000000000000000001000c" + "11" * 48)


@pytest.fixture
def host(host: LayerHost) -> LayerHost:
    host.opt_in()
    host.take_into_custody(KEY)
    return host


@pytest.fixture
def base(host: LayerHost, directory: Path) -> Path:
    """A TPM state made as libvirt lets our swtpm_setup make it."""
    state = owned_directory(directory / "guest" / UUID / "tpm2")
    owned_directory(directory / "guest")
    made = subprocess.run(
        [host.setup_shim, "--tpm2", "--tpm-state", state, "--vmid", f"g:{UUID}", "--logfile", directory / "guest/log",
         "--createek", "--lock-nvram", "--not-overwrite"],
        user=USER, group=USER, extra_groups=[], cwd="/", env={**host.env, "HOME": "/nonexistent"}, capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, (directory / "guest/log").read_text()
    return directory / "guest"


def close_window(host: LayerHost) -> None:
    """What the hook does at ``start``."""
    host.layout.state_key(UUID).unlink()
    host.layout.migration_key(UUID).unlink()


@pytest.fixture
def tpm(host: LayerHost, base: Path) -> Iterator[Tpm]:
    with host.tpm(base) as running:
        close_window(host)
        running.up()
        yield running


def shows_key(data: bytes) -> bool:
    """Whether either key is in the data, in binary or in digits of either case."""
    low = data.lower()
    return any(k in data or k.hex().encode() in low for k in (KEY, migration_key(KEY)))


def test_a_state_is_made_encrypted_and_stays_so(tpm: Tpm, base: Path) -> None:
    assert form(base / UUID / "tpm2") is Form.ENCRYPTED
    assert tpm.send(EXTEND_4)[6:10] == bytes(4)
    tpm.reset()
    tpm.shutdown()
    assert form(base / UUID / "tpm2") is Form.ENCRYPTED


def test_the_layer_is_there_too(tpm: Tpm, host: LayerHost) -> None:
    tpm.send(EXTEND_4)
    assert [record["content"]["event"] for record in host.records()] == ["startup", "measurement"]


def test_after_the_start_no_argument_environment_log_or_file_holds_the_key(
    tpm: Tpm, host: LayerHost, directory: Path
) -> None:
    assert tpm.process is not None
    process = Path(f"/proc/{tpm.process.pid}")
    assert b"Socket" not in (process / "cmdline").read_bytes()
    assert not shows_key((process / "cmdline").read_bytes() + (process / "environ").read_bytes())
    tpm.store_volatile()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"swtpm.log", PERMANENT, "tpm2-00.volatilestate", f"{UUID}.jsonl", "log"} <= {path.name for path in files}
    assert [path for path in files if shows_key(path.read_bytes())] == []
    # The test would see it: while the guest was starting it was there.
    host.take_into_custody(KEY)
    assert shows_key(host.layout.state_key(UUID).read_bytes())
    assert shows_key(host.layout.migration_key(UUID).read_bytes())


def test_no_descriptor_of_the_keys_stays_open(tpm: Tpm) -> None:
    assert tpm.process is not None
    links = [link.readlink().name for link in Path(f"/proc/{tpm.process.pid}/fd").iterdir()]
    assert not {name for name in links if "key" in name}


def test_it_runs_as_the_unprivileged_user_behind_its_filter(tpm: Tpm) -> None:
    assert tpm.process is not None
    lines = Path(f"/proc/{tpm.process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert int(status["CapEff"], 16) == 0
    assert status["Seccomp"] == "2"
    assert "0" not in status["Uid"].split()


def test_a_plain_swtpm_does_not_open_the_state(tpm: Tpm, base: Path) -> None:
    tpm.shutdown()
    with Tpm(base) as plain, pytest.raises(TpmError):
        plain.up()


def test_once_started_a_second_start_has_no_key_and_fails_closed(tpm: Tpm, host: LayerHost, base: Path) -> None:
    tpm.shutdown()
    with pytest.raises(TpmError, match=r"layer\.key-unreadable"), host.tpm(base):
        pass
    assert form(base / UUID / "tpm2") is Form.ENCRYPTED


def test_nor_does_it_make_a_plain_state_where_the_encrypted_one_is_gone(tpm: Tpm, host: LayerHost, base: Path) -> None:
    tpm.shutdown()
    state = base / UUID / "tpm2"
    (state / PERMANENT).unlink()
    with pytest.raises(TpmError, match=r"layer\.key-unreadable"), host.tpm(base):
        pass
    made = subprocess.run(
        [host.setup_shim, "--tpm2", "--tpm-state", state, "--vmid", f"g:{UUID}"],
        user=USER, group=USER, extra_groups=[], cwd="/", env={**host.env, "HOME": "/nonexistent"}, capture_output=True,
    )  # fmt: skip
    assert made.returncode == 1
    assert b"[layer.key-unreadable]" in made.stderr
    assert form(state) is Form.NONE


def test_another_key_does_not_open_the_state(tpm: Tpm, host: LayerHost, base: Path) -> None:
    tpm.shutdown()
    host.take_into_custody(bytes(32))
    with host.tpm(base) as other, pytest.raises(TpmError):
        other.up()


def test_what_migrates_opens_with_the_migration_key_alone(
    tpm: Tpm, host: LayerHost, directory: Path, base: Path, new_base: Callable[[str], Path]
) -> None:
    tpm.send(EXTEND_4)
    read = tpm.send(READ_4)
    blobs = tpm.snapshot()
    assert [blob[5] & MIGRATION_ENCRYPTED for _, blob in blobs.values() if blob] == [MIGRATION_ENCRYPTED] * 2
    tpm.shutdown()
    with Tpm(new_base("captured")) as plain, pytest.raises(TpmError):
        plain.restore(blobs)
    host.take_into_custody(bytes(32))
    with host.tpm(owned_directory(directory / "foreign")) as foreign, pytest.raises(TpmError):
        foreign.restore(blobs)
    host.take_into_custody(KEY)
    with host.tpm(owned_directory(directory / "destination")) as destination:
        destination.restore(blobs)
        assert destination.send(READ_4) == read
        destination.shutdown()
    assert form(directory / "destination" / UUID / "tpm2") is Form.ENCRYPTED


def test_a_changed_blob_is_refused(tpm: Tpm, host: LayerHost, directory: Path) -> None:
    """Without custody a blob carries an unkeyed checksum only: whoever can change it can set any PCR."""
    flags, blob = tpm.snapshot()[VOLATILE]
    changed = bytearray(blob)
    changed[len(blob) // 2] ^= 1
    tpm.stop()
    with pytest.raises(TpmError):
        tpm.set_state(VOLATILE, flags, bytes(changed))
    tpm.set_state(VOLATILE, flags, blob)


def test_a_swtpm_that_is_killed_leaves_an_encrypted_state(tpm: Tpm, host: LayerHost, base: Path) -> None:
    assert tpm.process is not None
    tpm.send(EXTEND_4)
    os.kill(tpm.process.pid, signal.SIGKILL)
    tpm.process.wait()
    host.opt_in()
    host.take_into_custody(KEY)
    with host.tpm(base) as again:
        again.up()
    assert form(base / UUID / "tpm2") is Form.ENCRYPTED
