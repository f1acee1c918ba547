"""A disk key that systemd-cryptenroll of Debian 12 binds to the property bank: it survives certified kernels only.

systemd 252 binds to the SHA-256 bank whatever other banks there are, so that must be the one that records properties.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from conftest import Pair
from product import Product
from updates import Site, updatable

from lab import guest

pytestmark = pytest.mark.host

CRYPTENROLL, CRYPTSETUP = Path("/usr/bin/systemd-cryptenroll"), Path("/sbin/cryptsetup")
TOKEN = Path("/lib/x86_64-linux-gnu/cryptsetup/libcryptsetup-token-systemd-tpm2.so")
CHEAP = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --cipher aes-cbc-essiv:sha256 --key-size 128"  # 64 KiB a slot
SMALL = "--luks2-metadata-size 16k --luks2-keyslots-size 128k"
FORMAT = f"{CRYPTSETUP} luksFormat --type luks2 --batch-mode {CHEAP} {SMALL} --key-file /run/key /run/volume"
PASSPHRASE_SLOT = slice(32 * 1024, 96 * 1024)  # behind the two headers; the second slot's area follows
ENROLL = f"{CRYPTENROLL} --unlock-key-file=/run/key --tpm2-device=auto --tpm2-pcrs=0+1+2+4+5+7+9+11 /run/volume"
DUMP = f"{CRYPTSETUP} luksDump --dump-json-metadata /run/volume"
UNLOCK = f"{CRYPTSETUP} open --test-passphrase --token-only /run/volume"


def test_a_luks_volume_unlocks_with_certified_kernels_only(pair: Pair, product: Product):
    first, update, stranger = guest.kernels(3)
    with updatable("cryptenroll", pair, product, (CRYPTENROLL, CRYPTSETUP, TOKEN)) as site:
        site.certify_reference(first)
        product.enable(site.machine, "--bank", "sha256")
        volume = enroll(site, first)
        site.certify(update)
        assert unlock(site, update, volume) == 0
        assert unlock(site, stranger, volume) != 0


def enroll(site: Site, kernel: str) -> bytes:
    """A LUKS2 volume, made and enrolled in the guest, packed and without its passphrase."""
    site.boot(kernel)
    console = site.machine.console
    console.put("/run/key", b"passphrase")
    for line in ("truncate -s 2M /run/volume", FORMAT, ENROLL, UNLOCK):
        console.check(line)
    assert '"tpm2-pcr-bank":"sha256"' in "".join(console.check(DUMP).split())
    volume = bytearray(gzip.decompress(console.run_bytes("gzip -c /run/volume")[1]))
    site.machine.destroy()
    # a slot is random bytes, and the way into a guest is slow
    volume[PASSPHRASE_SLOT] = bytes(64 * 1024)
    return gzip.compress(volume)


def unlock(site: Site, kernel: str, volume: bytes) -> int:
    """The exit status of unlocking by the TPM alone, on this kernel."""
    site.boot(kernel)
    site.machine.console.put("/run/volume.gz", volume)
    site.machine.console.check("gunzip /run/volume.gz")
    status, _ = site.machine.console.run(UNLOCK)
    site.machine.destroy()
    return status
