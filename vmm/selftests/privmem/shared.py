"""The shared half of the test memory: anonymous memory of this process, in pages of 4 KiB or 2 MiB.

2 MiB is a page of hugetlbfs where the machine has reserved some, and else a transparent one: what KVM is to cope with is that a page of
shared memory is larger than the private pages that replace parts of it.

`forbid` and `allow` are the protections of the case without double allocation: memory that nobody may touch while the guest's is private.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from vmm.selftests.checks import check_equal, fail, skip

PAGE_4K, PAGE_2M = 0x1000, 0x200000
_NORESERVE, _HUGETLB, _HUGE_2M = 0x4000, 0x40000, 21 << 26
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_mprotect = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True)(
    ("mprotect", ctypes.CDLL(None, use_errno=True))
)


class SharedMemory:
    """`size` bytes at `address`, in pages of `page` bytes."""

    def __init__(self, size: int, page: int = PAGE_4K) -> None:
        """Raises OSError, and `Skip` where this kernel has no large pages at all."""
        self.size = size
        self._map, start = _map_large(size) if page == PAGE_2M else (mmap.mmap(-1, size, _ANONYMOUS | _NORESERVE), 0)
        with memoryview(self._map) as view:
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(view)) + start
        self._start = start
        self._forbidden = False

    def fill(self, pattern: int) -> None:
        """Store `pattern` in every word. A failure while it is forbidden."""
        self._check_allowed()
        self._map[self._start : self._start + self.size] = _words(pattern, self.size)

    def expect(self, pattern: int) -> None:
        """Every word must be `pattern`."""
        check_equal(self.read(), _words(pattern, self.size), f"shared memory, expected {pattern:#x} all over")

    def read(self) -> bytes:
        """All of it. A failure while it is forbidden."""
        self._check_allowed()
        return self._map[self._start : self._start + self.size]

    def forbid(self) -> None:
        """From now on a touch of any byte is a SIGSEGV (`fill` and `read` of this class fail first)."""
        self._protect(0)
        self._forbidden = True

    def allow(self) -> None:
        """Give the pages back to the kernel, and let new ones come."""
        self._map.madvise(mmap.MADV_DONTNEED, self._start, self.size)
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._forbidden = False

    def close(self) -> None:
        """Unmap it. Safe to call twice."""
        self._map.close()

    def _check_allowed(self) -> None:
        if self._forbidden:
            fail("the host is about to touch the shared half of memory that is private")

    def _protect(self, protection: int) -> None:
        if _mprotect(self.address, self.size, protection):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "mprotect")


def _map_large(size: int) -> tuple[mmap.mmap, int]:
    """The mapping, and where in it the first 2 MiB page begins."""
    try:
        return mmap.mmap(-1, size, _ANONYMOUS | _HUGETLB | _HUGE_2M), 0
    except OSError:  # none are reserved, which is how most machines are
        pass
    if not _TRANSPARENT.exists() or "[never]" in _TRANSPARENT.read_text():
        skip("this kernel has no 2 MiB pages: reserve some (sysctl vm.nr_hugepages=8)")
    made = mmap.mmap(-1, size + PAGE_2M, _ANONYMOUS | _NORESERVE)
    with memoryview(made) as view:
        start = -ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_2M
    made.madvise(mmap.MADV_HUGEPAGE, start, size)
    return made, start


def _words(pattern: int, size: int) -> bytes:
    return pattern.to_bytes(8, "little") * (size // 8)
