"""Getting a thread out of KVM_RUN, whatever the guest does.

Two things together stop a vCPU for certain: `kvm_run.immediate_exit = 1`, so that the next KVM_RUN returns EINTR without entering the
guest, and a signal, so that a KVM_RUN in progress returns EINTR. (Documentation/virt/kvm/api.rst, KVM_RUN; a guest that spins inside
the kernel is reached only by the signal.) Nothing is lost between the two: whichever comes too late for one comes in time for the
other.

The signal needs a handler that does nothing. Python's own `signal.signal` works in the main thread only and a library is used in any,
so the handler is a harmless C function of libc, `abs`, put there with sigaction(2) through libc. It is installed once per process, on a
real-time signal that nobody else uses, and stays: a late signal must never meet the default action, which would end the process.

The signal is sent with tgkill(2) and a thread id, not with pthread_kill: a thread that has just ended makes ESRCH instead of a crash.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

_SYS_TGKILL = 234  # x86-64
_FIRST = 3  # glibc keeps the first two real-time signals for itself, and others like the lowest ones

_lock = threading.Lock()
_number = 0
_libc = ctypes.CDLL(None, use_errno=True)


def kick_signal() -> int:
    """Number of the signal that interrupts KVM_RUN; installs its handler on first use. Raises OSError when no signal is free."""
    global _number
    with _lock:
        if not _number:
            _number = _install()
        return _number


def _install() -> int:
    handler = ctypes.cast(_libc.abs, ctypes.c_void_p)
    set_handler = _libc.signal
    set_handler.restype = ctypes.c_void_p
    set_handler.argtypes = (ctypes.c_int, ctypes.c_void_p)
    for number in range(signal.SIGRTMIN + _FIRST, signal.SIGRTMAX + 1):
        before = set_handler(number, handler)
        if before is None:  # SIG_DFL: it was free
            _libc.siginterrupt(number, 1)
            return number
        set_handler(number, before)
    raise OSError(0, "every real-time signal has a handler; KVM_RUN cannot be interrupted")


def accept_kicks() -> None:
    """Unblock the signal in the calling thread; a thread inherits the mask of whoever started it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {kick_signal()})


def kick(thread_id: int) -> None:
    """Interrupt the thread with this kernel thread id (`threading.get_native_id`); nothing happens if it has ended."""
    _libc.syscall(_SYS_TGKILL, os.getpid(), thread_id, kick_signal())
