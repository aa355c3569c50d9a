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
from kvmapi.model.cpu.shadow import Shadow, Shadows
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.code import CodeCache
    from kvmapi.model.cpu.layout import Layout
    from kvmapi.model.cpu.native import Native
    from kvmapi.model.mem.physical import Physical, Window

__all__ = ["GP_VECTOR", "PF_VECTOR", "SCRATCH_AT", "EngineMemory", "Fault", "Mmu"]

SCRATCH_AT = 0x10000  # engine-physical; the windows of guest memory begin at 1 GiB
_READ_WRITE, _READ_EXECUTE = uc.UC_PROT_READ | uc.UC_PROT_WRITE, uc.UC_PROT_READ | uc.UC_PROT_EXEC
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
        self._mapped: dict[int, Window] = {}
        self._dropped = physical.dropped
        native.map(SCRATCH_AT, PAGE, scratch)

    def address(self, window: Window, offset: int) -> int:
        """The engine's physical address of a window's byte `offset`; the window is mapped if it was not."""
        if id(window) not in self._mapped:
            self._native.map(window.base, window.size, window.pointer)
            self._mapped[id(window)] = window
        return window.base + offset

    def drop_dead(self) -> None:
        """Windows whose memory went away leave the engine: their addresses may be given to others."""
        if self._physical.dropped == self._dropped:
            return
        self._dropped = self._physical.dropped
        for key, window in list(self._mapped.items()):
            if self._physical.windows.get(id(window.owner)) is not window:
                self._native.unmap(window.base, window.size)
                del self._mapped[key]


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
        self._refused: tuple[tuple[int, int, bool, bool], Shadow, Mapping] | None = None  # the conversion that a backing refused last
        self._stores: set[int] = set()  # pages, as our process sees them, that some TLB entry may let the guest store to unseen
        self._slots: dict[int, TlbEntry] = {}  # views of where the engine wants the answer
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
            u64, key = self._u64, self._shadow.key
            if u64[_CR3] != key[1] or u64[_CR0] != key[0] or u64[_CR4] != key[2] or u64[self._efer] != key[3]:
                self._switch()
            access = kind & 3 | (4 if self._u32[_HFLAGS] & 3 == 3 else 0) | u64[_EFLAGS] >> _AC_SHIFT & 8
            page = self._shadow.pages.get(va)
            if page is not None:
                t1, i1, w1, t2, i2, w2, t3, i3, w3, t4, i4, w4, address, allowed, gfn, pointer = page
                if allowed >> access & 1 and t4[i4] == w4 and t3[i3] == w3 and t2[i2] == w2 and t1[i1] == w1:
                    slot.paddr = address
                    if kind != uc.UC_MEM_FETCH:
                        slot.perms = _READ_WRITE if allowed >> (access & ~3 | 1) & 1 else uc.UC_PROT_READ
                        if slot.perms == _READ_WRITE:
                            self._stored(pointer)
                    else:
                        slot.perms = _READ_EXECUTE if allowed >> (access & ~3) & 1 else uc.UC_PROT_EXEC
                        self._fetched(va, gfn, pointer, address)
                    if self.physical.generation == self.generation:
                        return True
            for _ in range(_ATTEMPTS):
                self._convert(va, kind, bool(access & 4), bool(access & 8), slot)
                if self.physical.generation == self.generation:
                    break
                self._drop_all()
        except Exception as why:  # nothing may be raised through the engine's C frames: the run loop sorts it out
            if self.fault is None:
                self.fetching, self.refused_page = kind == uc.UC_MEM_FETCH, va
                self.fault = why
            elif self._kept is None or self._kept[0] is not self.fault:
                # After a run the engine looks for code at exits: what that meets is nothing, but the engine remembers it instead.
                self._kept = self.fault, self._native.fault_address(self._invalid_addr)
            return False
        return True

    def fault_address(self) -> int:
        """The address of the access that was refused with `fault`."""
        if self._kept is not None and self._kept[0] is self.fault:
            return self._kept[1]
        return self._native.fault_address(self._invalid_addr)

    def _slot(self, address: int) -> TlbEntry:
        """The engine's answer slot. It stands on the C stack, at one of a few addresses."""
        if len(self._slots) >= _MAX_SLOTS:
            self._slots.clear()
        slot = self._slots[address] = TlbEntry.from_address(address)
        return slot

    # ---- 2. and 3. conversion, and what is kept of it
    def _convert(self, va: int, kind: int, user: bool, ac: bool, slot: TlbEntry) -> None:
        write, fetch = kind == uc.UC_MEM_WRITE, kind == uc.UC_MEM_FETCH
        physical, shadow = self.physical, self._shadow
        before = physical.generation
        # What a backing refused is asked for again when it was converted: its walk need not be repeated.
        what, refused = (va, kind, user, ac), self._refused
        mapping = None
        if refused is not None:
            self._refused = None
            if refused[0] == what and refused[1] is shadow:
                mapping = refused[2]
                for view, at, word in mapping.steps:
                    if view[at] != word:
                        mapping = None
                        break
        if mapping is None:
            mapping = shadow.paging.walk(physical, va, write, fetch, user, ac)
        try:
            window, offset, storable = physical.locate(mapping.gfn, mapping.private, write)
        except Refused:
            self._refused = what, shadow, mapping
            raise
        physical.entered.add(mapping.gfn)
        if physical.generation != self.generation:
            self._drop_all()
        slot.paddr = address = self._memory.address(window, offset)
        pointer = window.pointer + offset
        if fetch:
            # Code may be where loads are refused (SMAP) or see something else (the C-bit clear).
            readable = not mapping.code_only and shadow.paging.allows(mapping.rights, False, False, user, ac)
            slot.perms = _READ_EXECUTE if readable else uc.UC_PROT_EXEC
            self._fetched(va, mapping.gfn, pointer, address)
        elif storable and mapping.dirty and shadow.paging.allows(mapping.rights, True, False, user, ac):
            slot.perms = _READ_WRITE
            self._stored(pointer)
        else:
            slot.perms = uc.UC_PROT_READ
        if physical.generation == before:
            self._shadows.remember(self._shadow, va, mapping, storable, address, pointer)
            if not fetch:
                self._extents.seen(va, mapping, shadow.paging, physical, self._code)

    # Writable and executable entries never stand in the TLB for one page, whatever addresses it has.
    def _stored(self, pointer: int) -> None:
        """A writable entry is about to be made."""
        if pointer in self._code.pointers:
            self._native.flush_tlb()
            self._code.stored(pointer)
        self._stores.add(pointer)

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
