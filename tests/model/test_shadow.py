"""What the shadow tables remember is used, is never used when it is stale, and never grows beyond its bounds; and code that
changes is executed as it stands.

Walks are counted by wrapping `Paging.walk`. Guests reach into their tables through an identity map (tests/conformance/paged.py).
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Exit, Hlt, Mmio
from kvmapi.model.cpu.paging import Paging
from kvmapi.model.cpu.shadow import MAX_PAGES, MAX_SHADOWS
from tests.conformance.paged import LONG, OTHER, SECOND, TABLES, TARGET, P, Paged, U, W
from tests.conformance.snippets import CODE, DATA, MIB, PAGE, LongGuest, address_of, code
from tests.model.sev_guest import SevGuest
from tests.model.test_cpu import together

pytestmark = pytest.mark.model
HLT = b"\xf4"
FUNCTION, NEXT = 0x11000, 0x12000
PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
AT = 16 * MIB


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that were walked."""
    seen: list[int] = []
    walk = Paging.walk

    def counted(self: Paging, physical: Any, va: int, *rest: Any) -> Any:
        seen.append(va)
        return walk(self, physical, va, *rest)

    monkeypatch.setattr(Paging, "walk", counted)
    return seen


def inside(guest: Any, number: int = 0) -> Any:
    """The model's Cpu of a vCPU."""
    return guest.host._files[guest.vcpus[number].fd][0].cpu


def physical_of(guest: Any) -> Any:
    return guest.host._files[guest.vm.fd][0].physical


@contextmanager
def watchdog(guest: Any) -> Iterator[None]:
    """Guests that would spin for ever are kicked: the test fails instead of hanging."""
    timer = threading.Timer(20, lambda: [vcpu.request_exit() for vcpu in guest.vcpus])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


# ---- what is remembered is used

SWITCHES = code("0f22de03 130f22df 032bffc9 75f2f4", "0: mov cr3, rsi; add edx, [rbx]; mov cr3, rdi; add ebp, [rbx]; dec ecx; jnz 0b; hlt")


def test_switching_roots_walks_once(model_host: Any, walks: list[int]) -> None:
    with Paged(model_host, LONG) as guest:
        second = guest.second_root(OTHER)
        guest.put(TARGET, (3).to_bytes(4, "little"))
        guest.put(OTHER, (500).to_bytes(4, "little"))
        assert guest.program(SWITCHES, rbx=guest.va, rsi=guest.root, rdi=second, rcx=200) == Hlt()
        assert (guest.regs().rdx, guest.regs().rbp) == (600, 100_000)
        assert walks.count(guest.va) == 2, "once in each address space, in 400 switches"
        walks.clear()
        guest.regs(rip=CODE, rcx=200)
        assert guest.run() == Hlt() and guest.regs().rdx == 1200
        assert walks.count(guest.va) == 0, "and remembered over the exit"


ROOTS = code(
    "4c89d64d 89c8488b 060f22d8 03134883 c60849ff c875efff c975e5f4",
    "1: mov rsi, r10; mov r8, r9; 0: mov rax, [rsi]; mov cr3, rax; add edx, [rbx]; add rsi, 8; dec r8; jnz 0b; dec ecx; jnz 1b; hlt",
)


@pytest.mark.parametrize("roots", [MAX_SHADOWS, MAX_SHADOWS + 3])
def test_as_many_roots_stay_warm_as_there_are_shadows(model_host: Any, walks: list[int], roots: int) -> None:
    """In rounds over N roots; with more of them than shadows the oldest makes room, and every answer is still right."""
    with Paged(model_host, LONG) as guest:
        values = []
        for number in range(roots):
            root = SECOND + 0x10000 + number * 0x4000
            guest.put(root, guest.get(guest.root, PAGE))
            guest.set_word(root + 8, root + 0x1000 | P | W)
            guest.set_word(root + 0x1000, root + 0x2000 | P | W)
            guest.set_word(root + 0x2000, root + 0x3000 | P | W)
            guest.set_word(root + 0x3000 + guest.mode.index(1, guest.va) * 8, (TARGET + number * PAGE) | P | W)
            guest.put(TARGET + number * PAGE, (1 << number).to_bytes(4, "little"))
            values.append(root)
        guest.put(DATA, struct.pack(f"<{roots}Q", *values))
        assert guest.program(ROOTS, rbx=guest.va, r10=DATA, r9=roots, rcx=20) == Hlt()
        assert guest.regs().rdx == 20 * ((1 << roots) - 1)
        assert walks.count(guest.va) == (roots if roots == MAX_SHADOWS else 20 * roots)
        shadows = inside(guest).mmu._shadows
        assert len(shadows._kept) <= MAX_SHADOWS


# ---- what is stale is never used

LOAD = code("488b03f4", "mov rax, [rbx]; hlt")
STORE = code("488903f4", "mov [rbx], rax; hlt")
OTHER_CPU = code(
    "8b13c707 01000000 837f0800 74fa0f20 d80f22d8 8b03f4",
    "mov edx, [rbx]; mov dword ptr [rdi], 1; 0: cmp dword ptr [rdi + 8], 0; je 0b; mov rax, cr3; mov cr3, rax; mov eax, [rbx]; hlt",
)
CHANGER = code("833f0074 fb48892e c7470801 000000f4", "0: cmp dword ptr [rdi], 0; je 0b; mov [rsi], rbp; mov dword ptr [rdi + 8], 1; hlt")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_another_vcpu_changes_an_entry(model_host: Any, level: int) -> None:
    """At any level, while the first vCPU runs and has used it; the first loads CR3 when it is told."""
    with Paged(model_host, LONG, vcpus=2) as guest:
        guest.put(TARGET, b"old.")
        guest.put(OTHER, b"new!")
        guest.second_root(OTHER)
        value = {1: OTHER, 2: SECOND + 0x1000, 3: SECOND + 0x2000, 4: SECOND + 0x3000}[level] | P | W | U
        guest.put(CODE, OTHER_CPU)
        guest.put(NEXT, CHANGER)
        guest.start(guest.vcpus[0], CODE, rbx=guest.va, rdi=DATA)
        guest.start(guest.vcpus[1], NEXT, rdi=DATA, rsi=guest.at(level), rbp=value)
        with watchdog(guest):
            assert together(lambda: guest.run(0), lambda: guest.run(1)) == [Hlt(), Hlt()]
        assert (guest.regs(0).rdx.to_bytes(4, "little"), guest.regs(0).rax.to_bytes(4, "little")) == (b"old.", b"new!")


def test_another_vcpu_takes_rights_away(model_host: Any) -> None:
    with Paged(model_host, LONG, vcpus=2) as guest:
        guest.put(CODE, OTHER_CPU)
        guest.put(NEXT, CHANGER)
        guest.start(guest.vcpus[0], CODE, rbx=guest.va, rdi=DATA)
        guest.start(guest.vcpus[1], NEXT, rdi=DATA, rsi=guest.at(1), rbp=0)
        with watchdog(guest):
            assert together(lambda: guest.run(0), lambda: guest.run(1)) == [Hlt(), Hlt()]
        assert guest.vector() == 14 and guest.vcpu.get_sregs().cr2 == guest.va


class SlotGuest(LongGuest):
    """A LongGuest with a slot of two pages at AT, whose pages say which they are."""

    def __init__(self, host: Any, type: int = 0) -> None:
        super().__init__(host, LOAD + STORE, type, size=4 * MIB)
        for page in range(4):
            self.put(3 * MIB + page * PAGE, struct.pack("<Q", 100 + page))
        self.place(AT)

    def place(self, gpa: int, size: int = 2 * PAGE, flags: int = 0, offset: int = 0) -> None:
        self.vm.set_user_memory_region(5, gpa, size, self.hva + 3 * MIB + offset, flags)

    def load(self, gpa: int) -> int | Exit:
        exit = self.again(rbx=gpa)
        if isinstance(exit, Mmio):
            assert self.run() == Hlt()
        return int(self.regs().rax) if exit == Hlt() else exit

    def store(self, gpa: int, value: int) -> Exit:
        return self.again(rip=CODE + len(LOAD), rbx=gpa, rax=value)


def test_slots_move_and_go(model_host: Any) -> None:
    with SlotGuest(model_host) as guest:
        assert [guest.load(AT), guest.load(AT + PAGE)] == [100, 101]
        guest.place(AT + PAGE)
        assert guest.load(AT + PAGE) == 100 and isinstance(guest.load(AT), Mmio)
        guest.place(0, 0)
        assert isinstance(guest.load(AT + PAGE), Mmio)
        guest.place(AT, offset=2 * PAGE)
        assert [guest.load(AT), guest.load(AT + PAGE)] == [102, 103]


def test_a_slot_with_tables_goes(model_host: Any) -> None:
    """The page tables themselves are in the slot that moves: what was converted from them is void."""
    with SlotGuest(model_host) as guest:
        root = AT
        guest.put(3 * MIB, guest.get(0x1000, PAGE))
        sregs = guest.vcpu.get_sregs()
        sregs.cr3 = root
        guest.vcpu.set_sregs(sregs)
        assert guest.load(DATA) == 0
        guest.place(0, 0)
        guest.regs(rip=CODE, rbx=DATA)
        assert guest.run().name == "SHUTDOWN", "no table, no IDT: #PF, #DF, triple fault"


def test_attributes_change(model_host: Any) -> None:
    with SlotGuest(model_host, 1) as guest, guest.vm.create_guest_memfd(2 * PAGE) as memfd:
        guest.place(0, 0)
        guest.vm.set_user_memory_region2(5, AT, 2 * PAGE, guest.hva + 3 * MIB, guest_memfd=memfd.fd)
        for _ in range(3):
            assert guest.load(AT + PAGE) == 101
            guest.vm.set_memory_attributes(AT + PAGE, PAGE, PRIVATE)
            assert guest.load(AT + PAGE) == 0
            assert guest.store(AT + PAGE, 7) == Hlt() and guest.load(AT + PAGE) == 7 and guest.load(AT) == 100
            memfd.punch_hole(PAGE, PAGE)
            assert guest.load(AT + PAGE) == 0, "the page that was remembered is gone"
            guest.vm.set_memory_attributes(AT, 2 * PAGE, 0)
            assert guest.get(3 * MIB + PAGE, 8) == struct.pack("<Q", 101)


def test_the_dirty_log_is_taken(model_host: Any) -> None:
    """A page whose log was cleared is logged again at its next store, though its entry is dirty and was remembered."""
    with SlotGuest(model_host) as guest:
        guest.place(0, 0)
        guest.place(AT, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
        for _ in range(3):
            assert guest.store(AT + PAGE, 5) == Hlt()
            assert guest.load(AT + PAGE) == 5
            assert guest.vm.get_dirty_log(5, 2)[0] & 3 == 2
            assert guest.load(AT + PAGE) == 5 and guest.vm.get_dirty_log(5, 2)[0] & 3 == 0
        guest.place(AT, flags=0)
        assert guest.store(AT, 5) == Hlt()
        guest.place(AT, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
        assert guest.store(AT, 6) == Hlt() and guest.vm.get_dirty_log(5, 2)[0] & 3 == 1, "writable before the log began"


FILL = code("48890348 ffc04881 c3001000 0048ffc9 75eef4", "0: mov [rbx], rax; inc rax; add rbx, 4096; dec rcx; jnz 0b; hlt")


def test_frames_are_given_up(model_host: Any) -> None:
    """More private pages than frames: a remembered page is not used when its frame holds another one."""
    with SevGuest(model_host, LOAD + STORE + FILL, size=4 * MIB) as guest:
        guest.store(DATA, 0x1234)
        for _ in range(2):
            assert guest.again(rip=CODE + 8, rbx=MIB, rcx=700, rax=1) == Hlt()
            assert guest.load(DATA) == 0x1234 and guest.load(MIB + 699 * PAGE) == 700 and guest.load(MIB) == 1


# ---- bounds

EVERYWHERE = code("03134801 f3ffc975 f7f4", "0: add edx, [rbx]; add rbx, rsi; dec ecx; jnz 0b; hlt")


def test_a_guest_that_maps_one_page_everywhere(model_host: Any) -> None:
    """All tables are one page, all of whose entries point to it: 2^36 addresses of one page."""
    with Paged(model_host, LONG) as guest:
        table = SECOND
        guest.put(table, struct.pack("<512Q", *[table | P | W | 0x60] * 512))
        guest.set_word(guest.root + 8 * 7, table | P | W | 0x60)
        with watchdog(guest):
            assert guest.program(EVERYWHERE, rbx=7 << 39, rsi=PAGE, rcx=MAX_PAGES + 2000) == Hlt()
            shadows = inside(guest).mmu._shadows
            assert 2000 <= sum(len(shadow.pages) for shadow in shadows._kept.values()) <= MAX_PAGES
            assert shadows._noted <= 4 * MAX_PAGES
        assert guest.touch() is None


def test_a_guest_with_more_tables_than_are_kept(model_host: Any) -> None:
    """A table for each 2 MiB, all different pages."""
    with Paged(model_host, LONG) as guest:
        count = 4500
        slot = 32 * MIB
        memory = mmap.mmap(-1, (count + 16) * PAGE)
        guest.closing.append(memory)
        guest.vm.set_user_memory_region(1, slot, len(memory), address_of(memory))
        for number in range(count):
            memory[number * PAGE : number * PAGE + 8] = (TARGET | P | W).to_bytes(8, "little")
            directory = (count + number // 512) * PAGE + number % 512 * 8
            memory[directory : directory + 8] = (slot + number * PAGE | P | W).to_bytes(8, "little")
        for number in range(count // 512 + 1):
            guest.set_word(TABLES + 0x3000 + 8 * number, slot + (count + number) * PAGE | P | W)
        guest.put(TARGET, (1).to_bytes(4, "little"))
        with watchdog(guest):
            assert guest.program(EVERYWHERE, rbx=1 << 39, rsi=2 * MIB, rcx=count) == Hlt()
        assert guest.vector() is None and guest.regs().rdx == count
        assert 0 < len(physical_of(guest).tables) <= 4096
