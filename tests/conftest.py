"""For every suite: tests of Ctrl-C need a SIGINT that arrives."""

from __future__ import annotations

import signal

# A shell that starts a job in the background has it ignore SIGINT, and what is ignored stays so in
# every child. A handler does not: children then start with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
