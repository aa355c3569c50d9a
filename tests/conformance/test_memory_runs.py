"""What a guest sees of its memory slots while they change: read-only slots, moves, deletions, memory-fault exits."""

from __future__ import annotations

import mmap
import threading
from errno import EFAULT
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Exit, Hlt, MemoryFault, Mmio
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, MIB, PAGE, LongGuest, Machine, address_of, code, protect

PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
AT = 16 * MIB
LOAD = code("488b07 f4", "mov rax, [rdi]; hlt")
STORE = code("488907 f4", "mov [rdi], rax; hlt")
# Read [rdi] until the word at rsi is not zero; stop as soon as it is neither rcx nor rdx.
WATCH = code(
    "488b07 4839c8 7405 4839d0 7506 48833e00 74ed f4",
    "1: mov rax, [rdi]; cmp rax, rcx; je 2f; cmp rax, rdx; jne 3f; 2: cmp qword ptr [rsi], 0; je 1b; 3: hlt",
)


class Guest(LongGuest):
    """A guest with a second piece of user memory, 4 MiB, whose pages hold their own number."""

    def __init__(self, host: Any, text: bytes, type: int = 0) -> None:
        super().__init__(host, text, type)
        self.user = mmap.mmap(-1, 4 * MIB)
        self.closing.append(self.user)
        for page in range(4 * MIB // PAGE):
            self.user[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")

    def slot(self, gpa: int, size: int = 2 * MIB, flags: int = 0, number: int = 5) -> None:
        self.vm.set_user_memory_region(number, gpa, size, address_of(self.user), flags)

    def load(self, gpa: int) -> Exit | int:
        """What the guest reads at `gpa`, or the exit that the attempt ends in."""
        exit = self.again(rdi=gpa)
        return int(self.regs().rax) if exit == Hlt() else exit


def test_a_read_only_slot(any_host: Any) -> None:
    """Loads are served, stores become MMIO and change nothing."""
    with Guest(any_host, LOAD) as guest:
        guest.slot(AT, flags=kvm.KVM_MEM_READONLY)
        assert guest.load(AT + 3 * PAGE) == 3
        guest.put(CODE, STORE)
        exit = guest.again(rdi=AT + 3 * PAGE, rax=0x1234)
        assert isinstance(exit, Mmio) and (exit.phys_addr, exit.length, exit.is_write) == (AT + 3 * PAGE, 8, True)
        assert guest.run() == Hlt()
        guest.put(CODE, LOAD)
        assert guest.load(AT + 3 * PAGE) == 3


def test_deletion_and_return(any_host: Any) -> None:
    with Guest(any_host, LOAD) as guest:
        guest.slot(AT)
        assert guest.load(AT + PAGE) == 1
        guest.slot(AT, 0)
        exit = guest.load(AT + PAGE)
        assert isinstance(exit, Mmio) and (exit.phys_addr, exit.length, exit.is_write) == (AT + PAGE, 8, False)
        guest.vcpu.answer_mmio(exit, b"\x77" * 8)
        assert guest.run() == Hlt() and guest.regs().rax == 0x7777777777777777
        guest.slot(AT)
        assert guest.load(AT + PAGE) == 1


def test_a_move_takes_the_memory_along(any_host: Any) -> None:
    with Guest(any_host, LOAD) as guest:
        guest.slot(AT)
        assert guest.load(AT + PAGE) == 1
        guest.slot(AT - PAGE)
        assert guest.load(AT + PAGE) == 2 and guest.load(AT - PAGE) == 0
        assert isinstance(guest.load(AT + 2 * MIB - PAGE), Mmio)


def test_two_slots_of_one_memory(any_host: Any) -> None:
    """Slots may share user memory: a store through one is seen through the other."""
    with Guest(any_host, STORE) as guest:
        guest.slot(AT)
        guest.slot(4 * AT, number=6)
        assert guest.again(rdi=AT + PAGE, rax=0x55) == Hlt()
        guest.put(CODE, LOAD)
        assert guest.load(4 * AT + PAGE) == 0x55


def test_user_memory_that_is_not_there(any_host: Any) -> None:
    """An access fails with EFAULT, and succeeds when the memory has come."""
    with Guest(any_host, LOAD) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip(f"{any_host.name}: its paravirtual MMU makes the access MMIO")
        guest.slot(AT)
        hva = address_of(guest.user)
        protect(hva, PAGE, 0)
        guest.regs(rip=CODE, rdi=AT + 8, rflags=2)
        assert guest.vcpu.run() == EFAULT
        protect(hva, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        assert guest.run() == Hlt() and guest.regs().rax == 0


@pytest.mark.parametrize("moves", [40])
def test_a_running_vcpu_sees_the_old_place_or_the_new(any_host: Any, moves: int) -> None:
    """Moved by a page to and fro, a slot shows one of two numbers; between the two it may be absent (MMIO)."""
    with Guest(any_host, WATCH) as guest:
        guest.slot(AT)
        stop = DATA
        guest.put(stop, bytes(8))
        guest.regs(rip=CODE, rflags=2, rdi=AT + PAGE, rsi=stop, rcx=1, rdx=2)
        seen: list[Exit] = []

        def run() -> None:
            while True:
                exit = guest.run()
                if not isinstance(exit, Mmio) or exit.is_write:
                    seen.append(exit)
                    return
                guest.vcpu.answer_mmio(exit, (1).to_bytes(8, "little"))

        thread = threading.Thread(target=run)
        thread.start()
        for number in range(moves):
            guest.slot(AT - PAGE if number % 2 == 0 else AT)
        guest.put(stop, b"\1")
        thread.join(20)
        assert not thread.is_alive() and seen == [Hlt()] and guest.regs().rax in (1, 2)


# ---- private memory


@pytest.fixture
def private(any_host: Any) -> Guest:
    with Machine(any_host) as probe:
        if not feature(probe, "SW_PROTECTED"):
            pytest.skip(f"{any_host.name}: no VM type SW_PROTECTED")
    return Guest(any_host, LOAD, 1)


def fault(guest: Guest, gpa: int) -> Exit:
    guest.regs(rip=CODE, rdi=gpa, rflags=2)
    return guest.run()


def test_private_and_shared_memory_are_two(private: Guest) -> None:
    with private as guest, guest.vm.create_guest_memfd(2 * MIB) as memfd:
        guest.vm.set_user_memory_region2(5, AT, 2 * MIB, address_of(guest.user), guest_memfd=memfd.fd)
        assert guest.load(AT + 3 * PAGE) == 3
        guest.vm.set_memory_attributes(AT, MIB, PRIVATE)
        assert guest.load(AT + 3 * PAGE) == 0
        guest.put(CODE, STORE)
        assert guest.again(rdi=AT + 3 * PAGE, rax=0x99) == Hlt()
        guest.put(CODE, LOAD)
        assert guest.load(AT + 3 * PAGE) == 0x99 and guest.user[3 * PAGE] == 3
        guest.vm.set_memory_attributes(AT, MIB, 0)
        assert guest.load(AT + 3 * PAGE) == 3
        guest.vm.set_memory_attributes(AT, MIB, PRIVATE)
        assert guest.load(AT + 3 * PAGE) == 0x99  # an attribute touches neither
        memfd.punch_hole(3 * PAGE, PAGE)
        assert guest.load(AT + 3 * PAGE) == 0


def test_private_but_the_slot_has_no_file(private: Guest) -> None:
    with private as guest:
        guest.slot(AT)
        guest.vm.set_memory_attributes(AT, 2 * MIB, PRIVATE)
        assert fault(guest, AT + PAGE + 8) == MemoryFault(PRIVATE, AT + PAGE, PAGE, EFAULT)
        guest.vm.set_memory_attributes(AT, 2 * MIB, 0)
        assert guest.run() == Hlt() and guest.regs().rax == 0  # the instruction is done again


def test_private_but_no_slot(private: Guest) -> None:
    """Not MMIO: private memory is never emulated."""
    with private as guest:
        guest.vm.set_memory_attributes(AT, 2 * MIB, PRIVATE)
        assert fault(guest, AT) == MemoryFault(PRIVATE, AT, PAGE, EFAULT)


def test_private_but_the_slot_was_deleted(private: Guest) -> None:
    with private as guest, guest.vm.create_guest_memfd(2 * MIB) as memfd:
        guest.vm.set_user_memory_region2(5, AT, 2 * MIB, address_of(guest.user), guest_memfd=memfd.fd)
        guest.vm.set_memory_attributes(AT, 2 * MIB, PRIVATE)
        assert guest.load(AT) == 0
        guest.slot(AT, 0)
        assert fault(guest, AT) == MemoryFault(PRIVATE, AT, PAGE, EFAULT)


def test_closing_the_file_unbinds_it(private: Guest) -> None:
    with private as guest:
        memfd = guest.vm.create_guest_memfd(2 * MIB)
        guest.vm.set_user_memory_region2(5, AT, 2 * MIB, address_of(guest.user), guest_memfd=memfd.fd)
        guest.vm.set_memory_attributes(AT, MIB, PRIVATE)
        assert guest.load(AT) == 0
        memfd.close()
        assert fault(guest, AT) == MemoryFault(PRIVATE, AT, PAGE, EFAULT)
        assert guest.load(AT + MIB) == MIB // PAGE  # what is shared goes on


def test_a_mapping_keeps_the_file_open(private: Guest) -> None:
    """The kernel's mappings hold the file: only munmap, after close, unbinds."""
    with private as guest:
        memfd = guest.vm.create_guest_memfd(2 * MIB, kvm.GUEST_MEMFD_FLAG_MMAP)
        guest.vm.set_user_memory_region2(5, AT, 2 * MIB, address_of(guest.user), guest_memfd=memfd.fd)
        guest.vm.set_memory_attributes(AT, 2 * MIB, PRIVATE)
        view = memfd.mmap()
        memfd.close()
        assert guest.load(AT) == 0
        view.close()
        assert fault(guest, AT) == MemoryFault(PRIVATE, AT, PAGE, EFAULT)


def test_a_slot_on_a_mappable_file_has_no_other_memory(private: Guest) -> None:
    """Shared accesses go to the file too; when it is closed they fail, and the exit says shared."""
    with private as guest:
        memfd = guest.vm.create_guest_memfd(2 * MIB, kvm.GUEST_MEMFD_FLAG_MMAP)
        guest.vm.set_user_memory_region2(5, AT, 2 * MIB, address_of(guest.user), guest_memfd=memfd.fd)
        assert guest.load(AT + 3 * PAGE) == 0
        memfd.close()
        assert fault(guest, AT) == MemoryFault(0, AT, PAGE, EFAULT)
