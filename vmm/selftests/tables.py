"""More mappings in a test guest's page tables than the bundled guests need: any GVA to any GPA, before the guest starts.

Works on the boot pages (`vmm.boot`) as bytes by GPA. New tables are taken from `[TABLES_MORE, TABLES_END)`, 2 MiB that no image and no
boot structure uses and that the identity map covers, so a guest's own `get_pte()` finds them.

Invariant: every entry made here has the C-bit of the guest in table entries; in leaves, where it is asked for.
"""

from __future__ import annotations

import struct

from vmm import boot

TABLES_MORE, TABLES_END = 0x600000, 0x800000
PAGE_4K, PAGE_2M = 0x1000, 0x200000
_PRESENT, _PAGE_SIZE_BIT = 1, 1 << 7
_TABLE, _LEAF, _LARGE_LEAF = 0x63, 0x63, 0xE3
_ADDRESS = 0x000FFFFFFFFFF000


class TableSpaceError(ValueError):
    """A mapping that cannot be made; one sentence."""


class PageTables:
    """The guest's tables while they are being made. `pages` holds every table page by GPA, changed or not."""

    def __init__(self, contents: dict[int, bytes | memoryview], c_mask: int) -> None:
        self.c_mask = c_mask
        self.changed: set[int] = set()
        self.pages: dict[int, bytearray] = {}
        self._contents = contents
        self._next = TABLES_MORE

    def map(self, gva: int, gpa: int, size: int, private: bool, page: int = PAGE_4K) -> None:
        """Map `[gva, gva + size)` to `[gpa, gpa + size)` in pages of `page` bytes; `private`: with the C-bit, where the guest has one."""
        if page not in (PAGE_4K, PAGE_2M) or gva % page or gpa % page or size % page or size <= 0:
            raise TableSpaceError(f"gva {gva:#x}, gpa {gpa:#x}, {size:#x} bytes: not multiples of a page of {page:#x} bytes")
        leaf = (_LARGE_LEAF if page == PAGE_2M else _LEAF) | (self.c_mask if private else 0)
        for at in range(0, size, page):
            self._set(gva + at, gpa + at | leaf, 2 if page == PAGE_2M else 1)

    def entry(self, gva: int) -> int:
        """The leaf entry of `gva`, 0 where nothing is mapped."""
        table = boot.TABLES
        for level in (4, 3, 2, 1):
            entry = self._get(table, gva >> 12 + 9 * (level - 1) & 511)
            if not entry & _PRESENT or level == 1 or entry & _PAGE_SIZE_BIT:
                return entry
            table = entry & _ADDRESS & ~self.c_mask
        return 0

    def _set(self, gva: int, entry: int, at_level: int) -> None:
        table = boot.TABLES
        for level in range(4, at_level, -1):
            table = self._descend(table, gva >> 12 + 9 * (level - 1) & 511, level)
        self._put(table, gva >> 12 + 9 * (at_level - 1) & 511, entry)

    def _descend(self, table: int, index: int, level: int) -> int:
        entry = self._get(table, index)
        if entry & _PRESENT and not entry & _PAGE_SIZE_BIT:
            return entry & _ADDRESS & ~self.c_mask
        new = self._new_table()
        if entry & _PRESENT:  # a large page is split
            if level != 2:
                raise TableSpaceError("only 2 MiB pages can be split")
            small = entry & ~_PAGE_SIZE_BIT
            self.pages[new][:] = struct.pack("<512Q", *(small + PAGE_4K * i for i in range(512)))
        self._put(table, index, new | _TABLE | self.c_mask)
        return new

    def _new_table(self) -> int:
        if self._next == TABLES_END:
            raise TableSpaceError(f"page tables need more than {(TABLES_END - TABLES_MORE) >> 10} KiB; use 2 MiB pages")
        gpa, self._next = self._next, self._next + PAGE_4K
        self.pages[gpa] = bytearray(PAGE_4K)
        self.changed.add(gpa)
        return gpa

    def _page(self, gpa: int) -> bytearray:
        if gpa not in self.pages:
            self.pages[gpa] = bytearray(self._contents[gpa])
        return self.pages[gpa]

    def _get(self, table: int, index: int) -> int:
        return int.from_bytes(self._page(table)[8 * index : 8 * index + 8], "little")

    def _put(self, table: int, index: int, entry: int) -> None:
        self._page(table)[8 * index : 8 * index + 8] = entry.to_bytes(8, "little")
        self.changed.add(table)
