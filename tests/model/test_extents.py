"""Pages that the engine finds without Python: the bits that are set, and every change that must be seen all the same."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.exits import Hlt, Io, Mmio
from kvmapi.model.cpu import extents
from tests.conformance.snippets import PAGE, PDPT, LongGuest, address_of, code

PAGES = 512
GPA, TABLES, VA, ALIAS = 64 << 30, 32 << 30, 4 << 30, 5 << 30
P_RW_US, P_RW = 7, 3
ACCESSED, DIRTY = 0x20, 0x40
NX = 1 << 63
STORES = code("488903 4881c300100000 48ffc9 75f1 f4", "mov [rbx], rax; add rbx, 0x1000; dec rcx; jnz $-13; hlt")
LOADS = code("480303 4881c300100000 48ffc9 75f1 f4", "add rax, [rbx]; add rbx, 0x1000; dec rcx; jnz $-13; hlt")
SWEEP_AND_CALL = code(
    "488903 4881c300100000 48ffc9 75f1 c707c3c3c3c3 ffd6 c707e680c3c3 ffd6 f4",
    "mov [rbx], rax; add rbx, 0x1000; dec rcx; jnz $-13; mov dword ptr [rdi], 0xc3c3c3c3; call rsi;"
    " mov dword ptr [rdi], 0xc3c380e6; call rsi; hlt",
)


class Swept(LongGuest):
    """A guest with slot 1 of 2 MiB at 64 GiB, seen at 4 GiB through a table of its own (`huge`: one large page)."""

    def __init__(self, host: Any, text: bytes, *, huge: bool = False, flags: int = 0) -> None:
        super().__init__(host, text)
        self.data = mmap.mmap(-1, PAGES * PAGE)
        self.tables = mmap.mmap(-1, 2 * PAGE)
        self.vm.set_user_memory_region(1, GPA, PAGES * PAGE, address_of(self.data), flags)
        self.vm.set_user_memory_region(2, TABLES, 2 * PAGE, address_of(self.tables))
        self.put(PDPT + 8 * 4, struct.pack("<2Q", TABLES | P_RW_US, TABLES | P_RW_US))  # and again at ALIAS
        if huge:
            self.set_directory(GPA | P_RW | 0x80)
        else:
            self.set_directory(TABLES + PAGE | P_RW_US)
        for page in range(PAGES):
            self.set_entry(page, GPA + page * PAGE | P_RW)
        self.closing += [self.data, self.tables]

    def set_directory(self, value: int) -> None:
        struct.pack_into("<Q", self.tables, 0, value)

    def set_entry(self, page: int, value: int) -> None:
        struct.pack_into("<Q", self.tables, PAGE + 8 * page, value)

    def entry(self, page: int) -> int:
        return int(struct.unpack_from("<Q", self.tables, PAGE + 8 * page)[0])

    def word(self, page: int) -> int:
        return int(struct.unpack_from("<Q", self.data, page * PAGE)[0])

    def sweep(self, value: int = 0, first: int = 0, pages: int = PAGES) -> Any:
        """Store `value` to pages [first, first+pages), or add up what stands there to it."""
        return self.again(rax=value, rbx=VA + first * PAGE, rcx=pages)

    def warm(self) -> None:
        """The guest sweeps until most of it needs no Python."""
        self.warm_by_host()
        for _ in range(3):
            assert self.sweep(1) == Hlt()

    def warm_by_host(self) -> None:
        """All pages are there, and known to be."""
        for page in range(PAGES):
            self.data[page * PAGE] = 0
        physical = self.host._files[self.vm.fd][0].physical
        physical._writable.add_range(address_of(self.data) // PAGE, address_of(self.data) // PAGE + PAGES)

    def calls(self) -> int:
        """How many pages of one sweep were asked of Python."""
        mmu = self.host._files[self.vcpu.fd][0].cpu.mmu
        mmu._shadows.clear()
        mmu.generation = -1  # the engine's TLB is emptied, and the extents go: they are made again in a first sweep
        assert self.sweep(1) == Hlt()
        mmu._native.flush_tlb()
        seen: list[int] = []
        convert = mmu._convert
        mmu._shadows.clear()
        mmu._convert = lambda va, *rest: (seen.append(va), convert(va, *rest))[1]
        try:
            assert self.sweep(1) == Hlt()
        finally:
            del mmu._convert
        return sum(VA <= va < VA + PAGES * PAGE for va in seen)

    def dirty(self) -> set[int]:
        """KVM_GET_DIRTY_LOG of slot 1."""
        bits = bytearray(PAGES // 8)
        argument = s.kvm_dirty_log(slot=1)
        argument.dirty_bitmap = ctypes.addressof(ctypes.c_char.from_buffer(bits))
        self.vm.ioctl(ioctls.KVM_GET_DIRTY_LOG, argument)
        return {page for page in range(PAGES) if bits[page // 8] >> page % 8 & 1}


@pytest.fixture(params=[False, True], ids=["4 KiB", "2 MiB"])
def huge(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_the_listing_is_the_code(tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("needs binutils")
    source = tmp_path / "fill.s"
    source.write_text(".intel_syntax noprefix\n" + extents.LISTING.replace(";", "\n").replace(":", ":\n"))
    subprocess.run(["as", "--64", source, "-o", tmp_path / "fill.o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "fill.o", tmp_path / "fill.bin"], check=True)
    assert (tmp_path / "fill.bin").read_bytes() == extents.CODE


def test_a_sweep_needs_no_python(model_host: Any, huge: bool) -> None:
    with Swept(model_host, STORES, huge=huge) as guest:
        guest.warm()
        assert guest.calls() < PAGES // 8, "what went before was thrown away: a few conversions make an extent"
        assert guest.sweep(0x1234) == Hlt() and all(guest.word(page) == 0x1234 for page in range(PAGES))


def test_accessed_and_dirty_bits(model_host: Any) -> None:
    with Swept(model_host, STORES) as guest:
        guest.warm()
        for page in range(PAGES):
            guest.set_entry(page, GPA + page * PAGE | P_RW)
        assert guest.sweep(2) == Hlt()
        assert all(guest.entry(page) == GPA + page * PAGE | P_RW | ACCESSED | DIRTY for page in range(PAGES))
        guest.put(0x10000, LOADS)
        for page in range(PAGES):
            guest.set_entry(page, GPA + page * PAGE | P_RW)
        assert guest.sweep(0) == Hlt() and guest.regs().rax == 2 * PAGES
        assert all(guest.entry(page) == GPA + page * PAGE | P_RW | ACCESSED for page in range(PAGES)), "a load does not dirty"


def test_the_dirty_log(model_host: Any, huge: bool) -> None:
    with Swept(model_host, STORES, huge=huge, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES) as guest:
        guest.warm()
        assert guest.dirty() == set(range(PAGES)) and guest.dirty() == set()
        for first, pages in ((0, PAGES), (3, 200), (100, 1), (0, PAGES)):
            assert guest.sweep(7, first, pages) == Hlt()
            assert guest.sweep(8, first, pages) == Hlt()
            assert guest.dirty() == set(range(first, first + pages))
        guest.put(0x10000, LOADS)
        assert guest.sweep(0) == Hlt() and guest.dirty() == set()
        guest.put(0x10000, STORES)
        assert guest.sweep(9, 5, 9) == Hlt() and guest.dirty() == set(range(5, 14)), "a page that was loaded first"


def test_entries_that_change(model_host: Any) -> None:
    with Swept(model_host, STORES) as guest:
        guest.warm()
        for page, value in ((10, 0), (300, GPA + 300 * PAGE | 1), (301, GPA + 301 * PAGE | P_RW | 1 << 51)):
            old = guest.entry(page)
            guest.set_entry(page, value)
            got = guest.sweep(5)
            assert got == Hlt() and guest.vector() == 14 and guest.regs().rcx == PAGES - page
            guest.set_entry(page, old)
            assert guest.sweep(6) == Hlt() and guest.word(page) == 6
        guest.set_entry(20, GPA + 21 * PAGE | P_RW)
        guest.set_entry(21, GPA + 20 * PAGE | P_RW)
        assert guest.sweep(0xAA, 20, 1) == Hlt() and (guest.word(20), guest.word(21)) == (6, 0xAA)


def test_upper_entries_that_change(model_host: Any, huge: bool) -> None:
    with Swept(model_host, STORES, huge=huge) as guest:
        guest.warm()
        old = struct.unpack_from("<Q", guest.tables, 0)[0]
        guest.set_directory(0)
        assert guest.sweep(5) == Hlt() and guest.vector() == 14 and guest.regs().rcx == PAGES
        guest.set_directory(old & ~2)
        assert guest.sweep(5) == Hlt() and guest.vector() == 14, "CR0.WP and a directory that is read-only"
        guest.set_directory(old)
        assert guest.sweep(6) == Hlt() and guest.word(511) == 6


def test_a_page_outside_the_slot(model_host: Any) -> None:
    with Swept(model_host, STORES) as guest:
        guest.warm()
        guest.set_entry(77, GPA + PAGES * PAGE | P_RW)
        got = guest.sweep(5)
        assert isinstance(got, Mmio) and got.phys_addr == GPA + PAGES * PAGE


def test_slots_that_change(model_host: Any, huge: bool) -> None:
    with Swept(model_host, STORES, huge=huge) as guest:
        guest.warm()
        guest.vm.set_user_memory_region(1, GPA, 0, 0)
        got = guest.sweep(5)
        assert isinstance(got, Mmio) and got.phys_addr == GPA
        other = mmap.mmap(-1, PAGES * PAGE)
        guest.closing.append(other)
        guest.vm.set_user_memory_region(1, GPA, PAGES * PAGE, address_of(other))
        guest.run()  # the store that was MMIO is over
        assert guest.sweep(9) == Hlt()
        assert other[511 * PAGE] == 9 and guest.word(511) == 1


def test_code_is_never_stored_to_unseen(model_host: Any, huge: bool) -> None:
    """Pages that a sweep has stored to become code (RET), are called by another address, changed to OUT, and called
    again, all in one run.
    """
    with Swept(model_host, SWEEP_AND_CALL, huge=huge) as guest:
        guest.warm_by_host()
        for page in range(0, PAGES, 37):
            exit = guest.again(rax=1, rbx=VA, rcx=PAGES, rdi=VA + page * PAGE, rsi=ALIAS + page * PAGE)
            assert isinstance(exit, Io) and exit.port == 0x80, page
            assert guest.run() == Hlt()
