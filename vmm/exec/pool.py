"""Threads that answer: as many as there are system calls in work, and one more that waits for the next.

A KVM_RUN blocks its own thread here as it blocks the program's thread there, and nobody else. A thread that takes a
notification and was the last one waiting starts another; one that finds too many waiting when it is done ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from vmm.exec.notify import Listener, Notification

_SPARE = 3  # threads that may wait at once: a burst does not make and end threads all the time
_MOST = 4096  # threads in all: more system calls at once wait for one that ends
_STACK = 512 << 10


class Pool:
    """Receives notifications and calls `handle` with each, on threads of its own, until the last task has ended."""

    def __init__(self, listener: Listener, handle: Callable[[Notification], None]) -> None:
        self._listener = listener
        self._handle = handle
        self._lock = threading.Lock()
        self._waiting = 0
        self._threads = 0
        self._stopping = False
        self.answered = 0

    def start(self) -> None:
        """The first thread."""
        self._waiting = 1
        self._spawn()

    def stop(self) -> None:
        """Nobody can ask any more. Threads that wait for a question end with the process."""
        self._stopping = True

    def _spawn(self) -> None:
        before = threading.stack_size(_STACK)
        try:
            self._threads += 1
            threading.Thread(target=self._main, name="sevmm-answers", daemon=True).start()
        finally:
            threading.stack_size(before)

    def _main(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
        buffer = bytearray(80)
        while not self._stopping:
            try:
                notification = self._listener.receive(buffer)
            except OSError:  # the caller was killed before we took its call, or nobody is left
                if self._stopping or self._listener.deserted():
                    break
                continue
            with self._lock:
                self._waiting -= 1
                self.answered += 1
                if not self._waiting and self._threads < _MOST:
                    self._waiting += 1
                    self._spawn()
            self._handle(notification)
            with self._lock:
                if self._waiting >= _SPARE:
                    self._threads -= 1
                    return
                self._waiting += 1
        with self._lock:
            self._waiting -= 1
            self._threads -= 1
