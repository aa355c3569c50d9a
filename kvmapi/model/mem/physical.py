"""Guest-physical memory: from a GFN and a C-bit to the one backing that this access may use.

There are two physical address spaces, secure and shared, and three rules for choosing, one per kind of VM:

- plain: there is only shared memory, the caller's (here);
- SW_PROTECTED (private.py): the memory attribute of the GFN chooses guest_memfd or the caller's memory; a page declared private
  whose slot has no living guest_memfd is refused (KVM_EXIT_MEMORY_FAULT);
- SEV: the C-bit of the access chooses; both are the same page of the caller's memory, seen decrypted or as it is.

Backings reach the engine as *windows*: ranges of host memory at an engine-physical address of their own, mapped into
each vCPU's engine when it first needs them. A window never moves, not even when its slot does; when its memory goes
away, no engine uses it from before the ioctl returns, and each unmaps it before it runs again.

An engine cannot do with thousands of windows: mapping each takes longer the more there are. Where the caller's addresses
have a fixed place in our process, small slots whose memory is near each other share the window of their *block*. What of it
belongs to no slot is there, too, but no translation leads to it. Such a window stays.
"""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from pyroaring import BitMap64

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE, Memory
from kvmapi.model.mem.secure import page_view
from kvmapi.model.stats import OF_VM, REMOTE_TLB_FLUSH, Stats

if TYPE_CHECKING:
    from kvmapi.model.memslots import Memslots, Slot

_PAGE_SHIFT = 12
_READONLY = kvm.KVM_MEM_READONLY
_WINDOW_ALIGN = 1 << 30
_BLOCK = 64 << 20  # bytes of the caller's addresses, aligned
_SMALL = _BLOCK // 16  # the largest slot that shares a window
_FEW_PAGES, _MAX_VOIDS = 64, 64  # what is noted page by page: more is a flush
_MAX_TABLES = 4096  # pages of guest tables with a view of their own
_STRETCH = 511  # pages to each side of one that `stretch` looks at
_TOP = 1 << 51  # end of the engine's physical addresses that windows may have


class Refused(Exception):
    """This access cannot be served. `kind`: "mmio" (no memory there), "fault" (memory-fault exit) or "hva" (the
    caller's memory is not there).
    """

    def __init__(self, kind: str, gpa: int, *, private: bool = False, number: int = errno.EFAULT) -> None:
        self.kind = kind
        self.gpa = gpa
        self.private = private
        self.number = number


@dataclass(slots=True, eq=False)
class Window:
    """Host memory [pointer, pointer+size) at engine-physical `base`."""

    base: int
    size: int
    pointer: int
    owner: object


Stretch = tuple[int, int, int, int, "Slot"]
"""[first GFN, end), the engine's address of the first page and where our process sees it, and the slot."""


def mark_dirty(slot: Slot, gfn: int) -> None:
    """The page is about to be stored to, and its slot keeps a log."""
    if slot.dirty is not None:
        index = gfn - slot.gfn
        slot.dirty[index >> 3] |= 1 << (index & 7)


class KeepsBytes(Protocol):
    """Who looks at guest memory between runs."""

    def lose_memory(self) -> None:
        """Some of it goes away: look at none until `code_generation` was seen to have changed."""


class Physical:
    """Guest-physical memory of a plain VM, and what the other kinds share."""

    always_attended = False
    has_stretches = True  # may `stretch` ever find one?

    def __init__(self, slots: Memslots, memory: Memory) -> None:
        self.slots = slots
        self.memory = memory
        self._elsewhere = memory.elsewhere
        self.attended = self._elsewhere or self.always_attended  # do `enter` and `leave` do anything?
        self._changes = 0  # of the caller's mappings, as far as is known here
        self.generation = 0  # counts changes after which every vCPU must drop its translations
        self.code_generation = 0  # counts changes after which translated blocks may be wrong
        self.code_caches: WeakSet[KeepsBytes] = WeakSet()
        self.windows: dict[int, Window] = {}  # by id(owner)
        self._blocks: dict[int, object] = {}  # owners of blocks' windows, by address
        self.dropped = 0  # counts windows that went away
        self._next_base = _WINDOW_ALIGN
        self._free: dict[int, list[int]] = {}  # addresses of dropped windows, by their span
        self._readable: BitMap64 = BitMap64()  # caller's pages seen to be there
        self._writable: BitMap64 = BitMap64()
        self.tables: dict[tuple[int, bool, bool], memoryview] = {}  # pages of guest tables: see `words`
        self.entered: BitMap64 = BitMap64()  # GFNs that some TLB or shadow table may know since the last flush
        self.stats = Stats("", OF_VM)
        self.flushed = 0  # the generation of the last `flush`
        self.voids: list[tuple[int, int, int]] = []  # (generation, first GFN, end) of changes of a few pages since then

    # ---- the rule
    def locate(self, gfn: int, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        """(window, offset of the page in it, may it be stored to from now on without a further look) for one access.
        Raises Refused.
        """
        slot = self._slot(gfn, write)
        if slot.gmem is not None and slot.gmem.mappable:
            return self._in_gmem(gfn, slot, private=False)
        return self._in_caller(gfn, slot, write)

    def page(self, gfn: int, encrypted: bool, write: bool) -> memoryview:
        """A page as bytes, for exception frames and string I/O. Valid until the next change."""
        window, offset, _ = self.locate(gfn, encrypted, write)
        return page_view(window.pointer + offset)

    def words(self, gfn: int, encrypted: bool, wide: bool = True) -> memoryview:
        """A page of guest tables as 512 64-bit words (`wide`) or 1024 32-bit ones, to be read; `store_word` writes one."""
        view = self.tables.get((gfn, encrypted, wide))
        if view is None:
            if len(self.tables) >= _MAX_TABLES:
                self.flush()  # a guest with that many tables starts again with none
            view = self.page(gfn, encrypted, write=False).cast("Q" if wide else "I")
            self.tables[gfn, encrypted, wide] = view
            self.entered.add(gfn)  # shadow tables remember what stands here
        return view

    def store_word(self, gfn: int, encrypted: bool, index: int, value: int, wide: bool = True) -> None:
        """Write an entry of a guest table (its accessed and dirty bits). A table in read-only memory stays as it is."""
        slot = self.slots.find(gfn)
        if slot is None or slot.readonly:
            return
        view = self.tables.get((gfn, encrypted, wide))
        if view is None or slot.dirty is not None or slot.hva_of(gfn) // PAGE not in self._writable:
            view = self.page(gfn, encrypted, write=True).cast("Q" if wide else "I")
        view[index] = value

    def populate(self, gfn: int) -> None:
        """Fault a page in, as a read of the guest would, without entering it anywhere. Raises Refused."""
        self.locate(gfn, False, False)

    # ---- entering and leaving KVM_RUN
    def enter(self) -> None:
        """A vCPU enters."""
        if self._elsewhere and (changes := self.memory.enter()) != self._changes:
            self._remapped(changes)

    def _remapped(self, changes: int) -> None:
        """What is mapped in the caller's memory has changed since the last entry."""
        self._changes = changes
        self.changed()

    def leave(self) -> None:
        """A vCPU leaves."""
        if self._elsewhere:
            self.memory.leave()

    def stretch(self, gfn: int) -> Stretch | None:
        """The memory around a page that any access may use unasked, as far as 511 pages to each side; None where there is no such."""
        slot = self.slots.find(gfn)
        if slot is None or slot.readonly or (slot.gmem is not None and slot.gmem.mappable):
            return None
        place = self._placed(slot)
        first, end = max(slot.gfn, gfn - _STRETCH), min(slot.gfn + slot.pages, gfn + _STRETCH + 1)
        page = slot.hva_of(first) // PAGE
        if place is None or self._writable.range_cardinality(page, page + end - first) != end - first:
            return None
        window, offset = place[0], place[1] + (first - slot.gfn) * PAGE
        return first, end, window.base + offset, window.pointer + offset, slot

    def is_plain_table(self, gpa: int) -> bool:
        """May accessed and dirty bits be set in the table at `gpa` by whoever finds it through `words`?"""
        slot = self.slots.find(gpa // PAGE)
        return slot is not None and not slot.readonly and slot.dirty is None and slot.hva_of(gpa // PAGE) // PAGE in self._writable

    # ---- pieces
    def _slot(self, gfn: int, write: bool) -> Slot:
        slot = self.slots.find(gfn)
        if slot is None or (write and slot.readonly):
            raise Refused("mmio", gfn * PAGE)
        return slot

    def _check_caller(self, gfn: int, slot: Slot, write: bool) -> None:
        """Is the caller's page there, for this access? Raises Refused."""
        hva = slot.hva_of(gfn)
        page = hva // PAGE
        known = self._writable if write else self._readable
        if page not in known:
            end = min(self.memory.reach(hva, write), slot.hva + slot.pages * PAGE)
            if end <= hva:
                raise Refused("hva", gfn * PAGE)
            known.add_range(page, end // PAGE)

    def _in_caller(self, gfn: int, slot: Slot, write: bool) -> tuple[Window, int, bool]:
        at = (gfn - slot.gfn) * PAGE
        page = slot.hva + at >> _PAGE_SHIFT
        if page not in (self._writable if write else self._readable):
            self._check_caller(gfn, slot, write)
        if slot.dirty is not None:
            storable = write
            if write:
                mark_dirty(slot, gfn)
        else:
            storable = write or (page in self._writable and not slot.flags & _READONLY)
        window = self.windows.get(id(slot.backing_key))
        if window is None:
            window, start = self._placed(slot) or self._place(slot)
            at += start
        return window, at, storable

    def _placed(self, slot: Slot) -> tuple[Window, int] | None:
        """The window that has the slot's memory, and where in it that begins; None when it has none yet."""
        window = self.windows.get(id(slot.backing_key))
        if window is not None:
            return window, 0
        block = slot.hva & -_BLOCK
        owner = self._blocks.get(block)
        if owner is None or slot.pages * PAGE > _SMALL or slot.hva + slot.pages * PAGE > block + _BLOCK:
            return None
        return self.windows[id(owner)], slot.hva - block

    def _place(self, slot: Slot) -> tuple[Window, int]:
        """Give the slot's memory a window, of its own or with others."""
        size, block = slot.pages * PAGE, slot.hva & -_BLOCK
        pointer = self.memory.pointer(slot.hva, size)
        if size <= _SMALL and slot.hva + size <= block + _BLOCK:
            start = self.memory.standing(block, _BLOCK)
            if start is not None:
                owner = self._blocks[block] = object()
                return self._add_window(owner, _BLOCK, start), slot.hva - block
        return self._add_window(slot.backing_key, size, pointer), 0

    def _in_gmem(self, gfn: int, slot: Slot, private: bool) -> tuple[Window, int, bool]:
        file = slot.backing()
        if file is None:
            raise Refused("fault", gfn * PAGE, private=private)
        window = self.windows.get(id(file))
        if window is None:
            pointer = ctypes.addressof(ctypes.c_char.from_buffer(file.memory()))
            window = self._add_window(file, (file.bytes_ + PAGE - 1) & -PAGE, pointer)
        return window, (slot.gmem_page + gfn - slot.gfn) * PAGE, True

    def _add_window(self, owner: object, size: int, pointer: int) -> Window:
        """Give host memory an engine-physical address, at least a page away from every other window: spans are powers
        of two from 1 GiB on. An address is used again only after its window was dropped, and every engine unmaps
        that one before it maps another. MemoryError when no address is left.
        """
        span = max(_WINDOW_ALIGN, 1 << (size + PAGE - 1).bit_length())
        free = self._free.get(span)
        if free:
            base = free.pop()
        else:
            base = self._next_base
            if base + span > _TOP:
                raise MemoryError
            self._next_base = base + span
        window = self.windows[id(owner)] = Window(base, size, pointer, owner)
        return window

    def slot_gone(self, slot: Slot) -> None:
        """A slot was deleted. Where nobody ever used it there is nothing to forget but what was known of its memory."""
        first = slot.hva // PAGE
        self._readable.remove_range(first, first + slot.pages)
        self._writable.remove_range(first, first + slot.pages)
        if id(slot.backing_key) in self.windows:
            self.drop_window(slot.backing_key)
        else:
            self.flush_range(slot.gfn, slot.pages)

    def _lose_code(self) -> None:
        """Code may be among what goes away: nobody compares it with what was translated from it any more."""
        self.code_generation += 1
        for cache in list(self.code_caches):
            cache.lose_memory()

    def drop_window(self, owner: object) -> None:
        """The owner's memory goes away."""
        window = self.windows.pop(id(owner), None)
        if window is not None:
            self._lose_code()
            self.dropped += 1
            span = max(_WINDOW_ALIGN, 1 << (window.size + PAGE - 1).bit_length())
            self._free.setdefault(span, []).append(window.base)
        self.changed()

    def flush(self) -> None:
        """Every vCPU must drop its translations before it goes on."""
        self.generation += 1
        self.stats.counters[REMOTE_TLB_FLUSH] += 1
        self.flushed = self.generation
        self.voids.clear()
        self.tables.clear()
        self.entered.clear()

    def flush_range(self, gfn: int, pages: int) -> None:
        """As `flush`, for a change that concerns [gfn, gfn+pages) only: nothing to do where nobody knows a page of it, and
        of a few pages the other translations stay. Tables are known by more than their own GFN.
        """
        if not (gfn in self.entered if pages == 1 else self.entered.range_cardinality(gfn, gfn + pages)):
            return
        few = pages <= _FEW_PAGES and len(self.voids) < _MAX_VOIDS
        if not few or any(key[0] in range(gfn, gfn + pages) for key in self.tables):
            self.flush()
            return
        self.generation += 1
        self.voids.append((self.generation, gfn, gfn + pages))
        self.entered.remove_range(gfn, gfn + pages)

    def changed(self) -> None:
        """Slots, attributes or backings changed: translations are void, and what was known of the caller's memory
        too.
        """
        self._readable.clear()
        self._writable.clear()
        self.flush()

    def destroy(self) -> None:
        """Drop everything."""
        self.tables.clear()
        self.windows.clear()
