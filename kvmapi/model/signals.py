"""Signals that interrupt KVM_RUN.

In the kernel, a signal for the vCPU's thread makes KVM_RUN return EINTR. Here the guest runs inside a library call,
where a handler would run and the guest go on as if nothing had happened. So a thread that is inside KVM_RUN keeps its
signals pending (blocked), and a watcher looks at the threads that have been inside for a while: a pending signal that
the thread would take makes the vCPU leave. The signal itself is delivered the moment KVM_RUN restores the mask,
before it returns: EINTR, and the handler has run.

KVM_SET_SIGNAL_MASK replaces the mask that decides what interrupts; the signals it alone lets through stay pending
afterwards, as the kernel leaves them. Latency is at most two looks of the watcher (10 ms). Where immediate_exit is
set too, the guest leaves at its next block.

A vCPU may be run for a thread of another process, which waits in its own KVM_RUN (`sevmm exec`). Its signals stay pending
by themselves until the call is answered; the watcher reads that thread's sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from typing import Protocol

LOOK = 0.005  # seconds between two looks
_SIBLING_LOOKS = 10  # every how many looks a foreign thread's siblings are looked at
_MAX_SIBLINGS = 64
_OTHERS_LOOKS = 20  # how many looks a signal for the whole process is left to its first thread
_SIG_SETMASK = 2
_SET_SIZE = 128  # sizeof(sigset_t) of glibc and musl
# Synchronous faults are not held back: blocked, they would end the process without a trace.
_NEVER_BLOCKED = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT)
# Without a handler these do nothing; they pend all the same while they are blocked, or the thread is traced.
_IGNORED_BY_DEFAULT = sum(1 << number - 1 for number in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))

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
        self.foreign = False
        self._looks = 0
        self._left_to_others = 0
        self.mask: int | None = None  # KVM_SET_SIGNAL_MASK: bit n-1 set, signal n does not interrupt

    def enter(self, thread: int = 0) -> None:
        """KVM_RUN begins in this thread, or for `thread` of another process, which waits in its system call."""
        self.foreign = thread != 0
        if not thread:
            _set_mask(_SIG_SETMASK, _BLOCKED_AT, self._old_at)
        self.interrupted = False
        self.runs += 1
        self.thread = thread or threading.get_native_id()
        if WATCHER.asleep:
            WATCHER.wake()

    def leave(self) -> None:
        """KVM_RUN ends: what is pending is delivered here."""
        self.thread = 0
        if not self.foreign:
            _set_mask(_SIG_SETMASK, self._old_at, None)

    def look(self) -> None:
        """The watcher's look: does a signal wait that this thread would take?"""
        thread, runs = self.thread, self.runs
        if not thread or runs != self.seen:
            self.seen = runs
            return
        if self.foreign:
            waiting = self._waits_elsewhere(thread)
        else:
            status = _status(f"/proc/self/task/{thread}/status")
            waiting = self._taken(status, int.from_bytes(self._old.raw[:8], "little"))
        if waiting and self.runs == runs:
            self.interrupted = True
            with contextlib.suppress(ValueError):  # the vCPU, and the page with its kick, may be gone
                self._kick[0] = 1

    def _own(self, thread: int, status: dict[str, int]) -> bool:
        """A signal for the whole process is the first thread's where that does not block it: the kernel woke it alone. If nobody
        takes it for a while, it is ours.
        """
        first = status["Tgid"]
        if thread == first or self.mask is not None or self._taken({**status, "ShdPnd": 0}, status["SigBlk"]):
            return True
        blocked = _status(f"/proc/{first}/status").get("SigBlk")
        if blocked is None or not self._taken(status, blocked):
            return True
        self._left_to_others += 1
        return self._left_to_others > _OTHERS_LOOKS

    def stopped(self) -> None:
        """The program's job was stopped and continued, and we with it: its threads have left KVM_RUN in between."""
        if self.foreign and self.thread:
            self.interrupted = True
            self._kick[0] = 1

    def _taken(self, status: dict[str, int], blocked: int) -> bool:
        blocked = self.mask if self.mask is not None else blocked
        ignored = status.get("SigIgn", 0) | _IGNORED_BY_DEFAULT & ~status.get("SigCgt", 0)
        return (status.get("SigPnd", 0) | status.get("ShdPnd", 0)) & ~blocked & ~ignored != 0

    def _waits_elsewhere(self, thread: int) -> bool:
        """Must the call that a thread of another process waits in end: a signal, its death, or a stop of its whole process,
        which is complete only when this thread has stopped too?
        """
        status = _status(f"/proc/{thread}/status")
        if not status or self._taken(status, status["SigBlk"]):
            return not status or self._own(thread, status)
        self._left_to_others = 0
        self._looks += 1
        return self._looks % _SIBLING_LOOKS == 0 and _sibling_stopped(thread)


def _sibling_stopped(thread: int) -> bool:
    """Is another thread of its process stopped (job control)?"""
    with contextlib.suppress(OSError):
        for sibling in os.listdir(f"/proc/{thread}/task")[:_MAX_SIBLINGS]:
            with open(f"/proc/{thread}/task/{sibling}/stat", "rb") as stat:
                if stat.read().rpartition(b") ")[2][:1] == b"T":
                    return True
    return False


def _status(path: str) -> dict[str, int]:
    """The signal sets of a thread, bit n-1 for signal n, and its process; empty when it is gone."""
    found = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"):
                found[name] = int(value, 16)
            elif name == "Tgid":
                found[name] = int(value)
    return found


def leave_signals_to_others() -> None:
    """This thread takes none but its own faults."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - set(_NEVER_BLOCKED))


class Watcher:
    """One thread for all vCPUs of the process; it lives while there are any, and sleeps while none of them enters: a thread that
    wakes up every few milliseconds takes the interpreter's lock from those that run guests without being watched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Inside] = set()
        self._wake = threading.Event()
        self._runs = 0  # of all vCPUs, when the thread looked last
        self.asleep = False  # who enters must wake it

    def add(self, inside: Inside) -> None:
        """A vCPU exists."""
        with self._lock:
            self._watched.add(inside)
            if len(self._watched) == 1:
                self._wake, self.asleep = threading.Event(), False
                try:
                    threading.Thread(target=self._main, args=(self._wake,), name="sevmm-signals", daemon=True).start()
                except RuntimeError:  # no more threads
                    self._watched.discard(inside)
                    raise

    def remove(self, inside: Inside) -> None:
        """It is gone; with the last one the thread ends."""
        with self._lock:
            self._watched.discard(inside)
            if not self._watched:
                self._wake.set()

    def wake(self) -> None:
        """Somebody is inside, and the thread was asleep."""
        self.asleep = False
        self._wake.set()

    def forked(self) -> None:
        """This process is a child now: the vCPUs are its parent's, and so is the thread."""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._watched, self.asleep = set(), False

    def job_continued(self) -> None:
        """SIGCONT came to us: the watcher, stopped too, has missed what the stop did to threads of others."""
        with self._lock:
            for inside in self._watched:
                inside.stopped()

    def _main(self, wake: threading.Event) -> None:
        leave_signals_to_others()
        while self._rest(wake):
            with self._lock:
                watched = list(self._watched)
            for inside in watched:
                with self._lock:  # a vCPU that is being taken away waits for this look
                    if inside in self._watched:
                        inside.look()

    def _rest(self, wake: threading.Event) -> bool:
        """Wait until it is time to look; False when the thread is to end."""
        with self._lock:
            if not self._watched or wake is not self._wake:
                return False
            wake.clear()
            runs = sum(inside.runs for inside in self._watched)
            self._runs, unused = runs, runs == self._runs
            self.asleep = unused  # first this, then the question: who has not seen it is seen
            if unused and any(inside.thread for inside in self._watched):
                self.asleep = False
            seconds = None if self.asleep else LOOK
        wake.wait(seconds)
        return True


WATCHER = Watcher()
os.register_at_fork(after_in_child=WATCHER.forked)
