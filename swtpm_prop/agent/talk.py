"""Each talk with a peer, from the agent's side: what became of it is logged and counted, and it brings nothing down."""

from __future__ import annotations

import logging
import socket

from swtpm_prop.agent.metrics import Counts
from swtpm_prop.errors import Error
from swtpm_prop.transfer import talk
from swtpm_prop.transfer.answer import Source
from swtpm_prop.transfer.settle import Settler
from swtpm_prop.transfer.speaker import Speaker

_log = logging.getLogger(__name__)


class Talker:
    """Talks with peers; any thread may use it.

    Args:
        speaker: this host's voice.
        source: this host as one that has guests' keys.
        settler: of its transfers.
        counts: counts ``answers`` by outcome: ``given``, or the id of what went wrong.
    """

    def __init__(self, speaker: Speaker, source: Source, settler: Settler, counts: Counts) -> None:
        self._speaker = speaker
        self._source = source
        self._settler = settler
        self._counts = counts

    def talk(self, peer: socket.socket) -> None:
        """Say all that is to be said to one connected peer, and close it."""
        outcome = "given"
        try:
            with peer:
                talk.serve(peer, self._speaker.identity(), self._source, self._settler)
        except Error as error:
            outcome = error.id
            _log.warning("a peer is refused: %s", error.line())
        except Exception:
            # A mistake of ours, perhaps found by a hostile peer, costs this talk and not the agent.
            outcome = "agent.failed"
            _log.exception("a talk failed")
        self._counts.count("answers", outcome=outcome)
