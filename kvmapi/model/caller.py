"""Who makes the system call: its memory, its open files and its limits.

The model takes what a system call gives: a request number, an integer, and access to the caller's memory. It never
takes a Python object from the caller. In-process callers and, later, traced programs differ only in this module's
classes.

Memory is copied with process_vm_readv/writev, even from our own process: a wild pointer then gives EFAULT, as
copy_from_user does, where a plain load would end the process; and unlike /proc/PID/mem it honours page protections.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import resource
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from kvmapi.model.eventfd import EventFd
    from kvmapi.model.files import File

PAGE = 4096
USER_TOP = 0x7FFFFFFFF000  # first address that no user mapping of a 4-level x86-64 process can have
_U64 = (1 << 64) - 1
_CAP_IPC_LOCK = 14

_libc = ctypes.CDLL(None, use_errno=True)
_vm_types = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
_readv = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *_vm_types, use_errno=True)(("process_vm_readv", _libc))
_madvise = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True)(("madvise", _libc))
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_mincore = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, use_errno=True)(("mincore", _libc))
_MINCORE = 1 << 20  # pages asked about at once
_writev = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *_vm_types, use_errno=True)(("process_vm_writev", _libc))


class Errno(Exception):
    """The system call fails with this errno. Raised anywhere below `File.ioctl`, turned into -errno there."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return errno.errorcode.get(self.number, str(self.number))


class Stoppable(Protocol):
    """A VM."""

    def paused(self) -> AbstractContextManager[None]:
        """No vCPU of it runs inside the block; each enters anew afterwards."""


class Memory(Protocol):
    """The caller's address space. `elsewhere`: it is another process's, and must be told when guests use it (`enter`, `leave`)."""

    elsewhere: bool

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`, or Errno(EFAULT)."""

    def write(self, address: int, data: bytes) -> None:
        """Store all of `data`, or Errno(EFAULT) (a prefix may have been stored, as copy_to_user does)."""

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill a writable buffer of ours from `address`, or Errno(EFAULT): `read` for large pieces, with one copy."""

    def write_from(self, address: int, buffer: memoryview) -> None:
        """`write` from a writable buffer of ours, with one copy."""

    def pointer(self, address: int, size: int) -> int:
        """Where this range of the caller's memory is mapped in *our* process, for the CPU engine and in-place
        encryption.
        """

    def standing(self, address: int, size: int) -> int | None:
        """Where the range stands in our process whatever the caller maps there, for as long as guests use the memory: what
        `pointer` shows of it is there, too. None where nothing is reserved for it.
        """

    def accessible(self, address: int, write: bool) -> bool:
        """Can the page at `address` be read (and written, if asked) now?"""

    def reach(self, address: int, write: bool) -> int:
        """The end of the pages from `address` on of which `accessible` is true and stays so until memory is mapped anew;
        `address` where the first is not.
        """

    def pinnable(self, address: int, size: int, write: bool = True, whole: bool = False) -> bool:
        """Could every page of [address, address+size) be pinned (for writing)? `whole`: the caller is about to use all of
        it, so every page may be faulted in to find out.
        """

    def watch(self, vm: Stoppable) -> None:
        """Guests of this VM use the memory: it is paused for a moment whenever what is mapped there changes."""

    def unwatch(self, vm: Stoppable) -> None:
        """The VM is gone, and with it all that it had of `pointer`."""

    def enter(self) -> int:
        """A guest is about to use this memory through `pointer`. Counts changes of what is mapped where guests use it: after one,
        pages that were accessible may not be so any more.
        """

    def leave(self) -> None:
        """It has stopped."""


_SMALL = 512  # bytes: nearly every struct of an ioctl


class _Iovec(threading.local):
    """Per-thread iovec pair, so that a copy allocates nothing."""

    def __init__(self) -> None:
        cells = (ctypes.c_uint64 * 4)()
        self.cells = memoryview(cells).cast("B").cast("Q")
        self.small = memoryview(bytearray(_SMALL))
        self.small_at = ctypes.addressof(ctypes.c_char.from_buffer(self.small))
        self.at = ctypes.addressof(cells)
        self.remote_at = self.at + 16
        self.all = self.cells, self.at, self.remote_at, self.small, self.small_at  # what is a thread's own costs to find


@functools.cache
def _can_populate() -> bool:
    """Does this kernel have MADV_POPULATE_*?"""
    page = mmap.mmap(-1, PAGE)
    return bool(_madvise(ctypes.addressof(ctypes.c_char.from_buffer(page)), PAGE, _MADV_POPULATE_WRITE) == 0)


_own: WeakSet[OwnMemory] = WeakSet()


def _forked() -> None:
    for memory in list(_own):
        memory.forked()


os.register_at_fork(after_in_child=_forked)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class ProcessMemory:
    """Copies to and from the memory of a process, which may be another one. `pid`: one of its threads."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._iovec = _Iovec()

    def _copy(self, function: object, local: int, address: int, size: int) -> int:
        iovec = self._iovec
        cells = iovec.cells
        cells[0], cells[1], cells[2], cells[3] = local, size, address & _U64, size
        done: int = function(self._pid, iovec.at, 1, iovec.remote_at, 1, 0)  # type: ignore[operator]
        return done

    def read(self, address: int, size: int) -> bytes:
        if size <= _SMALL:  # `_copy` in place: nearly every ioctl begins with this
            cells, at, remote_at, small, small_at = self._iovec.all
            cells[0], cells[1], cells[2], cells[3] = small_at, size, address & _U64, size
            done = _readv(self._pid, at, 1, remote_at, 1, 0)
            if done != size and self._copy(_readv, small_at, address, size) != size:  # which may know more
                raise Errno(errno.EFAULT)
            return small[:size].tobytes()
        buffer = ctypes.create_string_buffer(size)
        if self._copy(_readv, ctypes.addressof(buffer), address, size) != size:
            raise Errno(errno.EFAULT)
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        if self._copy(_writev, ctypes.addressof(buffer), address, len(data)) != len(data):
            raise Errno(errno.EFAULT)

    def read_into(self, address: int, buffer: memoryview) -> None:
        if self._copy(_readv, _address(buffer), address, len(buffer)) != len(buffer):
            raise Errno(errno.EFAULT)

    def write_from(self, address: int, buffer: memoryview) -> None:
        if self._copy(_writev, _address(buffer), address, len(buffer)) != len(buffer):
            raise Errno(errno.EFAULT)


class OwnMemory(ProcessMemory):
    """The caller is this process."""

    elsewhere = False

    def __init__(self) -> None:
        super().__init__(os.getpid())
        _own.add(self)

    def forked(self) -> None:
        """The process is another one now: a child."""
        self._pid = os.getpid()

    def pointer(self, address: int, size: int) -> int:
        return address

    def standing(self, address: int, size: int) -> int | None:
        """Never: what is around a slot is no guest's business, and ours."""
        return None

    def watch(self, vm: Stoppable) -> None:
        """Nothing to do: changes are not noticed."""

    def unwatch(self, vm: Stoppable) -> None:
        """Nothing to do."""

    def enter(self) -> int:
        """Nothing to do: the guest uses the very memory."""
        return 0

    def leave(self) -> None:
        """Nothing to do."""

    def accessible(self, address: int, write: bool) -> bool:
        # Populating the page faults it in as an access would, and changes nothing. Kernels before 5.14 lack it: then
        # it must at least be readable.
        if _madvise(address, PAGE, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ) == 0:
            return True
        if _can_populate() and ctypes.get_errno() != errno.EAGAIN:
            return False  # EINVAL too: the mapping's permissions forbid it
        byte = ctypes.create_string_buffer(1)
        return self._copy(_readv, ctypes.addressof(byte), address, 1) == 1

    def reach(self, address: int, write: bool) -> int:
        """One page at a time: each may be refused."""
        return address + PAGE if self.accessible(address, write) else address

    def pinnable(self, address: int, size: int, write: bool = True, whole: bool = False) -> bool:
        first, last = address & -PAGE, (address + size - 1) & -PAGE
        if not (self.accessible(first, write) and self.accessible(last, write)):
            return False
        if whole and _can_populate():
            advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
            return _madvise(first, last + PAGE - first, advice) == 0 or ctypes.get_errno() == errno.EAGAIN
        # Populating gigabytes to answer this would use the memory that a sparse guest never touches: between the ends
        # it is only asked whether something is mapped.
        resident = (ctypes.c_ubyte * min(_MINCORE, (last - first) // PAGE))()
        return all(
            _mincore(at, min(_MINCORE * PAGE, last - at), resident) == 0 or ctypes.get_errno() != errno.ENOMEM
            for at in range(first, last, _MINCORE * PAGE)
        )


class Caller(Protocol):
    """One process as the kernel sees it during a system call."""

    @property
    def memory(self) -> Memory:
        """Its address space."""

    @property
    def thread(self) -> int:
        """The thread that makes the call, if it is another process's; 0: it is the one that runs this."""

    def file(self, fd: int) -> File:
        """The model's file behind the caller's `fd`, a `Foreign` one for an fd that is not ours, Errno(EBADF) when
        nothing is open there.
        """

    def install(self, file: File) -> int:
        """Give the caller a new fd for `file`."""

    def eventfd(self, fd: int) -> EventFd:
        """The caller's eventfd `fd`, held until the object goes: Errno(EBADF) when nothing is open there, EINVAL for
        another kind of file.
        """

    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes, None when unlimited or the caller has CAP_IPC_LOCK."""


def memlock_limit(pid: int) -> int | None:
    """A process's pin limit in bytes (None: no limit), by RLIMIT_MEMLOCK and CAP_IPC_LOCK. Raises OSError when it has ended."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1:
                return None
    soft, _ = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
