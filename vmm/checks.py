"""The one place where a number that came from a guest is believed.

A guest names ranges of its own physical memory: in hypercalls, in faults, in shared pages. Every such number passes `check_range` (or
`check_pages`) before anything else looks at it, and what comes out is a `GpaRange`: page-aligned, not empty, below 2^52, inside memslots.
Code that takes a `GpaRange` checks nothing again; code that takes plain integers from a guest does not exist elsewhere.

Costs: a few comparisons and one bisection, whatever the numbers are; 2^52 pages cost what one page costs.

A number that fails gives `BadRange`: the negative errno that the guest gets as its answer, and a sentence for the log. The errno is the
one KVM gives for the same mistake where it has an opinion (EINVAL, `kvm_emulate_hypercall` in arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import errno as errnos
from typing import NamedTuple, Protocol

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
GPA_BITS = 52
"""Architectural limit of a physical address on x86-64 (AMD APM volume 2, 5.1)."""

GPA_LIMIT = 1 << GPA_BITS

MAP_GPA_RANGE_KNOWN = 0x1F
"""Attribute bits of KVM_HC_MAP_GPA_RANGE that mean something: bit 4 encrypted, 3:0 page size.
Source: Documentation/virt/kvm/x86/hypercalls.rst."""

MAP_GPA_RANGE_ENCRYPTED = 1 << 4
MAP_GPA_RANGE_LARGEST = 2
"""Largest page size the encoding knows: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB."""

_PRIVATE = {
    kind | size: bool(kind) for kind in (0, MAP_GPA_RANGE_ENCRYPTED) for size in range(MAP_GPA_RANGE_LARGEST + 1)
}  # by all attributes that mean something: is the range to be private?


class BadRange(Exception):
    """A guest's number is refused: `code` is the negative errno handed back, the text says what was wrong with it."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class GpaRange(NamedTuple):
    """`[gpa, gpa + size)` in bytes: aligned to 4 KiB, not empty, below 2^52 and wholly inside memslots."""

    gpa: int
    size: int

    @property
    def end(self) -> int:
        """First GPA after the range."""
        return self.gpa + self.size

    @property
    def gfn(self) -> int:
        """Guest frame number of the first page."""
        return self.gpa >> PAGE_SHIFT

    @property
    def pages(self) -> int:
        """Number of 4 KiB pages."""
        return self.size >> PAGE_SHIFT

    def __str__(self) -> str:
        return f"[{self.gpa:#x}, {self.end:#x})"


class Covers(Protocol):
    """Anything that can say how far memslots reach without a hole from a GPA (`GpaMap` does)."""

    def covered_until(self, gpa: int) -> int:
        """First GPA at or after `gpa` that is in no memslot; `gpa` itself when it is in none."""
        ...


def check_range(gpa: int, size: int, slots: Covers) -> GpaRange:
    """Check a range in bytes that a guest named; raises `BadRange` with -EINVAL."""
    end = gpa + size
    if (gpa | size) & (PAGE_SIZE - 1) or not 0 <= gpa < end <= GPA_LIMIT:
        raise BadRange(-errnos.EINVAL, _what_is_wrong(gpa, size))
    until = slots.covered_until(gpa)
    if until < end:
        raise BadRange(-errnos.EINVAL, f"range [{gpa:#x}, {end:#x}) leaves the memslots at {until:#x}")
    return GpaRange(gpa, size)


def _what_is_wrong(gpa: int, size: int) -> str:
    """Why a range is none, wherever memslots are."""
    if gpa < 0 or size < 0:
        return f"negative range: gpa {gpa}, size {size}"
    if gpa & (PAGE_SIZE - 1):
        return f"gpa {gpa:#x} is not aligned to 4 KiB"
    if size & (PAGE_SIZE - 1):
        return f"size {size:#x} at gpa {gpa:#x} is not a multiple of 4 KiB"
    if size == 0:
        return f"empty range at gpa {gpa:#x}"
    return f"range of {size:#x} bytes at gpa {gpa:#x} ends above 2^52"


def check_pages(gpa: int, pages: int, slots: Covers) -> GpaRange:
    """Check a range of 4 KiB pages that a guest named (a hypercall counts in pages); raises `BadRange` with -EINVAL.

    Python's integers do not wrap, so a count whose product wraps in 64 bits is seen for what it is: too large.
    """
    return check_range(gpa, pages << PAGE_SHIFT, slots)


def check_map_gpa_range(gpa: int, pages: int, attributes: int, slots: Covers) -> tuple[GpaRange, bool]:
    """Check the three arguments of KVM_HC_MAP_GPA_RANGE; returns the range and whether it is to become private.

    KVM does not look at the attributes before it exits (Linux 7.3, `__kvm_emulate_hypercall`), so reserved bits and unknown page sizes are
    ours to refuse: -EINVAL. The page size is only a hint, alignment to it is not required.
    """
    private = _PRIVATE.get(attributes)
    if private is None:
        reserved = attributes & ~MAP_GPA_RANGE_KNOWN
        wrong = f"reserved attribute bits {reserved:#x}" if reserved else f"unknown page size encoding {attributes & 0xF}"
        raise BadRange(-errnos.EINVAL, f"{wrong} at gpa {gpa:#x}")
    return check_range(gpa, pages << PAGE_SHIFT, slots), private
