"""Shadow tables: what was converted from the guest's own, ready to be entered into the engine's TLB again.

The engine's TLB is small and is emptied by every MOV to CR3. A shadow remembers, for one root and one paging mode, each
page that was looked up: the guest's entries it came from *with their values*, the engine's address of its backing, and
the accesses that it allows. A remembered page is used only while all those entries still hold these values. That makes
a shadow right without watching the guest's stores: whoever changed a table (the guest, another vCPU, the VMM) has
changed a value, and the next look-up walks again. So several shadows stay warm while the guest switches between its
processes, and nothing has to be trapped for it.

Bounds: a vCPU keeps at most `MAX_SHADOWS` shadows with `MAX_PAGES` pages together, whatever the guest does.
"""

from __future__ import annotations

from kvmapi.model.cpu.paging import Mapping, Paging, Step

MAX_SHADOWS = 8
MAX_PAGES = 16384
_MAX_NOTES = 4 * MAX_PAGES  # of pages by GFN, those included that are no longer what was noted
GFN = 14  # its index in a Page
_NOTHING = memoryview(bytes(8)).cast("Q")
_NO_STEP: Step = (_NOTHING, 0, 0)
_LEVELS = 4

READ, WRITE, FETCH, USER, AC = 0, 1, 2, 4, 8
"""An access as a number below 16: its kind, and whether user code makes it, and whether RFLAGS.AC is set."""

# Four entries (table, index, value), the engine's address, a bit per access that is allowed, GFN and host address.
Page = tuple[memoryview, int, int, memoryview, int, int, memoryview, int, int, memoryview, int, int, int, int, int, int]


def accesses(paging: Paging, mapping: Mapping, writable: bool) -> int:
    """The accesses that need no further look, a bit for each: stores only to pages that are dirty already, and whose backing is ready
    for stores (`writable`); fetches only where they see what loads see.
    """
    key = (mapping.rights, writable and mapping.dirty, mapping.private == paging.encrypted, mapping.code_only)
    found = paging.accesses.get(key)
    if found is None:
        found = 0
        for access in range(16):
            write, fetch = access & 3 == WRITE, access & 3 == FETCH
            if access & 3 == 3 or (write and not key[1]) or (not key[2] if fetch else key[3]):
                continue
            if paging.allows(mapping.rights, write, fetch, bool(access & USER), bool(access & AC)):
                found |= 1 << access
        paging.accesses[key] = found
    return found


class Shadow:
    """Converted pages of one address space, by guest-virtual page address."""

    __slots__ = ("key", "pages", "paging")

    def __init__(self, key: tuple[int, ...], paging: Paging) -> None:
        self.key = key
        self.paging = paging
        self.pages: dict[int, Page] = {}


class Shadows:
    """The shadows of one vCPU, the one used last at the end."""

    def __init__(self) -> None:
        self._by_gfn: dict[int, list[tuple[Shadow, int]]] = {}
        self._noted = 0
        self._kept: dict[tuple[int, ...], Shadow] = {}
        self._room = MAX_PAGES

    def switch(self, cr0: int, cr3: int, cr4: int, efer: int, c_mask: int, phys_bits: int) -> Shadow:
        """The shadow of this root and mode, warm if it was kept; the one unused for longest makes room for a new one."""
        key = (cr0, cr3, cr4, efer, c_mask)
        shadow = self._kept.pop(key, None)
        if shadow is None:
            if len(self._kept) >= MAX_SHADOWS:
                self._drop(next(iter(self._kept)))
            shadow = Shadow(key, Paging(cr0, cr3, cr4, efer, c_mask, phys_bits))
        self._kept[key] = shadow
        return shadow

    def _drop(self, key: tuple[int, ...]) -> None:
        pages = self._kept.pop(key).pages
        self._room += len(pages)
        pages.clear()  # what was noted by GFN must not find them again

    def remember(self, shadow: Shadow, va: int, mapping: Mapping, allowed: int, address: int, pointer: int) -> None:
        """Keep what `va` was converted to, and the accesses that it allows."""
        if not self._room or self._noted >= _MAX_NOTES:
            self.clear()
            self._kept[shadow.key] = shadow
        gfn, steps, pages = mapping.gfn, mapping.steps, shadow.pages
        old = pages.get(va)
        if old is None:
            self._room -= 1
        if old is None or old[GFN] != gfn:
            self._noted += 1
            notes = self._by_gfn.get(gfn)
            if notes is None:
                self._by_gfn[gfn] = [(shadow, va)]
            else:
                notes.append((shadow, va))
        if len(steps) < _LEVELS:
            steps += (_NO_STEP,) * (_LEVELS - len(steps))
        first, second, third, fourth = steps
        pages[va] = (*first, *second, *third, *fourth, address, allowed, gfn, pointer)

    def forget(self, first: int, end: int) -> None:
        """The backings of [first, end), in GFNs, changed. They are no tables that anything was converted from."""
        for gfn in range(first, end):
            for shadow, va in self._by_gfn.pop(gfn, ()):
                page = shadow.pages.get(va)
                if page is not None and page[GFN] == gfn:
                    del shadow.pages[va]
                    self._room += 1

    def clear(self) -> None:
        """Throw everything away: backings changed."""
        for shadow in self._kept.values():
            shadow.pages.clear()
        self._kept.clear()
        self._by_gfn.clear()
        self._room, self._noted = MAX_PAGES, 0
