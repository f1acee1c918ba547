"""The command line of who publishes a store, and of a host that follows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import test_repository
from certifier import ED25519, private_pem, trust_text
from storekeeper import ALL, Follower, Keeper, certificate
from test_repository import A, run

from swtpm_prop.trust.keys import load_private

keeper = test_repository.keeper
host = test_repository.host


def test_from_zero_to_a_followed_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("root", "targets", "online"):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", f"{name}.key"], check=True)
        subprocess.run(["openssl", "pkey", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pem"], check=True)
    keys = [f"--add-key={name}={name}.pem" for name in ("root", "targets", "online")]
    shown = run("init", "store", *keys, "--days", "timestamp=1", "--json")
    assert json.loads(shown.stdout)["roles"]["timestamp"]["days"] == 1
    (tmp_path / "a").write_bytes(certificate(A))
    assert run("add", "store", "a").exit_code == 0
    assert run("publish", "store", "--key", "root.key").exit_code == 1
    done = run("publish", "store", "--key", "targets.key", "--key", "online.key", "--json")
    assert (done.exit_code, json.loads(done.stdout)["certificates"]) == (0, 1)
    (tmp_path / "host/etc/swtpm-prop").mkdir(parents=True)
    (tmp_path / "host/var/lib/swtpm-prop/index").mkdir(parents=True)
    shutil.copy("store/public/metadata/1.root.json", "host/etc/swtpm-prop/root.json")
    Path("host/etc/swtpm-prop/trust.toml").write_text(trust_text(ED25519))
    assert run("sync", "--root", "host").exception.id == "usage.no-store"  # type: ignore[union-attr]
    Path("host/etc/swtpm-prop/host.toml").write_text(f'[store]\nurl = "file://{tmp_path}/store/public"\n')
    assert json.loads(run("sync", "--root", "host", "--json").stdout)["added"] == 1
    assert run("revoke", "store", "a").exit_code == 0
    assert run("publish", "store", "--key", "targets.key", "--key", "online.key").exit_code == 0
    assert json.loads(run("sync", "--root", "host", "--json").stdout)["removed"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("init", "store", "--add-key", "nobody=x.pem"),
        ("init", "store", "--add-key", "root"),
        ("init", "store", "--threshold", "root=0"),
        ("revoke", "store"),
        ("revoke", "store", "--component", "linux"),
        ("revoke", "store", "a", "--property", "https://example.org/p"),
    ],
)
def test_words_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exception.id.startswith("usage.")  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []


def test_who_publishes_hears_in_time_that_offline_keys_are_needed(
    keeper: Keeper, host: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("publish", keeper.publisher.directory, "--key", keeper.key("online"))
    assert "store.expires-soon" not in run(*words).output
    keeper.rotate(days={"root": 29})
    keeper.publish("root", "online")
    said = run(*words)
    assert said.exit_code == 0
    assert said.stderr.count("[store.expires-soon]") == 1
    monkeypatch.setattr("swtpm_prop.cli.store_publish.OFFLINE_NOTICE", 121 * 86400)
    assert run(*words).stderr.count("[store.expires-soon]") == 2


def test_a_timer_opens_the_online_key_by_a_file(keeper: Keeper) -> None:
    path = Path(keeper.key("online"))
    path.write_bytes(private_pem(load_private(path.read_bytes(), None), b"secret"))
    words = ["publish", keeper.publisher.directory, *(f"--key={keeper.key(name)}" for name in ALL)]
    (keeper.directory / "word").write_text("secret\n")
    (keeper.directory / "wrong").write_text("terces\n")
    assert run(*words, "--passphrase-file", keeper.directory / "wrong").exception.id == "trust.key-passphrase"  # type: ignore[union-attr]
    assert run(*words, "--passphrase-file", keeper.directory / "word").exit_code == 0
