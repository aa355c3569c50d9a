"""What a guest's private memory holds before it runs.

A private file cannot be written by user space, so KVM fills it from the shared half of the same slot: for an SEV guest in
LAUNCH_UPDATE_DATA, as was proposed with the tests' series, and where GPAs are registered (v7's test configuration), for any
guest, in the first registrations. The shared half keeps what it holds.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.dialects.memfd import Binding
from kvmapi.model.dialects.physical import tweak_address

if TYPE_CHECKING:
    from kvmapi.model.dialects.memfd import PrivateMemfd
    from kvmapi.model.dialects.vm import DialectVm
    from kvmapi.model.memslots import Slot
    from kvmapi.model.sev.stream import Piece

_CHUNK = 1 << 20
_ZEROES = bytes(_CHUNK)


class FileMemory:
    """Pages of a private file, by the addresses that stand for them."""

    def __init__(self, file: PrivateMemfd) -> None:
        self._view = memoryview(file.memory())
        self._base = tweak_address(file, 0)

    def write(self, address: int, data: bytes) -> None:
        """Store."""
        self._view[address - self._base : address - self._base + len(data)] = data

    def write_from(self, address: int, buffer: memoryview) -> None:
        """Store from a buffer."""
        self._view[address - self._base : address - self._base + len(buffer)] = buffer

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill a buffer."""
        buffer[:] = self._view[address - self._base : address - self._base + len(buffer)]


def pieces(vm: DialectVm, address: int, size: int) -> list[Piece]:
    """Where LAUNCH_UPDATE_DATA of the caller's [address, address+size) finds what it encrypts. Parts that are private were
    copied there and are populated when this returns; CHANGES is held. Errno(EFAULT).
    """
    found: list[Piece] = []
    end = address + size
    while address < end:
        slot = _slot_at(vm, address)
        if slot is None:
            part = min([end, *(other.hva for other in vm.slots.all() if other.hva > address)]) - address
        else:
            part = min(end, slot.hva + slot.pages * PAGE) - address
        found += [(vm.memory, address, part)] if slot is None else _pieces_of_slot(vm, slot, address, part)
        address += part
    return found


def _slot_at(vm: DialectVm, address: int) -> Slot | None:
    """The private slot whose shared half holds the address."""
    for slot in vm.slots.all():
        if isinstance(slot.gmem, Binding) and 0 <= address - slot.hva < slot.pages * PAGE:
            return slot
    return None


def _pieces_of_slot(vm: DialectVm, slot: Slot, address: int, size: int) -> list[Piece]:
    """The same for a part of one private slot's shared half, in runs of pages that are private and of others."""
    found: list[Piece] = []
    end = address + size
    while address < end:
        index = (address - slot.hva) // PAGE
        private, last = _goes_private(vm, slot, index), index + 1
        while slot.hva + last * PAGE < end and _goes_private(vm, slot, last) == private:
            last += 1
        part = min(end, slot.hva + last * PAGE) - address
        found.append(_into_file(vm, slot, address, part) if private else (vm.memory, address, part))
        address += part
    return found


def _goes_private(vm: DialectVm, slot: Slot, index: int) -> bool:
    """Is this page of the slot to be launched in private memory? Where population decides, it is what makes it private."""
    return vm.dialect.decides == "population" or slot.gfn + index in vm.private


def _into_file(vm: DialectVm, slot: Slot, address: int, size: int) -> Piece:
    """Copy a part of the shared half to its place in the file."""
    gmem = slot.gmem
    if not isinstance(gmem, Binding):
        raise TypeError("not a private slot")
    file, at = gmem.file, slot.gmem_page * PAGE + address - slot.hva
    if at + size > file.size():
        raise Errno(errno.EFAULT)
    first, last = at // PAGE, -(-(at + size) // PAGE)
    file.populate(first, last)
    memory, place = FileMemory(file), tweak_address(file, 0) + at
    for done in range(0, size, _CHUNK):
        memory.write(place + done, vm.memory.read(address + done, min(_CHUNK, size - done)))
    return memory, place, size


def populate_from_shared(vm: DialectVm, gfn: int, pages: int) -> None:
    """Registered GFNs take over what stands in their slot's shared half. CHANGES is held and no vCPU runs. EINVAL: not all of
    them are in one private slot with a file that is long enough; EFAULT.
    """
    slot = vm.slots.find(gfn)
    if slot is None or not isinstance(slot.gmem, Binding) or gfn + pages > slot.gfn + slot.pages:
        raise Errno(errno.EINVAL)
    file, at, hva = slot.gmem.file, (slot.gmem_page + gfn - slot.gfn) * PAGE, slot.hva_of(gfn)
    if at + pages * PAGE > file.size():
        raise Errno(errno.EINVAL)
    file.populate(at // PAGE, at // PAGE + pages, held=vm)
    memory, place = FileMemory(file), tweak_address(file, 0) + at
    for done in range(0, pages * PAGE, _CHUNK):
        data = vm.memory.read(hva + done, min(_CHUNK, pages * PAGE - done))
        if data != _ZEROES[: len(data)]:  # a sparse guest stays sparse
            memory.write(place + done, data)
    vm.physical.flush_range(gfn, pages)
