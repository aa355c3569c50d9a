"""The buffer of a request: string I/O and MMIO data, at the GPA in `sw_scratch`.

It lies in the GHCB's own shared buffer. Version 1 of the protocol allows it anywhere else in shared memory, up to 64 KiB:
that one is copied when the request begins, and copied back before the guest goes on if the request is a read. (KVM looks
at the shared side of memory: a guest that names a private page has its ciphertext read or written.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvmapi.abi import ghcb as abi
from kvmapi.model.caller import PAGE
from kvmapi.model.ghcb import memory, page
from kvmapi.model.mem.physical import Physical

_U64 = 0xFFFFFFFFFFFFFFFF
View = Callable[[], memoryview | None]


class BadScratch(Exception):
    """No buffer of this length may lie there."""


class Buffer(Protocol):
    """Bytes that both sides use."""

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes from offset `at`."""

    def write(self, at: int, data: bytes) -> None:
        """Put them there."""

    def sync(self) -> set[int]:
        """The guest goes on. The pages that were stored to just now, as our process sees them."""


class Inside:
    """In the GHCB. `view` gives the page as it is now, None once the guest's memory is gone: then reads are zeroes."""

    def __init__(self, view: View, offset: int) -> None:
        self._view = view
        self._offset = offset

    def read(self, at: int, size: int) -> bytes:
        view = self._view()
        return bytes(view[self._offset + at : self._offset + at + size]) if view is not None else bytes(size)

    def write(self, at: int, data: bytes) -> None:
        view = self._view()
        if view is not None:
            view[self._offset + at : self._offset + at + len(data)] = data

    def sync(self) -> set[int]:
        return set()  # it is the guest's own page


class Outside:
    """A copy of guest memory. Raises Refused when that is not all there."""

    def __init__(self, physical: Physical, gpa: int, size: int, back: bool) -> None:
        self._physical = physical
        self._gpa = gpa
        self._back = back
        self._data = bytearray(memory.read(physical, gpa, size))

    def read(self, at: int, size: int) -> bytes:
        return bytes(self._data[at : at + size])

    def write(self, at: int, data: bytes) -> None:
        self._data[at : at + len(data)] = data

    def sync(self) -> set[int]:
        return memory.write(self._physical, self._gpa, self._data) if self._back else set()


def locate(gpa: int, size: int, ghcb_gpa: int, view: View, physical: Physical, version: int, back: bool) -> Buffer:
    """The buffer [gpa, gpa+size) of a request in the GHCB at `ghcb_gpa`; `back`: a copy of it goes back. Raises BadScratch
    for a place that the protocol forbids, Refused for one without memory.
    """
    end = gpa + size
    if not gpa or end > _U64:
        raise BadScratch
    if gpa & -PAGE == ghcb_gpa:
        if gpa < ghcb_gpa + page.SHARED_BUFFER_AT or end > ghcb_gpa + page.SHARED_BUFFER_END:
            raise BadScratch
        return Inside(view, gpa - ghcb_gpa)
    if version >= abi.GHCB_PROTOCOL_MAX or size > abi.GHCB_SCRATCH_AREA_LIMIT:
        raise BadScratch
    return Outside(physical, gpa, size, back)
