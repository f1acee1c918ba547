"""Entry of the hook program: NAME OPERATION SUBOPERATION EXTRA as arguments, domain XML on standard input."""

from __future__ import annotations

import gc
import os
import sys

from swtpm_prop.hook.operations import run
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOMAIN_XML_BYTES


def main() -> None:
    """Carry out one hook call, and end the process with its exit status."""
    # A guest waits. What lives for a tenth of a second has no garbage to look for, and the kernel tidies up after it at
    # once; the interpreter takes a sixth of all the time for that.
    gc.disable()
    status = run(sys.argv[1:], sys.stdin.buffer.read(DOMAIN_XML_BYTES + 1), Layout())
    sys.stdout.flush()
    os._exit(status)
