"""The supervisor's only tracer: one OS thread that makes every ptrace call and every wait(2).

It has to be one, because the kernel ties a traced thread to the OS thread that traces it, and lets any thread of a
process take the wait status that another one is waiting for. Others hand it work (`run`), and the main thread tells it
when a child or a traced thread changed (`reap`).

Its own work is CPUID (cpuid.py). A program that speaks to KVM is followed from its first open(2) on: its instruction is
made to fault, and the SIGSEGV of each is answered here and never seen by the program. Everything else passes: signals
are delivered, group stops stay stops, threads and forked children are followed too. A new program image begins without,
and is followed again, or not, at its own first open. A thread that is about to end is let go before: a parent that
hears of its child's end by a pidfd must find it with wait(2) at once, and not only when its tracer has. Programs without
"/dev/kvm" in their executable are never traced, and cost nothing. Where the processor cannot fault, or somebody else
traces the program (gdb), it sees this machine's CPUID.

Invariants: no stop is left unanswered; a stop that ends by itself (the thread was killed) is forgotten; if this thread
ends, the programs that it traces end (PTRACE_O_EXITKILL).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from kvmapi.model.signals import leave_signals_to_others
from vmm.exec.tracing import ptrace
from vmm.exec.tracing.again import make_again
from vmm.exec.tracing.cpuid import Cpuid
from vmm.exec.tracing.ptrace import Hold

T = TypeVar("T")
_WALL = 0x40000000
_LISTEN = 0x4208
_TRACEFORK, _TRACEVFORK, _TRACECLONE, _TRACEEXEC, _TRACEEXIT, _EXITKILL = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6, 1 << 20
_OPTIONS = ptrace.TRACESYSGOOD | _TRACEFORK | _TRACEVFORK | _TRACECLONE | _TRACEEXEC | _TRACEEXIT | _EXITKILL
_EVENT_EXEC, _EVENT_EXIT, _EVENT_STOP = 4, 6, 128
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_ARCH_PRCTL, _ARCH_SET_CPUID = 158, 0x1012
_FROM_KERNEL = 0x80  # si_code of a general protection fault
_INSTRUCTION = b"\x0f\xa2"
_SYSCALL_SIZE = 2
_RESTARTS = (-512, -513, -514)  # a system call that an interruption ended before it began: ERESTARTSYS, -NOINTR, -NOHAND
_RESTART_BLOCK, _RESTART_SYSCALL = -516, 219
_U32, _U64 = 0xFFFFFFFF, (1 << 64) - 1
_NAME = b"/dev/kvm"
_LARGEST, _PIECE = 256 << 20, 1 << 20  # executables beyond are not looked into; read at once
_SYSCALL = b"\x0f\x05"


class Tracer:
    """`cpuid` is what programs see; `on_end(pid, status)` hears of children, and of traced threads, that ended; `say` tells
    the user why programs see this machine's CPUID.
    """

    def __init__(self, cpuid: Cpuid, on_end: Callable[[int, int], None], say: Callable[[str], None]) -> None:
        self._cpuid = cpuid
        self._on_end = on_end
        self._say = say
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="sevmm-tracer", daemon=True)
        self._starting: dict[int, int] = {}  # threads to be stopped for the first time -> a `syscall` instruction of theirs
        self.active = False  # does CPUID fault in any program?
        self._parked = 0  # a thread whose stops are a job's own
        self._left: tuple[int, int] | None = None  # that thread and a signal of its, if the job has left it to us
        self._works = True  # until the kernel says that CPUID cannot fault
        self._programs: dict[tuple[int, int, int], bool] = {}  # executables: do they speak to KVM?

    def start(self) -> None:
        """Begin. Signals that this process waits for must be blocked already."""
        self._thread.start()

    def _main(self) -> None:
        leave_signals_to_others()
        while True:
            self._jobs.get()()

    def run(self, job: Callable[[], T]) -> T:
        """Do a job in the tracer's thread, and come back with its result; what it raises is raised here."""
        if threading.current_thread() is self._thread:
            return job()
        replies: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def whole() -> None:
            try:
                replies.put((job(), None))
            except BaseException as failure:
                replies.put((None, failure))
            self._after_job()

        self._jobs.put(whole)
        result, failure = replies.get()
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def post(self, job: Callable[[], None]) -> None:
        """Have a job, which raises nothing, done in the tracer's thread; come back at once."""

        def whole() -> None:
            job()
            self._drain()

        self._jobs.put(whole)

    # ---- whom to follow
    def follow(self, tid: int, ip: int) -> None:
        """A new program image made its first open(2), and waits for the answer: if it speaks to KVM, it is followed. `ip` is
        the address after its `syscall` instruction. Nothing happens before the call is answered.
        """
        if self._works and self._speaks_to_kvm(tid):
            self.run(lambda: self._seize(tid, ip))

    def _speaks_to_kvm(self, tid: int) -> bool:
        try:
            fd = os.open(f"/proc/{tid}/exe", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            key = (status.st_dev, status.st_ino, status.st_mtime_ns)
            known = self._programs.get(key)
            if known is None:
                if len(self._programs) > 256:
                    self._programs.clear()
                known = self._programs[key] = 0 < status.st_size <= _LARGEST and _contains(fd, _NAME)
            return known
        except OSError:
            return False
        finally:
            os.close(fd)

    def _seize(self, tid: int, ip: int) -> None:
        try:
            ptrace.request(ptrace.SEIZE, tid, None, _OPTIONS)
            self._starting[tid] = ip - _SYSCALL_SIZE
            ptrace.request(ptrace.INTERRUPT, tid)
        except OSError as failure:
            if failure.errno != errno.ESRCH:
                self._say(f"a program sees this machine's CPUID: it cannot be traced ({os.strerror(failure.errno or 0).lower()})")

    # ---- what happens to those that are followed
    def reap(self) -> bool:
        """SIGCHLD came: see to everybody whose state changed. False when neither a child nor a traced thread is left."""
        return self.run(self._drain)

    def attend(self, but: int) -> None:
        """During a job that waits: see to everybody but this thread, which the job holds."""
        self._parked = but
        try:
            self._drain()
        finally:
            self._parked = 0

    def _after_job(self) -> None:
        """Stops that came while the job had the threads."""
        if self._left is not None:
            (tid, number), self._left = self._left, None
            self._handle(tid, number, 0)
        self._drain()

    def _drain(self) -> bool:
        while True:
            try:
                tid, status = os.waitpid(-1, os.WNOHANG | _WALL)
            except ChildProcessError:
                return False
            if not tid:
                return True
            if os.WIFSTOPPED(status):
                self._handle(tid, os.WSTOPSIG(status), status >> 16)
            else:
                self._starting.pop(tid, None)
                self._on_end(tid, status)

    def _handle(self, tid: int, number: int, event: int) -> None:
        try:
            self._stopped(tid, number, event)
        except OSError:  # most often: killed while it was stopped
            with contextlib.suppress(OSError):
                ptrace.request(ptrace.CONT, tid)

    def _stopped(self, tid: int, number: int, event: int) -> None:
        if event in (_EVENT_EXEC, _EVENT_EXIT):
            self._starting.pop(tid, None)
            ptrace.request(ptrace.DETACH, tid)
            return
        if tid == self._parked:
            if not event and number != _SYSCALL_STOP:
                self._left = tid, number
            return
        if tid in self._starting and event == _EVENT_STOP and number not in _STOPS:
            self._begin(tid, self._starting.pop(tid))
            return
        if event == _EVENT_STOP and number in _STOPS:
            ptrace.request(_LISTEN, tid)
        elif event or number == _SYSCALL_STOP or (number == signal.SIGSEGV and self._answered(tid)):
            ptrace.request(ptrace.CONT, tid)
        else:
            hold = Hold(tid)
            registers = hold.registers(tid)
            if make_again(registers):
                hold.set_registers(tid, registers)
            ptrace.request(ptrace.CONT, tid, None, number)

    def _begin(self, tid: int, instruction: int) -> None:
        """The first stop of a program: from here on its CPUID faults, and that of all it starts."""
        hold = Hold(tid)
        try:
            if _bytes_at(tid, instruction, _SYSCALL_SIZE) != _SYSCALL:
                raise OSError(errno.EFAULT, "no system call there any more")
            with hold.borrowed(tid):
                result = hold.call(tid, instruction, _ARCH_PRCTL, _ARCH_SET_CPUID, 0)
            _restart(hold, tid)
        except ProcessLookupError:
            raise
        except OSError as failure:
            result = -(failure.errno or errno.EFAULT)
        if result:
            self._works = self._works and result != -errno.ENODEV
            self._say(f"programs see this machine's CPUID: it cannot be made to fault ({os.strerror(-result).lower()})")
        else:
            self.active = True
        ptrace.request(ptrace.DETACH if result else ptrace.CONT, tid)

    def _answered(self, tid: int) -> bool:
        """Was that SIGSEGV the program's CPUID? Then it has its answer."""
        info = ctypes.create_string_buffer(128)
        ptrace.request(ptrace.GETSIGINFO, tid, None, ctypes.addressof(info))
        if int.from_bytes(info.raw[8:12], "little") != _FROM_KERNEL:
            return False
        hold = Hold(tid)
        registers = hold.registers(tid)
        if _bytes_at(tid, registers.rip, len(_INSTRUCTION)) != _INSTRUCTION:
            return False
        answer = self._cpuid(registers.rax & _U32, registers.rcx & _U32)
        registers.rax, registers.rbx, registers.rcx, registers.rdx = answer
        registers.rip = registers.rip + len(_INSTRUCTION) & _U64
        hold.set_registers(tid, registers)
        return True


def _contains(fd: int, what: bytes) -> bool:
    """Read, not mapped: a file that shrinks meanwhile must not hurt us."""
    tail = b""
    while data := os.read(fd, _PIECE):
        if what in tail + data:
            return True
        tail = data[1 - len(what) :]
    return False


def _bytes_at(tid: int, address: int, size: int) -> bytes:
    """The program's memory; nothing where there is none."""
    try:
        fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(fd, size, address) if address < 1 << 47 else b""
    except OSError:
        return b""
    finally:
        os.close(fd)


def _restart(hold: Hold, tid: int) -> None:
    """A system call that our interruption cut short is made again. The kernel would have done so on its way back to the
    program; that way is over, as the thread has made another call since.
    """
    registers = hold.registers(tid)
    result = int(registers.rax) - (1 << 64) if registers.rax >> 63 else int(registers.rax)
    if registers.orig_rax >> 63 or result not in (*_RESTARTS, _RESTART_BLOCK):
        return
    registers.rax = _RESTART_SYSCALL if result == _RESTART_BLOCK else registers.orig_rax
    registers.rip = registers.rip - _SYSCALL_SIZE & _U64
    registers.orig_rax = _U64
    hold.set_registers(tid, registers)
