"""Guest RAM that could not be made shared: our copies of single pages, brought up to date around each run of a vCPU.

A page is mirrored from when the model first asks whether it may be accessed. When a vCPU enters, what the process has
stored since is read; when it leaves, the bytes that the guest has changed are written back, and no others: so stores of the
process to the rest of a page survive. While a guest runs, neither side sees the other's stores.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable

from vmm.exec.memory import copying

PAGE = 4096
MOST = 1 << 16  # pages: 256 MiB, and as much for what they were
_PART = 64  # bytes compared at a time


class Mirror:
    """The mirrored pages of the process `tgid`. `pointers` tells where a page stands here: in several places, perhaps."""

    def __init__(self, tgid: int, pointers: Callable[[int], Iterable[int]]) -> None:
        self._tgid = tgid
        self._pointers = pointers
        self.pages: dict[int, bytes] = {}  # by address: the contents when the two sides were last the same

    def __len__(self) -> int:
        return len(self.pages)

    def add(self, address: int) -> bool:
        """The page at `address` is mirrored from now on. False when it cannot be read, or too many are."""
        if address in self.pages:
            return True
        return len(self.pages) < MOST and self._read(address)

    def fill(self, start: int, end: int, pointer: int) -> None:
        """[start, end) stands at `pointer`, too, from now on."""
        for address in [page for page in self.pages if start <= page < end]:
            with contextlib.suppress(OSError):
                copying.store(pointer + address - start, self.pages[address])

    def drop(self, start: int, end: int) -> None:
        """[start, end) is not mirrored any more."""
        for address in [page for page in self.pages if start <= page < end]:
            del self.pages[address]

    def enter(self) -> None:
        """Both sides are the same afterwards."""
        self.leave()
        for address in list(self.pages):
            if not self._read(address):
                del self.pages[address]

    def leave(self) -> None:
        """What the guest has changed is in the process afterwards."""
        for address in list(self.pages):
            for pointer in self._pointers(address):
                before, now = self.pages[address], ctypes.string_at(pointer, PAGE)
                if now != before:
                    self._write(address, before, now)
                    self.pages[address] = now

    def _read(self, address: int) -> bool:
        page = copying.read(self._tgid, address, PAGE)
        if page is None:
            return False
        if page != self.pages.get(address):
            try:
                for pointer in self._pointers(address):
                    copying.store(pointer, page)
            except OSError:
                return False
        self.pages[address] = page
        return True

    def _write(self, address: int, before: bytes, now: bytes) -> None:
        for first, last in _changes(before, now):
            copying.write(self._tgid, address + first, now[first:last])  # or it is not there any more


def _changes(before: bytes, now: bytes) -> Iterable[tuple[int, int]]:
    """Ranges of bytes that differ."""
    for part in range(0, PAGE, _PART):
        if before[part : part + _PART] == now[part : part + _PART]:
            continue
        first = None
        for at in range(part, part + _PART + 1):
            differs = at < part + _PART and before[at] != now[at]
            if differs and first is None:
                first = at
            elif not differs and first is not None:
                yield first, at
                first = None
