"""Private memory of a live process becomes a shared mapping of a backing, in place and under its feet.

1. seize every thread; all but the caller's are stopped; the caller's is held in the notification of its system call
2. put the backings' fds into the process; ask the caller's thread to stop, too, and answer the notification: it stops
   on its way back to user code
3. copy the pages that exist, straight into our mapping of the backing
4. let the caller's thread map the backing over its memory, with the `syscall` instruction it has just used
5. the other threads go on: the ioctl may have to wait for one of them, which brings a page that it reads (userfaultfd)
6. the model's ioctl; its result into rax; let go of the caller's thread

A program can make us wait for ever all the same, in step 3 or 6, and with us whoever has memory to be converted. Such a
program is killed.

The mappings keep their protection. They lose what cannot be asked for: mlock, madvise and userfaultfd registrations.
Later fork(2)s share the memory instead of copying it. A process whose address space another process shares (vfork,
clone with CLONE_VM) is held only by its own threads.

When it cannot be done the memory stays as it was and the system call goes on: see mirror.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from vmm.exec.memory import copying
from vmm.exec.memory.backing import Backing
from vmm.exec.memory.maps import Area, Maps
from vmm.exec.tracing import ptrace
from vmm.exec.tracing.elsewhere import elsewhere

_MMAP, _CLOSE = 9, 3
_SHARED_FIXED = 0x01 | 0x10 | 0x4000  # MAP_SHARED | MAP_FIXED | MAP_NORESERVE
_SYSCALL = b"\x0f\x05"
_LIMIT, _LONGEST = 20.0, 1200.0  # seconds that a conversion may take, and that it may take longer because it is large
_SLOWEST = 64 << 20  # bytes that it copies in one of them


class Held(Protocol):
    """A thread that waits in a notification for its answer."""

    tid: int
    ip: int  # address after its `syscall` instruction

    @property
    def busy(self) -> Collection[int]:
        """Threads of its process that wait in other notifications."""

    def add_fd(self, fd: int) -> int:
        """Put a copy of ours into the process: its number there."""

    def answer(self, result: int) -> object:
        """The result, or -errno, of the system call."""


class Tracer(Protocol):
    """The OS thread that traces, if there is one."""

    def post(self, job: Callable[[], None]) -> None:
        """Have it do a job; come back at once."""

    def attend(self, but: int) -> None:
        """In it, during a job: see to the threads that it traces, except `but`."""


class Piece(NamedTuple):
    """[start, end) of a private mapping goes into `backing`."""

    start: int
    end: int
    prot: int
    file: bool  # pages that are not there come from a file
    backing: Backing


class Conversion:
    """One conversion of `pieces` of the process. `converted` has those that worked out."""

    def __init__(self, tgid: int, maps: Maps, held: Held, pieces: list[Piece], action: Callable[[], int]) -> None:
        self._tgid = tgid
        self._maps = maps
        self._held = held
        self._pieces = pieces
        self._action = action
        self.converted: list[Piece] = []
        self.failure: OSError | None = None

    def run(self, done: Callable[[], None], tracer: Tracer | None) -> None:
        """Do it, `done()`, then the action, and give its result to the process."""
        size = sum(piece.end - piece.start for piece in self._pieces)
        limit = threading.Timer(_LIMIT + min(size / _SLOWEST, _LONGEST), self._end_it)
        limit.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads: then nobody looks
            limit.start()
        try:
            if tracer is None:
                elsewhere(lambda here: self._traced(here, done), None)
            else:
                elsewhere(lambda here: self._traced(here, done), tracer.post, lambda: tracer.attend(self._held.tid))
        finally:
            limit.cancel()

    def _end_it(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.kill(self._tgid, signal.SIGKILL)
            print(f"sevmm exec: process {self._tgid} gives memory to a VM that it does not bring: killed", file=sys.stderr, flush=True)

    def _traced(self, here: Callable[[Callable[[], int]], int], done: Callable[[], None]) -> None:
        hold = ptrace.Hold(self._tgid)
        held = self._held
        try:
            try:
                hold.seize(held.tid)
                hold.freeze(lambda: held.busy, held.tid)
                fds = self._give()
            except OSError as failure:
                self.failure = failure
                hold.let_go()
                held.answer(here(self._action))
                return
            try:
                self._stop(hold)
                self._convert(hold, fds)
            except OSError as failure:
                self.failure = failure
            done()
            hold.let_go(but=held.tid)
            result = here(self._action)
            with contextlib.suppress(OSError):
                registers = hold.registers(held.tid)
                registers.rax = result & ((1 << 64) - 1)
                hold.set_registers(held.tid, registers)
        finally:
            hold.let_go()

    def _stop(self, hold: ptrace.Hold) -> None:
        """Get the caller's thread out of its notification and into a stop."""
        hold.interrupt(self._held.tid)
        self._held.answer(0)
        why, _ = hold.wait(self._held.tid)
        if why != ptrace.Stop.EVENT:
            raise OSError(errno.EBUSY, "the thread stopped for another reason")

    def _give(self) -> dict[Backing, int]:
        """Put the backings' fds into the process. OSError when it has no room for them."""
        fds: dict[Backing, int] = {}
        for piece in self._pieces:
            if piece.backing not in fds:
                ours = piece.backing.another()
                try:
                    fds[piece.backing] = self._held.add_fd(ours)
                finally:
                    os.close(ours)
        return fds

    def _convert(self, hold: ptrace.Hold, fds: dict[Backing, int]) -> None:
        tid, instruction = self._held.tid, self._held.ip - len(_SYSCALL)
        if copying.read(self._tgid, instruction, len(_SYSCALL)) != _SYSCALL:
            raise OSError(errno.EFAULT, "the program has changed its code")
        with hold.borrowed(tid):
            try:
                for piece in self._pieces:
                    if not self._unchanged(piece):
                        continue
                    size = piece.end - piece.start
                    with piece.backing.mapped(piece.start, size) as at:
                        copying.copy(self._tgid, piece.start, piece.end, at - piece.start, piece.file)
                    at = hold.call(tid, instruction, _MMAP, piece.start, size, piece.prot, _SHARED_FIXED, fds[piece.backing], piece.start)
                    if at != piece.start:
                        piece.backing.punch(piece.start, size)
                        raise OSError(-at if at < 0 else errno.EPERM, "mmap in the process failed")  # or a filter of its own has trapped it
                    piece.backing.take(piece.start, piece.end)
                    self.converted.append(piece)
            finally:
                with contextlib.suppress(OSError):
                    for fd in fds.values():
                        hold.call(tid, instruction, _CLOSE, fd)

    def _unchanged(self, piece: Piece) -> bool:
        """Is it still what it was before the threads were held?"""
        self._maps.forget()
        area = self._maps.area(piece.start)
        return area is not None and not area.shared and area.end >= piece.end and area.prot == piece.prot and from_file(area) == piece.file


def from_file(area: Area) -> bool:
    """Do pages of this private mapping that are not there come from a file?"""
    return area.inode != 0 and not area.name.startswith((b"/anon_hugepage", b"/dev/zero"))
