"""Fetching by https from a real server that behaves, misleads, or never ends."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certifier import P256, private_pem
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from storekeeper import Follower, Keeper, certificate

from swtpm_prop.errors import Error, StoreError
from swtpm_prop.trust.fetch import Fetcher, address

SHUT_SECONDS = 0.02
"""How often a server looks whether it is to end; every test waits for that."""


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("https://example.org/store", "https://example.org/store/"),
        ("https://example.org:8443/a/", "https://example.org:8443/a/"),
        ("file:///srv/store", "file:///srv/store/"),
        ("/srv/my store", "file:///srv/my%20store/"),
    ],
)
def test_addresses(source: str, url: str) -> None:
    assert address(source) == url


@pytest.mark.parametrize(
    "source",
    ["", "http://example.org/", "ftp://example.org/", "https://", "https://e.org/?x", "file://other/srv", "file:srv"],
)
def test_no_addresses(source: str) -> None:
    with pytest.raises(StoreError) as refused:
        address(source)
    assert refused.value.id == "store.url"


class Server:
    """An https server on this machine whose certificate the tests trust; ``handler`` may be exchanged."""

    def __init__(self, directory: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca = directory / "tls.pem"
        self.ca.write_bytes(private_pem(P256) + _certificate())
        context.load_cert_chain(self.ca)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(SHUT_SECONDS,), daemon=True).start()
        self.url = f"https://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _certificate() -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, P256.public_key(), 1, now, now + datetime.timedelta(hours=1))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(here, critical=False)
    return builder.sign(P256, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Follower, type[Any]]]:
    keeper = Keeper(tmp_path)
    keeper.init()
    keeper.add(certificate(b"kernel"))
    keeper.publish()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(keeper.public))

        def log_message(self, *_args: object) -> None:
            """Quiet."""

    server = Server(tmp_path, Handler)
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca))
    host = Follower(tmp_path / "host", keeper)
    host.pin()
    host.url = server.url
    yield host, Handler
    server.close()


def test_a_store_is_followed_by_https(followed: tuple[Follower, type[Any]]) -> None:
    host, _ = followed
    assert host.sync()[:3] == (1, 0, ())
    assert host.sync()[:3] == (0, 0, ())
    assert host.certified(b"kernel") == [b"kernel"]


def test_a_server_without_a_certificate_we_know(
    followed: tuple[Follower, type[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = followed
    monkeypatch.delenv("SSL_CERT_FILE")
    assert _error(host) == "store.download"


def _error(host: Follower) -> str:
    with pytest.raises(Error) as caught:
        host.sync()
    assert not host.layout.index.exists()
    return caught.value.id


def _redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/elsewhere" + handler.path)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _fail(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(500)


def _cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.connection.shutdown(socket.SHUT_RDWR)


def _without_end(handler: BaseHTTPRequestHandler, chunk: bytes = b"x" * 65536, pause: float = 0) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(chunk)
            time.sleep(pause)
    except OSError:
        handler.close_connection = True


def _drop_by_drop(handler: BaseHTTPRequestHandler) -> None:
    _without_end(handler, b"x", 0.05)


def _silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("answer", "id"),
    [
        *((_redirect, "download"), (_fail, "download"), (_cut, "download"), (_without_end, "too-large")),
        *((_drop_by_drop, "download"), (_silent, "download")),
    ],
)
def test_a_server_that_misbehaves(
    followed: tuple[Follower, type[Any]], monkeypatch: pytest.MonkeyPatch, answer: Any, id: str
) -> None:
    host, handler = followed
    monkeypatch.setattr(handler, "do_GET", answer)
    monkeypatch.setattr("storekeeper.Fetcher", lambda: Fetcher(seconds=0.8, silence=0.2))
    began = time.monotonic()
    assert _error(host) == f"store.{id}"
    assert time.monotonic() - began < 5


def test_a_proxy_is_used_where_the_environment_names_one(
    followed: tuple[Follower, type[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = followed
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_args: object) -> None:
            """Quiet."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, args=(SHUT_SECONDS,), daemon=True).start()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    try:
        assert _error(host) == "store.download"
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert asked[0] == host.url.removeprefix("https://").rstrip("/")
