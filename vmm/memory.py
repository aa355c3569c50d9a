"""Guest memory: memslots backed by memfds, with a guest_memfd beside them where the VM type has private memory.

Each slot is one memfd, mapped shared and without reservation, so that memory costs what the guest touches. On SW_PROTECTED VMs a slot may
also bind a guest_memfd, through KVM_SET_USER_MEMORY_REGION2; the memfd is then the shared half, the guest_memfd the private half of the
same GPAs. SEV VMs have no guest_memfd: their private memory is the same memfd, encrypted in place.

Invariants
- a slot is in KVM, in `GuestMemory` and in the GPA map, or in none of them: `add_slot` takes back what it did when a step fails;
- slots do not overlap (the GPA map refuses), ranges are half-open, GPAs, HVAs and sizes in bytes;
- `read` and `write` see the shared half and, on SEV, ciphertext for private pages: nothing here can show private memory;
- `close` releases in the order guest_memfd, mapping, memfd; the caller closes vCPUs and VM first, so that nothing runs on memory that goes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.checks import GpaRange
from vmm.conversion import Step
from vmm.gpamap import GpaMap

if TYPE_CHECKING:
    from kvmapi.memfd import GuestMemfd
    from kvmapi.vm import Vm

MAP_NORESERVE = 0x4000  # x86; Python 3.11 has no name for it
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


class BadAddress(OSError):
    """A GPA range that is not wholly inside memslots, asked for by the VMM itself or its user (not by the guest)."""


@dataclass
class MemorySlot:
    """One memslot: `[gpa, gpa + size)` in bytes, its memfd and mapping, and its guest_memfd if it has one."""

    id: int
    gpa: int
    size: int
    fd: int
    map: mmap.mmap
    hva: int
    guest_memfd: GuestMemfd | None = None

    @property
    def end(self) -> int:
        """First GPA after the slot."""
        return self.gpa + self.size


class GuestMemory:
    """The memslots of one VM.

    >>> memory = GuestMemory(vm, GpaMap())              # doctest: +SKIP
    >>> memory.add_slot(0, gpa=0, size=64 << 20)        # doctest: +SKIP
    >>> memory.write(0x1000, b"hello")                  # doctest: +SKIP
    """

    def __init__(self, vm: Vm, map: GpaMap) -> None:
        self.vm = vm
        self.map = map
        self.slots: list[MemorySlot] = []  # ascending by GPA
        self._last: MemorySlot | None = None  # that the last piece was in

    # -- slots ---------------------------------------------------------------------------------------------------------------------------

    def add_slot(self, id: int, gpa: int, size: int, guest_memfd: bool = False) -> MemorySlot:
        """Create memslot `id`, all of it shared; with `guest_memfd`, bind a new guest_memfd of the same size.

        Raises KvmError (the kernel refused), OSError (no memory, no fds) or ValueError (overlap); nothing is left behind then.
        """
        self.map.add_slot(id, gpa, size)
        slot: MemorySlot | None = None
        try:
            slot = self._create(id, gpa, size)
            if guest_memfd:
                slot.guest_memfd = self.vm.create_guest_memfd(size)
            self._tell_kvm(slot)
        except BaseException:
            if slot is not None:
                _release(self.vm, slot)
            self.map.remove_slot(id)
            raise
        self.slots.append(slot)
        self.slots.sort(key=lambda s: s.gpa)
        return slot

    def _create(self, id: int, gpa: int, size: int) -> MemorySlot:
        host = self.vm.host
        fd = host.memfd_create(f"sevmm-slot{id}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)  # a memfd is an ordinary file on every host; KVM has no part in its size
            map = host.mmap(fd, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_NORESERVE, 0)
        except BaseException:
            host.close(fd)
            raise
        return MemorySlot(id, gpa, size, fd, map, ctypes.addressof(ctypes.c_char.from_buffer(map)))

    def _tell_kvm(self, slot: MemorySlot) -> None:
        """KVM_SET_USER_MEMORY_REGION2 where a guest_memfd is to be bound; the older ioctl does for everything else, on every kernel."""
        if slot.guest_memfd is None:
            self.vm.set_user_memory_region(slot.id, slot.gpa, slot.size, slot.hva)
        else:
            self.vm.set_user_memory_region2(
                slot.id, slot.gpa, slot.size, slot.hva, flags=KVM_MEM_GUEST_MEMFD, guest_memfd=slot.guest_memfd.fd
            )

    # -- access --------------------------------------------------------------------------------------------------------------------------

    def slot_at(self, gpa: int) -> MemorySlot | None:
        """The memslot that holds `gpa`, or None."""
        at = bisect_right(self.slots, gpa, key=lambda s: s.gpa) - 1
        return self.slots[at] if at >= 0 and gpa < self.slots[at].end else None

    def read(self, gpa: int, size: int) -> bytes:
        """Copy `[gpa, gpa + size)` out of the shared half; raises `BadAddress`."""
        return b"".join(slot.map[a:b] for slot, a, b in self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into the shared half at `gpa`; raises `BadAddress` before anything is written."""
        at = 0
        for slot, a, b in list(self._pieces(gpa, len(data))):
            slot.map[a:b] = bytes(data[at : at + b - a])
            at += b - a

    def hva(self, gpa: int, size: int = 1) -> int:
        """Host virtual address of `gpa`; `[gpa, gpa + size)` must lie within one slot; raises `BadAddress`."""
        slot = self.slot_at(gpa)
        if slot is None or gpa + size > slot.end:
            raise BadAddress(14, f"no memslot holds [{gpa:#x}, {gpa + size:#x})")
        return slot.hva + gpa - slot.gpa

    def holds_private(self, range: GpaRange) -> bool:
        """Whether every page of `range` has a guest_memfd behind it."""
        return all(slot.guest_memfd is not None for slot, _, _ in self.pieces(range))

    def pieces(self, range: GpaRange) -> Iterable[tuple[MemorySlot, int, int]]:
        """The parts of `range` slot by slot: slot, and a half-open range of bytes relative to the slot."""
        gpa, size = range
        slot = self._last
        if slot is not None and slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:  # as most conversions do
            return ((slot, gpa - slot.gpa, gpa - slot.gpa + size),)
        return self._pieces(gpa, size)

    def _pieces(self, gpa: int, size: int) -> Iterator[tuple[MemorySlot, int, int]]:
        """The parts of `[gpa, gpa + size)` slot by slot: slot, first and last byte (half-open) relative to the slot."""
        until = self.map.covered_until(gpa)
        if gpa < 0 or size < 0 or until < gpa + size:
            raise BadAddress(14, f"[{gpa:#x}, {gpa + size:#x}) is not in guest memory (no memslot at {until:#x})")
        end = gpa + size
        while gpa < end:
            slot = self.slot_at(gpa)
            if slot is None:
                raise BadAddress(14, f"no memslot at {gpa:#x}")
            stop = min(end, slot.end)
            self._last = slot
            yield slot, gpa - slot.gpa, stop - slot.gpa
            gpa = stop

    # -- end -----------------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release guest_memfds, mappings and memfds. Safe to call twice."""
        self._last = None
        while self.slots:
            slot = self.slots.pop()
            self.map.remove_slot(slot.id)
            _release(self.vm, slot)


def _release(vm: Vm, slot: MemorySlot) -> None:
    if slot.guest_memfd is not None:
        slot.guest_memfd.close()
    slot.map.close()
    vm.host.close(slot.fd)


class GuestMemfdBacking:
    """Backing of SW_PROTECTED VMs: the kernel's attribute says which half of a page counts, the guest_memfd holds the private half."""

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self.vm = vm
        self.memory = memory

    def steps(self, range: GpaRange, private: bool, before: GpaMap) -> Sequence[Step]:
        """To private: the attribute. To shared: the attribute, then the private pages are punched out (last: it cannot be undone)."""
        gpa, size = range

        def attribute() -> None:
            try:
                self.vm.set_memory_attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)
            except OSError:
                restore()  # the kernel may have done a part
                raise

        def restore() -> None:
            for run in before.ranges(gpa, size):
                start, stop = max(run.gpa, gpa), min(run.gpa + run.size, gpa + size)
                self.vm.set_memory_attributes(start, stop - start, KVM_MEMORY_ATTRIBUTE_PRIVATE if run.state == "private" else 0)

        def punch() -> None:
            for slot, start, stop in self.memory.pieces(range):
                if slot.guest_memfd is not None:
                    slot.guest_memfd.punch_hole(start, stop - start)

        first = Step("KVM_SET_MEMORY_ATTRIBUTES", attribute, restore)
        return (first,) if private else (first, Step("punch the private pages", punch, _nothing))


def _nothing() -> None:
    """Undoes a step that is the last one: it never has to be."""
