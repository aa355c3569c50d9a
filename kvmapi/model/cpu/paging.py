"""Guest page tables: the paging modes of an x86 CPU, and the walk that checks and converts each entry.

A guest may write anything into its tables. So nothing in an entry is used before it passed the checks here: present,
no reserved bit, a table that lies in memory. What fails becomes the fault that the processor raises; a table outside
memory reads as not present. Accessed and dirty bits are set as the processor sets them.

Modes: none (addresses are physical), 32-bit (4 KiB and 4 MiB pages), PAE (4 KiB, 2 MiB) and long mode with four levels
(4 KiB, 2 MiB, 1 GiB). PAE's top entries are read at each walk, as AMD processors do under nested paging. Source: AMD64
Architecture Programmer's Manual, volume 2, chapter 5; for encrypted guests section 15.34.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmapi.model.caller import PAGE
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.mem.physical import Physical

P, RW, US, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16
PF_VECTOR, GP_VECTOR = 14, 13
CR0_PE, CR0_WP, CR0_PG = 1, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
MODE_CR0, MODE_CR4, MODE_EFER = CR0_PG | CR0_WP, CR4_PSE | CR4_PAE | CR4_SMEP | CR4_SMAP, EFER_LMA | EFER_NXE

Step = tuple[memoryview, int, int]  # one entry that a walk used: its table, its index there, its value
Region = tuple[tuple[Step, ...], int, int, int, memoryview, int, int]
"""The steps above a page's entry, what they leave of RW and US, NX, the table that has the entry and its words, the shift of its level,
and the index in the table at which that level begins."""
_MAX_REGIONS = 4096


class Fault(Exception):
    """The access raises this exception in the guest. `address` goes to CR2 for #PF."""

    def __init__(self, vector: int, error: int | None, address: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error
        self.address = address


class Mapping(NamedTuple):
    """What a walk found: the page, whether it is seen decrypted, the rights all levels leave (RW, US, NX), whether it
    is dirty, the entries used, and whether this view is for fetches only (code through a mapping without the C-bit).
    """

    gfn: int
    private: bool
    rights: int
    dirty: bool
    steps: tuple[Step, ...]
    code_only: bool = False


class Paging:
    """One paging mode with one root: everything that CR0, CR3, CR4 and EFER say about translation. It keeps views of tables, and is
    not to be used any more after a flush of `Physical`.
    """

    def __init__(self, cr0: int, cr3: int, cr4: int, efer: int, c_mask: int, phys_bits: int) -> None:
        self.on = bool(cr0 & CR0_PG)
        self.write_protect = bool(cr0 & CR0_WP)
        self.smep, self.smap = self.on and bool(cr4 & CR4_SMEP), self.on and bool(cr4 & CR4_SMAP)
        self.long = bool(efer & EFER_LMA)
        self.wide = self.long or bool(cr4 & CR4_PAE)
        self.no_execute = self.wide and bool(efer & EFER_NXE)
        self.c_mask = c_mask
        self.encrypted = bool(c_mask)
        self.address_mask = (1 << phys_bits) - 1 & -PAGE if self.wide else 0xFFFFF000
        self._pointer = self.address_mask & ~c_mask  # of an entry: the table or 4 KiB page that it names
        self._index_mask = 0x1FF if self.wide else 0x3FF
        self.reserved = 0
        self.accesses: dict[tuple[int, bool, bool, bool], int] = {}  # what a page's rights allow, see shadow.py
        self._regions: dict[int, Region] = {}
        self._region_shift = 21 if self.wide else 22
        self._checked = P  # of an entry: with P alone of these bits it may be used
        self.shifts: tuple[int, ...] = ()
        self.large: tuple[int, ...] = ()
        self.root = cr3 & self.address_mask & ~c_mask
        if not self.on:
            return
        if self.long:
            self.shifts, self.large = (39, 30, 21, 12), (30, 21)
            self.reserved = (1 << 52) - (1 << phys_bits) & ~c_mask
        elif self.wide:
            self.shifts, self.large = (30, 21, 12), (21,)
            self.reserved = (1 << 63) - (1 << phys_bits) & ~c_mask
            self.root = cr3 & 0xFFFFFFE0
        else:
            self.shifts, self.large = (22, 12), (22,) if cr4 & CR4_PSE else ()
        if self.wide and not self.no_execute:
            self.reserved |= NX
        self._checked = P | self.reserved

    def cause(self, write: bool, fetch: bool, user: bool) -> int:
        """The #PF error code's bits that tell what was tried."""
        return (PF_W if write else 0) | (PF_U if user else 0) | (PF_I if fetch and (self.no_execute or self.smep) else 0)

    # ---- the walk
    def walk(self, physical: Physical, va: int, write: bool, fetch: bool, user: bool, ac: bool) -> Mapping:
        """Translate the page at `va` for one access. `ac`: RFLAGS.AC, which lifts SMAP. Raises Fault, or Refused for a
        table in memory that may not be used.
        """
        if not self.on:
            return Mapping(va >> 12 & 0xFFFFF, self.encrypted, RW | US, True, ())
        if not self.long:
            va &= 0xFFFFFFFF
        elif va >> 47 and va >> 47 != 0x1FFFF:
            raise Fault(GP_VECTOR, 0)
        region = self._regions.get(va >> self._region_shift)
        if region is not None:
            for above, at, value in region[0]:
                if above[at] != value:
                    region = None  # the upper levels are no longer what they were
                    break
        if region is None:
            region = self._upper(physical, va, write, fetch, user)
        steps, rights, no_execute, table, view, shift, first = region
        index = (va >> shift & self._index_mask) + first
        entry = view[index]
        if entry & self._checked != P or (shift != 12 and self._bad_large(entry, shift)):
            raise Fault(PF_VECTOR, self.cause(write, fetch, user) | (PF_P | PF_RSVD if entry & P else 0), va)
        rights = rights & entry & (RW | US) | no_execute | entry & NX
        if (fetch or user or rights != RW) and not self.allows(rights, write, fetch, user, ac):  # else ring 0's own data
            raise Fault(PF_VECTOR, self.cause(write, fetch, user) | PF_P, va)
        marked = entry | (A | D if write else A)
        if marked != entry:
            entry = self._mark(physical, table, view, index, entry, marked)
        page = (entry & self._pointer if shift == 12 else self._address(entry, shift, va)) >> 12
        steps += ((view, index, entry),)
        if not self.encrypted:
            return Mapping(page, False, rights, marked & D != 0, steps)
        # Fetches are always decrypted, whatever the C-bit: code in shared memory would otherwise be the host's to
        # write.
        # In 32-bit paging there is no room for a C-bit, and everything is private.
        data_private = not self.wide or entry & self.c_mask != 0
        return Mapping(page, fetch or data_private, rights, marked & D != 0, steps, fetch and not data_private)

    def _upper(self, physical: Physical, va: int, write: bool, fetch: bool, user: bool) -> Region:
        """The way to the entry of the page at `va`, without that entry: to the last table, or to where a large page's entry stands
        (that is not kept). The entries on the way are checked and marked as accessed.
        """
        table, rights, no_execute, first = self.root, RW | US, 0, (self.root & 0xFFF) >> 3
        steps: list[Step] = []
        for shift in self.shifts[:-1]:
            view = self._table(physical, table, self.cause(write, fetch, user), va)
            index = (va >> shift & self._index_mask) + first
            entry = view[index]
            if not entry & P:
                raise Fault(PF_VECTOR, self.cause(write, fetch, user), va)
            if shift == 30 and not self.long:  # PAE's top level has no rights and no accessed bit
                if entry & (self.reserved | NX | 0x1E6):
                    raise Fault(PF_VECTOR, self.cause(write, fetch, user) | PF_P | PF_RSVD, va)
            elif entry & self.reserved or (entry & G and shift == 39):  # what would be G is reserved at the top (AMD)
                raise Fault(PF_VECTOR, self.cause(write, fetch, user) | PF_P | PF_RSVD, va)
            elif entry & PS and (shift != 22 or self.large):
                return tuple(steps), rights, no_execute, table, view, shift, first
            else:
                rights &= entry
                no_execute |= entry & NX
                if not entry & A:
                    entry = self._mark(physical, table, view, index, entry, entry | A)
            steps.append((view, index, entry))
            table, first = entry & self._pointer, 0
        view = self._table(physical, table, self.cause(write, fetch, user), va)
        region = tuple(steps), rights, no_execute, table, view, 12, 0
        if len(self._regions) >= _MAX_REGIONS:
            self._regions.clear()
        self._regions[va >> self._region_shift] = region  # the way for its other pages
        return region

    def _table(self, physical: Physical, table: int, cause: int, va: int) -> memoryview:
        """A table's words. Raises Fault or Refused."""
        try:
            return physical.words(table >> 12, self.encrypted, self.wide)
        except Refused as why:
            if why.kind == "mmio":  # as KVM: a table that is not in memory has no entries
                raise Fault(PF_VECTOR, cause, va) from None
            raise

    def _mark(self, physical: Physical, table: int, view: memoryview, index: int, entry: int, marked: int) -> int:
        """Set accessed and dirty bits; the entry as it stands now (tables in read-only memory keep what they have)."""
        physical.store_word(table >> 12, self.encrypted, index, marked, self.wide)
        return int(view[index])

    def _bad_large(self, entry: int, shift: int) -> bool:
        """Has a large page's entry reserved bits set, or may there be none at this level?"""
        if shift == 22:
            return bool(entry & 1 << 21)
        if shift not in self.large:
            return True
        return bool(entry & (1 << shift) - 0x2000 & self.address_mask)

    def _address(self, entry: int, shift: int, va: int) -> int:
        offset = va & (1 << shift) - 1
        if shift == 22:  # bits 20:13 of a 4 MiB page's entry are bits 39:32 of the address
            return (entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32) + offset
        return (entry & self._pointer & -(1 << shift)) + offset

    def allows(self, rights: int, write: bool, fetch: bool, user: bool, ac: bool) -> bool:
        """May an access with these `rights` (RW, US, NX) be made?"""
        if fetch and rights & NX:
            return False
        if user:
            return bool(rights & US) and (not write or bool(rights & RW))
        if write and not rights & RW and self.write_protect:
            return False
        if rights & US:
            return not self.smep if fetch else not self.smap or ac
        return True
