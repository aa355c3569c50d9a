"""The dirty log of memslots: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.

A slot with KVM_MEM_LOG_DIRTY_PAGES has a bit per page, padded to 64. A store sets it when the page is entered writable
into a TLB; so whoever clears a bit must make every vCPU drop that entry, or the next store goes unnoticed.
Without manual protection GET hands the bits out and clears them. With it, GET copies only and CLEAR clears what it is
told to; with INITIALLY_SET besides, a slot whose log is switched on starts with every page dirty.
Source: virt/kvm/kvm_main.c (7.3): kvm_get_dirty_log_protect, kvm_clear_dirty_log_protect.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from kvmapi.abi import kvm
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.memslots import Memslots, Slot

_GET = struct.Struct("<IIQ")
_CLEAR = struct.Struct("<IIQQ")
ALL_OPTIONS = kvm.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kvm.KVM_DIRTY_LOG_INITIALLY_SET


def bitmap(pages: int, *, dirty: bool) -> bytearray:
    """A log for so many pages: all clean or all dirty. The bits behind the last page stay 0."""
    size = (pages + 63) // 64 * 8
    return bytearray(((1 << pages) - 1).to_bytes(size, "little")) if dirty else bytearray(size)


class DirtyLog:
    """The log's ioctls on one VM. `flush(gfn, pages)` makes all vCPUs forget writable entries; the caller pauses them."""

    def __init__(self, slots: Memslots, flush: Callable[[int, int], None]) -> None:
        self._slots = slots
        self._flush = flush
        self._options = 0

    @property
    def starts_dirty(self) -> bool:
        """Does a log that is switched on now begin with every page dirty?"""
        return self._options == ALL_OPTIONS

    def enable(self, flags: int, options: int) -> None:
        """KVM_ENABLE_CAP. EINVAL: flags, an unknown option, or INITIALLY_SET without manual protection."""
        allowed = ALL_OPTIONS if options & kvm.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE else 0
        if flags or options & ~allowed:
            raise Errno(errno.EINVAL)
        self._options = options

    def get(self, data: bytes, caller: Caller) -> None:
        """KVM_GET_DIRTY_LOG with the struct in `data`. EINVAL: no such slot number; ENOENT: no such slot, or no log;
        EFAULT: the bitmap cannot be written, and what was dirty is forgotten all the same.
        """
        number, _, address = _GET.unpack(data)
        slot = self._slot(number)
        bits = self._log(slot)
        out = bytes(bits)
        if not self._options and slot is not None:
            self._clean(slot, bits, 0, int.from_bytes(out, "little"))
        caller.memory.write(address, out)

    def clear(self, data: bytes, caller: Caller) -> None:
        """KVM_CLEAR_DIRTY_LOG with the struct in `data`. EINVAL: no such slot number, a first page that is no multiple
        of 64, a range that leaves the slot, or a number of pages that is no multiple of 64 and ends before the slot
        does; ENOENT: as `get`; EFAULT: the bitmap cannot be read.
        """
        number, pages, first, address = _CLEAR.unpack(data)
        slot = self._slot(number)
        if first % 64:
            raise Errno(errno.EINVAL)
        bits = self._log(slot)
        left = slot.pages - first if slot is not None else 0
        if left < 0 or pages > left or (pages < left and pages % 64):
            raise Errno(errno.EINVAL)
        size, at = (pages + 63) // 64 * 8, first // 8
        wanted = int.from_bytes(caller.memory.read(address, size), "little") if size else 0
        dirty = int.from_bytes(bits[at : at + size], "little")
        if wanted & dirty and slot is not None:
            self._clean(slot, bits, first, wanted & dirty)

    def _clean(self, slot: Slot, bits: bytearray, first: int, dirty: int) -> None:
        """Clear the log's bits `dirty`, which begin at page `first` (a multiple of 64), and have stores to these pages noticed again."""
        if not dirty:
            return
        at, size = first // 8, (dirty.bit_length() + 7) // 8
        bits[at : at + size] = (int.from_bytes(bits[at : at + size], "little") & ~dirty).to_bytes(size, "little")
        lowest = (dirty & -dirty).bit_length() - 1
        self._flush(slot.gfn + first + lowest, dirty.bit_length() - lowest)

    def _slot(self, number: int) -> Slot | None:
        if number >> 16 or number & 0xFFFF >= kvm.KVM_USER_MEM_SLOTS:
            raise Errno(errno.EINVAL)
        return self._slots.get(number)

    def _log(self, slot: Slot | None) -> bytearray:
        if slot is None or slot.dirty is None:
            raise Errno(errno.ENOENT)
        return slot.dirty
