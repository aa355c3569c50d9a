"""Page tables with anything in them, against a second walker written from the manual: the same page, the same fault with
the same error code, the same bits left behind, in every mode and for every kind of access.

The second walker is walker.py. SEVMM_DEEP=N makes N times as many examples, other ones each time.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmapi.abi import caps, kvm
from kvmapi.exits import Mmio
from kvmapi.model.caller import OwnMemory
from kvmapi.model.cpu import shadow
from kvmapi.model.cpu.paging import Fault, Paging
from kvmapi.model.mem.physical import Physical, Refused
from kvmapi.model.memslots import Memslots, Slot
from tests.conformance import paged
from tests.conformance.snippets import PAGE, address_of
from tests.model.walker import ACCESSES, KINDS, PHYS_BITS, Access, Memory, Page, Raised, State, bits, expect

pytestmark = pytest.mark.model
DEEP = int(os.environ.get("SEVMM_DEEP", "0"))
C_BIT = 1 << 51
ALLOWED = 13  # the element of a remembered page that has a bit per access
U64 = (1 << 64) - 1


def examples(count: int) -> Any:
    return settings(
        max_examples=count * (DEEP or 1), derandomize=not DEEP, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# ---- tables with anything in them

SLOTS = {0: 12, 0x80: 2, 1 << 28: 2}  # first GFN: pages; the one at 0x80 is read-only
FRAMES = [first + n for first, count in SLOTS.items() for n in range(count)]
READ_ONLY = {0x80, 0x81}
OUTSIDE = [0x40, 0x82, 0xFFFFF, 1 << 30, (1 << 36) - 1]


@dataclass
class Case:
    """A state, an address, and what stands in the entries on its way, each put where the one before points."""

    state: State
    va: int
    entries: list[int]


@st.composite
def entry(draw: st.DrawFn, wide: bool) -> int:
    frame = draw(st.one_of(st.sampled_from(FRAMES), st.sampled_from(FRAMES[:4]), st.sampled_from(OUTSIDE)))
    flags = draw(st.one_of(st.sampled_from([1, 7, 0x67, 0x87, 3, 5]), st.integers(0, 0xFFF), st.integers(0, 0xFFF).map(lambda n: n | 1)))
    value = frame << 12 | flags
    if draw(st.integers(0, 3)) == 0:
        value ^= 1 << draw(st.integers(12, 63))
    if draw(st.integers(0, 9)) == 0:
        value = draw(st.integers(0, U64))
    return value if wide else value & 0xFFFFFFFF


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mode = draw(st.sampled_from(["long", "long", "PAE", "32-bit", "none"]))
    cr4 = draw(st.sampled_from([0, 1 << 20, 1 << 21, 3 << 20])) | draw(st.sampled_from([0, 1 << 4]))
    cr4 |= 1 << 5 if mode in ("long", "PAE") else 0
    efer = (0x500 if mode == "long" else 0) | draw(st.sampled_from([0, 1 << 11, 1 << 11]))
    cr0 = 1 | (0 if mode == "none" else 1 << 31) | draw(st.sampled_from([0, 1 << 16]))
    cr3 = draw(st.sampled_from(FRAMES)) << 12 | draw(st.sampled_from([0, 0x18, 0xFFF, 0xFE0, 0x20]))
    c_mask = draw(st.sampled_from([0, 0, C_BIT])) if mode == "long" else 0
    va = draw(st.one_of(st.integers(0, U64), st.integers(0, (1 << 32) - 1), st.sampled_from([0, 1 << 47, (1 << 47) - PAGE, U64 - 0xFFF])))
    if mode == "long":
        if draw(st.integers(0, 15)):
            va = va & bits(46, 0) | (bits(63, 47) if va >> 47 & 1 else 0)
    else:
        va &= 0xFFFFFFFF
    wide = mode != "32-bit"
    frames = draw(st.permutations(FRAMES[1:12]))
    entries = [(frame << 12 | 7) & ~(0x1E6 if mode == "PAE" and level == 0 else 0) for level, frame in enumerate(frames[:4])]
    if draw(st.integers(0, 2)) == 0:  # a large page: its lower address bits are zero, but perhaps for one
        level = draw(st.integers(0, 2))
        entries[level] = entries[level] & 0xFFF | 0x80 | draw(st.sampled_from([0, 0, *(1 << n for n in range(12, 31))]))
    for level in draw(st.lists(st.integers(0, 3), max_size=3)):
        entries[level] = draw(st.one_of(entry(wide), st.just(entries[level] ^ draw(st.sampled_from([1, 2, 4, 0x80, 0x100, 1 << 63])))))
    return Case(State(cr0, cr3, cr4, efer, c_mask), va & -PAGE, [value & (U64 if wide else 0xFFFFFFFF) for value in entries])


def place(memory: Memory, case: Case) -> None:
    """Put the entries where a walk will look for them, as long as the way leads through memory."""
    state, va = case.state, case.va
    if state.efer >> 10 & 1:
        shifts, size, table = (39, 30, 21, 12), 8, state.cr3 & bits(51, 12)
    elif state.cr4 >> 5 & 1:
        shifts, size, table = (30, 21, 12), 8, state.cr3 & bits(31, 5)
    else:
        shifts, size, table = (22, 12), 4, state.cr3 & bits(31, 12)
    for shift, value in zip(shifts, case.entries, strict=False):
        at = table + (va >> shift & (0x1FF if size == 8 else 0x3FF)) * size
        page = memory.pages.get(at >> 12)
        if page is None:
            return
        page[at & 0xFFF : (at & 0xFFF) + size] = value.to_bytes(8, "little")[:size]
        table = value & bits(PHYS_BITS - 1, 12) & ~state.c_mask


class Model:
    """A real Physical, with the bytes of a Memory."""

    def __init__(self) -> None:
        self.host = mmap.mmap(-1, len(FRAMES) * PAGE)
        slots, at = Memslots(readonly_allowed=True), address_of(self.host)
        for number, (first, count) in enumerate(SLOTS.items()):
            flags = kvm.KVM_MEM_READONLY if first in READ_ONLY else 0
            slots.put(Slot(number, flags, first, count, at))
            at += count * PAGE
        self.physical = Physical(slots, OwnMemory())

    def load(self, memory: Memory) -> None:
        for number, gfn in enumerate(FRAMES):
            self.host[number * PAGE : (number + 1) * PAGE] = bytes(memory.pages[gfn])

    def walk(self, case: Case, access: Access) -> tuple[Page | Raised, Any]:
        state = case.state
        paging = Paging(state.cr0, state.cr3, state.cr4, state.efer, state.c_mask, PHYS_BITS)
        try:
            mapping = paging.walk(self.physical, case.va, access.kind == "write", access.kind == "fetch", access.user, access.ac)
        except Fault as fault:
            assert fault.vector == 13 or fault.address == case.va & (U64 if case.state.efer >> 10 & 1 else 0xFFFFFFFF)
            return Raised(fault.vector, fault.error or 0), None
        return Page(mapping.gfn, mapping.private), (paging, mapping)

    def differs(self, memory: Memory) -> str:
        """Where the bytes are not these."""
        for number, gfn in enumerate(FRAMES):
            mine, theirs = self.host[number * PAGE : (number + 1) * PAGE], bytes(memory.pages[gfn])
            if mine != theirs:
                at = next(n for n in range(PAGE) if mine[n] != theirs[n])
                return f"page {gfn:#x}, byte {at:#x}: {mine[at]:#x} instead of {theirs[at]:#x}"
        return ""


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@examples(250)
@given(case=cases())
def test_any_table(model: Model, case: Case) -> None:
    fresh = Memory({gfn: bytearray(PAGE) for gfn in FRAMES}, READ_ONLY)
    place(fresh, case)
    for access in ACCESSES:
        memory = fresh.copy()
        model.load(memory)
        found, _ = model.walk(case, access)
        assert found == expect(memory, case.state, case.va, access), access
        assert not model.differs(memory), access


@examples(120)
@given(case=cases())
def test_what_is_remembered_allows_no_more(model: Model, case: Case) -> None:
    """A remembered page answers an access only if a walk would give the same page, and would mark nothing."""
    fresh = Memory({gfn: bytearray(PAGE) for gfn in FRAMES}, READ_ONLY)
    place(fresh, case)
    for access in ACCESSES:
        memory = fresh.copy()
        model.load(memory)
        found, more = model.walk(case, access)
        if more is None:
            continue
        expect(memory, case.state, case.va, access)
        shadows, (paging, mapping) = shadow.Shadows(), more
        kept = shadows.switch(case.state.cr0, case.state.cr3, case.state.cr4, case.state.efer, case.state.c_mask, PHYS_BITS)
        kept.paging = paging
        shadows.remember(kept, case.va, mapping, shadow.accesses(paging, mapping, True), 0, 0)
        page = kept.pages[case.va]
        if any(view[index] != value for view, index, value in mapping.steps):
            continue  # the walk marked an entry that it had read: the next look-up walks again
        assert page[ALLOWED] >> number(access) & 1, "what was asked is answered the next time"
        for other in ACCESSES:
            if page[ALLOWED] >> number(other) & 1:
                after = memory.copy()
                assert expect(after, case.state, case.va, other) == found, (access, other)
                assert after.pages == memory.pages, (access, other)


def number(access: Access) -> int:
    """As shadow.py counts accesses."""
    return KINDS.index(access.kind) | (shadow.USER if access.user else 0) | (shadow.AC if access.ac else 0)


def test_addresses_beyond_32_bits_wrap_outside_long_mode(model: Model) -> None:
    """The model's own reads may run past 4 GiB (the tail of code at the end): no table has a fifth entry."""
    state = State(0x80000001, 0xFE0, 0x20, 0)
    memory = Memory({gfn: bytearray(PAGE) for gfn in FRAMES}, READ_ONLY)
    memory.pages[0][0xFE0:0x1000] = b"".join(((2 << 12) | 1).to_bytes(8, "little") for _ in range(4))
    memory.pages[2][0:8] = (0x87).to_bytes(8, "little")
    model.load(memory)
    for va in (0, 1 << 32, (1 << 63) + PAGE, U64 & -PAGE):
        got, _ = model.walk(Case(state, va, []), ACCESSES[0])
        assert got in (Page(va >> 12 & 0x1FF, False), Raised(14, 0))


# ---- by a guest


@st.composite
def guests(draw: st.DrawFn) -> tuple[paged.Mode, list[int], int, int, int, list[tuple[str, bool, int]]]:
    mode = draw(st.sampled_from(paged.MODES))
    places = [paged.TARGET, paged.OTHER, *(paged.TABLES + 0x1000 * n for n in range(1, mode.levels)), 0x4000_0000]
    chain = []
    for level in range(mode.levels, 0, -1):
        straight = paged.TABLES + 0x1000 * (level - 1) if level > 1 else paged.TARGET
        where = straight if draw(st.integers(0, 3)) else draw(st.sampled_from(places))
        value = where | draw(st.sampled_from([7, 7, 3, 5, 1, 0x87, 0x67, 0x1E7, 6]))
        if mode.wide and not draw(st.integers(0, 4)):
            value |= 1 << draw(st.integers(13, 63))
        if mode.name == "PAE" and level == 3:
            value &= bits(47, 12) | 0xE19  # a MOV to CR3 refuses reserved bits there
        chain.append(value)
    cr4 = draw(st.sampled_from([0, paged.SMEP, paged.SMAP, paged.SMEP | paged.SMAP]))
    touches = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans(), st.sampled_from([2, 2 | paged.AC])), min_size=4, max_size=4))
    return mode, chain, cr4, draw(st.sampled_from([0, paged.NXE])), draw(st.sampled_from([0, paged.WP])), touches


@pytest.fixture(scope="module")
def shared_host() -> Any:
    from kvmapi.model.host import ModelHost

    return ModelHost()


@examples(25)
@given(drawn=guests())
def test_any_table_by_a_guest(shared_host: Any, drawn: tuple[paged.Mode, list[int], int, int, int, list[tuple[str, bool, int]]]) -> None:
    """The same in a guest: what reaches its IDT, or the GPA that the access went to, and the bits in its tables."""
    mode, chain, cr4, off, wp, touches = drawn
    with paged.Paged(shared_host, mode, cr4=cr4) as guest:
        guest.vm.enable_cap(caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)  # not #UD for user code where no memory is
        guest.efer &= ~off if mode.wide else -1
        guest.cr0 &= ~wp
        for page in range(512):  # the code of ring 0 is nobody else's (SMEP, SMAP)
            at = guest.identity + page * guest.size
            if page != paged.USER_STACK - 1 >> 12:
                guest.set_word(at, guest.word(at) & ~paged.U)
        for level, value in zip(range(mode.levels, 0, -1), chain, strict=True):
            guest.set(level, value)
        va = guest.va + 0x800
        for page in (paged.TARGET, paged.OTHER, *(paged.TABLES + 0x1000 * n for n in range(1, mode.levels)), guest.root):
            guest.put(page + 0x800, paged.HLT)
        for kind, user, rflags in touches:
            guest.flush()
            own = guest.identity + (paged.ACCESS >> 12) * guest.size
            guest.set_word(own, guest.word(own) | (paged.U if user else 0))
            state = State(guest.cr0, guest.root, guest.cr4, guest.efer)
            memory = Memory({gfn: bytearray(guest.get(gfn << 12, PAGE)) for gfn in range(512)}, set())
            expected = expect(memory, state, va & -PAGE, Access(kind, user, bool(rflags & paged.AC)))
            if kind == "fetch" and isinstance(expected, Page) and expected.gfn < 512:
                guest.put(expected.gfn << 12 | 0x800, paged.HLT)
            got = touch(guest, kind, va, user, rflags)
            check(guest, got, expected, va, kind, user)
            after = [guest.entry(level) for level in range(mode.levels, 0, -1)]
            wanted = [memory.load(guest.at(level), guest.size) for level in range(mode.levels, 0, -1)]
            assert after == wanted, (kind, user)
            guest.set_word(own, guest.word(own) & ~paged.U)


def touch(guest: paged.Paged, kind: str, va: int, user: bool, rflags: int) -> Any:
    """As Paged.touch, but what it stores is the HLT that stands in every page that it may reach."""
    guest.put(paged.ACCESS, paged.INSTRUCTIONS[kind])
    guest.start(guest.vcpu, paged.ACCESS, user=user, rflags=rflags, rbx=va, rcx=paged.HLT[0])
    exit = guest.run()
    return guest.outcome(exit, va if kind == "fetch" else paged.ACCESS, va if kind == "fetch" else paged.ACCESS + 2, user=user)


def check(guest: paged.Paged, got: Any, expected: Page | Raised, va: int, kind: str, user: bool) -> None:
    if isinstance(expected, Raised):
        assert got == paged.Fault(14, expected.error, va)
    elif expected.gfn < 512:
        assert got is None, (kind, expected)
    elif kind == "fetch":
        assert got.name == "INTERNAL_ERROR", "code where no memory is"
    else:
        assert isinstance(got, Mmio) and (got.phys_addr, got.is_write) == (expected.gfn << 12 | va & 0xFFF, kind == "write")
        if not got.is_write:
            guest.vcpu.answer_mmio(got, bytes(4))
        assert guest.outcome(guest.run(), paged.ACCESS, paged.ACCESS + 2, user=user) is None


def test_a_table_in_memory_that_is_refused() -> None:
    """Private memory without a file: the walk gives the access up, and it is no page fault of the guest's."""

    class Gone(Physical):
        def locate(self, gfn: int, encrypted: bool, write: bool) -> Any:
            raise Refused("fault", gfn << 12, private=True)

    slots = Memslots(readonly_allowed=True)
    with pytest.raises(Refused) as caught:
        Paging(0x80000001, 0x5000, 0x20, 0x500, 0, PHYS_BITS).walk(Gone(slots, OwnMemory()), 0, False, False, False, False)
    assert (caught.value.kind, caught.value.gpa, caught.value.private) == ("fault", 0x5000, True)
