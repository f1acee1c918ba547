"""The hook's way to this host's agent, which has everything loaded that takes the hook longer than its work does.

The agent greets with what it is, in one line. A hook of the same version sends the domain XML and ends its side; the
agent does what the hook would, answers with one JSON object, and ends. A hook that is not greeted at once does it
itself: what it has not sent nobody works on. Who says nothing has left something in the journal.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from swtpm_prop import __version__
from swtpm_prop.errors import Error, TransferError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOMAIN_XML_BYTES, GREETING_SECONDS, LET_IN_SECONDS

GREETING = f"swtpm-prop {__version__}\n".encode()


def have_let_in(xml: bytes, layout: Layout) -> bytes | None:
    """Have the agent do what `migrate.let_in` does.

    Returns:
        As `migrate.let_in`; None: no agent of this version is there that has time.

    Raises:
        TransferError: ``transfer.agent-lost``.
        Error: what the agent raised.
    """
    with socket.socket(socket.AF_UNIX) as line:
        if not _greeted(line, layout):
            return None
        line.settimeout(LET_IN_SECONDS)
        try:
            line.sendall(xml)
            line.shutdown(socket.SHUT_WR)
            answer = json.loads(_all(line))
        except (OSError, ValueError) as error:
            raise TransferError(
                "transfer.agent-lost",
                "this host's agent ended, or hangs, while it fetched the guest's key",
                "see that it runs; migrate again",
            ) from error
    if "xml" not in answer:
        raise Error(answer["id"], answer["what"], answer["mend"])
    return str(answer["xml"]).encode()


def knock(layout: Layout) -> None:
    """Have the agent, if there is one, look into the journal now."""
    with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
        _reach(line, layout)


def hear(line: socket.socket) -> bytes:
    """The agent's side: greet, and read the domain XML; empty: the hook has said nothing, or does not wait any more."""
    with suppress(OSError):
        line.sendall(GREETING)
        # What is cut off within the XML is no XML.
        return _all(line)
    return b""


def let(line: socket.socket, xml: bytes) -> None:
    """The agent's side: libvirt may go on, with this XML."""
    _end(line, {"xml": xml.decode()})


def refuse(line: socket.socket, error: Error) -> None:
    """The agent's side: it may not."""
    _end(line, {"id": error.id, "what": error.what, "mend": error.mend})


@contextmanager
def address(layout: Layout) -> Iterator[str]:
    """Where the agent's socket is: below a descriptor, for an address has at most 107 bytes (unix(7)).

    Raises:
        OSError: the directory is not there.
    """
    directory = os.open(layout.run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{layout.agent_socket.name}"
    finally:
        os.close(directory)


def _greeted(line: socket.socket, layout: Layout) -> bool:
    try:
        _reach(line, layout)
        return line.recv(len(GREETING)) == GREETING
    except OSError:
        return False


def _reach(line: socket.socket, layout: Layout) -> None:
    line.settimeout(GREETING_SECONDS)
    with address(layout) as place:
        line.connect(place)


def _all(line: socket.socket) -> bytes:
    """What the other side sends until it ends; cut off where it is too long to be whole."""
    data = b""
    while len(data) <= 2 * DOMAIN_XML_BYTES and (part := line.recv(65536)):
        data += part
    return data


def _end(line: socket.socket, answer: dict[str, str]) -> None:
    line.sendall(json.dumps(answer, ensure_ascii=False).encode())
