"""Translation as the processor does it, in every paging mode: who may touch a page, what a refused access pushes, and
which bits it leaves behind.

The same rows run on the model, on this machine's kernel and in the lab. A paravirtual kernel has long mode only (no 32-bit
paging), and QEMU's CPU, on which the lab runs, does not check everything that an AMD processor does: `lack` says what.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.exits import Hlt, Io, Mmio
from tests.conformance.paged import (
    AC,
    CHANGE,
    FETCH,
    LONG,
    MODES,
    NX,
    NXE,
    OTHER,
    PAE_MODE,
    PLAIN_MODE,
    PS,
    PSE_MODE,
    READ,
    SMAP,
    SMEP,
    TABLES,
    TARGET,
    USER_STACK,
    WP,
    WRITE,
    A,
    D,
    Fault,
    G,
    Mode,
    P,
    Paged,
    U,
    W,
)  # fmt: skip
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, MIB, PAGE, code

every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
wide_modes = pytest.mark.parametrize("mode", [LONG, PAE_MODE], ids=lambda mode: mode.name)
KINDS = (READ, WRITE, FETCH)
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16
NOWHERE = 0x4000_0000  # no slot there

LACKS = {
    "a paravirtual KVM": {"G at the top", "a store across two pages", "marks of a refused access"},  # G: not reserved on Intel's processors
    "the lab's CPU": {"G at the top"},
}


def lack(guest: Paged, name: str) -> None:
    """Skip what this host is known to lack."""
    if feature(guest, "the model"):
        return
    who = "the lab's CPU" if not feature(guest, "an exact CPU") else "a paravirtual KVM"
    if (who == "the lab's CPU" or not feature(guest, "hardware virtualization")) and name in LACKS[who]:
        pytest.skip(f"{who}: {name} is a known difference, see docs/fidelity.md")


def cause(kind: str, user: bool, mode: Mode, *, smep: bool = False) -> int:
    """The error code's bits that tell what was tried: the fetch bit only where NX or SMEP is on."""
    fetch = PF_I if kind == FETCH and (bool(mode.efer & NXE) or smep) else 0
    return (PF_W if kind == WRITE else 0) | (PF_U if user else 0) | fetch


def rsvd(guest: Paged) -> int:
    """A reserved bit was found in an entry that is present; QEMU's CPU does not say the latter."""
    return PF_RSVD | (PF_P if feature(guest, "an exact CPU") else 0)


@every_mode
def test_everybody_may_touch_an_open_page(any_host: Any, mode: Mode) -> None:
    with Paged(any_host, mode) as guest:
        guest.put(TARGET, b"left")
        for user in (False, True):
            for kind in (READ, WRITE, FETCH, CHANGE):
                assert guest.touch(kind, user=user, value=0x61) is None
        guest.put(TARGET, b"left")
        assert guest.touch(READ, guest.va) is None and guest.regs().rdx == int.from_bytes(b"left", "little")
        assert guest.touch(WRITE, guest.va + 8, value=0x31323334) is None and guest.get(TARGET + 8, 4) == b"4321"


@every_mode
def test_not_present_at_each_level(any_host: Any, mode: Mode) -> None:
    with Paged(any_host, mode) as guest:
        for level in range(1, mode.levels + 1):
            kept = guest.entry(level)
            for absent in (0, kept & ~P):
                guest.set(level, absent)
                for kind in KINDS:
                    for user in (False, True):
                        at = guest.va + 0x123
                        assert guest.touch(kind, at, user=user) == Fault(14, cause(kind, user, mode), at), (level, kind, user)
            guest.set(level, kept)
            assert guest.touch(READ) is None


@every_mode
def test_rights_are_what_all_levels_leave(any_host: Any, mode: Mode) -> None:
    """W and U missing at any level, one at a time (PAE's top level has neither)."""
    with Paged(any_host, mode) as guest:
        for level in range(1, mode.levels + 1):
            if mode is PAE_MODE and level == 3:
                continue
            kept = guest.entry(level)
            guest.set(level, kept & ~W)
            for user in (False, True):
                assert guest.touch(READ, user=user) is None and guest.touch(FETCH, user=user) is None
                assert guest.touch(WRITE, user=user) == Fault(14, PF_P | cause(WRITE, user, mode), guest.va), (level, user)
            guest.set(level, kept & ~U)
            for kind in KINDS:
                assert guest.touch(kind) is None
                assert guest.touch(kind, user=True) == Fault(14, PF_P | cause(kind, True, mode), guest.va), (level, kind)
            guest.set(level, kept)


@every_mode
def test_write_protect(any_host: Any, mode: Mode) -> None:
    """CR0.WP clear lets ring 0 store to read-only pages, and sets D; ring 3 never."""
    with Paged(any_host, mode) as guest:
        guest.change(1, off=W)
        guest.cr0 &= ~WP
        assert guest.touch(WRITE) is None and guest.entry(1) & (A | D) == A | D
        assert guest.touch(WRITE, user=True) == Fault(14, PF_P | PF_W | PF_U, guest.va)
        guest.cr0 |= WP
        assert guest.touch(WRITE) == Fault(14, PF_P | PF_W, guest.va)


@wide_modes
def test_no_execute(any_host: Any, mode: Mode) -> None:
    """NX at any level that has it; without EFER.NXE it is a reserved bit."""
    with Paged(any_host, mode) as guest:
        for level in range(1, mode.levels + 1):
            if mode is PAE_MODE and level == 3:
                continue
            guest.change(level, on=NX)
            for user in (False, True):
                assert guest.touch(READ, user=user) is None and guest.touch(WRITE, user=user) is None
                assert guest.touch(FETCH, user=user) == Fault(14, PF_P | PF_I | (PF_U if user else 0), guest.va), (level, user)
            guest.efer &= ~NXE
            for kind in KINDS:
                error = rsvd(guest) | (PF_W if kind == WRITE else 0)
                assert guest.touch(kind) == Fault(14, error, guest.va), (level, kind, "without NXE the fetch bit is never set")
            guest.efer |= NXE
            guest.change(level, off=NX)


@every_mode
def test_smep(any_host: Any, mode: Mode) -> None:
    with Paged(any_host, mode) as guest:
        if not offered(guest, 7):
            pytest.skip(f"{any_host.name}: CPUID offers no SMEP")
        assert guest.touch(FETCH) is None
        supervisor_only(guest)
        guest.cr4 |= SMEP
        assert guest.touch(FETCH) == Fault(14, PF_P | PF_I, guest.va) and guest.touch(READ) is None
        guest.change(1, off=U)
        assert guest.touch(FETCH) is None
        guest.change(1, off=P)
        assert guest.touch(FETCH) == Fault(14, PF_I, guest.va), "SMEP alone brings the fetch bit"


@every_mode
def test_smap(any_host: Any, mode: Mode) -> None:
    """Ring 0 reaches user pages only with RFLAGS.AC; fetches and ring 3 do not care. One page with U clear at any level is
    no user page.
    """
    with Paged(any_host, mode) as guest:
        if not offered(guest, 20):
            pytest.skip(f"{any_host.name}: CPUID offers no SMAP")
        guest.cr4 |= SMAP
        supervisor_only(guest)
        for kind in (READ, WRITE):
            assert guest.touch(kind) == Fault(14, PF_P | cause(kind, False, mode), guest.va)
            assert guest.touch(kind, rflags=2 | AC) is None
        assert guest.touch(FETCH) is None
        guest.cr4 &= ~SMAP
        assert guest.touch(READ) is None
        guest.cr4 |= SMAP
        guest.change(2, off=U)
        assert guest.touch(READ) is None and guest.touch(WRITE) is None


@every_mode
def test_smap_holds_for_the_data_of_code_in_a_user_page(any_host: Any, mode: Mode) -> None:
    """Ring 0 may fetch from a user page (without SMEP) and may still not read it: code there cannot read its own page."""
    with Paged(any_host, mode) as guest:
        if not offered(guest, 20):
            pytest.skip(f"{any_host.name}: CPUID offers no SMAP")
        guest.cr4 |= SMAP
        supervisor_only(guest)
        guest.put(TARGET, code("908b1390 f4", "nop; mov edx, [rbx]; nop; hlt"))
        guest.start(guest.vcpu, guest.va, rbx=guest.va + 0x800)
        assert guest.outcome(guest.run(), guest.va + 1, guest.va + 4) == Fault(14, PF_P, guest.va + 0x800)


def offered(guest: Paged, bit: int) -> bool:
    """Does CPUID leaf 7 offer this bit of EBX?"""
    return any(entry.function == 7 and entry.index == 0 and entry.ebx >> bit & 1 for entry in guest.system.supported_cpuid())


def supervisor_only(guest: Paged) -> None:
    """The identity map belongs to ring 0 alone: with SMAP its stack could not be used otherwise."""
    for page in range(512):
        at = guest.identity + page * guest.size
        guest.set_word(at, guest.word(at) & ~U)


# ---- accessed and dirty bits


@every_mode
def test_accessed_and_dirty(any_host: Any, mode: Mode) -> None:
    """A where an entry was used, D in the leaf of a page that was written, nothing else; what is set stays."""
    with Paged(any_host, mode) as guest:
        top = A if mode is not PAE_MODE or not feature(guest, "an exact CPU") else 0  # QEMU's CPU marks PAE's top as well
        above = [top, *[A] * (mode.levels - 2)]
        clear = [guest.entry(level) & ~(A | D) for level in range(1, mode.levels + 1)]
        for kind, leaf in ((READ, A), (FETCH, A), (WRITE, A | D), (CHANGE, A | D)):
            for user in (False, True):
                for level, value in enumerate(clear, 1):
                    guest.set(level, value)
                assert guest.marks() == [0] * mode.levels
                assert guest.touch(kind, user=user) is None
                assert guest.marks() == [*above, leaf], (kind, user)
                assert [guest.entry(level) & ~(A | D) for level in range(1, mode.levels + 1)] == clear, "and nothing else"
        assert guest.touch(READ) is None and guest.marks() == [*above, A | D]


@every_mode
def test_a_store_to_a_clean_page_that_was_read(any_host: Any, mode: Mode) -> None:
    """The read leaves a translation behind; the store must set D all the same, without any flush."""
    text = code("8b138b53 04890bf4", "mov edx, [rbx]; mov edx, [rbx + 4]; mov [rbx], ecx; hlt")
    with Paged(any_host, mode) as guest:
        assert guest.program(text[:5] + b"\xf4", rbx=guest.va) == Hlt() and guest.entry(1) & (A | D) == A
        assert guest.program(text, rbx=guest.va) == Hlt() and guest.entry(1) & (A | D) == A | D


@every_mode
def test_marks_of_a_refused_access(any_host: Any, mode: Mode) -> None:
    """A where the walk went through, nothing in the entry that refused, nor below."""
    with Paged(any_host, mode) as guest:
        lack(guest, "marks of a refused access")
        kept = [guest.entry(level) for level in range(1, mode.levels + 1)]
        above = [0 if mode is PAE_MODE and feature(guest, "an exact CPU") else A, *[A] * (mode.levels - 2)]
        for level in range(1, mode.levels if mode is PAE_MODE else mode.levels + 1):
            for number, value in enumerate(kept, 1):
                guest.set(number, value & ~(P if number == level else 0))
            assert guest.touch(WRITE) == Fault(14, PF_W, guest.va)
            assert guest.marks() == above[: mode.levels - level] + [0] * level, level
        for off, kind, user, error in ((W, WRITE, False, PF_P | PF_W), (U, READ, True, PF_P | PF_U)):
            for number, value in enumerate(kept, 1):
                guest.set(number, value & ~(off if number == 1 else 0))
            assert guest.touch(kind, user=user) == Fault(14, error, guest.va)
            assert guest.marks() == [*above, 0]


# ---- large pages


LARGE = [(LONG, 2), (LONG, 3), (PAE_MODE, 2), (PSE_MODE, 2)]


@pytest.mark.parametrize(("mode", "level"), LARGE, ids=["2 MiB", "1 GiB", "2 MiB in PAE", "4 MiB"])
def test_large_pages(any_host: Any, mode: Mode, level: int) -> None:
    """The address comes from the entry above, rights and marks too. GPA 0 is mapped, where the guest's memory is."""
    with Paged(any_host, mode) as guest:
        if level == 3 and not any(entry.function == 0x80000001 and entry.edx >> 26 & 1 for entry in guest.system.supported_cpuid()):
            pytest.skip(f"{any_host.name}: CPUID offers no pages of 1 GiB")
        size = 1 << mode.shift(level)
        guest.set(level, P | W | U | PS)
        va = (guest.va & -size) + TARGET
        for user in (False, True):
            for kind in (*KINDS, CHANGE):
                assert guest.touch(kind, va + 0x123, user=user) is None, (kind, user)
        assert guest.entry(level) & (A | D) == A | D and guest.vcpu.translate(va + 5) == TARGET + 5
        guest.set(level, P | W | U | PS)
        assert guest.touch(READ, va) is None and guest.entry(level) & (A | D) == A
        guest.set(level, P | PS)
        assert guest.touch(WRITE, va) == Fault(14, PF_P | PF_W, va) and guest.touch(READ, va, user=True) == Fault(14, PF_P | PF_U, va)
        if mode.efer & NXE:
            guest.set(level, P | W | U | PS | NX)
            assert guest.touch(FETCH, va) == Fault(14, PF_P | PF_I, va)


def test_without_pse_there_are_no_large_pages(any_host: Any) -> None:
    """The bit is ignored: the entry points to a table."""
    with Paged(any_host, PLAIN_MODE) as guest:
        guest.change(2, on=PS)
        guest.put(TARGET, b"four")
        assert guest.touch(READ) is None and guest.regs().rdx == int.from_bytes(b"four", "little")


def test_pse_36(any_host: Any) -> None:
    """Bits 20:13 of a 4 MiB page's entry are bits 39:32 of its address. No slot is there: MMIO with that address."""
    with Paged(any_host, PSE_MODE) as guest:
        if not any(entry.function == 1 and entry.edx >> 17 & 1 for entry in guest.system.supported_cpuid()):
            pytest.skip(f"{any_host.name}: CPUID offers no PSE-36")
        guest.set(2, P | W | U | PS | 0x5 << 13)
        va = (guest.va & -0x400000) + 0x123450
        assert guest.touch(READ, va) == Mmio(0x5_0012_3450, 4, False, b"") and guest.vcpu.translate(va) == 0x5_0012_3450


# ---- reserved bits


def reserved_rows() -> list[Any]:
    rows = [
        (LONG, 1, 1 << 51, "bit 51"), (LONG, 2, 1 << 51, "bit 51"), (LONG, 3, 1 << 51, "bit 51"), (LONG, 4, 1 << 51, "bit 51"),
        (LONG, 4, PS, "PS at the top"), (LONG, 4, G, "G at the top"),
        (LONG, 2, PS | 1 << 13, "2 MiB, bit 13"), (LONG, 2, PS | 1 << 20, "2 MiB, bit 20"),
        (LONG, 3, PS | 1 << 13, "1 GiB, bit 13"), (LONG, 3, PS | 1 << 29, "1 GiB, bit 29"),
        (PAE_MODE, 1, 1 << 62, "bit 62"), (PAE_MODE, 1, 1 << 52, "bit 52"), (PAE_MODE, 2, 1 << 62, "bit 62"),
        (PAE_MODE, 2, PS | 1 << 20, "2 MiB, bit 20"),
        (PSE_MODE, 2, PS | 1 << 21, "4 MiB, bit 21"),
    ]  # fmt: skip
    return [pytest.param(*row, id=f"{row[0].name}, level {row[1]}, {row[3]}") for row in rows]


@pytest.mark.parametrize(("mode", "level", "bits", "name"), reserved_rows())
def test_reserved_bits(any_host: Any, mode: Mode, level: int, bits: int, name: str) -> None:
    """RSVD comes with P, and before any right is asked for: read-only, user and NX make no difference."""
    with Paged(any_host, mode) as guest:
        lack(guest, name)
        kept = guest.entry(level)
        if bits & PS and level < 4:
            kept = P | W | U
        guest.set(level, kept | bits)
        for kind in KINDS:
            for user in (False, True):
                expected = Fault(14, rsvd(guest) | cause(kind, user, mode), guest.va)
                assert guest.touch(kind, user=user) == expected, (kind, user)
        guest.set(level, (kept | bits) & ~(W | U))
        assert guest.touch(WRITE) == Fault(14, rsvd(guest) | PF_W, guest.va)
        guest.set(level, (kept | bits) & ~P)
        assert guest.touch(READ) == Fault(14, 0, guest.va), "what is not present has no reserved bits"
        assert guest.vcpu.translate(guest.va) is None


IGNORED = [(LONG, 1, 0x7FF << 52 | 0xE18), (LONG, 2, 0x7FF << 52 | 0xF58), (LONG, 3, 0x7FF << 52 | 0xF58), (LONG, 4, 0x7FF << 52 | 0xE58),
           (PAE_MODE, 1, 0xE18), (PAE_MODE, 2, 0xF58), (PAE_MODE, 3, 0xE18), (PSE_MODE, 1, 0xE18), (PSE_MODE, 2, 0xF58),
           (PLAIN_MODE, 2, 0xFD8)]  # fmt: skip


@pytest.mark.parametrize(("mode", "level", "bits"), IGNORED, ids=lambda value: getattr(value, "name", None) or f"{value:#x}")
def test_bits_that_mean_nothing(any_host: Any, mode: Mode, level: int, bits: int) -> None:
    """Cacheability, what is left to the system, D and G of what is no leaf."""
    with Paged(any_host, mode) as guest:
        guest.change(level, on=bits)
        before = guest.entry(level) | A
        for kind in KINDS:
            assert guest.touch(kind, user=True) is None
        assert guest.entry(level) | A | (D if level == 1 else 0) == before | (D if level == 1 else 0)


# ---- what entries point to


@every_mode
def test_a_table_where_no_memory_is(any_host: Any, mode: Mode) -> None:
    """As KVM: not present. Nothing is read as an entry that user space would have to answer for."""
    with Paged(any_host, mode) as guest:
        # KVM's emulator, which finds the table missing, goes by PAE's top entries as they were when CR3 was loaded.
        for level in range(2, mode.levels + (0 if mode is PAE_MODE else 1)):
            kept = guest.entry(level)
            guest.set(level, NOWHERE | kept & 0xFFF)
            for kind in KINDS:
                # At an offset that no entry of the absent table has: KVM's emulator goes by that, see gpa_available there.
                at = guest.va + 0x124
                assert guest.touch(kind, at) == Fault(14, cause(kind, False, mode), at), (level, kind)
            assert guest.vcpu.translate(guest.va) is None
            guest.set(level, kept)
            assert guest.touch(READ) is None


@every_mode
def test_a_page_where_no_memory_is(any_host: Any, mode: Mode) -> None:
    """MMIO with the guest-physical address, after the rights were asked for; marks are set as for memory."""
    with Paged(any_host, mode) as guest:
        guest.set(1, NOWHERE + 0x5000 | P | W)
        exit = guest.touch(READ, guest.va + 0x10)
        assert exit == Mmio(NOWHERE + 0x5010, 4, False, b"")
        assert isinstance(exit, Mmio)
        guest.vcpu.answer_mmio(exit, b"\x11\x22\x33\x44")
        assert guest.run() == Hlt() and guest.regs().rdx == 0x44332211
        assert guest.touch(WRITE, guest.va + 0x10) == Mmio(NOWHERE + 0x5010, 4, True, b"\x5a\0\0\0")
        assert guest.run() == Hlt()
        assert guest.touch(READ, user=True) == Fault(14, PF_P | PF_U, guest.va)
        guest.change(1, off=W)
        assert guest.touch(WRITE) == Fault(14, PF_P | PF_W, guest.va)


@every_mode
def test_tables_in_tables(any_host: Any, mode: Mode) -> None:
    """An entry that points to its own table makes the tables visible at addresses of their own; a store there changes
    translation, and the marks are in the entries that are read.
    """
    if mode is PAE_MODE:
        pytest.skip("PAE's top level has a format of its own, so its tables cannot be seen through themselves")
    with Paged(any_host, mode) as guest:
        index = 5
        entry = guest.root + index * guest.size
        guest.set_word(entry, guest.root | P | W)
        bits = 9 if mode.wide else 10
        va = 0
        for level in range(mode.levels, 0, -1):
            va |= index << mode.shift(level)
        window = va  # the root table itself
        assert guest.touch(READ, window + index * guest.size) is None
        assert guest.regs().rdx == (guest.root | P | W | A), "A was set by the walk, before the load"
        assert guest.touch(WRITE, window + 0x200, value=0x77) is None and guest.get(guest.root + 0x200, 1) == b"\x77"
        assert guest.word(entry) & (A | D) == A | D, "one entry at every level: also the leaf's dirty bit"
        # The entry of the page under test, by its place in the tables: all shifts by one level.
        leaf = index << mode.shift(mode.levels) | (guest.va & (1 << mode.shift(mode.levels) + bits) - 1) >> bits & -guest.size
        assert guest.touch(WRITE, leaf, value=OTHER | P | W) is None and guest.entry(1) == OTHER | P | W
        guest.put(OTHER, b"moved")
        assert guest.touch(READ) is None and guest.regs().rdx == int.from_bytes(b"move", "little")


@every_mode
def test_a_table_that_is_its_own_page(any_host: Any, mode: Mode) -> None:
    """The leaf points to the table that it is in: the guest stores to its own entry through it."""
    with Paged(any_host, mode) as guest:
        table = TABLES + 0x1000
        guest.set(1, table | P | W)
        at = guest.va + mode.index(1, guest.va) * guest.size
        assert guest.touch(READ, at) is None and guest.regs().rdx == table | P | W | A
        assert guest.touch(WRITE, at, value=TARGET | P | W) is None and guest.entry(1) & ~(A | D) == TARGET | P | W
        guest.put(TARGET, b"page")
        assert guest.touch(READ) is None and guest.regs().rdx == int.from_bytes(b"page", "little")
        if mode.wide and mode is not PAE_MODE:
            guest.set(2, TABLES + 0x2000 | P | W)  # the directory as its own table of pages
            back = (guest.va & -(1 << 21)) + ((mode.index(2, guest.va)) << 12)
            assert guest.touch(READ, back + mode.index(2, guest.va) * 8) is None and guest.regs().rdx & -PAGE == TABLES + 0x2000


# ---- changes and flushes


FLUSHES = {
    "INVLPG": code("8b13892f 0f013b8b 03f4", "mov edx, [rbx]; mov [rdi], ebp; invlpg [rbx]; mov eax, [rbx]; hlt"),
    "MOV to CR3": code("8b13892f 0f20d90f 22d98b03 f4", "mov edx, [rbx]; mov [rdi], ebp; mov rcx, cr3; mov cr3, rcx; mov eax, [rbx]; hlt"),
}
NO_FLUSH = code("892f8b03 890bf4", "mov [rdi], ebp; mov eax, [rbx]; mov [rbx], ecx; hlt")
TWO_ROOTS = code("0f22de03 130f22df 032bffc9 75f2f4", "0: mov cr3, rsi; add edx, [rbx]; mov cr3, rdi; add ebp, [rbx]; dec ecx; jnz 0b; hlt")


def labelled(guest: Paged) -> tuple[int, int]:
    guest.put(TARGET, b"left")
    guest.put(OTHER, b"else")
    return int.from_bytes(b"left", "little"), int.from_bytes(b"else", "little")


@every_mode
@pytest.mark.parametrize("how", FLUSHES)
def test_a_present_entry_changes_and_is_flushed(any_host: Any, mode: Mode, how: str) -> None:
    with Paged(any_host, mode) as guest:
        left, other = labelled(guest)
        for _ in range(2):
            assert guest.program(FLUSHES[how], rbx=guest.va, rdi=guest.at(1), rbp=OTHER | P | W) == Hlt()
            assert guest.vector() is None and guest.regs().rdx == left and guest.regs().rax & 0xFFFFFFFF == other
            assert guest.program(FLUSHES[how], rbx=guest.va, rdi=guest.at(1), rbp=0) == Hlt()
            assert guest.vector() == 14 and guest.regs().rdx == other
            guest.set(1, TARGET | P | W)


@every_mode
def test_entries_that_allow_more_need_no_flush(any_host: Any, mode: Mode) -> None:
    """Not present to present, and read-only to writable: a fault is never remembered."""
    with Paged(any_host, mode) as guest:
        left, other = labelled(guest)
        guest.set(1, 0)
        assert guest.touch(READ) == Fault(14, 0, guest.va)
        assert guest.program(NO_FLUSH, rbx=guest.va, rdi=guest.at(1), rbp=TARGET | P) == Hlt() and guest.vector() == 14
        assert guest.regs().rax & 0xFFFFFFFF == left and guest.frame_error() == PF_P | PF_W
        assert guest.program(NO_FLUSH, rbx=guest.va, rdi=guest.at(1), rbp=TARGET | P | W, rcx=other) == Hlt() and guest.vector() is None
        assert guest.get(TARGET, 4) == b"else"


@every_mode
def test_user_space_changes_entries_between_runs(any_host: Any, mode: Mode) -> None:
    """Each time the guest loads CR3 before it looks."""
    with Paged(any_host, mode) as guest:
        labels = dict(zip((TARGET, OTHER), labelled(guest), strict=True))
        for number in range(6):
            page = (TARGET, OTHER)[number % 2]
            guest.set(1, page | P | W)
            assert guest.touch(READ) is None and guest.regs().rdx == labels[page]
            if number == 3:
                guest.change(2, off=P)
                assert guest.touch(READ) == Fault(14, 0, guest.va)
                guest.change(2, on=P)


@every_mode
def test_two_roots_in_turn(any_host: Any, mode: Mode) -> None:
    """The same address in two address spaces, 20 switches; then the one that is not in use changes."""
    with Paged(any_host, mode) as guest:
        first, second = guest.root, guest.second_root(OTHER)
        guest.put(TARGET, (3).to_bytes(4, "little"))
        guest.put(OTHER, (500).to_bytes(4, "little"))
        assert guest.program(TWO_ROOTS, rbx=guest.va, rsi=first, rdi=second, rcx=10) == Hlt()
        assert (guest.vector(), guest.regs().rdx, guest.regs().rbp) == (None, 30, 5000)
        guest.set(1, (TARGET + 2 * PAGE) | P | W)
        guest.put(TARGET + 2 * PAGE, (7).to_bytes(4, "little"))
        assert guest.program(TWO_ROOTS, rbx=guest.va, rsi=second, rdi=first, rcx=10) == Hlt()
        assert (guest.vector(), guest.regs().rdx, guest.regs().rbp) == (None, 5000, 70)


# ---- where a fault is


@every_mode
def test_an_access_across_two_pages(any_host: Any, mode: Mode) -> None:
    """CR2 is the first byte that was refused, and nothing of a store is made."""
    with Paged(any_host, mode) as guest:
        after = guest.va + PAGE
        guest.map(after, OTHER)
        guest.put(TARGET, bytes(2 * PAGE))
        assert guest.touch(WRITE, after - 2, value=0x44332211) is None and guest.get(OTHER - 2, 4) == b"\x11\x22\x33\x44"
        lack(guest, "a store across two pages")
        for rights, error in ((0, 0), (P, PF_P)):
            guest.map(after, OTHER, rights)
            assert guest.touch(WRITE, after - 2) == Fault(14, error | PF_W, after)
            assert guest.get(OTHER - 2, 4) == b"\x11\x22\x33\x44"
            assert guest.touch(READ, after - 2) == (None if rights else Fault(14, 0, after))
        guest.map(after, OTHER)
        guest.set(1, 0)
        assert guest.touch(READ, after - 2) == Fault(14, 0, after - 2)


@every_mode
@pytest.mark.parametrize("inside", [0, 1, 2])
def test_code_runs_into_a_page_that_is_absent(any_host: Any, mode: Mode, inside: int) -> None:
    """What stands before the page is executed; the fault is the next instruction's, at the page (CR2)."""
    with Paged(any_host, mode) as guest:
        after = guest.va + PAGE
        guest.map(after, OTHER, 0)
        text = code("89ca8913", "mov edx, ecx; mov [rbx], edx") + code("b9040302 01f4", "mov ecx, 0x1020304; hlt")
        at = guest.va + PAGE - 4 - inside
        guest.put(TARGET + PAGE - 4 - inside, text)
        guest.start(guest.vcpu, at, rbx=DATA, rcx=0x55)
        assert guest.run() == Hlt() and guest.vector() == 14 and guest.get(DATA, 1) == b"\x55", "executed"
        assert (guest.frame_error(), guest.vcpu.get_sregs().cr2) == (cause(FETCH, False, mode), after)
        assert guest.frame_rip() == at + 4


@every_mode
@pytest.mark.parametrize("smap", [False, True], ids=["", "SMAP"])
def test_an_out_of_ring_3_across_two_pages(any_host: Any, mode: Mode, smap: bool) -> None:
    """An instruction that needs the VMM, half on a page that ring 0 may not read."""
    with Paged(any_host, mode) as guest:
        if smap and not offered(guest, 20):
            pytest.skip(f"{any_host.name}: CPUID offers no SMAP")
        guest.map(guest.va + PAGE, OTHER)
        supervisor_only(guest)
        stack = guest.identity + (USER_STACK - 1 >> 12) * guest.size
        guest.set_word(stack, guest.word(stack) | U)
        guest.cr4 |= SMAP if smap else 0
        guest.put(TARGET + PAGE - 1, code("e610f4", "out 0x10, al; hlt"))
        guest.start(guest.vcpu, guest.va + PAGE - 1, user=True, rflags=2 | 3 << 12, rax=0x41)
        exit = guest.run()
        assert isinstance(exit, Io) and (exit.port, exit.size, exit.is_out, exit.data) == (0x10, 1, True, b"A")
        assert guest.outcome(guest.run(), guest.va, guest.va + PAGE + 1, user=True) is None


def test_addresses_that_are_not_canonical(any_host: Any) -> None:
    with Paged(any_host, LONG) as guest:
        for va in (1 << 47, (1 << 64) - (1 << 47) - 8, 1 << 63):
            for kind in (READ, WRITE):
                assert guest.touch(kind, va) == Fault(13, 0), hex(va)
        top = (1 << 64) - 8
        assert guest.touch(READ, top) == Fault(14, 0, top) and guest.touch(READ, (1 << 47) - 4) == Fault(14, 0, (1 << 47) - 4)


@every_mode
def test_kvm_translate(any_host: Any, mode: Mode) -> None:
    """KVM_TRANSLATE asks as ring 0 would that reads: rights for writing and for ring 3 make no difference."""
    with Paged(any_host, mode) as guest:
        assert guest.vcpu.translate(guest.va + 0x123) == TARGET + 0x123 and guest.vcpu.translate(CODE) == CODE
        for off in (W, U, W | U):
            guest.change(1, off=off)
            assert guest.vcpu.translate(guest.va) == TARGET
        guest.set(1, NOWHERE | P)
        assert guest.vcpu.translate(guest.va + 1) == NOWHERE + 1
        for level in range(1, mode.levels + (0 if mode is PAE_MODE else 1)):  # processors may keep PAE's top entries
            kept = guest.entry(level)
            guest.set(level, kept & ~P)
            assert guest.vcpu.translate(guest.va) is None
            guest.set(level, kept)
        if mode is LONG:
            assert guest.vcpu.translate((1 << 48) - MIB) is None


def test_without_paging_addresses_are_physical(any_host: Any) -> None:
    with Paged(any_host, PLAIN_MODE) as guest:
        guest.cr0 &= ~(1 << 31)
        assert guest.touch(WRITE, TARGET + 4, reload=False, value=0x34333231) is None and guest.get(TARGET + 4, 4) == b"1234"
        assert guest.touch(READ, guest.va, reload=False) == Mmio(guest.va, 4, False, b"")
        assert guest.vcpu.translate(0x12345678) == 0x12345678
