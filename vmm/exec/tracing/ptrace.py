"""ptrace(2) as far as it is needed to hold a process still for a moment and let one of its threads make system calls.

Everything here is bound to the OS thread that seized. It is the supervisor's tracer thread, or else a thread that ends
with its job: however that one ends, the kernel lets go of every thread it seized, and nothing stays stopped.
In the tracer thread some threads are seized already. Those are interrupted only, and afterwards every stop that is not
ours is left for the tracer to see.

Whether a thread has stopped is asked with PTRACE_GETSIGINFO, never with wait(2): a wait could take the exit status of
a child away from whoever launched it.

Every wait has a limit: the program may have been made so that what we let it do never ends. A thread that runs is stopped
again, and has its registers back. One that the kernel keeps for longer than anything we ask for can take is killed with
its process: it would go on with registers that are not its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from enum import Enum

SEIZE, INTERRUPT, GETSIGINFO = 0x4206, 0x4207, 0x4202
GETREGS, SETREGS, SYSCALL, CONT, DETACH = 12, 13, 24, 7, 17
GETSIGMASK, SETSIGMASK = 0x420A, 0x420B
TRACESYSGOOD = 1
_SYSCALL_CODE = signal.SIGTRAP | 0x80  # si_code of the stops of PTRACE_SYSCALL
_EVENT_CODE = 128  # PTRACE_EVENT_STOP: bits 8 and up of si_code of what PTRACE_INTERRUPT makes, and of group stops
_EXIT_CODE = 6  # the same, of PTRACE_EVENT_EXIT
_U64 = (1 << 64) - 1
_NOT_BEGUN = (-512, -513, -514)  # ERESTARTSYS, -NOINTR, -NOHAND
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
# Of a filter of the program, by which it refuses a call. It must not be blocked meanwhile: the kernel would forget its handler.
_REFUSAL = signal.SIGSYS
_HELD_BACK = ((1 << 64) - 1 & ~(1 << _REFUSAL - 1)).to_bytes(8, "little")
_NAP, _LONG_NAP, _GLANCES = 5e-5, 1e-3, 16
PATIENCE = 2.0  # seconds that a thread inside a system call has to come out of it
LAST = 30.0  # seconds after which a thread that we made enter the kernel is given up: unmapping much memory takes a while

_ptrace = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, use_errno=True)(
    ("ptrace", ctypes.CDLL(None, use_errno=True))
)


class Stop(Enum):
    """Why a thread is stopped."""

    EVENT = "asked to, or with all of its process"
    SYSCALL = "at the start or the end of a system call"
    SIGNAL = "before a signal is delivered: it is lost unless it is given back when the thread goes on"


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )


def request(what: int, tid: int, address: int | None = None, data: int | None = None) -> None:
    """One ptrace(2). Raises OSError."""
    if _ptrace(what, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Hold:
    """The threads of one process, held for a while. Made and used by one OS thread."""

    def __init__(self, tgid: int) -> None:
        self._tgid = tgid
        self._seized: set[int] = set()
        self._kept: set[int] = set()  # those of them that were seized before
        self._faulted: set[int] = set()  # whose last signal is the fault of `call`
        self._info = ctypes.create_string_buffer(128)

    # ---- freezing
    def seize(self, tid: int) -> None:
        """Take hold of one thread; it runs on. PermissionError when somebody else traces it or nobody may,
        ProcessLookupError when it is gone.
        """
        for attempt in range(100):
            try:
                request(SEIZE, tid, None, TRACESYSGOOD)
                break
            except PermissionError:
                tracer = _tracer(self._tgid, tid)
                if tracer == threading.get_native_id():
                    self._kept.add(tid)
                    break
                # An earlier tracer of ours that is just ending lets go at any moment.
                if attempt == 99 or tracer not in _ours() or state(self._tgid, tid) in "ZX":
                    raise
                time.sleep(_NAP)
        self._seized.add(tid)

    def interrupt(self, tid: int) -> None:
        """Ask a seized thread to stop."""
        request(INTERRUPT, tid)

    def freeze(self, busy: Callable[[], Collection[int]], but: int) -> None:
        """Hold every thread except `but`: none runs a user instruction until it is let go. Those in `busy()` sit in system
        calls that we answer: they stop when they are answered. TimeoutError when a thread does not stop.
        """
        quiet: set[int] = {but}
        while True:
            new = [tid for tid in _threads(self._tgid) if tid not in self._seized and tid not in quiet]
            for tid in new:
                try:
                    self.seize(tid)
                    self.interrupt(tid)
                except ProcessLookupError:
                    quiet.add(tid)
                except PermissionError:
                    if state(self._tgid, tid) not in "ZX":  # has ended: the main thread does so before the others
                        raise
                    quiet.add(tid)
            waiting = self._seized - quiet
            limit = time.monotonic() + PATIENCE  # for all of them: they were asked at once
            for tid in waiting:
                self._settle(tid, busy, limit)
            quiet |= waiting
            if not new:
                return

    def _settle(self, tid: int, busy: Callable[[], Collection[int]], limit: float) -> None:
        """Wait until the thread can run no instruction."""
        nap = _NAP
        while not self.stopped(tid):
            now = state(self._tgid, tid)
            if now in "ZX" or (now == "D" and tid in busy()):
                return
            if now == "D":
                self._let_children_go(tid)
            if time.monotonic() > limit:
                if now == "D":
                    return  # in the kernel for long: it stops before it comes back
                raise TimeoutError(errno.ETIMEDOUT, f"thread {tid} does not stop")
            time.sleep(nap)
            nap = min(2 * nap, _LONG_NAP)

    def _let_children_go(self, tid: int) -> None:
        """The thread may wait for a child of its vfork(2), and that for its tracer, which is this OS thread and busy here: at its
        beginning, or when it ends.
        """
        try:
            with open(f"/proc/{self._tgid}/task/{tid}/children", "rb") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            return
        for child in children:
            with contextlib.suppress(OSError):
                if child not in self._seized and self.stopped(child):
                    number, code = struct.unpack_from("=i4xi", self._info)
                    if code >> 8 == _EVENT_CODE and number == signal.SIGTRAP:
                        request(CONT, child)
                    elif code >> 8 == _EXIT_CODE:
                        request(DETACH, child)

    def stopped(self, tid: int) -> bool:
        """Is it held in a stop?"""
        return bool(_ptrace(GETSIGINFO, tid, None, ctypes.addressof(self._info)) == 0)

    def _seen(self) -> tuple[Stop, int]:
        """Of the stop that was seen last: why, and the signal."""
        number, code = struct.unpack_from("=i4xi", self._info)
        if code >> 8 == _EVENT_CODE:
            return Stop.EVENT, number
        return (Stop.SYSCALL if code == _SYSCALL_CODE else Stop.SIGNAL), number

    def wait(self, tid: int) -> tuple[Stop, int]:
        """Wait for a stop of `tid`: why, and the signal. It is asked to stop after PATIENCE, and killed after LAST.
        ProcessLookupError when the thread is gone.
        """
        for _ in range(_GLANCES):  # most often it is a matter of microseconds
            if self.stopped(tid):
                return self._seen()
            os.sched_yield()
        nap, began, asked = _NAP, time.monotonic(), False
        while not self.stopped(tid):
            if state(self._tgid, tid) in "ZX":
                raise ProcessLookupError(errno.ESRCH, "the thread has ended")
            waited = time.monotonic() - began
            if waited > PATIENCE and not asked:
                asked = True
                with contextlib.suppress(OSError):
                    self.interrupt(tid)
            if waited > LAST:
                with contextlib.suppress(OSError):
                    os.kill(self._tgid, signal.SIGKILL)
                raise ProcessLookupError(errno.ESRCH, "the thread does not stop: its process was killed")
            time.sleep(nap)
            nap = min(2 * nap, _LONG_NAP)
        return self._seen()

    def let_go(self, but: int = 0) -> None:
        """Every thread goes on, except `but`. Those that have not stopped yet go on when this OS thread ends."""
        for tid in self._seized - {but}:
            with contextlib.suppress(OSError):
                if not self.stopped(tid):
                    continue
                why, number = self._seen()
                if tid not in self._kept:
                    request(DETACH, tid, None, number if why == Stop.SIGNAL and tid not in self._faulted else 0)
                elif why != Stop.SIGNAL or tid in self._faulted:
                    request(CONT, tid)
        self._seized &= {but}

    # ---- one stopped thread
    def registers(self, tid: int) -> Registers:
        """Its registers now."""
        registers = Registers()
        request(GETREGS, tid, None, ctypes.addressof(registers))
        return registers

    def set_registers(self, tid: int, registers: Registers) -> None:
        """Give it these."""
        request(SETREGS, tid, None, ctypes.addressof(registers))

    @contextlib.contextmanager
    def borrowed(self, tid: int) -> Iterator[None]:
        """Inside, `call` may be used: no signal reaches the thread. Afterwards it is as it was. The SIGSYS of a
        call that is trapped is taken away by the next call.
        """
        saved = self.registers(tid)
        mask = ctypes.create_string_buffer(8)
        request(GETSIGMASK, tid, 8, ctypes.addressof(mask))
        every = ctypes.create_string_buffer(_HELD_BACK, 8)
        request(SETSIGMASK, tid, 8, ctypes.addressof(every))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                request(SETSIGMASK, tid, 8, ctypes.addressof(mask))
                self.set_registers(tid, saved)

    def call(self, tid: int, instruction: int, number: int, *arguments: int) -> int:
        """Let it make a system call with the `syscall` instruction at `instruction`: the result, or -errno; its own number where a
        filter of the program traps it. OSError (EFAULT) when there is no such instruction any more; TimeoutError when it does
        something else there, or is stopped again and again; ProcessLookupError when it is gone.
        """
        limit = time.monotonic() + PATIENCE
        while True:
            result = self._one_call(tid, instruction, number, arguments, limit)
            # A call that our own filter asks about can be interrupted while it waits to be received. It has not begun then.
            if result not in _NOT_BEGUN or time.monotonic() > limit:
                return result

    def _one_call(self, tid: int, instruction: int, number: int, arguments: tuple[int, ...], limit: float) -> int:
        registers = self.registers(tid)
        values = [value & _U64 for value in arguments] + [0] * (6 - len(arguments))
        registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9 = values
        registers.rip, registers.rax, registers.orig_rax = instruction, number, _U64
        self.set_registers(tid, registers)
        for _ in range(2):  # entry, exit
            request(SYSCALL, tid)
            while (stop := self.wait(tid))[0] != Stop.SYSCALL:
                # SIGSTOP cannot be held back. The group stop it makes goes on when the thread is let go.
                why, signal_ = stop
                if why == Stop.SIGNAL and signal_ in _FAULTS:
                    self._faulted.add(tid)
                    raise OSError(errno.EFAULT, f"signal {signal_} instead of a system call")
                if time.monotonic() > limit:
                    raise TimeoutError(errno.ETIMEDOUT, f"thread {tid} makes no system call")
                request(SYSCALL, tid, None, signal_ if why == Stop.SIGNAL and signal_ != _REFUSAL else 0)
        result = int(self.registers(tid).rax)
        return result - (1 << 64) if result >> 63 else result


def state(tgid: int, tid: int) -> str:
    """The letter of /proc/PID/stat: R, S, D, T, t, Z; X when it is gone."""
    try:
        with open(f"/proc/{tgid}/task/{tid}/stat", "rb") as file:
            return chr(file.read().rpartition(b")")[2].split()[0][0])
    except OSError:
        return "X"


def _threads(tgid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{tgid}/task")]
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, "the process has ended") from None


def _tracer(tgid: int, tid: int) -> int:
    try:
        with open(f"/proc/{tgid}/task/{tid}/status", "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"TracerPid:"))
    except OSError:
        return 0


def _ours() -> set[int]:
    """What TracerPid can say of us: a thread of ours, or 0 when it has just let go."""
    return {0, os.getpid(), *map(int, os.listdir("/proc/self/task"))}
