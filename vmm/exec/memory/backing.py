"""The memory files that converted guest RAM lives in, of all traced processes together.

A backing is a sparse memfd in which a page stands at the offset that equals its virtual address at the time of its
conversion. So neighbours that are converted one after the other become one mapping again, there and here.

A page of a backing is given out once: when the process converts an address again, its old memory may live on in a
forked child or where mremap moved it. A backing serves the mapping it was made for, and small ones beside that (`join`),
so that thousands of small slots do not need thousands of files; a second generation is a new backing. What the process
unmaps is free when the whole backing is dead: hence small ones only.

A backing is dead when no process has it open or mapped any more. The kernel says so: a write lease is granted only when
there is no other open file (fcntl(2), F_SETLEASE). For that to count, all files of it come from open(2): one made by
memfd_create itself is not in the count. Dead ones are closed at the next `reap`, whosever they are, and their memory is free
then. So whoever uses the fd of one has to `keep` it meanwhile: later its number may be that of another process's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from bisect import bisect_right
from collections.abc import Iterator

from vmm.exec.pidfd import copy_fd_of, living

PAGE = 4096
MOST = 1024  # backings, of all processes
TOGETHER = 64 << 20  # bytes that mappings in one backing may span
_TOP = 1 << 47
_PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_AT_ONCE = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a lease on the file, or a pipe in its place, must not hold us up
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_fallocate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True)(
    ("fallocate", ctypes.CDLL(None, use_errno=True))
)
_all: dict[tuple[int, int], Backing] = {}
_lock = threading.Lock()


class Backing:
    """One memfd, for memory of [start, end). Raises OSError when there can be none."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._starts = [start]  # of the mappings, up to the next one
        self._conversions = [0]  # in each of them
        self._used: list[tuple[int, int]] = []
        self._keepers = 0
        self._closed = False
        made = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(made, _TOP)
            fcntl.fcntl(made, fcntl.F_ADD_SEALS, _SEALS)  # no process can cut it under us
            self.fd = _reopened(made)
        finally:
            os.close(made)
        status = os.fstat(self.fd)
        self.key = (status.st_dev, status.st_ino)

    def keep(self) -> bool:
        """It is not closed before `let_go`. False: it is already."""
        with _lock:
            self._keepers += not self._closed
            return not self._closed

    def let_go(self) -> None:
        """It may be closed."""
        with _lock:
            self._keepers -= 1

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Both. OSError (EBADF) when it is closed already."""
        if not self.keep():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            yield
        finally:
            self.let_go()

    def another(self) -> int:
        """A new open file of it, to be given to a process. The caller closes the fd."""
        return _reopened(self.fd)

    def serves(self, start: int, end: int) -> bool:
        """Can [start, end) be converted into it?"""
        return self.start <= start and end <= self.end and all(end <= first or last <= start for first, last in self._used)

    def join(self, start: int, end: int) -> bool:
        """Serve the mapping [start, end), too, if it is beside the others and all are small."""
        if max(end, self.end) - min(start, self.start) > TOGETHER or (end != self.start and start != self.end):
            return False
        at = 0 if end == self.start else len(self._starts)
        self._starts.insert(at, start)
        self._conversions.insert(at, 0)
        self.start, self.end = min(start, self.start), max(end, self.end)
        return True

    def conversions(self, address: int) -> int:
        """How many there were in the mapping that had `address`."""
        return self._conversions[bisect_right(self._starts, address) - 1]

    def take(self, start: int, end: int) -> None:
        """[start, end) is converted."""
        self._conversions[bisect_right(self._starts, start) - 1] += 1
        touching = [run for run in self._used if run[1] == start or run[0] == end]
        self._used = [run for run in self._used if run not in touching]
        self._used.append((min([start, *(run[0] for run in touching)]), max([end, *(run[1] for run in touching)])))

    @property
    def used(self) -> bool:
        """Was anything converted into it?"""
        return bool(self._used)

    @contextlib.contextmanager
    def mapped(self, offset: int, size: int) -> Iterator[int]:
        """The address of a mapping of it here, for a while. Raises OSError."""
        mapping = mmap.mmap(self.fd, size, offset=offset)
        cell = ctypes.c_char.from_buffer(mapping)
        try:
            yield ctypes.addressof(cell)
        finally:
            del cell
            mapping.close()

    def punch(self, offset: int, size: int) -> None:
        """[offset, offset+size) is zero from now on, and its memory is free. Raises OSError."""
        if _fallocate(self.fd, _PUNCH, offset, size) < 0:
            raise OSError(ctypes.get_errno(), "cannot punch a hole")

    def dead(self) -> bool:
        """Has nobody but us it open?"""
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return False
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True

    def close(self) -> None:
        """Forget it. Mappings that exist stay."""
        with _lock:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            del _all[self.key]
            os.close(self.fd)

    def close_if_dead(self) -> bool:
        """Close it when it was used, and is by nobody any more. Under the lock."""
        gone = self.used and not self._keepers and self.dead()
        if gone:
            self._close()
        return gone


def new(start: int, end: int) -> Backing:
    """A backing for [start, end). Raises OSError."""
    if len(_all) >= MOST:
        raise OSError(errno.EMFILE, "too much guest RAM in pieces")
    backing = Backing(start, end)
    with _lock:
        _all[backing.key] = backing
    return backing


def find(device: int, inode: int) -> Backing | None:
    """The backing that this file is."""
    return _all.get((device, inode))


def reap() -> list[Backing]:
    """Close those that nobody has any more. Returns them."""
    with _lock:
        return [backing for backing in list(_all.values()) if backing.close_if_dead()]


def drop_unused(made: list[Backing]) -> None:
    """Nothing will ever be converted into these: of the others, `reap` learns when they are dead."""
    for backing in made:
        if not backing.used:
            backing.close()
    made.clear()


def _reopened(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def file_of(tgid: int, device: int, inode: int, start: int, end: int, name: bytes) -> tuple[int, bool] | None:
    """An fd of ours for the file that `tgid` has mapped shared at [start, end), and whether it may be written; None when
    there is no way to it. The caller closes it.

    A copy of the process's own fd is best: one of the model's files is closed when the last open of it is, and an open of
    ours would be taken for one of the program's.
    """
    try:
        thread = living(tgid)
    except ProcessLookupError:
        return None
    paths = _open_files(thread, device, inode, name)
    for path in paths:
        fd = _copied(tgid, thread, int(path.rpartition("/")[2]), inode)
        if fd is not None:
            return fd, True
    for path in (*paths, f"/proc/{thread}/map_files/{start:x}-{end:x}"):
        for flags in (os.O_RDWR, os.O_RDONLY):
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.stat(path).st_mode):  # opening a device could do anything
                    fd = os.open(path, flags | _AT_ONCE)
                    if os.fstat(fd).st_ino == inode:
                        return fd, flags == os.O_RDWR
                    os.close(fd)
    return None


def _copied(tgid: int, thread: int, number: int, inode: int) -> int | None:
    """Our copy of a thread's fd, if it is that file, open for reading and writing."""
    try:
        fd = copy_fd_of(tgid, thread, number)
    except OSError:
        return None
    status = os.fstat(fd)
    if status.st_ino == inode and stat.S_ISREG(status.st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
        return fd
    os.close(fd)
    return None


def _open_files(thread: int, device: int, inode: int, name: bytes) -> list[str]:
    """Paths of a thread's fds that are this file. Some file systems show another device in stat(2) than in maps: then the
    name must be the same.
    """
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{thread}/fd"):
            path = f"/proc/{thread}/fd/{fd}"
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if status.st_ino == inode and (status.st_dev == device or os.readlink(os.fsencode(path)) == name):
                    found.append(path)
    return found
