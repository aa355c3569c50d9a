"""The map of guest physical memory: which pages are private and which are shared.

Representation: one Roaring bitmap per memslot, page-relative (bit n = page n of the slot; set = private). "Memslots own the bitmaps": a
bit exists only where a memslot exists, so a guest cannot make the map grow beyond what its memory allows.

Invariants
- no bit outside a slot, ever: every write is clipped by a slot that was found first, and a page in no slot is refused;
- slots do not overlap, are not empty, and start and end on page boundaries;
- ranges are half-open, GPAs and sizes in bytes, GFNs and pages in 4 KiB pages.

Costs: a well-behaved guest has a few runs, that is some bytes. A hostile one that flips every other page costs at most 8 KiB per 65,536
pages (2 MiB for 64 GiB). One page is one bit operation; a range costs its 65,536-page containers, not its pages; the slot, and how far
slots reach from it without a hole, are searched only when they are not those of the last time.

The map does not lock: questions may be asked at any time, and whoever changes it holds the lock of the machine's conversions
(`vmm.conversion`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pyroaring import BitMap

from vmm.checks import GPA_LIMIT, PAGE_SHIFT, PAGE_SIZE

PRIVATE = "private"
SHARED = "shared"
MAX_SLOT_PAGES = 1 << 32
"""A 32-bit Roaring bitmap numbers 2^32 pages: 16 TiB in one slot."""


class MappedRange(NamedTuple):
    """One run of equal state inside one slot: `[gpa, gpa + size)` in bytes; `state` is "private" or "shared"."""

    gpa: int
    size: int
    state: str
    slot: int

    def to_json(self) -> dict[str, Any]:
        """The JSON object under `map`."""
        return self._asdict()


class _Slot:
    """One memslot: its number, its first GFN, the GFN after its last, and its bitmap."""

    __slots__ = ("bits", "end", "first", "id")

    def __init__(self, id: int, first: int, end: int) -> None:
        self.id = id
        self.first = first
        self.end = end
        self.bits = BitMap()


class GpaMap:
    """Private or shared, for every page of every memslot.

    >>> m = GpaMap()
    >>> m.add_slot(0, gpa=0, size=0x10000)
    >>> m.set_range(0x4000, 0x2000, private=True)
    >>> [tuple(r) for r in m.ranges()]
    [(0, 16384, 'shared', 0), (16384, 8192, 'private', 0), (24576, 40960, 'shared', 0)]
    """

    __slots__ = ("_add", "_discard", "_end", "_first", "_firsts", "_reach", "_slots")

    _reach: tuple[int, int]
    _add: Callable[[int], None]
    _discard: Callable[[int], None]

    def __init__(self) -> None:
        self._slots: list[_Slot] = []  # ascending by first GFN
        self._firsts: list[int] = []  # the same slots' first GFNs, for bisection
        self._forget()

    # -- slots ---------------------------------------------------------------------------------------------------------------------------

    def add_slot(self, slot: int, gpa: int, size: int, private: bool = False) -> None:
        """Add memslot `slot` over `[gpa, gpa + size)`, all of it private or all of it shared; raises ValueError."""
        if gpa < 0 or gpa % PAGE_SIZE or size <= 0 or size % PAGE_SIZE or gpa + size > GPA_LIMIT:
            raise ValueError(f"memslot {slot}: gpa {gpa:#x}, size {size:#x}: not page-aligned, empty, or above 2^52")
        pages = size >> PAGE_SHIFT
        if pages > MAX_SLOT_PAGES:
            raise ValueError(f"memslot {slot}: {pages} pages; one slot of the map holds at most 2^32 pages (16 TiB): use several slots")
        if any(s.id == slot for s in self._slots):
            raise ValueError(f"memslot {slot} is in the map already")
        first = gpa >> PAGE_SHIFT
        at = bisect_right(self._firsts, first)
        if (at and self._slots[at - 1].end > first) or (at < len(self._slots) and self._slots[at].first < first + pages):
            raise ValueError(f"memslot {slot} [{gpa:#x}, {gpa + size:#x}) overlaps another memslot")
        new = _Slot(slot, first, first + pages)
        if private:
            new.bits.add_range(0, pages)
        self._slots.insert(at, new)
        self._firsts.insert(at, first)
        self._forget()

    def remove_slot(self, slot: int) -> None:
        """Forget memslot `slot` and everything known about its pages; raises KeyError."""
        for at, candidate in enumerate(self._slots):
            if candidate.id == slot:
                del self._slots[at], self._firsts[at]
                self._forget()
                return
        raise KeyError(f"no memslot {slot} in the map")

    def covered_until(self, gpa: int) -> int:
        """First GPA at or after `gpa` (in bytes) that no memslot holds; `gpa` itself when none holds it."""
        first, until = self._reach  # one look: another thread may change it
        if first <= gpa < until:
            return until
        gfn = gpa >> PAGE_SHIFT
        at = bisect_right(self._firsts, gfn) - 1
        if at < 0 or self._slots[at].end <= gfn:
            return gpa
        end = self._slots[at].end
        for following in self._slots[at + 1 :]:
            if following.first != end:
                break
            end = following.end
        self._reach = self._slots[at].first << PAGE_SHIFT, end << PAGE_SHIFT
        return end << PAGE_SHIFT

    def slot_of(self, gpa: int) -> int | None:
        """Number of the memslot that holds `gpa`, or None."""
        found = self._find(gpa >> PAGE_SHIFT)
        return None if found is None else found.id

    # -- changes -------------------------------------------------------------------------------------------------------------------------

    def set_page(self, gfn: int, private: bool) -> None:
        """Set one page by its guest frame number; raises KeyError for a page in no memslot.

        The hot path of a guest that converts page after page: when the page lies in the slot used last, two comparisons and one bit.
        """
        if not self._first <= gfn < self._end:
            self._select(gfn)
        if private:
            self._add(gfn - self._first)
        else:
            self._discard(gfn - self._first)

    def set_range(self, gpa: int, size: int, private: bool) -> None:
        """Set `[gpa, gpa + size)`; it may span slots that touch. Raises KeyError, before any change, where no memslot is."""
        if gpa % PAGE_SIZE or size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"range of {size:#x} bytes at gpa {gpa:#x}: not page-aligned or empty")
        if size == PAGE_SIZE:
            self.set_page(gpa >> PAGE_SHIFT, private)
            return
        until = self.covered_until(gpa)
        if until < gpa + size:
            raise KeyError(f"no memslot at gpa {until:#x}")
        gfn, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        at = bisect_right(self._firsts, gfn) - 1
        while gfn < end:
            slot = self._slots[at]
            stop = min(end, slot.end)
            change = slot.bits.add_range if private else slot.bits.remove_range
            change(gfn - slot.first, stop - slot.first)
            gfn = stop
            at += 1

    def run_optimize(self) -> None:
        """Let the bitmaps choose their smallest form, run-length containers included (bits stay as they are)."""
        for slot in self._slots:
            slot.bits.run_optimize()
            slot.bits.shrink_to_fit()

    # -- questions -----------------------------------------------------------------------------------------------------------------------

    def is_private(self, gpa: int) -> bool:
        """Whether the page that holds `gpa` is private; a GPA in no memslot is not."""
        gfn = gpa >> PAGE_SHIFT
        slot = self._find(gfn)
        return slot is not None and gfn - slot.first in slot.bits

    def private_pages(self) -> int:
        """Number of private 4 KiB pages in all slots."""
        return sum(len(slot.bits) for slot in self._slots)

    def ranges(self, gpa: int = 0, size: int = GPA_LIMIT) -> Iterator[MappedRange]:
        """Runs of equal state inside `[gpa, gpa + size)`, ascending, each as long as it can be within its slot.

        Costs two bitmap searches per run (not per page), and one complement per slot.
        """
        low, high = gpa >> PAGE_SHIFT, (gpa + size + PAGE_SIZE - 1) >> PAGE_SHIFT
        for slot in list(self._slots):
            start, stop = max(slot.first, low) - slot.first, min(slot.end, high) - slot.first
            if start < stop:
                for a, b, private in _runs(slot.bits, start, stop):
                    state = PRIVATE if private else SHARED
                    yield MappedRange((slot.first + a) << PAGE_SHIFT, (b - a) << PAGE_SHIFT, state, slot.id)

    # -- inside --------------------------------------------------------------------------------------------------------------------------

    def _find(self, gfn: int) -> _Slot | None:
        at = bisect_right(self._firsts, gfn) - 1
        return self._slots[at] if at >= 0 and gfn < self._slots[at].end else None

    def _select(self, gfn: int) -> None:
        """Make the slot of `gfn` the one that `set_page` writes to."""
        slot = self._find(gfn)
        if slot is None:
            raise KeyError(f"no memslot at gpa {gfn << PAGE_SHIFT:#x}")
        self._first, self._end = slot.first, slot.end
        self._add, self._discard = slot.bits.add, slot.bits.discard

    def _forget(self) -> None:
        """Nothing was used or asked last: empty intervals make the next `set_page` and `covered_until` search."""
        self._reach = 0, 0  # GPAs: of a slot, and the end of those that follow it without a hole
        self._first = self._end = 0
        self._add = self._discard = _no_slot


def _no_slot(page: int) -> None:
    """What `set_page` would call with no slot selected; the interval check makes that impossible."""
    raise KeyError(f"no memslot selected for page {page}")


def _runs(bits: Any, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    """Half-open runs `[a, b)` of equal bits within `[start, stop)`, and whether they are set."""
    clear = bits.flip(start, stop)  # outside [start, stop) it equals `bits`, where nobody looks
    at = start
    private = at in bits
    while at < stop:
        end = _next_set(clear if private else bits, at, stop)
        yield at, end, private
        at, private = end, not private


def _next_set(bits: Any, start: int, stop: int) -> int:
    """First set bit in `[start, stop)`, or `stop`."""
    try:
        return min(int(bits.next_set_bit(start)), stop)
    except ValueError:
        return stop
