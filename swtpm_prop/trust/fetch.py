"""Fetch the files of a store by https or from a directory: bounded in time, from nowhere else than asked."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from swtpm_prop.errors import StoreError
from swtpm_prop.limits import SILENCE_SECONDS, SYNC_SECONDS

_CHUNK = 65536


def address(source: str) -> str:
    """The URL of a store, ending in a slash, from an ``https:`` or ``file:`` URL or a directory's path.

    Raises:
        StoreError: ``store.url``.
    """
    parts = urlsplit(source)
    if parts.scheme == "https" and parts.hostname and not (parts.query or parts.fragment):
        return source.rstrip("/") + "/"
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return source.rstrip("/") + "/"
    if not parts.scheme and source:
        return Path(source).absolute().as_uri() + "/"
    raise StoreError("store.url", f"'{source}' is no https: or file: URL and no directory", "see --url")


class Fetcher(FetcherInterface):
    """Fetches for one sync. The length is bounded by `FetcherInterface`, which knows what the metadata says."""

    def __init__(self, seconds: float = SYNC_SECONDS, silence: float = SILENCE_SECONDS) -> None:
        self._deadline = time.monotonic() + seconds
        self._silence = silence
        self._pools: dict[str, urllib3.PoolManager] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        chunks = self._read(url) if url.startswith("file:") else self._get(url)
        try:
            for chunk in chunks:
                if time.monotonic() > self._deadline:
                    raise SlowRetrievalError(f"{url} takes too long")
                yield chunk
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise DownloadError(f"{url}: {error}") from error

    def _read(self, url: str) -> Iterator[bytes]:
        path = unquote(urlsplit(url).path)
        try:
            # Not blocking: a FIFO in its place must not hold up the sync.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DownloadHTTPError(f"there is no {path}", 404) from None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DownloadError(f"{path} is no regular file")
            while chunk := file.read(_CHUNK):
                yield chunk

    def _get(self, url: str) -> Iterator[bytes]:
        response = self._pool(url).request(
            "GET",
            url,
            preload_content=False,
            # Where a store is, is for the operator to say; and compressed data would have no bound.
            redirect=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "swtpm-prop"},
            timeout=urllib3.Timeout(self._silence),
        )
        try:
            if response.status != 200:
                raise DownloadHTTPError(f"{url}: HTTP status {response.status}", response.status)
            while chunk := response.read1(_CHUNK, decode_content=False):
                yield chunk
        finally:
            response.release_conn()

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections, through a proxy where the environment names one."""
        host = urlsplit(url).hostname or ""
        proxy = getproxies().get("https", "")
        proxy = "" if proxy_bypass(host) else proxy
        if proxy not in self._pools:
            self._pools[proxy] = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()
        return self._pools[proxy]
