"""The answer to most of the engine's TLB misses, without Python: pages of a region of which some were converted already.

An *extent* is what mmu.py knows of 2 MiB of guest-virtual addresses when it has converted some of their pages: the entries of
the upper levels with their values, where the last table is (or the one large page), and a stretch of guest memory that may be
used by any access without asking again. With that a page is found by machine code as the processor would: the upper entries
must be what they were, the last one is read, checked, and gets its accessed and dirty bits; a store to a slot that keeps a log
sets its bit there. What is not plain goes to Mmu.fill: fetches, ring 3, protected or missing pages, everything
outside the stretch.

Extents are of the current root and mode only; they go with any change of backings, with every switch of tables, and when code is
fetched from their stretch, because stores to it through an extent are seen by nobody (`holds`).

Called as UC_HOOK_TLB_FILL: rsi the address, edx the kind of access, rcx the answer, r8 our block: addresses and expected values of
CPL, CR3, CR0, CR4 and EFER, the generation, masks, and a table of extents by bits 30:21 of the address.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.paging import RW, US, D

if TYPE_CHECKING:
    from kvmapi.model.cpu.code import CodeCache
    from kvmapi.model.cpu.paging import Mapping, Paging
    from kvmapi.model.mem.physical import Physical

LISTING = """
mov rax, [r8]; test byte ptr [rax], 3; jne miss; mov rax, [r8+8]; mov rax, [rax]; cmp rax, [r8+40]; jne miss;
mov rax, [r8+16]; mov rax, [rax]; cmp rax, [r8+48]; jne miss; mov rax, [r8+24]; mov rax, [rax]; cmp rax, [r8+56];
jne miss; mov rax, [r8+32]; mov rax, [rax]; cmp rax, [r8+64]; jne miss; lea eax, [rdx-16]; cmp eax, 1; ja miss;
mov r9, rsi; shr r9, 21; mov r10, r9; and r10d, 1023; shl r10, 7; lea r10, [r8+r10+128]; cmp r9, [r10]; jne miss;
mov rax, [r8+72]; cmp rax, [r10+8]; jne miss; mov rax, [r10+16]; mov rax, [rax]; cmp rax, [r10+24]; jne miss;
mov rax, [r10+32]; mov rax, [rax]; cmp rax, [r10+40]; jne miss; mov rax, [r10+48]; mov rax, [rax];
cmp rax, [r10+56]; jne miss; mov r11, [r10+64]; test r11, r11; jz linear; mov r9, rsi; shr r9, 12; and r9d, 511;
lea r11, [r11+r9*8]; mov r9, [r11]; test r9b, 1; jz miss; test r9, [r8+80]; jnz miss; mov rax, r9; and rax, [r8+88];
sub rax, [r10+80]; cmp rax, [r10+88]; jae miss; cmp edx, 17; je table_write; test r9b, 0x20; jnz marked;
lock or byte ptr [r11], 0x20; marked: mov r11d, r9d; and r9, [r8+88]; mov eax, 1; and r11d, 0x42; cmp r11d, 0x42;
jne done; jmp both; table_write: test r9b, 2; jz miss; test byte ptr [r10+120], 1; jz miss;
lock or byte ptr [r11], 0x60; and r9, [r8+88]; mov eax, 3; jmp note; linear: mov r9, rsi; and r9, -4096;
add r9, [r10+72]; mov rax, r9; sub rax, [r10+80]; cmp rax, [r10+88]; jae miss; mov eax, 1; cmp edx, 17; jne both;
test byte ptr [r10+120], 1; jz miss; mov eax, 3; note: mov r11, [r10+104]; test r11, r11; jz done; mov rdi, r9;
shr rdi, 12; sub rdi, [r10+112]; bts [r11], rdi; jmp done; both: test byte ptr [r10+120], 1; jz done;
cmp qword ptr [r10+104], 0; jne done; mov eax, 3; done: add r9, [r10+96]; mov [rcx], r9; mov [rcx+8], eax;
mov eax, 1; ret; miss: mov rax, [r8+96]; xor r8d, r8d; jmp rax;
"""
CODE = bytes.fromhex("""
498b00f600030f85bd010000498b4008488b00493b40280f85ac010000498b4010488b00493b40300f859b010000498b4018488b00493b40380f
858a010000498b4020488b00493b40400f85790100008d42f083f8010f876d0100004989f149c1e9154d89ca4181e2ff03000049c1e2074f8d94
10800000004d3b0a0f8547010000498b4048493b42080f8539010000498b4210488b00493b42180f8528010000498b4220488b00493b42280f85
17010000498b4230488b00493b42380f85060100004d8b5a404d85db0f848b0000004989f149c1e90c4181e1ff0100004f8d1ccb4d8b0b41f6c1
010f84da0000004d8548500f85d00000004c89c849234058492b4250493b42580f83bb00000083fa11742741f6c1207505f041800b204589cb4d
234858b8010000004183e3424183fb420f8581000000eb6c41f6c1020f848500000041f6427801747ef041800b604d234858b803000000eb3149
89f14981e100f0ffff4d034a484c89c8492b4250493b42587353b80100000083fa11752641f64278017442b8030000004d8b5a684d85db74244c
89cf48c1ef0c492b7a70490fab3beb1341f6427801740c49837a68007505b8030000004d034a604c8909894108b801000000c3498b40604531c0
ffe0
""")
"""LISTING, assembled (GNU as, Intel syntax)."""

_SHIFT, _SLOTS, _ENTRY_SIZE, _HEADER_SIZE = 21, 1024, 128, 128
_KEY, _GENERATION, _MASKS, _ZERO = struct.Struct("<4Q"), struct.Struct("<Q"), struct.Struct("<2Q"), 104
_KEY_AT, _GENERATION_AT, _MASKS_AT = 40, 72, 80
_ENTRY = struct.Struct("<16Q")
_LEVELS = 4
_TRIES = frozenset((4, 16, 64, 256, 512, 1024))  # conversions in a region after which an extent is tried
_MAX_COUNTS = 4096


@functools.cache
def _stub() -> tuple[int, mmap.mmap]:
    """The address of the code, and the page that holds it."""
    page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(CODE)] = CODE
    return ctypes.addressof(ctypes.c_char.from_buffer(page)), page


def _address(view: memoryview | bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Extents:
    """The extents of one vCPU."""

    def __init__(self, state: memoryview, efer: int, callback: int) -> None:
        """`state` is the engine's CPU structure, `efer` its offset there, `callback` the function that answers the rest."""
        self._block = mmap.mmap(-1, _HEADER_SIZE + _SLOTS * _ENTRY_SIZE)
        self.block = _address(memoryview(self._block))
        at = _address(state)
        where = (at + layout.HFLAGS, at + layout.CR + 24, at + layout.CR, at + layout.CR + 32, at + efer)
        struct.pack_into("<5Q", self._block, 0, *where)
        struct.pack_into("<Q", self._block, 96, callback)
        self._generation = 0
        self._stretches: dict[int, list[tuple[int, int]]] = {}  # by 2 MiB of our addresses: [first, end) that extents have of them
        self._counts: dict[int, int] = {}
        self._logs: list[object] = []  # dirty logs must stay where they are
        self.clear()

    @staticmethod
    def function() -> int:
        """The hook: to be called with `block` as its data."""
        return _stub()[0]

    def clear(self) -> None:
        """No extent counts any more."""
        self._generation += 1
        _GENERATION.pack_into(self._block, _GENERATION_AT, self._generation)
        self._stretches.clear()
        self._counts.clear()
        self._logs.clear()

    def switch(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Other tables, or another mode."""
        self.clear()
        _KEY.pack_into(self._block, _KEY_AT, cr3, cr0, cr4, efer)

    def holds(self, pointer: int) -> bool:
        """May the page that our process sees at `pointer` be stored to through an extent?"""
        return any(first <= pointer < end for first, end in self._stretches.get(pointer >> _SHIFT, ()))

    def seen(self, va: int, mapping: Mapping, paging: Paging, physical: Physical, code: CodeCache) -> None:
        """A page was converted for a load or store of data, and needs no further look for either."""
        region = va >> _SHIFT
        count = self._counts.get(region, 0) + 1
        if len(self._counts) >= _MAX_COUNTS:
            self._counts.clear()
        self._counts[region] = count
        if count in _TRIES and paging.long and paging.on and not paging.encrypted:
            self._try(va, mapping, paging, physical, code)

    def _try(self, va: int, mapping: Mapping, paging: Paging, physical: Physical, code: CodeCache) -> None:
        steps = mapping.steps
        stretch = physical.stretch(mapping.gfn)
        if stretch is None:
            return
        first, end, address, pointer, slot = stretch
        here = pointer + (mapping.gfn - first) * PAGE
        # Not up to a page with code: only what looks at each store may write there.
        below = max((page for page in code.pointers if pointer <= page <= here), default=pointer - PAGE)
        above = min((page for page in code.pointers if here < page), default=pointer + (end - first) * PAGE)
        if below == here:
            return
        skip = (below + PAGE - pointer) // PAGE
        end = min(end, first + (above - pointer) // PAGE)
        first, address, pointer = first + skip, address + skip * PAGE, pointer + skip * PAGE
        writable, table, linear = True, 0, 0
        for _, _, value in steps[:-1]:
            writable = writable and bool(value & RW)
        view, _, leaf = steps[-1]
        checks = steps
        if len(steps) == _LEVELS:
            if not physical.is_plain_table(steps[-2][2] & paging.address_mask):
                return
            table, checks = _address(view), steps[:-1]
        else:
            if leaf & US and paging.smap:
                return
            writable = writable and bool(leaf & RW and leaf & D)
            linear = (mapping.gfn * PAGE - (va & -PAGE)) & (1 << 64) - 1
        words: list[int] = []
        for view, index, value in checks:
            words += [_address(view) + 8 * index, value]
        words += [self.block + _ZERO, 0] * (3 - len(checks))
        log = 0
        if slot.dirty is not None:
            log = _address(slot.dirty)
            self._logs.append(slot.dirty)
        region = va >> _SHIFT
        _MASKS.pack_into(self._block, _MASKS_AT, paging.reserved | (US if paging.smap else 0), paging.address_mask)
        _ENTRY.pack_into(
            self._block, _HEADER_SIZE + (region & _SLOTS - 1) * _ENTRY_SIZE,
            region, self._generation, *words, table, linear, first * PAGE, (end - first) * PAGE,
            (address - first * PAGE) & (1 << 64) - 1, log, slot.gfn, writable,
        )  # fmt: skip
        physical.entered.add_range(first, end)
        last = pointer + (end - first) * PAGE
        for part in range(pointer >> _SHIFT, (last - 1 >> _SHIFT) + 1):
            self._stretches.setdefault(part, []).append((pointer, last))
