"""What changes of memory cost and what they leave behind: windows, addresses, bindings, logs."""

from __future__ import annotations

import itertools
import mmap
import os
from errno import EEXIST
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Hlt, Mmio
from kvmapi.model.caller import Errno, OwnMemory
from kvmapi.model.dirty_log import bitmap
from kvmapi.model.mem.physical import Physical
from kvmapi.model.memslots import Memslots, Request
from tests.conformance.snippets import ALIAS, CODE, MIB, MMIO, PAGE, LongGuest, Machine, address_of, code
from tests.model.sev_guest import SevGuest

GIB = 1 << 30
COPY = code("48a5 f4", "movsq; hlt")
STORE = code("488907 f4", "mov [rdi], rax; hlt")


def test_addresses_of_windows_come_back() -> None:
    """A large slot that comes and goes for ever does not use up the engine's addresses; two at a time never meet."""
    physical = Physical(Memslots(readonly_allowed=True), OwnMemory())
    for _ in range(5000):
        owners = [object() for _ in range(3)]
        windows = [physical._add_window(owner, size, 0) for owner, size in zip(owners, (64 * GIB, PAGE, GIB))]
        ranges = sorted((window.base, window.base + window.size) for window in windows)
        assert all(end < first for (_, end), (first, _) in itertools.pairwise(ranges))
        for owner in owners:
            physical.drop_window(owner)
    assert physical._next_base < 256 * GIB


def test_no_address_left() -> None:
    physical = Physical(Memslots(readonly_allowed=True), OwnMemory())
    with pytest.raises(MemoryError):
        for _ in range(1 << 12):
            physical._add_window(object(), 1 << 43, 0)


def test_a_window_stays_when_its_slot_moves(model_host: Any) -> None:
    with LongGuest(model_host, STORE) as guest:
        guest.vm.set_user_memory_region(1, 16 * MIB, MIB, guest.hva + MIB)
        assert guest.again(rdi=16 * MIB, rax=1) == Hlt()
        physical = model_host._files[guest.vm.fd][0].physical
        windows = dict(physical.windows)
        guest.vm.set_user_memory_region(1, 32 * MIB, MIB, guest.hva + MIB)
        guest.vm.set_user_memory_region(1, 32 * MIB, MIB, guest.hva + MIB, kvm.KVM_MEM_LOG_DIRTY_PAGES)
        assert guest.again(rdi=32 * MIB + 8, rax=2) == Hlt()
        assert physical.windows == windows and guest.get(MIB, 16) == (1 << 0 | 2 << 64).to_bytes(16, "little")
        guest.vm.set_user_memory_region(1, 0, 0, 0)
        assert len(physical.windows) == len(windows) - 1


def test_a_slot_that_nobody_used_flushes_nothing(model_host: Any) -> None:
    with LongGuest(model_host, STORE) as guest:
        assert guest.again(rdi=0x30000, rax=1) == Hlt()
        physical = model_host._files[guest.vm.fd][0].physical
        before = physical.generation
        for gpa in (16 * MIB, 24 * MIB):  # made, and moved
            guest.vm.set_user_memory_region(1, gpa, MIB, guest.hva)
        guest.vm.set_user_memory_region(1, 24 * MIB, MIB, guest.hva, kvm.KVM_MEM_LOG_DIRTY_PAGES)
        guest.vm.set_user_memory_region(1, 24 * MIB, 0, 0)
        guest.vm.set_user_memory_region(1, 16 * MIB, MIB, guest.hva)
        assert physical.generation == before
        assert guest.again(rdi=16 * MIB, rax=2) == Hlt()
        guest.vm.set_user_memory_region(1, 32 * MIB, MIB, guest.hva)
        assert physical.generation > before
        gone = guest.again(rdi=16 * MIB, rax=3)
        assert isinstance(gone, Mmio) and gone.phys_addr == 16 * MIB


def test_memory_that_went_during_an_mmio_exit_is_not_written(model_host: Any) -> None:
    """The instruction reads MMIO and stores to a slot; while the VMM looks for the answer the slot is deleted. What
    the engine knew of the slot is void: the store must not reach the memory that stood there.
    """
    with LongGuest(model_host, STORE) as guest:
        memory = mmap.mmap(-1, MIB)
        guest.closing.append(memory)
        guest.vm.set_user_memory_region(1, 16 * MIB, MIB, address_of(memory))
        assert guest.again(rdi=16 * MIB, rax=0x1111) == Hlt()  # its page is in the TLB
        guest.put(CODE, COPY)
        exit = guest.again(rsi=MMIO, rdi=16 * MIB)
        assert isinstance(exit, Mmio) and exit.phys_addr == MMIO
        guest.vm.set_user_memory_region(1, 16 * MIB, 0, 0)
        memory[:8] = (0x1111).to_bytes(8, "little")
        guest.vcpu.answer_mmio(exit, b"\x22" * 8)
        guest.run()
        assert memory[:8] == (0x1111).to_bytes(8, "little")


def test_memory_that_came_during_an_mmio_exit_is_written(model_host: Any) -> None:
    """As above, and another slot stands there: it may have been given the engine address of the first."""
    with LongGuest(model_host, STORE) as guest:
        old, new = mmap.mmap(-1, MIB), mmap.mmap(-1, MIB)
        guest.closing += [old, new]
        guest.vm.set_user_memory_region(1, 16 * MIB, MIB, address_of(old))
        assert guest.again(rdi=16 * MIB, rax=0x1111) == Hlt()
        guest.put(CODE, COPY)
        exit = guest.again(rsi=MMIO, rdi=16 * MIB)
        assert isinstance(exit, Mmio)
        guest.vm.set_user_memory_region(1, 16 * MIB, 0, 0)
        guest.vm.set_user_memory_region(1, 16 * MIB, MIB, address_of(new))
        guest.vcpu.answer_mmio(exit, b"\x22" * 8)
        assert guest.run() == Hlt()
        assert new[:8] == b"\x22" * 8 and old[:8] != new[:8]


def test_bindings_against_a_list(model_host: Any) -> None:
    with Machine(model_host) as machine, machine.vm.create_guest_memfd(64 * PAGE) as memfd:
        file: Any = model_host._files[memfd.fd][0]
        slots = Memslots(readonly_allowed=True)
        bound: dict[int, Any] = {}
        for step in range(2000):
            page, pages = step * 7 % 61, 1 + step * 5 % 6
            if step % 3 == 2 and bound:
                file.unbind(bound.pop(sorted(bound)[step % len(bound)]))
                continue
            taken = any(page < slot.gmem_page + slot.pages and slot.gmem_page < page + pages for slot in bound.values())
            try:
                file.check_unbound(page, pages)
            except Errno as failure:
                assert failure.number == EEXIST and taken
                continue
            assert not taken
            new = slots.check(Request(1, 0, page * PAGE, pages * PAGE, 0))[1]
            assert new is not None
            new.gmem_page = page
            file.bind(new)
            bound[page] = new
        assert len(file._bindings) == len(bound) > 3


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 100])
def test_a_dirty_bitmap_ends_with_its_slot(pages: int) -> None:
    assert int.from_bytes(bitmap(pages, dirty=True), "little") == (1 << pages) - 1
    assert len(bitmap(pages, dirty=True)) == len(bitmap(pages, dirty=False)) == (pages + 63) // 64 * 8
    assert not any(bitmap(pages, dirty=False))


def test_only_stores_dirty_an_encrypted_page(model_host: Any) -> None:
    with SevGuest(model_host) as guest:
        guest.vm.set_user_memory_region(0, 0, 2 * MIB, guest.hva, kvm.KVM_MEM_LOG_DIRTY_PAGES)
        guest.load(0x50000)
        assert not dirty(guest) & 1 << 0x50
        guest.store(0x51000, 7)
        assert dirty(guest) & (1 << 0x50 | 1 << 0x51) == 1 << 0x51
        guest.store(0x51000, 8)  # the page still stands decrypted
        assert dirty(guest) & 1 << 0x51
        guest.store(ALIAS + 0x52000, 9)
        assert dirty(guest) & (1 << 0x51 | 1 << 0x52) == 1 << 0x52


def dirty(guest: LongGuest) -> int:
    return int.from_bytes(guest.vm.get_dirty_log(0, 512), "little")


def test_a_child_that_closes_takes_nothing(model_host: Any) -> None:
    """The pages that stand decrypted are shared with a forked child: its copy of the VM must not wipe them."""
    with SevGuest(model_host) as guest:
        guest.store(0x50000, 77)
        child = os.fork()
        if not child:
            guest.vcpu.close()
            guest.vm.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert guest.load(0x50000) == 77
