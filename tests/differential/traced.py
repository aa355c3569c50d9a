"""The judge: this machine's own processor, running a snippet in a child process under ptrace.

1. A hand-made ELF of one page (`pause` in a loop) is started and seized; everything else in it is done by making it
   execute `syscall` instructions with registers of our choice.
2. It maps four areas of one memfd that we have mapped too: code, data, read-only data, stack. So setting up and reading
   memory needs no system call.
3. It gives up everything else it has (its own program, stack, vDSO) and takes a seccomp filter that kills it at any
   system call. Snippets run under PTRACE_SYSEMU, so a system call in one stops it before the kernel looks at the number:
   two locks on one door.
4. Per snippet: registers and FXSAVE image go in, the child runs until INT3, a signal or a timer tick, and both are read
   back. For a fault the signal is delivered to a handler (an INT3) once, because only the signal frame tells trap number
   and error code.

The child dies with us (PTRACE_O_EXITKILL), is killed by `close`, and replaced when a snippet manages to end it.
Source: ptrace(2), sigreturn frames of arch/x86/include/uapi/asm/sigcontext.h, seccomp(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import subprocess
from typing import NamedTuple, Self

CODE, DATA, FIXED, STACK = 0x10000000, 0x10004000, 0x10008000, 0x1000C000
CODE_SIZE, DATA_SIZE, FIXED_SIZE, STACK_SIZE = 0x1000, 0x2000, 0x1000, 0x1000
AREAS = ((CODE, CODE_SIZE, 5), (DATA, DATA_SIZE, 3), (FIXED, FIXED_SIZE, 1), (STACK, STACK_SIZE, 3))  # address, size, PROT_*
_SIGNALS, _SIGNALS_SIZE = 0x765400000000, 0x20000  # signal frames (with AVX-512 and AMX state) and the handler
_TF, _ID, _SI_KERNEL = 0x100, 1 << 21, 0x80
_TASK_END = 0x7FFFFFFFF000
_TICK = 20_000  # µs of the child's own time; the second tick in one run is a timeout

_TRACE_GETREGS, _TRACE_SETREGS, _TRACE_GETFPREGS, _TRACE_SETFPREGS = 12, 13, 14, 15
_TRACE_CONT, _TRACE_SINGLESTEP, _TRACE_SYSEMU, _TRACE_SEIZE, _TRACE_INTERRUPT, _TRACE_GETSIGINFO = 7, 9, 31, 0x4206, 0x4207, 0x4202
_OPTIONS = 1 | 1 << 20  # TRACESYSGOOD, EXITKILL
_WALL = 0x40000000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_TICKS = (signal.SIGVTALRM, signal.SIGALRM)
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs",
    "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
_SYS_MMAP, _SYS_MUNMAP, _SYS_SIGACTION, _SYS_SETITIMER, _SYS_SIGALTSTACK, _SYS_PRCTL, _SYS_SECCOMP = 9, 11, 13, 38, 131, 157, 317
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
DIED, TIMEOUT, SYSCALL = -1, -2, -3
"""Outcomes that are no vector."""


class user_regs(ctypes.Structure):
    """struct user_regs_struct."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]


class Stop(NamedTuple):
    """How a run ended: a vector (3 for the end mark) or DIED, TIMEOUT, SYSCALL; error code and CR2 of a fault."""

    vector: int
    error: int = 0
    cr2: int = 0


class Gone(Exception):
    """The child ended."""


def _elf() -> bytes:
    """A program that pauses for ever."""
    text = b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7"  # mov eax, 34; syscall; jmp
    at = 0x400000
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, at + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, at, at, 120 + len(text), 120 + len(text), 4096) + text


class Traced:
    """The child, and the memory it shares with us: `areas[address]` is a writable view of an area."""

    def __init__(self) -> None:
        self.regs = user_regs()
        self.fpu = ctypes.create_string_buffer(512)
        self._fd = os.memfd_create("snippets")
        total = sum(size for _, size, _ in AREAS) + _SIGNALS_SIZE
        os.ftruncate(self._fd, total)
        self._memory = mmap.mmap(self._fd, total)
        self.areas: dict[int, memoryview] = {}
        at = 0
        for address, size, _ in AREAS:
            self.areas[address] = memoryview(self._memory)[at : at + size]
            at += size
        self._frames = memoryview(self._memory)[at:]
        self._frames[0] = 0xCC  # the handler
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child and give everything back."""
        self._kill()
        for view in (*self.areas.values(), self._frames):
            view.release()
        self._memory.close()
        os.close(self._fd)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(ChildProcessError):
                self._process.wait()
            self._process = None

    # ---- the child
    def _start(self) -> None:
        program = os.memfd_create("pause", 0)
        try:
            os.write(program, _elf())
            self._process = subprocess.Popen([f"/proc/self/fd/{program}"], pass_fds=(program, self._fd), env={})
        finally:
            os.close(program)
        self._pid = self._process.pid
        self._trace(_TRACE_SEIZE, 0, _OPTIONS)
        self._trace(_TRACE_INTERRUPT)
        self._wait()
        self._trace(_TRACE_GETREGS, 0, ctypes.addressof(self.regs))
        self._first = user_regs.from_buffer_copy(self.regs)
        self._first.orig_rax = (1 << 64) - 1  # no system call is restarted
        at = 0
        for address, size, prot in (*AREAS, (_SIGNALS, _SIGNALS_SIZE, 7)):
            self._call(0x400000 + 120 + 5, _SYS_MMAP, address, size, prot, 0x11, self._fd, at)  # MAP_SHARED | MAP_FIXED
            at += size
        self._isolate()

    def _isolate(self) -> None:
        """Steps 3 and 4's preparations, executed from the code area."""
        self.areas[CODE][:2] = b"\x0f\x05"
        edges = sorted([(address, address + size) for address, size, _ in AREAS] + [(_SIGNALS, _SIGNALS + _SIGNALS_SIZE)])
        for (_, end), (start, _) in zip([(0, 0), *edges], [*edges, (_TASK_END, 0)]):
            self._call(CODE, _SYS_MUNMAP, end, start - end)
        self._scratch(struct.pack("<QiiQ", _SIGNALS + 0x1000, 0, 0, _SIGNALS_SIZE - 0x1000))
        self._call(CODE, _SYS_SIGALTSTACK, DATA, 0)
        self._scratch(struct.pack("<QQQQ", _SIGNALS, 0x4C000004, _SIGNALS, 0))  # SIGINFO, RESTORER, ONSTACK, NODEFER
        for number in _FAULTS:
            self._call(CODE, _SYS_SIGACTION, number, DATA, 0, 8)
        self._scratch(struct.pack("<4Q", 0, _TICK, 0, _TICK))
        self._call(CODE, _SYS_SETITIMER, 1, DATA, 0)
        self._call(CODE, _SYS_PRCTL, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        self._scratch(struct.pack("<HxxxxxxQ", 1, DATA + 16) + struct.pack("<HBBI", 6, 0, 0, 0x80000000))  # return KILL_PROCESS
        self._call(CODE, _SYS_SECCOMP, 1, 0, DATA)

    def _scratch(self, data: bytes) -> None:
        self.areas[DATA][: len(data)] = data

    def _call(self, at: int, number: int, *arguments: int) -> None:
        """One system call in the child: `at` is a SYSCALL instruction."""
        self.regs = user_regs.from_buffer_copy(self._first)
        self.regs.rip, self.regs.rax = at, number
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments):
            setattr(self.regs, name, value)
        self._trace(_TRACE_SETREGS, 0, ctypes.addressof(self.regs))
        while True:
            self._trace(_TRACE_SINGLESTEP)
            if self._wait() == signal.SIGTRAP:
                break
        self._trace(_TRACE_GETREGS, 0, ctypes.addressof(self.regs))
        if -4096 < ctypes.c_int64(self.regs.rax).value < 0:
            number_of = ctypes.c_int64(self.regs.rax).value
            raise OSError(-number_of, f"system call {number} in the traced child: {os.strerror(-number_of)}")

    def _trace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self._pid, address, data) == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")

    def _wait(self) -> int:
        """The signal of the next stop."""
        _, status = os.waitpid(self._pid, _WALL)
        if not os.WIFSTOPPED(status):
            assert self._process is not None
            self._process.returncode = -1  # it is reaped
            self._process = None
            raise Gone
        return os.WSTOPSIG(status)

    # ---- running
    def run(self) -> Stop:
        """Run from `regs` and `fpu`, which are then what the snippet left."""
        try:
            regs, fpu = ctypes.addressof(self.regs), ctypes.addressof(self.fpu)
            self.regs.orig_rax = (1 << 64) - 1
            self._trace(_TRACE_SETREGS, 0, regs)
            self._trace(_TRACE_SETFPREGS, 0, fpu)
            ticks = 0
            while True:
                self._trace(_TRACE_SYSEMU)
                number = self._wait()
                if number not in _TICKS:
                    break
                ticks += 1
                if ticks > 1:
                    break
            self._trace(_TRACE_GETREGS, 0, regs)
            self._trace(_TRACE_GETFPREGS, 0, fpu)
            code = self._signal_code() if number == signal.SIGTRAP and self.regs.eflags & _TF else _SI_KERNEL
            stop = self._fault(number) if number in _FAULTS else None
            if self.regs.eflags & _ID:
                self._clear_id()
            if stop is not None:
                return stop
        except Gone:
            self._start_again()
            return Stop(DIED)
        if number == signal.SIGTRAP:
            return Stop(3 if code == _SI_KERNEL else 1)
        return Stop(TIMEOUT if number in _TICKS else SYSCALL if number == _SYSCALL_STOP else DIED)

    def _signal_code(self) -> int:
        info = ctypes.create_string_buffer(128)
        self._trace(_TRACE_GETSIGINFO, 0, ctypes.addressof(info))
        return int.from_bytes(info.raw[8:12], "little", signed=True)

    def _clear_id(self) -> None:
        """POPF with ID clear: PTRACE_SETREGS does not touch that flag, and the next snippet would find it set."""
        self._frames[0x100:0x102] = b"\x9d\xcc"
        self._frames[0x200:0x208] = struct.pack("<Q", 0x202)
        regs = user_regs.from_buffer_copy(self._first)
        regs.rip, regs.rsp, regs.cs = _SIGNALS + 0x100, _SIGNALS + 0x200, self._first.cs
        self._trace(_TRACE_SETREGS, 0, ctypes.addressof(regs))
        self._trace(_TRACE_SYSEMU)
        while self._wait() in _TICKS:
            self._trace(_TRACE_SYSEMU)

    def _fault(self, number: int) -> Stop:
        """Let the signal be delivered: its frame has the trap number and the error code."""
        self._trace(_TRACE_SYSEMU, 0, number)
        while self._wait() in _TICKS:
            self._trace(_TRACE_SYSEMU)
        after = user_regs()
        self._trace(_TRACE_GETREGS, 0, ctypes.addressof(after))
        error, trap, _, cr2 = struct.unpack_from("<4Q", self._frames, after.rdx + 192 - _SIGNALS)
        return Stop(trap, error, cr2)

    def steps(self, most: int) -> list[int]:
        """RIP before each of the first instructions of a run from `regs` (which stay as they are); it ends where the
        snippet does.
        """
        found = [int(self.regs.rip)]
        now = user_regs.from_buffer_copy(self.regs)
        try:
            self._trace(_TRACE_SETREGS, 0, ctypes.addressof(self.regs))
            self._trace(_TRACE_SETFPREGS, 0, ctypes.addressof(self.fpu))
            for _ in range(4000):
                if len(found) > most:
                    break
                self._trace(_TRACE_SINGLESTEP)
                number = self._wait()
                if number in _TICKS:
                    continue
                self._trace(_TRACE_GETREGS, 0, ctypes.addressof(now))
                if number != signal.SIGTRAP or self._is_mark(found[-1]):
                    break
                if now.rip != found[-1]:  # a repetition of a string instruction is a step too
                    found.append(int(now.rip))
        except Gone:
            self._start_again()
        return found

    def _is_mark(self, rip: int) -> bool:
        return CODE <= rip < CODE + CODE_SIZE and self.areas[CODE][rip - CODE] == 0xCC

    def _start_again(self) -> None:
        code = bytes(self.areas[CODE])
        data = bytes(self.areas[DATA])
        self._kill()
        self._start()
        self.areas[CODE][:], self.areas[DATA][:] = code, data
