"""A second page table walker, written from the manual, for test_paging.py: `expect`.

AMD64 Architecture Programmer's Manual, volume 2, sections 5.2 to 5.6 and 8.4.2. It has nothing in common with
kvmapi/model/cpu/paging.py: it works on a copy of the memory (`Memory`), and from the names of the levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PHYS_BITS = 48
KINDS = ("read", "write", "fetch")


class Page(NamedTuple):
    """The access is made, to this page frame; `private`: through the C-bit, in an encrypted guest."""

    gfn: int
    private: bool


class Raised(NamedTuple):
    """The access raises this exception."""

    vector: int
    error: int


@dataclass(frozen=True)
class State:
    """What the control registers say."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    c_mask: int = 0


@dataclass(frozen=True)
class Access:
    kind: str
    user: bool
    ac: bool


ACCESSES = [Access(kind, user, ac) for kind in KINDS for user in (False, True) for ac in (False, True)]


class Memory:
    """Guest memory as bytes by page; pages that are absent, and pages that no store changes."""

    def __init__(self, pages: dict[int, bytearray], readonly: set[int]) -> None:
        self.pages = pages
        self.readonly = readonly

    def copy(self) -> Memory:
        return Memory({gfn: bytearray(data) for gfn, data in self.pages.items()}, self.readonly)

    def load(self, gpa: int, size: int) -> int | None:
        page = self.pages.get(gpa >> 12)
        return None if page is None else int.from_bytes(page[gpa & 0xFFF : (gpa & 0xFFF) + size], "little")

    def set_bits(self, gpa: int, bits: int) -> None:
        if gpa >> 12 not in self.readonly:
            self.pages[gpa >> 12][gpa & 0xFFF] |= bits


def bits(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


def must_be_zero(mode: str, level: str, entry: int, state: State) -> int:
    """The bits that must be zero in this entry."""
    no_nx = 0 if state.efer >> 11 & 1 else 1 << 63
    large = entry >> 7 & 1
    if mode == "long":
        zero = bits(51, PHYS_BITS) | no_nx
        zero |= {"PML4E": bits(8, 7), "PDPE": bits(29, 13) if large else 0, "PDE": bits(20, 13) if large else 0, "PTE": 0}[level]
    elif mode == "PAE":
        if level == "PDPE":
            zero = bits(63, PHYS_BITS) | bits(8, 5) | bits(2, 1)
        else:
            zero = bits(62, PHYS_BITS) | no_nx | (bits(20, 13) if level == "PDE" and large else 0)
    else:
        zero = 1 << 21 if level == "PDE" and large and state.cr4 >> 4 & 1 else 0
    return zero & ~state.c_mask


def expect(memory: Memory, state: State, va: int, access: Access) -> Page | Raised:
    """Walk, and leave accessed and dirty bits in `memory`."""
    write, fetch = access.kind == "write", access.kind == "fetch"
    encrypted = state.c_mask != 0
    if not state.cr0 >> 31 & 1:
        return Page((va & 0xFFFFFFFF) >> 12, encrypted)
    mode = "long" if state.efer >> 10 & 1 else "PAE" if state.cr4 >> 5 & 1 else "32-bit"
    if mode == "long" and va >> 47 not in (0, (1 << 17) - 1):
        return Raised(13, 0)
    nxe, smep, smap = mode != "32-bit" and state.efer >> 11 & 1, state.cr4 >> 20 & 1, state.cr4 >> 21 & 1
    tried = 2 * write + 4 * access.user + (16 if fetch and (nxe or smep) else 0)
    levels = {
        "long": [("PML4E", 47, 39), ("PDPE", 38, 30), ("PDE", 29, 21), ("PTE", 20, 12)],
        "PAE": [("PDPE", 31, 30), ("PDE", 29, 21), ("PTE", 20, 12)],
        "32-bit": [("PDE", 31, 22), ("PTE", 21, 12)],
    }[mode]
    size = 4 if mode == "32-bit" else 8
    frame = bits(PHYS_BITS - 1, 12) & ~state.c_mask
    table = state.cr3 & {"long": frame, "PAE": bits(31, 5), "32-bit": bits(31, 12)}[mode]
    writable = user_page = True
    no_execute = False
    for level, high, low in levels:
        at = table + (va >> low & (1 << high - low + 1) - 1) * size
        entry = memory.load(at, size)
        if entry is None or not entry & 1:
            return Raised(14, tried)
        if entry & must_be_zero(mode, level, entry, state):
            return Raised(14, tried | 8 | 1)
        table = entry & frame
        if mode == "PAE" and level == "PDPE":
            continue
        writable, user_page = writable and bool(entry & 2), user_page and bool(entry & 4)
        no_execute |= bool(size == 8 and entry >> 63)
        large = entry & 0x80 and (level in ("PDPE", "PDE") if mode != "32-bit" else level == "PDE" and state.cr4 >> 4 & 1)
        if level == "PTE" or large:
            break
        memory.set_bits(at, 0x20)
    if access.user:
        right = user_page and (writable or not write)
    elif fetch:
        right = not (smep and user_page)
    else:
        right = (writable or not write or not state.cr0 >> 16 & 1) and not (smap and user_page and not access.ac)
    if not right or (fetch and no_execute):
        return Raised(14, tried | 1)
    memory.set_bits(at, 0x60 if write else 0x20)
    start = entry & frame & -(1 << low)
    if mode == "32-bit" and level == "PDE":
        start = entry & bits(31, 22) | (entry >> 13 & 0xFF) << 32
    private = encrypted and (fetch or mode == "32-bit" or bool(entry & state.c_mask))
    return Page(start + (va & (1 << low) - 1) >> 12, private)
