"""Paging: what entries point to, changes and flushes, and where a fault is. The rights are test_paging.py's."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Io, Mmio
from tests.conformance.paged import (
    FETCH,
    LONG,
    OTHER,
    PAE_MODE,
    PLAIN_MODE,
    READ,
    SMAP,
    TABLES,
    TARGET,
    USER_STACK,
    WRITE,
    A,
    D,
    Fault,
    Mode,
    P,
    Paged,
    U,
    W,
)  # fmt: skip
from tests.conformance.paging_words import (
    KINDS,
    NOWHERE,
    PF_P,
    PF_U,
    PF_W,
    cause,
    every_mode,
    lack,
    offered,
    supervisor_only,
)
from tests.conformance.snippets import ALIAS, CODE, DATA, GDT, IDT, MIB, PAGE, PD_ALIAS, STACK, STUBS, TSS, LongGuest, code

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


def test_the_address_of_a_fault_after_other_tables_were_loaded(any_host: Any) -> None:
    """Nothing that ran under the old tables is there any more: not its instructions either, which an engine may look for."""
    text = code("0f22d8 488b1f f4", "mov cr3, rax; mov rbx, [rdi]; hlt")
    undefined = bytes.fromhex("f00fa3c0")  # lock bt eax, eax: an engine that cannot bear it looks out for it
    with LongGuest(any_host, code("e610 f4", "out 0x10, al; hlt") + undefined) as guest:
        assert isinstance(guest.run(), Io)
        other = 0x40000
        guest.put(other, struct.pack("<Q", other + 0x1003))
        guest.put(other + 0x1000, struct.pack("<2Q", 0, PD_ALIAS | 3))
        guest.put(CODE + 0x1000, text)
        guest.set_gate(14, ALIAS + STUBS + 16 * 14)
        sregs = guest.vcpu.get_sregs()
        sregs.idt.base, sregs.gdt.base, sregs.tr.base = ALIAS + IDT, ALIAS + GDT, ALIAS + TSS
        guest.vcpu.set_sregs(sregs)
        for address in (0x123450, (1 << 31) + 0x678):
            found = guest.again(rip=ALIAS + CODE + 0x1000, rsp=ALIAS + STACK, rax=other, rdi=address)
            assert (found, guest.regs().rip - 1, guest.vcpu.get_sregs().cr2) == (Hlt(), ALIAS + STUBS + 16 * 14, address)
