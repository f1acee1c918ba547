"""Warnings of a hook call that succeeds: of these libvirt keeps standard error for its debug log."""

from __future__ import annotations

import sys

from swtpm_prop.errors import printable


def warn(text: str) -> None:
    """One line on standard error and in the system's log."""
    # Imported here because it is seldom needed.
    import syslog

    line = printable(text)
    print(f"swtpm-prop: {line}", file=sys.stderr)
    syslog.openlog("swtpm-prop", 0, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, line)
