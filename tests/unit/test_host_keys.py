"""A host's own keys: real key files, and handles that come back from them, whatever was interrupted or lost."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hardware import HardwareTpm
from tpm2_pytss import ESAPI
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import TPM2B_PUBLIC, TPML_PCR_SELECTION

from swtpm_prop import durable
from swtpm_prop.attest import structures, tpm_keys
from swtpm_prop.custody import tss2
from swtpm_prop.custody.host_keys import AK, PARENT, HostKey
from swtpm_prop.custody.objects import ImportBlob, Sealed
from swtpm_prop.custody.tss2 import OWNER, KeyFile
from swtpm_prop.errors import HostError

pytestmark = pytest.mark.root

SECRET = bytes(range(32))
BOTH = (PARENT, AK)
each = pytest.mark.parametrize("key", BOTH, ids=["parent", "ak"])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HardwareTpm]:
    """An initialised host."""
    with HardwareTpm(tmp_path / "host") as tpm:
        publics(tpm)
        yield tpm


@pytest.fixture
def new(tmp_path: Path) -> Iterator[HardwareTpm]:
    """A host that was never initialised."""
    with HardwareTpm(tmp_path / "new") as tpm:
        yield tpm


def publics(tpm: HardwareTpm) -> dict[HostKey, bytes]:
    """What ``host init`` finds or makes."""
    with tpm.open() as opened:
        opened.initialise()
        return {PARENT: opened.parent_public, AK: opened.ak_public}


def files(tpm: HardwareTpm) -> dict[HostKey, bytes]:
    """What lies in the files."""
    return {key: tss2.from_pem((tpm.keys / key.file).read_bytes()).item[0] for key in BOTH}


@contextmanager
def refused(id: str, *words: str) -> Iterator[None]:
    with pytest.raises(HostError) as error:
        yield
    assert error.value.id == id, error.value
    for word in words:
        assert word in f"{error.value.what}: {error.value.mend}"


def owner(code: int, *fields: int, auth: int = OWNER) -> bytes:
    """A command with an empty password, by hand; the first field is a handle if there are two."""
    handles, parameters = fields[:-1], fields[-1:]
    body = struct.pack(f">{1 + len(handles)}I", auth, *handles) + bytes.fromhex("00000009 40000009 0000 00 0000")
    body += struct.pack(f">{len(parameters)}I", *parameters)
    return struct.pack(">HII", 0x8002, 10 + len(body), code) + body


def evict(tpm: HardwareTpm, key: HostKey) -> None:
    assert tpm.send(owner(0x120, key.handle, key.handle))[6:10] == bytes(4)


def clear(tpm: HardwareTpm) -> None:
    assert tpm.send(owner(0x126, auth=0x4000000A))[6:10] == bytes(4)


def is_there(tpm: HardwareTpm, key: HostKey) -> bool:
    return bool(tpm.send(struct.pack(">HIII", 0x8001, 14, 0x173, key.handle))[6:10] == bytes(4))


def tool(tpm: HardwareTpm, line: str) -> None:
    environment = {**os.environ, "TPM2TOOLS_TCTI": tpm.tcti}
    done = subprocess.run(line.split(), env=environment, cwd=tpm.directory, capture_output=True, text=True)
    assert done.returncode == 0, (line, done.stderr)
    if "_load" in line:
        tool(tpm, "tpm2_flushcontext -t")


# -- the files ----------------------------------------------------------------------------------


def test_the_files_are_this_host_s_keys(host: HardwareTpm) -> None:
    assert files(host) == publics(host)
    assert host.keys.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in host.keys.iterdir()} == {
        "parent.pem": 0o600,
        "ak.pem": 0o600,
    }
    tpm_keys.check_parent(files(host)[PARENT])
    tpm_keys.check_attestation_key(files(host)[AK])


def test_another_library_loads_and_uses_them(host: HardwareTpm) -> None:
    made = publics(host)
    parent, ak = (TSSPrivKey.from_pem((host.keys / key.file).read_bytes()) for key in BOTH)
    assert (parent.parent, parent.empty_auth, ak.parent, ak.empty_auth) == (OWNER, True, OWNER, True)
    with ESAPI(host.tcti) as esys:
        with ak.load(esys) as loaded:
            attest, signature = esys.quote(loaded, TPML_PCR_SELECTION.parse("sha256:0"), b"a question")
        public = structures.p256(structures.public(made[AK], "ak"))
        assert public is not None
        structures.check_signature(public, signature.marshal(), bytes(attest), "quote")
        with parent.load(esys) as loaded:
            private, child, *_ = esys.create(loaded, None, TPM2B_PUBLIC.parse("ecc"))
        # What was made below the key of the file is below the one at the handle: they are the same.
        with esys.load(esys.tr_from_tpmpublic(PARENT.handle), private, child):
            pass


def test_the_tools_load_and_use_them(host: HardwareTpm) -> None:
    (host.directory / "ak.public").write_bytes(publics(host)[AK])
    tool(host, f"tpm2_load -Q -r {host.keys}/ak.pem -c ak.ctx")
    tool(host, "tpm2_quote -Q -c ak.ctx -l sha256:0,7 -q 00aa -m quote -s signature")
    tool(host, "tpm2_flushcontext -t")
    tool(host, "tpm2_checkquote -Q -u ak.public -m quote -s signature -q 00aa")
    tool(host, f"tpm2_load -Q -r {host.keys}/parent.pem -c parent.ctx")
    tool(host, "tpm2_create -Q -C parent.ctx -G ecc -u child.pub -r child.priv")
    tool(host, "tpm2_flushcontext -t")
    tool(host, f"tpm2_load -Q -C {PARENT.handle:#x} -u child.pub -r child.priv -c child.ctx")


# -- what comes back ----------------------------------------------------------------------------


def test_to_initialise_again_changes_nothing(host: HardwareTpm) -> None:
    before, kept = publics(host), {path: path.stat() for path in host.keys.iterdir()}
    assert publics(host.reboot()) == before
    assert {path: path.stat() for path in host.keys.iterdir()} == kept


@each
def test_a_handle_that_is_lost_comes_back(host: HardwareTpm, key: HostKey) -> None:
    before = publics(host)
    with host.open() as opened:
        sealed = opened.seal(SECRET)
    evict(host, key)
    assert publics(host) == before
    with host.open() as opened:
        assert opened.unseal(sealed) == SECRET


def test_both_handles_come_back(host: HardwareTpm) -> None:
    before = publics(host)
    for key in BOTH:
        evict(host, key)
    assert publics(host.reboot()) == before


@each
def test_a_file_that_is_lost_stays_lost_and_the_host_goes_on(host: HardwareTpm, key: HostKey) -> None:
    before = publics(host)
    kept = (host.keys / key.file).rename(host.directory / "backup")
    assert publics(host) == before
    assert not (host.keys / key.file).exists()
    kept.rename(host.keys / key.file)
    evict(host, key)
    assert publics(host) == before


STEPS = ("write", "load", "evict_control")


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_it_begins_where_it_was(new: HardwareTpm, step: str, turn: int) -> None:
    killed_before(new, step, turn)
    assert sum((new.keys / key.file).exists() for key in BOTH) == turn - (step == "write")
    assert sum(is_there(new, key) for key in BOTH) == turn - 1
    made = {key: file for key in BOTH if (file := new.keys / key.file).exists()}
    before = {key: tss2.from_pem(file.read_bytes()).item[0] for key, file in made.items()}
    assert before.items() <= publics(new).items()
    assert files(new) == publics(new)


def killed_before(tpm: HardwareTpm, step: str, turn: int) -> None:
    """``host init`` by a process that dies before it does this for the first or second time."""
    child = os.fork()
    if child == 0:
        where: Any = durable if step == "write" else ESAPI
        done, left = getattr(where, step), [turn]

        def dying(*words: Any, **more: Any) -> Any:
            left[0] -= 1
            return done(*words, **more) if left[0] else os._exit(17)

        setattr(where, step, dying)
        publics(tpm)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def test_no_key_without_its_file(new: HardwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", full)
        with refused("host.keys-unwritable", "parent.pem", "No space"):
            publics(new)
    assert not any(is_there(new, key) for key in BOTH)
    publics(new)


# -- refusals -----------------------------------------------------------------------------------


def test_a_cleared_tpm_is_told_from_a_new_one(host: HardwareTpm, tmp_path: Path) -> None:
    before, kept = publics(host), [(host.keys / key.file).read_bytes() for key in BOTH]
    clear(host)
    for _ in range(2):
        with refused("tpm.cleared", str(host.keys / "parent.pem"), "parent.pem and ak.pem", "host enroll"):
            publics(host)
    assert not any(is_there(host, key) for key in BOTH)
    assert [(host.keys / key.file).read_bytes() for key in BOTH] == kept
    # As the message says.
    for key in BOTH:
        (host.keys / key.file).rename(tmp_path / key.file)
    after = publics(host)
    assert after == files(host)
    assert not after.items() & before.items()


@each
def test_nothing_new_is_made_beside_a_file_of_a_cleared_tpm(host: HardwareTpm, key: HostKey) -> None:
    (host.keys / key.file).unlink()
    clear(host)
    with refused("tpm.cleared"):
        publics(host)
    assert not any(is_there(host, each) for each in BOTH)
    assert not (host.keys / key.file).exists()


def test_the_disk_of_another_host(host: HardwareTpm, new: HardwareTpm) -> None:
    publics(new)
    new.keys.rename(new.directory / "own")
    new.keys = host.keys
    with refused("tpm.handle-taken", "0x81005350", "parent.pem", "another host", "tpm2_evictcontrol -c 0x81005350"):
        publics(new)


@each
def test_a_foreign_key_at_the_handle(host: HardwareTpm, key: HostKey) -> None:
    evict(host, key)
    tool(host, "tpm2_createprimary -Q -C o -G ecc -c foreign.ctx")
    tool(host, "tpm2_flushcontext -t")
    tool(host, f"tpm2_evictcontrol -Q -C o -c foreign.ctx {key.handle:#x}")
    with refused("tpm.handle-taken", f"{key.handle:#x}", key.file):
        publics(host)
    (host.keys / key.file).rename(host.directory / "away")
    with refused("tpm.handle-taken", f"{key.handle:#x}", key.what):
        publics(host)


def broken(key: HostKey, pem: bytes, other: bytes) -> dict[str, bytes]:
    item = tss2.from_pem(pem).item
    assert isinstance(item, Sealed)
    return {
        "no key file": b"parent\n",
        "cut off": pem[:-60],
        "of the other key": other,
        "sealed data": tss2.to_pem(KeyFile(item, OWNER, secret=True)),
        "to be imported": tss2.to_pem(KeyFile(ImportBlob(*item, b"\0\0"), OWNER)),
        "below another key": tss2.to_pem(KeyFile(item, PARENT.handle)),
        "not restricted": tss2.to_pem(
            KeyFile(item._replace(public=item.public.replace(b"\4\x72", b"\0\x72", 1)), OWNER)
        ),
    }


@each
@pytest.mark.parametrize("there", [True, False], ids=["with-handle", "without"])
def test_a_file_that_is_something_else(host: HardwareTpm, key: HostKey, there: bool) -> None:
    before = publics(host)
    path = host.keys / key.file
    pem, other = path.read_bytes(), next((host.keys / each.file).read_bytes() for each in BOTH if each != key)
    if not there:
        evict(host, key)
    for what, data in broken(key, pem, other).items():
        path.write_bytes(data)
        with refused("host.key-file", str(path), key.what):
            publics(host)
        assert path.read_bytes() == data, what
    path.write_bytes(pem)
    assert publics(host) == before


def test_a_file_whose_private_part_was_changed_is_not_loaded(host: HardwareTpm) -> None:
    path = host.keys / PARENT.file
    item = tss2.from_pem(path.read_bytes()).item
    path.write_bytes(tss2.to_pem(KeyFile(Sealed(item[0], item[1][:-1] + b"\0"), OWNER)))
    evict(host, PARENT)
    with refused("tpm.cleared", "the file is damaged"):
        publics(host)


# -- what does not belong below the parent ------------------------------------------------------


def test_a_foreign_object_says_whether_the_parent_is_the_host_s(host: HardwareTpm, new: HardwareTpm) -> None:
    with host.open() as opened:
        sealed = opened.seal(SECRET)
    publics(new)
    with new.open() as opened, refused("tpm.foreign-object", "another storage parent", "is unchanged"):
        opened.unseal(sealed)
    new.keys, own = host.keys, new.keys
    with new.open() as opened, refused("tpm.foreign-object", "cleared or replaced", "host init"):
        opened.unseal(sealed)
    for nothing in (own / "none", host.directory / "swtpm.log"):
        new.keys = nothing
        with new.open() as opened, refused("tpm.foreign-object", "does not belong to this host's TPM"):
            opened.unseal(sealed)
