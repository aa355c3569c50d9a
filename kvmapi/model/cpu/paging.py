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

P, RW, US, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16
PF_VECTOR, GP_VECTOR = 14, 13
CR0_PE, CR0_WP, CR0_PG = 1, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
MODE_CR0, MODE_CR4, MODE_EFER = CR0_PG | CR0_WP, CR4_PSE | CR4_PAE | CR4_SMEP | CR4_SMAP, EFER_LMA | EFER_NXE

Step = tuple[memoryview, int, int]  # one entry that a walk used: its table, its index there, its value


class Fault(Exception):
    """The access raises this exception in the guest. `address` goes to CR2 for #PF."""

    def __init__(self, vector: int, error: int | None, address: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error
        self.address = address


class Mapping(NamedTuple):
    """What a walk found: the page, whether it is seen decrypted, the rights all levels leave (RW, US, NX), whether it
    is dirty, and the entries used.
    """

    gfn: int
    private: bool
    rights: int
    dirty: bool
    steps: tuple[Step, ...]


class Paging:
    """One paging mode with one root: everything that CR0, CR3, CR4 and EFER say about translation."""

    def __init__(self, cr0: int, cr3: int, cr4: int, efer: int, c_mask: int, phys_bits: int) -> None:
        self.on = bool(cr0 & CR0_PG)
        self.write_protect = bool(cr0 & CR0_WP)
        self.smep, self.smap = bool(cr4 & CR4_SMEP), bool(cr4 & CR4_SMAP)
        self.long = bool(efer & EFER_LMA)
        self.wide = self.long or bool(cr4 & CR4_PAE)
        self.no_execute = self.wide and bool(efer & EFER_NXE)
        self.c_mask = c_mask
        self.encrypted = bool(c_mask)
        self.address_mask = (1 << phys_bits) - 1 & -PAGE if self.wide else 0xFFFFF000
        self.reserved = 0
        self.accesses: dict[tuple[int, bool, bool], int] = {}  # what a page's rights allow, see shadow.py
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
            self.root |= cr3 & 0xFE0
        else:
            self.shifts, self.large = (22, 12), (22,) if cr4 & CR4_PSE else ()
        if self.wide and not self.no_execute:
            self.reserved |= NX

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
        if self.long and (va >> 47) not in (0, 0x1FFFF):
            raise Fault(GP_VECTOR, 0)
        cause = self.cause(write, fetch, user)
        table, rights, no_execute = self.root, RW | US, 0
        steps: list[Step] = []
        for shift in self.shifts:
            view = self._table(physical, table, cause, va)
            index = (va >> shift & (0x1FF if self.wide else 0x3FF)) + ((table & 0xFFF) >> 3)
            entry = view[index]
            if not entry & P:
                raise Fault(PF_VECTOR, cause, va)
            if shift == 30 and not self.long:  # PAE's top level has no rights and no accessed bit
                if entry & (self.reserved | NX | 0x1E6):
                    raise Fault(PF_VECTOR, cause | PF_P | PF_RSVD, va)
                steps.append((view, index, entry))
                table = entry & self.address_mask & ~self.c_mask
                continue
            leaf = shift == 12 or (entry & PS and shift in self.large)
            if entry & self.reserved or (shift != 12 and entry & PS and self._bad_large(entry, shift)):
                raise Fault(PF_VECTOR, cause | PF_P | PF_RSVD, va)
            rights &= entry
            no_execute |= entry & NX
            if leaf:
                break
            steps.append((view, index, self._mark(physical, table, view, index, entry, entry | A)))
            table = entry & self.address_mask & ~self.c_mask
        rights = rights & (RW | US) | no_execute
        if not self.allows(rights, write, fetch, user, ac):
            raise Fault(PF_VECTOR, cause | PF_P, va)
        marked = entry | A | (D if write else 0)
        steps.append((view, index, self._mark(physical, table, view, index, entry, marked)))
        # Fetches are always decrypted, whatever the C-bit: code in shared memory would otherwise be the host's to write.
        # In 32-bit paging there is no room for a C-bit, and everything is private.
        private = self.encrypted and (fetch or not self.wide or bool(entry & self.c_mask))
        return Mapping(self._address(entry, shift, va) >> 12, private, rights, bool(marked & D), tuple(steps))

    def _table(self, physical: Physical, table: int, cause: int, va: int) -> memoryview:
        try:
            return physical.words(table >> 12, self.encrypted, self.wide)
        except Refused as why:
            if why.kind == "mmio":  # as KVM: a table that is not in memory has no entries
                raise Fault(PF_VECTOR, cause, va) from None
            raise

    def _mark(self, physical: Physical, table: int, view: memoryview, index: int, entry: int, marked: int) -> int:
        """Set accessed and dirty bits; the entry as it stands now (tables in read-only memory keep what they have)."""
        if marked != entry:
            physical.store_word(table >> 12, self.encrypted, index, marked, self.wide)
            return int(view[index])
        return entry

    def _bad_large(self, entry: int, shift: int) -> bool:
        """Has a large page's entry reserved bits set, or may there be none at this level?"""
        if shift == 22:
            return bool(self.large) and bool(entry & 1 << 21)
        if shift not in self.large:
            return True
        return bool(entry & (1 << shift) - 0x2000 & self.address_mask)

    def _address(self, entry: int, shift: int, va: int) -> int:
        offset = va & (1 << shift) - 1
        if shift == 22:  # bits 20:13 of a 4 MiB page's entry are bits 39:32 of the address
            return (entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32) + offset
        return (entry & self.address_mask & ~self.c_mask & -(1 << shift)) + offset

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
