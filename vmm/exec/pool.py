"""Threads that answer: one receives, and hands that over only when its own answer takes long.

Every thread that waits for notifications is woken by each of them, so only one does: the leader. It answers what it
receives itself, which for most calls is done before anybody else could have been woken. But a KVM_RUN may last for ever,
and the next question must not wait for it: a watchman looks every millisecond whether the leader is still at the same
call, and makes another thread the leader then. A former leader that has answered at last is parked until it is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from kvmapi.model.signals import leave_signals_to_others
from vmm.exec.memory.sigbus import without_cpuid
from vmm.exec.notify import Listener, Notification

_LOOK = 0.0007  # seconds between two looks of the watchman
_AGAIN = 0.02  # seconds until a thread that could not be started is tried again
_IDLE_LOOKS = 30  # looks without a call after which it sleeps until there is one
_PARKED = 64  # threads that may be kept for later
_MOST = 4096  # threads in all: with so many calls waiting, the next one waits for one of them
_STACK = 512 << 10
_OFTEN = 32  # calls of one thread between two looks at whether CPUID faults in programs


class _Worker:
    """One thread of the pool. `turn` is released to make it the leader."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.turn.acquire()


class Pool:
    """Receives notifications and calls `handle` with each, on threads of its own, until the last task has ended. While
    `cpuid_faults()` in programs, it does in these threads.
    """

    def __init__(self, listener: Listener, handle: Callable[[Notification], None], cpuid_faults: Callable[[], bool]) -> None:
        self._listener = listener
        self._cpuid_faults = cpuid_faults
        self._handle = handle
        self._lock = threading.Lock()
        self._leader: _Worker | None = None
        self._busy = False  # the leader is answering
        self._parked: list[_Worker] = []
        self._threads = 0
        self._stopping = False
        self._wanted = threading.Event()  # the watchman has something to watch
        self._watching = False
        self.answered = 0

    def start(self) -> None:
        """The first leader, the one that follows, and the watchman. RuntimeError: there can be no such threads. With these there is
        somebody to answer what the first one's answer makes the program ask, even where there can be no more.
        """
        self._run(self._watch, "sevmm-watchman")
        for _ in range(2):
            worker = _Worker()
            self._run(partial(self._main, worker, parked=True), "sevmm-answers")
            self._parked.append(worker)
            self._threads += 1
        with self._lock:
            self._promote()

    def stop(self) -> None:
        """Nobody can ask any more. Threads that still wait for something end with the process."""
        self._stopping = True
        self._wanted.set()

    def _run(self, main: Callable[[], None], name: str) -> None:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=main, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def _promote(self) -> None:
        """Make another thread the leader, or nobody where there can be no more. The lock is held, or nobody else runs yet."""
        self._busy = False
        self._leader = None
        if self._parked:
            self._leader = self._parked.pop()
            self._leader.turn.release()
        elif self._threads < _MOST:
            worker = self._leader = _Worker()
            try:
                self._run(lambda: self._main(worker), "sevmm-answers")
            except RuntimeError:  # RLIMIT_NPROC, or the container's limit: whoever is done next leads
                self._leader = None
            else:
                self._threads += 1

    def _main(self, me: _Worker, parked: bool = False) -> None:
        leave_signals_to_others()
        if parked:
            me.turn.acquire()
        receive, handle, lock, buffer = self._listener.receive, self._handle, self._lock, bytearray(80)
        number = 0
        while not self._stopping:
            if number % _OFTEN == 0 and self._cpuid_faults():  # now and then: a CPUID of ours ends it
                without_cpuid()
            number += 1
            try:
                notification = receive(buffer)
            except OSError:  # the caller was killed before we took its call, or nobody is left
                if self._stopping or self._listener.deserted():
                    return
                continue
            self.answered += 1
            self._busy = True
            if not self._watching:
                self._wanted.set()
            handle(notification)
            with lock:
                if self._leader is me:
                    self._busy = False
                    continue
                if self._leader is None:  # all threads there may be were busy
                    self._leader = me
                    continue
                if len(self._parked) >= _PARKED:
                    self._threads -= 1
                    return
                self._parked.append(me)
            me.turn.acquire()

    def _watch(self) -> None:
        leave_signals_to_others()
        seen, idle = -1, _IDLE_LOOKS
        while not self._stopping:
            if idle >= _IDLE_LOOKS:
                self._watching = False
                if not self._busy:
                    self._wanted.wait()
                self._wanted.clear()
                self._watching, idle = True, 0
            time.sleep(_LOOK)
            number, idle = self.answered, idle + 1
            if number != seen:
                seen, idle = number, 0
            elif self._busy:
                with self._lock:
                    if self._busy and self.answered == seen and self._leader is not None:
                        self._promote()
            elif self._leader is None:
                idle = 0  # not asleep: there may be room for a thread again
                time.sleep(_AGAIN)
                with self._lock:
                    if self._leader is None:
                        self._promote()
