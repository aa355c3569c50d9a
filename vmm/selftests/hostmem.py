"""System calls about this process's own memory that Python has no name for: NUMA policies, huge pages, mappings beyond a file's end.

For tests of guest_memfd, whose mappings are to behave as the kernel says. Nothing here knows of KVM. Numbers: Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from vmm.selftests.case import Skip

MPOL_DEFAULT, MPOL_BIND, MPOL_INTERLEAVE = 0, 2, 3
MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 14, 25
_MPOL_F_ADDR = 2
_SYS_MBIND, _SYS_GET_MEMPOLICY, _SYS_MOVE_PAGES = 237, 239, 279
_MAX_NODES = 1024  # bits of a node mask
_ENOSYS = 38
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NodeMask = ctypes.c_uint64 * (_MAX_NODES // 64)


def address_of(view: mmap.mmap) -> int:
    """Where a writable mapping lies; the number does not keep it mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def nodes() -> list[int]:
    """The NUMA nodes with memory, ascending; [0] where the kernel does not say."""
    try:
        text = Path("/sys/devices/system/node/has_memory").read_text(encoding="ascii").strip()
    except OSError:
        return [0]
    found: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def mbind(address: int, size: int, mode: int, wanted: Sequence[int]) -> None:
    """mbind(2) of `[address, address + size)` to the nodes `wanted`. Raises OSError, and `Skip` on a kernel without NUMA."""
    mask = _NodeMask()
    for node in wanted:
        mask[node // 64] |= 1 << node % 64
    pointer = ctypes.addressof(mask) if wanted else 0
    _call(_SYS_MBIND, address, size, mode, pointer, _MAX_NODES if wanted else 0, 0)


def get_mempolicy(address: int) -> tuple[int, list[int]]:
    """The policy of the mapping at `address`: its mode and nodes. Raises OSError."""
    mode, mask = ctypes.c_int(), _NodeMask()
    _call(_SYS_GET_MEMPOLICY, ctypes.addressof(mode), ctypes.addressof(mask), _MAX_NODES, address, _MPOL_F_ADDR)
    return mode.value, [node for node in range(_MAX_NODES) if mask[node // 64] >> node % 64 & 1]


def nodes_of(address: int, pages: int) -> list[int]:
    """The node of each of `pages` pages from `address` on; below 0: the negative errno (ENOENT: not there)."""
    addresses = (ctypes.c_uint64 * pages)(*(address + 4096 * i for i in range(pages)))
    status = (ctypes.c_int * pages)()
    _call(_SYS_MOVE_PAGES, 0, pages, ctypes.addressof(addresses), 0, ctypes.addressof(status), 0)
    return list(status)


def madvise(address: int, size: int, advice: int) -> None:
    """madvise(2). Raises OSError."""
    if _libc.madvise(address, size, advice):
        raise _error()


def huge_page_size() -> int:
    """Bytes of a transparent huge page, 0 where the kernel has none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text(encoding="ascii"))
    except OSError:
        return 0


def _call(number: int, *arguments: int) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        error = _error()
        if error.errno == _ENOSYS:
            raise Skip("this kernel has no NUMA policies (CONFIG_NUMA)")
        raise error
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class Overlong:
    """A shared mapping of `length` bytes of a file that may be shorter: slices work as those of an mmap, touching it beyond the
    file's end is SIGBUS.
    """

    def __init__(self, fd: int, length: int) -> None:
        """Raises OSError."""
        address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise _error()
        self._length = length
        self._address = address

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self._length)
        return ctypes.string_at(self._address + start, stop - start)

    def __setitem__(self, where: slice, data: bytes) -> None:
        start, stop, _ = where.indices(self._length)
        if len(data) != stop - start:
            raise ValueError(f"{len(data)} bytes do not fill [{start}, {stop})")
        ctypes.memmove(self._address + start, data, len(data))

    def close(self) -> None:
        """Unmap. Safe to call twice."""
        address, self._address = self._address, 0
        if address:
            _libc.munmap(address, self._length)
