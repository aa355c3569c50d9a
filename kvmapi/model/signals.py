"""Signals that interrupt KVM_RUN.

In the kernel, a signal for the vCPU's thread makes KVM_RUN return EINTR. Here the guest runs inside a library call,
where a handler would run and the guest go on as if nothing had happened. So a thread that is inside KVM_RUN keeps its
signals pending (blocked), and a watcher looks at the threads that have been inside for a while: a pending signal that
the thread would take makes the vCPU leave. The signal itself is delivered the moment KVM_RUN restores the mask,
before it returns: EINTR, and the handler has run.

KVM_SET_SIGNAL_MASK replaces the mask that decides what interrupts; the signals it alone lets through stay pending
afterwards, as the kernel leaves them. Latency is at most two looks of the watcher (10 ms). Where immediate_exit is
set too, the guest leaves at its next block.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from typing import Protocol

LOOK = 0.005  # seconds between two looks
_SIG_SETMASK = 2
_SET_SIZE = 128  # sizeof(sigset_t) of glibc and musl
# Synchronous faults are not held back: blocked, they would end the process without a trace.
_NEVER_BLOCKED = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT)

_libc = ctypes.CDLL(None)
_set_mask = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(("pthread_sigmask", _libc))


class KickFlag(Protocol):
    """Element 0, once set, makes a vCPU leave the engine at its next block."""

    def __setitem__(self, index: int, value: int, /) -> None: ...


def _all_signals() -> bytes:
    mask = (1 << 64) - 1
    for number in _NEVER_BLOCKED:
        mask &= ~(1 << number - 1)
    return mask.to_bytes(8, "little").ljust(_SET_SIZE, b"\0")


_BLOCKED = ctypes.create_string_buffer(_all_signals(), _SET_SIZE)
_BLOCKED_AT = ctypes.addressof(_BLOCKED)


class Inside:
    """One vCPU's thread while it is inside KVM_RUN. One object per vCPU, used for every run."""

    def __init__(self, kick: KickFlag) -> None:
        self._kick = kick
        self._old = ctypes.create_string_buffer(_SET_SIZE)
        self._old_at = ctypes.addressof(self._old)
        self.thread = 0
        self.runs = 0  # counts entries: the watcher looks at a run it has seen before
        self.seen = -1
        self.interrupted = False
        self.mask: int | None = None  # KVM_SET_SIGNAL_MASK: bit n-1 set, signal n does not interrupt

    def enter(self) -> None:
        """KVM_RUN begins in this thread."""
        _set_mask(_SIG_SETMASK, _BLOCKED_AT, self._old_at)
        self.interrupted = False
        self.runs += 1
        self.thread = threading.get_native_id()

    def leave(self) -> None:
        """KVM_RUN ends: what is pending is delivered here."""
        self.thread = 0
        _set_mask(_SIG_SETMASK, self._old_at, None)

    def look(self) -> None:
        """The watcher's look: does a signal wait that this thread would take?"""
        thread, runs = self.thread, self.runs
        if not thread or runs != self.seen:
            self.seen = runs
            return
        status = _status(thread)
        blocked = self.mask if self.mask is not None else int.from_bytes(self._old.raw[:8], "little")
        waiting = (status.get("SigPnd", 0) | status.get("ShdPnd", 0)) & ~blocked & ~status.get("SigIgn", 0)
        if waiting and self.runs == runs:
            self.interrupted = True
            self._kick[0] = 1


def _status(thread: int) -> dict[str, int]:
    """The signal sets of one of our threads, bit n-1 for signal n; empty when it is gone."""
    found = {}
    with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/status", encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd", "SigIgn"):
                found[name] = int(value, 16)
    return found


class Watcher:
    """One thread for all vCPUs of the process; it lives while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Inside] = set()
        self._wake = threading.Event()

    def add(self, inside: Inside) -> None:
        """A vCPU exists."""
        with self._lock:
            self._watched.add(inside)
            if len(self._watched) == 1:
                self._wake = threading.Event()
                threading.Thread(target=self._main, args=(self._wake,), name="sevmm-signals", daemon=True).start()

    def remove(self, inside: Inside) -> None:
        """It is gone; with the last one the thread ends."""
        with self._lock:
            self._watched.discard(inside)
            if not self._watched:
                self._wake.set()

    def _main(self, end: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - set(_NEVER_BLOCKED))  # signals are for others
        while not end.wait(LOOK):
            with self._lock:
                watched = list(self._watched)
            for inside in watched:
                inside.look()


WATCHER = Watcher()
