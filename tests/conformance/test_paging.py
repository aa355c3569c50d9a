"""Translation as the processor does it, in every paging mode: who may touch a page, what a refused access pushes, and
which bits it leaves behind.

The same rows run on the model, on this machine's kernel and in the lab. A paravirtual kernel has long mode only (no 32-bit
paging), and QEMU's CPU, on which the lab runs, does not check everything that an AMD processor does: `lack` says what.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.exits import Hlt, Mmio
from tests.conformance.paged import (
    AC,
    CHANGE,
    FETCH,
    LONG,
    NX,
    NXE,
    PAE_MODE,
    PLAIN_MODE,
    PS,
    PSE_MODE,
    READ,
    SMAP,
    SMEP,
    TARGET,
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
from tests.conformance.paging_words import (
    KINDS,
    PF_I,
    PF_P,
    PF_U,
    PF_W,
    cause,
    every_mode,
    lack,
    offered,
    rsvd,
    supervisor_only,
    wide_modes,
)
from tests.conformance.rows import feature
from tests.conformance.snippets import code


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
