"""What is mapped where in another process: one question about one address, or a walk over a range.

The answer is as fresh as the question where the kernel can be asked about one address (PROCMAP_QUERY, Linux 6.11).
Elsewhere /proc/PID/maps is read as a whole and kept until `forget`.

/proc/PID/maps stands for the address space it was opened on. When the process has executed another program the old one
is gone; then it is opened again, and `generation` is one more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
from bisect import bisect_right
from typing import NamedTuple

from vmm.exec.pidfd import living

_QUERY_SIZE = 104  # struct procmap_query
_PROCMAP_QUERY = 0xC0000000 | _QUERY_SIZE << 16 | ord("f") << 8 | 17
_NEXT = 0x10  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA
_READ, _WRITE, _EXECUTE, _SHARED = 1, 2, 4, 8
_NAME = 64  # bytes of a mapping's name that are asked for


class Area(NamedTuple):
    """One mapping [start, end). `prot` are mmap's PROT_ bits; `offset` in bytes; `inode` 0 for anonymous memory."""

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    device: int
    inode: int
    page: int
    name: bytes

    @property
    def special(self) -> bool:
        """The kernel's own pages, which nothing can stand in for."""
        return self.name.startswith((b"[v", b"[uprobes"))

    @property
    def private(self) -> bool:
        """The process's own memory, which can become shared."""
        return not self.shared and not self.special

    def allows(self, write: bool) -> bool:
        """May the process read it, or write it too?"""
        return self.prot & 3 == 3 if write else bool(self.prot & 1)


class _Query(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("vma_flags", ctypes.c_uint64),
        ("page", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("name_size", ctypes.c_uint32),
        ("build_id_size", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("build_id", ctypes.c_uint64),
    )


class Maps:
    """The mappings of the process `tgid`. Usable from any thread."""

    def __init__(self, tgid: int, *, query: bool = True) -> None:
        self._tgid = tgid
        self._fd = -1
        self._query = query
        self._cells = _Query()
        self._name = ctypes.create_string_buffer(_NAME)
        self._list: list[Area] | None = None
        self._lock = threading.Lock()
        self.generation = 0
        self._closed = False

    def area(self, address: int) -> Area | None:
        """The mapping that holds `address`."""
        area = self.next(address)
        return area if area is not None and area.start <= address else None

    def next(self, address: int) -> Area | None:
        """The mapping that holds `address`, or else the first one above it; None when the process is gone, too."""
        with self._lock:
            for _ in range(2):
                try:
                    return self._ask(address) if self._query else self._look(address)
                except ProcessLookupError:
                    self._reopen()
                except OSError:
                    break
        return None

    def walk(self, start: int, end: int) -> list[Area]:
        """What is mapped of [start, end), in order, cut to it."""
        found = []
        at = start
        while at < end:
            area = self.next(at)
            if area is None or area.start >= end:
                break
            found.append(cut(area, start, end))
            at = area.end
        return found

    def forget(self) -> None:
        """The mappings may have changed."""
        with self._lock:
            self._list = None

    def close(self) -> None:
        """Give the file back. Nothing is mapped any more."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
            self._closed = True

    def _open(self) -> int:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._fd < 0:
            self._fd = os.open(f"/proc/{living(self._tgid)}/maps", os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def _reopen(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._list = -1, None
        self.generation += 1

    def _ask(self, address: int) -> Area | None:
        cells = self._cells
        ctypes.memset(ctypes.addressof(cells), 0, _QUERY_SIZE)
        cells.size, cells.flags, cells.address = _QUERY_SIZE, _NEXT, address
        cells.name_size, cells.name = _NAME, ctypes.addressof(self._name)
        fd = self._open()
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, cells)
        except OSError as failure:
            if failure.errno == errno.ENAMETOOLONG:  # no special mapping has a long name
                cells.name_size, cells.name = 0, 0
                with contextlib.suppress(FileNotFoundError):
                    fcntl.ioctl(fd, _PROCMAP_QUERY, cells)
            elif failure.errno == errno.ENOENT:
                return None
            elif failure.errno == errno.ENOTTY:
                self._query = False
                return self._look(address)
            else:
                raise
        flags = cells.vma_flags
        name = self._name.value if cells.name_size else b""
        device = os.makedev(cells.major, cells.minor)
        return Area(cells.start, cells.end, flags & 7, bool(flags & _SHARED), cells.offset, device, cells.inode, cells.page, name)

    def _look(self, address: int) -> Area | None:
        if self._list is None:
            fd = self._open()
            text = _whole(fd)
            if not text:
                raise ProcessLookupError
            self._list = [_parsed(line) for line in text.splitlines()]
        at = bisect_right(self._list, address, key=lambda area: area.end)
        return self._list[at] if at < len(self._list) else None


def cut(area: Area, start: int, end: int) -> Area:
    """The part of `area` that lies in [start, end)."""
    first, last = max(area.start, start), min(area.end, end)
    return area._replace(start=first, end=last, offset=area.offset + first - area.start)


def _whole(fd: int) -> bytes:
    pieces, at = [], 0
    while piece := os.pread(fd, 1 << 16, at):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def _parsed(line: bytes) -> Area:
    span, mode, offset, device, inode, *name = line.split(maxsplit=5)
    start, _, end = span.partition(b"-")
    major, _, minor = device.partition(b":")
    prot = _READ * (mode[0:1] == b"r") | _WRITE * (mode[1:2] == b"w") | _EXECUTE * (mode[2:3] == b"x")
    path = name[0] if name else b""
    huge = path.startswith(b"/anon_hugepage")  # the size of its pages is not told here: the largest there is
    return Area(
        int(start, 16),
        int(end, 16),
        prot,
        mode[3:4] == b"s",
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
        1 << 30 if huge else 4096,
        path,
    )
