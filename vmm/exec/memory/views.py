"""Where ranges of a traced process's memory stand in our own address space.

A view is a reservation of ours for [start, end) of the process: address a of the process is at `base - start + a` here,
for as long as the process lives. What stands there is *painted*: the file that the process has mapped at an address now,
a mirror where there is no file (mirror.py), or nothing at all. When the process maps something else there, the view is
painted anew the next time anybody asks for it.

Reservations are whole GiB, aligned alike here and there. So there are few of them, their pieces merge, and huge pages of
files fit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

from vmm.exec.memory import sigbus

GRAIN = 1 << 30
_FIXED, _ANONYMOUS, _PRIVATE, _SHARED, _NORESERVE = 0x10, 0x20, 0x02, 0x01, 0x4000
_NONE, _RW = 0, mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long, use_errno=True
)(("mmap", _libc))
_munmap = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, use_errno=True)(("munmap", _libc))


class Paint(NamedTuple):
    """What is painted. `delta`: offset in the file less address in the process."""

    device: int
    inode: int
    delta: int


NOTHING = Paint(0, 0, 0)
MIRROR = Paint(-1, 0, 0)
UNKNOWN = Paint(-2, 0, 0)


def _map(address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    at: int | None = _mmap(address, size, prot, flags, fd, offset)
    if at is None or at == (1 << 64) - 1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return at


class View:
    """One reservation. Raises OSError when there is no room."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start & -GRAIN, (end + GRAIN - 1) & -GRAIN
        size = self.end - self.start
        self._whole = _map(None, size + GRAIN, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE)
        self._whole_size = size + GRAIN
        self.base = (self._whole + GRAIN - 1) & -GRAIN
        self._starts = [self.start]  # of runs of one paint each, up to the next
        self._paints = [NOTHING]
        try:
            self._entry = sigbus.register(self.base, self.base + size)
        except OSError:
            _munmap(self._whole, self._whole_size)
            raise

    def covers(self, start: int, end: int) -> bool:
        """Does all of [start, end) stand here?"""
        return self.start <= start and end <= self.end

    def pointer(self, address: int) -> int:
        """Where `address` of the process is in ours."""
        return self.base + address - self.start

    def paint_at(self, address: int) -> tuple[Paint, int]:
        """What is painted there, and up to where."""
        at = bisect_right(self._starts, address) - 1
        return self._paints[at], self._starts[at + 1] if at + 1 < len(self._starts) else self.end

    def is_painted(self, start: int, end: int, paint: Paint) -> bool:
        """Is it that, all over?"""
        there, until = self.paint_at(start)
        return there == paint and until >= end

    def paint(self, start: int, end: int, paint: Paint, fd: int = -1, writable: bool = True) -> None:
        """[start, end) is `paint` from now on: of the file `fd`. Raises OSError."""
        at, size = self.pointer(start), end - start
        if paint == NOTHING:
            _map(at, size, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED)
        elif paint == MIRROR:
            _map(at, size, _RW, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED)
        else:
            _map(at, size, _RW if writable else mmap.PROT_READ, _SHARED | _NORESERVE | _FIXED, fd, start + paint.delta)
        self._note(start, end, paint)

    def _note(self, start: int, end: int, paint: Paint) -> None:
        starts, paints = self._starts, self._paints
        after = self.paint_at(end)[0] if end < self.end else None
        first, last = bisect_right(starts, start - 1), bisect_right(starts, end)
        merged = [(start, paint)] if first == 0 or paints[first - 1] != paint else []
        if after is not None and after != paint:
            merged.append((end, after))
        starts[first:last] = [at for at, _ in merged]
        paints[first:last] = [what for _, what in merged]

    def strip(self, device: int, inode: int) -> None:
        """Nothing stands any more where this file stood. Raises OSError."""
        at = self.start
        while at < self.end:
            paint, until = self.paint_at(at)
            if (paint.device, paint.inode) == (device, inode):
                self.paint(at, until, NOTHING)
            at = until

    def doubt(self) -> None:
        """Something else may stand anywhere than was painted."""
        self._starts, self._paints = [self.start], [UNKNOWN]

    def blank(self) -> None:
        """Paint nothing all over: what stood there is void. Raises OSError."""
        self.paint(self.start, self.end, NOTHING)

    def close(self) -> None:
        """Give the address space back. Nobody may use a pointer any more."""
        sigbus.unregister(self._entry)
        _munmap(self._whole, self._whole_size)


_GRACE = 10.0  # seconds
_buried: deque[tuple[float, View]] = deque()


def bury(gone: list[View]) -> None:
    """Close views that somebody may still be using for a moment, when that moment is over: at a later call."""
    now = time.monotonic()
    _buried.extend((now, view) for view in gone)
    while _buried and now - _buried[0][0] > _GRACE:
        try:
            _, view = _buried.popleft()
        except IndexError:  # another thread was faster
            return
        view.close()
