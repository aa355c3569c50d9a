"""The model's MMU: a shadow of the guest's page tables, in seven parts.

1. *Look-up on fault.* The engine's TLB asks `fill` for a page that it lacks. What the shadow of the current address
   space remembers is checked and given; otherwise the guest's tables are walked. A refusal leaves the instruction
   unexecuted and the reason in `fault`.
2. *Checked conversion* of each entry is paging.py: nothing the guest wrote into its tables can do more than raise the
   fault that the architecture has for it.
3. *Setting and flushing.* What was converted is remembered with the entries it came from and their values
   (shadow.py). Nobody has to say that a table changed: a remembered page whose entries differ is converted again.
4. *Switching tables.* A MOV to CR3, or a change of mode, empties the engine's TLB and nothing else: each root has a
   shadow of its own, and several are kept warm.
5. *Throwing away.* When backings change (slots, attributes, guest_memfds, encrypted frames), `Physical.generation`
   moves on, and before the guest continues its TLB is empty, and so are all shadows, or of a few pages only those pages
   are gone (`catch_up`).
6. *What must always be mapped* is nothing of the guest's: the engine keeps its code outside the guest's addresses. Ours
   are the windows of host memory, each at an engine-physical address of its own, and one scratch page for instructions
   that touch MMIO (`EngineMemory`).
7. *The initial state without tables.* With paging off, an address space has no entries to check: the same path, with
   addresses that are physical.

A page fetched is entered without W and scanned (scan.py), a page stored to is entered without X, so that code written
later is scanned before it runs; that holds for a page under all its addresses. Tables of an encrypted guest are
read decrypted whatever their entries' C-bits say, as the hardware reads them. A secure page is reached only by an
access whose C-bit or attribute says private: `Physical.locate` has the one rule for each kind of VM.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.extents import Extents
from kvmapi.model.cpu.native import TlbEntry, TlbFill
from kvmapi.model.cpu.paging import GP_VECTOR, PF_VECTOR, Fault, Mapping, Paging
from kvmapi.model.cpu.shadow import Shadow, Shadows, accesses
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.code import CodeCache
    from kvmapi.model.cpu.layout import Layout
    from kvmapi.model.cpu.native import Native
    from kvmapi.model.mem.physical import Physical, Window

__all__ = ["GP_VECTOR", "PF_VECTOR", "SCRATCH_AT", "EngineMemory", "Fault", "Mmu"]

SCRATCH_AT = 0x10000  # engine-physical; the windows of guest memory begin at 1 GiB
_READ, _EXECUTE = uc.UC_PROT_READ, uc.UC_PROT_EXEC
_READ_WRITE, _READ_EXECUTE = uc.UC_PROT_READ | uc.UC_PROT_WRITE, uc.UC_PROT_READ | uc.UC_PROT_EXEC
_WRITE, _FETCH = uc.UC_MEM_WRITE, uc.UC_MEM_FETCH
_MAX_STORES = 1 << 16
_AC_SHIFT = 18 - 3  # RFLAGS.AC to shadow.AC
_AC = 1 << 18
_HFLAGS, _EFLAGS = layout.HFLAGS >> 2, layout.EFLAGS >> 3
_CR0, _CR3, _CR4 = (layout.CR + 8 * n >> 3 for n in (0, 3, 4))
_MAX_SLOTS = 64
_ATTEMPTS = 4  # a page that is scanned may take another one's frame, or even its own: then look again


class EngineMemory:
    """Which windows of host memory one engine has mapped, and the scratch page."""

    def __init__(self, native: Native, physical: Physical, scratch: int) -> None:
        self._native = native
        self._physical = physical
        self.mapped: set[Window] = set()
        self._dropped = physical.dropped
        native.map(SCRATCH_AT, PAGE, scratch)

    def address(self, window: Window, offset: int) -> int:
        """The engine's physical address of a window's byte `offset`; the window is mapped if it was not."""
        if window not in self.mapped:
            self._native.map(window.base, window.size, window.pointer)
            self.mapped.add(window)
        return window.base + offset

    def drop_dead(self) -> None:
        """Windows whose memory went away leave the engine: their addresses may be given to others."""
        if self._physical.dropped == self._dropped:
            return
        self._dropped = self._physical.dropped
        for window in list(self.mapped):
            if self._physical.windows.get(id(window.owner)) is not window:
                self._native.unmap(window.base, window.size)
                self.mapped.discard(window)


class Mmu:
    """Address translation of one vCPU. CR0, CR3, CR4, EFER, CPL and AC are read where the engine keeps them."""

    def __init__(
        self,
        native: Native,
        where: Layout,
        physical: Physical,
        scratch: int,
        code: CodeCache,
        on_fetch: Callable[[int, int, int, int], None],
    ) -> None:
        self._native = native
        self._code = code
        self._memory = EngineMemory(native, physical, scratch)
        self._u32 = native.state[: len(native.state) & -4].cast("I")
        self._u64 = native.state[: len(native.state) & -8].cast("Q")
        self._efer, self._invalid_addr = where.efer >> 3, where.invalid_addr
        self.physical = physical
        self._on_fetch = on_fetch
        self.fetching = False  # what the access was for that `fault` tells of
        self.refused_page = 0  # and of which guest-virtual page
        self.c_mask = 0  # 1 << C-bit in an encrypted guest
        self.max_phys_bits = 48
        self.fault: Exception | None = None
        self._kept: tuple[Exception, int] | None = None  # a fault and its address, which the engine has forgotten since
        self.generation = -1  # of `physical`, at the last flush
        self._shadows = Shadows()
        self._shadow = self._shadows.switch(0, 0, 0, 0, 0, self.max_phys_bits)
        self._refused: tuple[int, int, Shadow, Mapping] | None = None  # the conversion that a backing refused last, and its access
        self._stores: set[int] = set()  # pages, as our process sees them, that some TLB entry may let the guest store to unseen
        self._slots: dict[int, memoryview] = {}  # views of where the engine wants the answer
        self._callback = TlbFill(self.fill)
        self._extents = Extents(native.state, where.efer, ctypes.cast(self._callback, ctypes.c_void_p).value or 0)
        native.hook_tlb_fill(self._extents.function(), self._extents.block)

    # ---- 1. look-up on fault
    def fill(self, _uc: int, va: int, kind: int, entry: int, _data: int) -> bool:
        """UC_HOOK_TLB_FILL. Never raises: what went wrong is left in `fault`."""
        try:
            slot = self._slots.get(entry)
            if slot is None:
                slot = self._slot(entry)
            u64, key, physical = self._u64, self._shadow.key, self.physical
            if u64[_CR3] != key[1] or u64[_CR0] != key[0] or u64[_CR4] != key[2] or u64[self._efer] != key[3]:
                self._switch()
            access = kind & 3 | (4 if self._u32[_HFLAGS] & 3 == 3 else 0) | u64[_EFLAGS] >> _AC_SHIFT & 8
            page = self._shadow.pages.get(va)
            attempts = _ATTEMPTS
            while True:
                if page is not None:
                    t1, i1, w1, t2, i2, w2, t3, i3, w3, t4, i4, w4, address, allowed, gfn, pointer = page
                    if not allowed >> access & 1 or t4[i4] != w4 or t3[i3] != w3 or t2[i2] != w2 or t1[i1] != w1:
                        page = None
                if page is None:
                    address, allowed, gfn, pointer = self._convert(va, kind, access)
                slot[0] = address
                if kind == _FETCH:
                    # Code may be where loads are refused (SMAP) or see something else (the C-bit clear).
                    slot[1] = _READ_EXECUTE if allowed >> (access & ~3) & 1 else _EXECUTE
                    self._fetched(va, gfn, pointer, address)
                elif allowed >> (access & ~3 | 1) & 1:
                    slot[1] = _READ_WRITE
                    if pointer in self._code.pointers:
                        self._stored_to_code(pointer)
                    self._stores.add(pointer)
                else:
                    slot[1] = _READ
                if physical.generation == self.generation:
                    return True
                self._drop_all()
                if not attempts:
                    return True
                page, attempts = None, attempts - 1
        except Exception as why:  # nothing may be raised through the engine's C frames: the run loop sorts it out
            if self.fault is None:
                self.fetching, self.refused_page = kind == _FETCH, va
                self.fault = why
            elif self._kept is None or self._kept[0] is not self.fault:
                # After a run the engine looks for code at exits: what that meets is nothing, but the engine remembers it instead.
                self._kept = self.fault, self._native.fault_address(self._invalid_addr)
            return False

    def fault_address(self) -> int:
        """The address of the access that was refused with `fault`."""
        if self._kept is not None and self._kept[0] is self.fault:
            return self._kept[1]
        return self._native.fault_address(self._invalid_addr)

    def _slot(self, address: int) -> memoryview:
        """The engine's answer slot, a TlbEntry, as two words. It stands on the C stack, at one of a few addresses."""
        if len(self._slots) >= _MAX_SLOTS:
            self._slots.clear()
        slot = self._slots[address] = memoryview(TlbEntry.from_address(address)).cast("B").cast("Q")
        return slot

    # ---- 2. and 3. conversion, and what is kept of it
    def _convert(self, va: int, kind: int, access: int) -> tuple[int, int, int, int]:
        """Look the page up in the guest's tables: the engine's address of its backing, the accesses that are allowed from now on (as
        in shadow.py), GFN and host address. Raises Fault, Refused and what else a backing says.
        """
        physical, shadow, write = self.physical, self._shadow, kind == _WRITE
        before, paging = physical.generation, shadow.paging
        refused = self._refused
        mapping = None if refused is None else self._refused_before(refused, va, access)
        if mapping is None:
            mapping = paging.walk(physical, va, write, kind == _FETCH, access & 4 != 0, access & 8 != 0)
        gfn = mapping.gfn
        try:
            window, offset, storable = physical.locate(gfn, mapping.private, write)
        except Refused:
            self._refused = va, access, shadow, mapping
            raise
        physical.entered.add(gfn)
        if physical.generation != self.generation:
            self._drop_all()
        memory = self._memory
        address = window.base + offset if window in memory.mapped else memory.address(window, offset)
        pointer, allowed = window.pointer + offset, accesses(paging, mapping, storable)
        if physical.generation == before:
            self._shadows.remember(self._shadow, va, mapping, allowed, address, pointer)
            if kind != _FETCH and physical.has_stretches:
                self._extents.seen(va, mapping, paging, physical, self._code)
        return address, allowed, gfn, pointer

    def _refused_before(self, refused: tuple[int, int, Shadow, Mapping], va: int, access: int) -> Mapping | None:
        """What a backing refused is asked for again when it was converted: then its walk need not be repeated."""
        where, what, shadow, mapping = refused
        self._refused = None
        if where != va or what != access or shadow is not self._shadow:
            return None
        for view, at, word in mapping.steps:
            if view[at] != word:
                return None
        return mapping

    # Writable and executable entries never stand in the TLB for one page, whatever addresses it has.
    def _stored_to_code(self, pointer: int) -> None:
        """A writable entry of a page of code is about to be made."""
        self._native.flush_tlb()
        self._code.stored(pointer)

    def _fetched(self, va: int, gfn: int, pointer: int, address: int) -> None:
        """An executable entry is about to be made."""
        if pointer in self._stores or len(self._stores) > _MAX_STORES or self._extents.holds(pointer):
            self._native.flush_tlb()
            self._stores.clear()
            self._extents.clear()
        self._on_fetch(va, gfn, pointer, address)

    def _drop_all(self) -> None:
        """From inside the engine: an alias of some page was given up, and nothing older may survive."""
        self._native.flush_tlb()
        self.generation = self.physical.generation
        self._shadows.clear()
        self._switch()

    # ---- 4. switching tables
    def _switch(self) -> None:
        u64 = self._u64
        self._shadow = self._shadows.switch(u64[_CR0], u64[_CR3], u64[_CR4], u64[self._efer], self.c_mask, self.max_phys_bits)
        self._extents.switch(u64[_CR0], u64[_CR3], u64[_CR4], u64[self._efer])

    # ---- 5. throwing away
    def catch_up(self) -> bool:
        """Did backings change since the last look? Then the shadows no longer have them, and the TLB must be flushed."""
        if self.physical.generation == self.generation:
            return False
        physical = self.physical
        self._extents.clear()
        if self.generation >= physical.flushed:
            for generation, first, end in physical.voids:
                if generation > self.generation:
                    self._shadows.forget(first, end)
        else:
            self._memory.drop_dead()
            self._shadows.clear()
            self._switch()
        self.generation = physical.generation
        return True

    def reset(self) -> None:
        """CPUID or the guest's encryption changed: shadows made before do not count."""
        self.generation = -1

    # ---- for the model's own accesses (exception frames, string I/O, KVM_TRANSLATE)
    def paging(self) -> Paging:
        """The current mode and root."""
        if self.generation < self.physical.flushed:  # what was kept shows memory that may be gone
            self._shadows.clear()
            self._switch()
        key, u64 = self._shadow.key, self._u64
        if u64[_CR3] != key[1] or u64[_CR0] != key[0] or u64[_CR4] != key[2] or u64[self._efer] != key[3] or self.c_mask != key[4]:
            self._switch()
        return self._shadow.paging

    def translate(self, va: int, write: bool, fetch: bool, user: bool) -> tuple[int, bool, bool]:
        """(GFN, decrypted view, a store would be allowed too) of the page at `va`. Raises Fault or Refused."""
        mapping = self.paging().walk(self.physical, va, write, fetch, user, bool(self._u64[_EFLAGS] & _AC))
        return mapping.gfn, mapping.private, mapping.dirty

    def read(self, va: int, size: int, user: bool = False) -> bytes:
        """Guest-virtual bytes. Raises Fault or Refused."""
        out = b""
        while size:
            view, at, part = self._piece(va, size, False, user)
            out += bytes(view[at : at + part])
            va, size = va + part & 0xFFFFFFFFFFFFFFFF, size - part
        return out

    def read_code(self, va: int, size: int) -> bytes:
        """Guest-virtual bytes as the current code would fetch them. Raises Fault or Refused."""
        user, out = self._u32[_HFLAGS] & 3 == 3, b""
        while size:
            view, at, part = self._piece(va, size, False, user, fetch=True)
            out += bytes(view[at : at + part])
            va, size = va + part & 0xFFFFFFFFFFFFFFFF, size - part
        return out

    def write(self, va: int, data: bytes, user: bool = False) -> None:
        """Store guest-virtual bytes. Raises as `read` does; an earlier page may have been stored."""
        while data:
            view, at, part = self._piece(va, len(data), True, user)
            view[at : at + part] = data[:part]
            va, data = va + part & 0xFFFFFFFFFFFFFFFF, data[part:]

    def _piece(self, va: int, size: int, write: bool, user: bool, fetch: bool = False) -> tuple[memoryview, int, int]:
        at = va & (PAGE - 1)
        try:
            gfn, encrypted, _ = self.translate(va & -PAGE, write, fetch, user)
        except Fault as fault:
            if fault.vector == PF_VECTOR:
                fault.address = va
            raise
        try:
            return self.physical.page(gfn, encrypted, write), at, min(size, PAGE - at)
        except Refused as why:
            if why.kind == "mmio":
                why.gpa = why.gpa & -PAGE | at  # a device's register, not its page
            raise
