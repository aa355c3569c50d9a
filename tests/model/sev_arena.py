"""Memory for calls that lie about memory: pages to write, pages to read only, and nothing between them.

    scratch   command, struct, buffers      hole      read-only pages      hole      guest pages of VM 0      hole      ...

Every byte is known before and after a call, so a call that changes anything it should not is seen.
"""

from __future__ import annotations

import ctypes
import mmap

PAGE = 4096
SCRATCH, READONLY, GUEST = 24 * PAGE, 2 * PAGE, 4 * PAGE
PROT_NONE, PROT_READ = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`vms` guest areas of `GUEST` bytes beside the scratch area; a `sev_reference.Memory`."""

    def __init__(self, vms: int) -> None:
        size = SCRATCH + PAGE + READONLY + PAGE + vms * (GUEST + PAGE) + GUEST
        self._map = mmap.mmap(-1, size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.scratch = self.base
        self.readonly = self.base + SCRATCH + PAGE
        first = self.readonly + READONLY + PAGE
        self.guest = [first + number * (GUEST + PAGE) for number in range(vms)]
        self.hole = self.base + SCRATCH
        self._writable = [(self.scratch, SCRATCH), *((address, GUEST) for address in self.guest)]
        self._regions = [*self._writable, (self.readonly, READONLY)]
        ctypes.memset(self.readonly, 0xA5, READONLY)
        for hole in (self.hole, self.readonly + READONLY, *(address + GUEST for address in self.guest)):
            self._protect(hole, PAGE, PROT_NONE)
        self._protect(self.base + size - GUEST, GUEST, PROT_NONE)  # whatever is mapped behind us is out of reach
        self._protect(self.readonly, READONLY, PROT_READ)

    def _protect(self, address: int, size: int, how: int) -> None:
        if _libc.mprotect(address, size, how):
            raise OSError(ctypes.get_errno(), "mprotect")

    @staticmethod
    def _inside(regions: list[tuple[int, int]], address: int, size: int) -> bool:
        return not size or any(start <= address and address + size <= start + length for start, length in regions)

    def readable(self, address: int, size: int) -> bool:
        """Whether every byte of [address, address+size) can be read."""
        return self._inside(self._regions, address, size)

    def writable(self, address: int, size: int) -> bool:
        """Whether every byte can be written."""
        return self._inside(self._writable, address, size)

    def read(self, address: int, size: int) -> bytes:
        """Bytes that are readable."""
        assert self.readable(address, size)
        return ctypes.string_at(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Bytes that are writable."""
        assert self.writable(address, len(data))
        ctypes.memmove(address, data, len(data))

    def snapshot(self) -> list[bytes]:
        """Everything."""
        return [ctypes.string_at(start, length) for start, length in self._regions]

    def changed(self, before: list[bytes], allowed: list[tuple[int, int]]) -> list[int]:
        """Addresses of pages in which something else than `allowed` ranges differs from a snapshot."""
        found = []
        for (start, length), old in zip(self._regions, before):
            now = ctypes.string_at(start, length)
            if now == old:
                continue
            new = bytearray(now)
            for address, size in allowed:
                low, high = max(address, start) - start, min(address + size, start + length) - start
                if low < high:
                    new[low:high] = old[low:high]
            if new != old:
                found += [start + at for at in range(0, length, PAGE) if new[at : at + PAGE] != old[at : at + PAGE]]
        return found

    def close(self) -> None:
        """Give it back."""
        self._protect(self.base, len(self._map), 3)
        self._map.close()
