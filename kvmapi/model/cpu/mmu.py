"""The model's MMU: the engine's TLB is a shadow of the guest's tables, filled here.

On a miss the engine asks `fill` for one page. The guest's own tables are walked entry by entry, each entry is
*checked and converted* (present, reserved bits, permissions, C-bit), accessed and dirty bits are set as the CPU sets
them, and the backing that this access may use is looked up. A refusal leaves the instruction unexecuted and the
reason in `fault`; nothing the guest wrote into an entry can do more than that.

Writable and executable never meet in one entry: a page fetched is entered without W and scanned (scan.py), a page
stored to is entered without X, so that code written later is scanned before it runs.
Tables of an encrypted guest are read decrypted whatever their entries' C-bits say, as the hardware reads them.
Implemented: no paging, and 4-level long-mode paging with 4 KiB, 2 MiB and 1 GiB pages, NX, U/S, WP, SMEP and SMAP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.native import TlbEntry

if TYPE_CHECKING:
    from kvmapi.model.cpu.layout import Layout
    from kvmapi.model.cpu.native import Native
    from kvmapi.model.mem.physical import Physical

P, RW, US, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_SMEP, CR4_SMAP = 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
RFLAGS_AC = 1 << 18
PF_VECTOR, GP_VECTOR = 14, 13
SCRATCH_AT = 0x10000  # engine-physical; the windows of guest memory begin at 1 GiB


class Fault(Exception):
    """The access raises this exception in the guest. `address` goes to CR2 for #PF."""

    def __init__(self, vector: int, error: int | None, address: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error
        self.address = address


class UnsupportedMode(Exception):
    """The guest switched to a paging mode that the model lacks."""


class Mmu:
    """Address translation of one vCPU. Uses the engine's registers for CR0, CR3, CR4, EFER, CPL and AC."""

    def __init__(self, native: Native, where: Layout, physical: Physical, on_fetch: Callable[[int, int, int], None]) -> None:
        self._native = native
        self._u32 = native.state[: len(native.state) & -4].cast("I")
        self._u64 = native.state[: len(native.state) & -8].cast("Q")
        self._cr0, self._cr3, self._cr4 = (layout.CR + 8 * n >> 3 for n in (0, 3, 4))
        self._efer = where.efer >> 3
        self.physical = physical
        self._on_fetch = on_fetch
        self.fetching = False  # what the access was for that `fault` tells of
        self.c_mask = 0  # 1 << C-bit in an encrypted guest
        self.max_phys_bits = 48
        self.fault: Exception | None = None
        self.generation = -1  # of `physical`, at the last flush
        self.scratch_gpa = -1  # the page that a scratch page stands for while an MMIO instruction is tried

    # ---- the engine's side
    def fill(self, _uc: int, va: int, kind: int, entry: int, _data: int) -> bool:
        """UC_HOOK_TLB_FILL. Never raises: what went wrong is left in `fault`."""
        try:
            self.fetching = kind == uc.UC_MEM_FETCH
            write, fetch = kind == uc.UC_MEM_WRITE, kind == uc.UC_MEM_FETCH
            user = self._u32[layout.HFLAGS >> 2] & 3 == 3
            gfn, encrypted, writable = self.translate(va, write, fetch, user)
            physical = self.physical
            slot = TlbEntry.from_address(entry)
            if gfn << 12 == self.scratch_gpa:
                slot.paddr, slot.perms = SCRATCH_AT, uc.UC_PROT_READ | uc.UC_PROT_WRITE
                return True
            window, offset, storable = physical.locate(gfn, encrypted, write)
            physical.entered.add(gfn)
            if physical.generation != self.generation:
                self._native.flush_tlb()  # an alias of this page was given up: nothing older may survive
                self.generation = physical.generation
            slot.paddr = self.engine_address(window, offset)
            if fetch:
                self._on_fetch(va, gfn, window.pointer + offset)
                slot.perms = uc.UC_PROT_READ | uc.UC_PROT_EXEC
            else:
                slot.perms = uc.UC_PROT_READ | uc.UC_PROT_WRITE if write and writable and storable else uc.UC_PROT_READ
        except Exception as why:  # nothing may be raised through the engine's C frames: the run loop sorts it out
            self.fault = why
            return False
        return True

    engine_address: Callable[..., int]  # (window, offset) -> engine-physical address; set by the CPU

    # ---- translation
    def translate(self, va: int, write: bool, fetch: bool, user: bool) -> tuple[int, bool, bool]:
        """(GFN, encrypted, a store would be allowed too) of the page at `va`. Raises Fault or UnsupportedMode."""
        cr0 = self._u64[self._cr0]
        if not cr0 & CR0_PG:
            return va >> 12 & 0xFFFFF, bool(self.c_mask), True
        efer = self._u64[self._efer]
        if not efer & EFER_LMA:
            raise UnsupportedMode("32-bit paging")
        if (va >> 47) not in (0, 0x1FFFF):
            raise Fault(GP_VECTOR, 0)
        return self._walk(va, write, fetch, user, cr0, efer)

    def _walk(self, va: int, write: bool, fetch: bool, user: bool, cr0: int, efer: int) -> tuple[int, bool, bool]:
        c_mask = self.c_mask
        encrypted = bool(c_mask)
        address_mask = ((1 << self.max_phys_bits) - 1) & -PAGE
        reserved = ((1 << 52) - (1 << self.max_phys_bits)) & ~c_mask
        if not efer & EFER_NXE:
            reserved |= NX
        cause = (PF_W if write else 0) | (PF_U if user else 0) | (PF_I if fetch and efer & EFER_NXE else 0)
        words = self.physical.words
        table = self._u64[self._cr3] & address_mask & ~c_mask
        allowed, no_execute = RW | US, 0
        shift = 39
        while True:
            view = words(table >> 12, encrypted)
            index = va >> shift & 0x1FF
            entry = view[index]
            if not entry & P:
                raise Fault(PF_VECTOR, cause, va)
            leaf = shift == 12 or bool(entry & PS)
            if entry & reserved or (leaf and shift > 12 and (shift == 39 or entry & ((1 << shift) - 0x2000) & address_mask)):
                raise Fault(PF_VECTOR, cause | PF_P | PF_RSVD, va)
            allowed &= entry
            no_execute |= entry & NX
            if leaf:
                break
            if not entry & A:
                self.physical.store_word(table >> 12, encrypted, index, entry | A)
            table = entry & address_mask & ~c_mask
            shift -= 9
        self._check(va, write, fetch, user, cr0, allowed, no_execute, cause)
        marked = entry | A | (D if write else 0)
        if marked != entry:
            self.physical.store_word(table >> 12, encrypted, index, marked)
        offset = va & ((1 << shift) - 1)
        gpa = (entry & address_mask & ~c_mask & -(1 << shift)) + offset
        # Fetches are always decrypted, whatever the C-bit: code in shared memory would otherwise be the host's to
        # write.
        private = encrypted and (fetch or bool(entry & c_mask))
        return gpa >> 12, private, bool(marked & D)

    def _check(self, va: int, write: bool, fetch: bool, user: bool, cr0: int, allowed: int, no_execute: int, cause: int) -> None:
        if user:
            bad = not allowed & US or (write and not allowed & RW)
        else:
            bad = write and not allowed & RW and bool(cr0 & CR0_WP)
            if allowed & US and not bad:
                cr4 = self._u64[self._cr4]
                if fetch:
                    bad = bool(cr4 & CR4_SMEP)
                elif cr4 & CR4_SMAP:
                    bad = not self._u64[layout.EFLAGS >> 3] & RFLAGS_AC
        if bad or (fetch and no_execute):
            raise Fault(PF_VECTOR, cause | PF_P, va)

    # ---- access on the guest's behalf (exception frames, string I/O, KVM_TRANSLATE)
    def read(self, va: int, size: int, user: bool = False) -> bytes:
        """Guest-virtual bytes. Raises Fault, Refused or UnsupportedMode."""
        out = b""
        while size:
            view, at, part = self._piece(va, size, False, user)
            out += bytes(view[at : at + part])
            va, size = va + part & 0xFFFFFFFFFFFFFFFF, size - part
        return out

    def write(self, va: int, data: bytes, user: bool = False) -> None:
        """Store guest-virtual bytes. Raises as `read` does; an earlier page may have been stored."""
        while data:
            view, at, part = self._piece(va, len(data), True, user)
            view[at : at + part] = data[:part]
            va, data = va + part & 0xFFFFFFFFFFFFFFFF, data[part:]

    def _piece(self, va: int, size: int, write: bool, user: bool) -> tuple[memoryview, int, int]:
        at = va & (PAGE - 1)
        try:
            gfn, encrypted, _ = self.translate(va & -PAGE, write, False, user)
        except Fault as fault:
            if fault.vector == PF_VECTOR:
                fault.address = va
            raise
        return self.physical.page(gfn, encrypted, write), at, min(size, PAGE - at)
