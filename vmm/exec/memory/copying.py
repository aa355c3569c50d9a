"""Bytes from and to other processes, and the pages of a process that is held still into our mapping of a backing, where
they keep their addresses: a page at `address` there goes to `view + address` here.

Only pages with contents are copied: the rest stays a hole. The kernel is asked which those are with PAGEMAP_SCAN
(Linux 6.7), elsewhere /proc/PID/pagemap is read.

Nothing here stores to our mapping directly. Where memory runs out a system call fails; a plain store would end us.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator

from vmm.exec.memory.backing import PAGE
from vmm.exec.pidfd import living

_PAGEMAP_SCAN = 0xC0606610
_PRESENT, _SWAPPED, _ZERO = 1 << 3, 1 << 4, 1 << 5  # categories of pages
_REGIONS = 1024  # per question
_STEP = 1 << 16  # entries of pagemap per read
_RUN = 64 << 20  # bytes, and
_RUNS = 256  # ranges copied by one call
_FILE_RUN = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_vm_types = (ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
_readv = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *_vm_types, use_errno=True)(("process_vm_readv", _libc))
_writev = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *_vm_types, use_errno=True)(("process_vm_writev", _libc))


def read(tgid: int, address: int, size: int) -> bytes | None:
    """`size` bytes of a process; None when it may not read all of them."""
    buffer = ctypes.create_string_buffer(size)
    local = struct.pack("=2Q", ctypes.addressof(buffer), size)
    return buffer.raw if _transferred(_readv, tgid, local, struct.pack("=2Q", address, size)) == size else None


def write(tgid: int, address: int, data: bytes) -> bool:
    """Into a process; False when it may not write all of it."""
    buffer = ctypes.create_string_buffer(data, len(data))
    local = struct.pack("=2Q", ctypes.addressof(buffer), len(data))
    return _transferred(_writev, tgid, local, struct.pack("=2Q", address, len(data))) == len(data)


def _transferred(function: Callable[..., int], tgid: int, local: bytes, remote: bytes) -> int:
    """Bytes that a process_vm_ call has copied between these ranges; -1 and an errno."""
    done = function(tgid, local, len(local) // 16, remote, len(remote) // 16, 0)
    if done < 0 and ctypes.get_errno() == errno.ESRCH:  # its first thread has ended, others may live on
        with contextlib.suppress(ProcessLookupError):
            done = function(living(tgid), local, len(local) // 16, remote, len(remote) // 16, 0)
    return done


def copy(tgid: int, start: int, end: int, view: int, file: bool) -> None:
    """[start, end). `file`: a private mapping of a file, where pages that are not there have contents, too. OSError when it
    cannot be read, or when there is no memory for it.
    """
    tgid = living(tgid)
    if file:
        _copy_file(tgid, start, end, view)
        return
    with open(f"/proc/{tgid}/pagemap", "rb", buffering=0) as pagemap:
        for batch in _batches(present(pagemap.fileno(), start, end)):
            _copy_batch(tgid, view, batch)


def _batches(runs: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    size = 0
    for start, end in runs:
        for at in range(start, end, _RUN):
            batch.append((at, min(at + _RUN, end)))
            size += batch[-1][1] - at
            if size >= _RUN or len(batch) == _RUNS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _copy_batch(tgid: int, view: int, batch: list[tuple[int, int]]) -> None:
    remote = struct.pack(f"={2 * len(batch)}Q", *itertools.chain.from_iterable((start, end - start) for start, end in batch))
    local = struct.pack(f"={2 * len(batch)}Q", *itertools.chain.from_iterable((view + start, end - start) for start, end in batch))
    if _readv(tgid, local, len(batch), remote, len(batch), 0) == sum(end - start for start, end in batch):
        return
    # Something in between is not readable for the process itself; /proc/PID/mem does not mind that.
    with open(f"/proc/{tgid}/mem", "rb", buffering=0) as memory:
        for start, end in batch:
            for at in range(start, end, PAGE):
                page = _page(memory.fileno(), at, PAGE)
                if page:
                    store(view + at, page)


def _copy_file(tgid: int, start: int, end: int, view: int) -> None:
    """What is zero stays a hole, and so does what lies past the file's end."""
    zero = bytes(PAGE)
    with open(f"/proc/{tgid}/mem", "rb", buffering=0) as memory:
        for first in range(start, end, _FILE_RUN):
            data = _page(memory.fileno(), first, min(_FILE_RUN, end - first))
            for at in range(0, len(data), PAGE):
                page = data[at : at + PAGE]
                if page != zero:
                    store(view + first + at, page)


def _page(memory: int, at: int, size: int) -> bytes:
    """What can be read of it: nothing of a guard page, or past the end of a file."""
    try:
        return os.pread(memory, size, at)
    except OSError as failure:
        if failure.errno in (errno.EIO, errno.EFAULT):
            return b""
        raise


def store(address: int, data: bytes) -> None:
    """Into our own memory. OSError when there is none."""
    source = ctypes.create_string_buffer(data, len(data))
    local = struct.pack("=2Q", address, len(data))
    if _readv(os.getpid(), local, 1, struct.pack("=2Q", ctypes.addressof(source), len(data)), 1, 0) != len(data):
        raise OSError(errno.ENOMEM, "no memory for guest RAM")


# ---- which pages have contents
def present(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of pages of private anonymous memory with contents, in order."""
    try:
        yield from scan(pagemap, start, end)
    except OSError as failure:
        if failure.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        yield from entries(pagemap, start, end)


def scan(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """`present` by PAGEMAP_SCAN. OSError (ENOTTY) before anything else where there is none."""
    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    while start < end:
        request = bytearray(
            struct.pack("=12Q", 96, 0, start, end, 0, ctypes.addressof(regions), _REGIONS, 0, _ZERO, _ZERO, _PRESENT | _SWAPPED, _PRESENT)
        )  # not the zero page, and there or swapped out
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request, True)
        for at in range(0, 3 * count, 3):
            yield regions[at], regions[at + 1]
        start = struct.unpack_from("=Q", request, 32)[0]  # how far it came


def entries(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """`present` by reading an entry for every page."""
    for at in range(start, end, _STEP * PAGE):
        words = array.array("Q", os.pread(pagemap, 8 * min(_STEP, (end - at) // PAGE), at // PAGE * 8))
        first = None
        for index, word in enumerate(itertools.chain(words, (0,))):
            there = bool(word >> 62)
            if there and first is None:
                first = index
            elif not there and first is not None:
                yield at + first * PAGE, at + index * PAGE
                first = None
