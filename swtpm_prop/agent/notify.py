"""Tells the service manager how far the agent is (sd_notify(3)); nothing happens where none asked."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` or ``STATUS=text`` to whom the environment names."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A leading "@" stands for the zero byte of Linux' abstract names.
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            manager.sendto(state.encode(), name)
        except OSError:
            return  # it has gone, and with it the reason to tell
