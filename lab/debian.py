"""Unpacked Debian packages, fetched once and cached, so that tests and guests use real kernels and boot loaders."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from pathlib import Path

ENVIRONMENT = "SWTPM_PROP_CACHE"
DEFAULT = "/var/cache/swtpm-prop-tests"


def cache() -> Path:
    """The cache directory (``$SWTPM_PROP_CACHE``), outside the repository; made if absent."""
    path = Path(os.environ.get(ENVIRONMENT, DEFAULT))
    path.mkdir(parents=True, exist_ok=True)
    return path


def package(name: str) -> Path:
    """The tree of binary package ``name`` (or ``name=version``), unpacked with ``dpkg -x``; no maintainer script runs.

    The tree appears in the cache by one rename, under a lock: processes that ask at once fetch once. An unversioned
    name keeps the version it was first fetched with.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+(=[A-Za-z0-9.+~:-]+)?", name):
        raise ValueError(f"not a package name: {name!r}")
    debs = cache() / "debs"
    debs.mkdir(exist_ok=True)
    tree = debs / name
    with (debs / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            _fetch(name, tree)
    return tree


def archive(name: str) -> Path:
    """The .deb of binary package ``name`` itself, fetched once; keeps its version as `package` does."""
    kept = cache() / "archives"
    kept.mkdir(exist_ok=True)
    with (kept / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(kept.glob(f"{name}_*.deb")):
            _download(name, kept)
    (deb,) = kept.glob(f"{name}_*.deb")
    return deb


def cloud_kernels() -> list[str]:
    """Signed cloud kernel packages of the archive, oldest ABI first (``linux-image-6.1.0-47-cloud-amd64`` ...)."""
    names = _run("apt-cache", "pkgnames", "linux-image-").split()
    pattern = re.compile(r"linux-image-[0-9]+\.[0-9]+\.[0-9][0-9a-z.+-]*-cloud-amd64")
    return sorted(filter(pattern.fullmatch, names), key=_numbers)


def kernel(name: str) -> Path:
    """The kernel image (a PE file) of an unpacked kernel package."""
    return next((package(name) / "boot").glob("vmlinuz-*"))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", name)]


def _fetch(name: str, tree: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".fetch-") as scratch:
        _download(name, Path(scratch))
        (deb,) = Path(scratch).glob("*.deb")
        unpacked = Path(scratch) / "tree"
        _run("dpkg", "-x", str(deb), str(unpacked))
        unpacked.rename(tree)


def _download(name: str, to: Path) -> None:
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name, cwd=str(to))


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
