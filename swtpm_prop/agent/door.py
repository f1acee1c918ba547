"""The door for this host's own hooks: lets guests in for them, with everything loaded; root alone can open it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from swtpm_prop.agent.metrics import Counts
from swtpm_prop.errors import Error, HostError
from swtpm_prop.hook import door
from swtpm_prop.hook.files import make_directory
from swtpm_prop.hook.migrate import let_in
from swtpm_prop.layout import Layout
from swtpm_prop.limits import AGENT_PEERS_WAITING
from swtpm_prop.transfer.speaker import Speaker

_log = logging.getLogger(__name__)


class Door:
    """Does what hooks ask; any thread may use it.

    Args:
        layout: of the host.
        speaker: the host's voice.
        counts: counts ``arrivals`` by outcome: ``let in``, or the id of what went wrong.
        look: has the journal looked at; returns at once.
    """

    def __init__(self, layout: Layout, speaker: Speaker, counts: Counts, look: Callable[[], None]) -> None:
        self._layout = layout
        self._speaker = speaker
        self._counts = counts
        self._look = look

    def talk(self, line: socket.socket) -> None:
        """Do what one hook asks, and close the connection."""
        with line, suppress(OSError):  # the hook was killed: what was begun for it is given up as its own would be
            xml = door.hear(line)
            if xml:
                self._let_in(line, xml)
            else:
                self._look()

    def _let_in(self, line: socket.socket, xml: bytes) -> None:
        try:
            noted = let_in(xml, self._layout, self._speaker)
        except Error as error:
            self._refuse(line, error)
        except Exception as error:
            _log.exception("a guest was not let in")
            self._refuse(line, Error("agent.failed", f"{type(error).__name__}: {error}", "report this"))
        else:
            self._counts.count("arrivals", outcome="let in")
            door.let(line, noted)

    def _refuse(self, line: socket.socket, error: Error) -> None:
        self._counts.count("arrivals", outcome=error.id)
        _log.warning("a guest is not let in: %s", error.line())
        door.refuse(line, error)


@contextmanager
def listening(layout: Layout) -> Iterator[socket.socket]:
    """The socket that this host's hooks connect to. There is one agent, so that what lies there is an earlier one's.

    Raises:
        HostError: ``agent.listen``.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            make_directory(layout.run, 0o755)
            layout.agent_socket.unlink(missing_ok=True)
            with door.address(layout) as place:
                listener.bind(place)
            layout.agent_socket.chmod(0o600)
            listener.listen(AGENT_PEERS_WAITING)
        except OSError as error:
            raise HostError(
                "agent.listen", f"cannot listen at {layout.agent_socket}: {error.strerror}", "see that /run is not full"
            ) from error
        try:
            yield listener
        finally:
            layout.agent_socket.unlink(missing_ok=True)
