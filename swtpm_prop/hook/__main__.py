"""Entry of the hook: ``python -m swtpm_prop.hook NAME OPERATION SUBOPERATION EXTRA``, domain XML on standard input."""

from __future__ import annotations

import gc
import os
import sys

from swtpm_prop.hook.operations import run
from swtpm_prop.layout import Layout
from swtpm_prop.limits import DOMAIN_XML_BYTES

if __name__ == "__main__":
    # A guest waits. Whoever lives for a tenth of a second has no garbage, and the kernel tidies up after it in less time
    # than the interpreter, which takes a sixth of all for that.
    gc.disable()
    status = run(sys.argv[1:], sys.stdin.buffer.read(DOMAIN_XML_BYTES + 1), Layout())
    sys.stdout.flush()
    os._exit(status)
