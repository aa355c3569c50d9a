"""The time-stamp counter of the machine the model runs on: what RDTSC reads, and how fast it counts.

A guest's counter is this one, scaled and moved, as KVM makes it of the processor's. User space relies on that: it reads
its own RDTSC and expects a guest with a known offset to be there. So the model cannot have a counter of its own.

The frequency is measured once for each process, against CLOCK_MONOTONIC_RAW; a reading is taken when the module is loaded, and
the later the frequency is asked for the better it is known (10 ms apart, at least: some parts in 100,000).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

_CODE = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SHORTEST = 10_000_000  # ns between the two readings
_TRIES = 16  # a reading that was interrupted is worthless: the quickest of so many counts


def _make() -> tuple[Callable[[], int], mmap.mmap]:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(_CODE)] = _CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    # PYFUNCTYPE: giving the GIL away for 20 ns of work would cost more than the work.
    return ctypes.PYFUNCTYPE(ctypes.c_uint64)(address), page


read, _page = _make()


def _reading() -> tuple[int, int]:
    """(counter, nanoseconds) at one time."""
    best, found = 1 << 62, (0, 0)
    for _ in range(_TRIES):
        before = read()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        after = read()
        if after - before < best:
            best, found = after - before, ((before + after) // 2, now)
    return found


_first = _reading()


@functools.cache
def khz() -> int:
    """The counter's frequency in kHz; the same for the life of the process."""
    left = _first[1] + _SHORTEST - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    if left > 0:
        time.sleep(left / 1e9)
    counter, now = _reading()
    return round((counter - _first[0]) * 1_000_000 / (now - _first[1]))
