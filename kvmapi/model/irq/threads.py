"""Threads of the process that take no signals.

A signal for the process may be given to any thread that does not block it. A vCPU's thread blocks all of them inside
KVM_RUN and looks for those that wait (`model/signals.py`), so a helper thread that took one would keep a vCPU from
noticing it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

# Synchronous faults are a thread's own.
_OWN = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}


def start_quiet(name: str, main: Callable[[], None]) -> None:
    """Start a daemon thread in which every other signal is blocked from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _OWN)
    try:
        threading.Thread(target=main, name=name, daemon=True).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
