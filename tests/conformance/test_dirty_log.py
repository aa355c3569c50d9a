"""The dirty log: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, and the two ways to protect pages again."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from errno import EFAULT, EINVAL, ENOENT
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt
from tests.conformance.rows import OK, Row, expect_errno, parametrize
from tests.conformance.snippets import MIB, PAGE, LongGuest, Machine, address_of, code

LOG = kvm.KVM_MEM_LOG_DIRTY_PAGES
MANUAL, INITIALLY_SET = kvm.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm.KVM_DIRTY_LOG_INITIALLY_SET
PAGES = 100  # of slot 1: not a multiple of 64
GPA = 16 * MIB
WILD = 0xFFFF888000000000


def get(slot: int = 1, at: int | None = None) -> Callable[[Machine], Any]:
    """The argument of GET. Without `at` the bitmap is one of the test's."""

    def make(machine: Machine) -> Any:
        argument = s.kvm_dirty_log(slot=slot)
        argument.dirty_bitmap = machine.hva if at is None else at
        return argument

    return make


def clear(slot: int = 1, first: int = 0, pages: int = PAGES, at: int | None = None) -> Callable[[Machine], Any]:
    """The argument of CLEAR."""

    def make(machine: Machine) -> Any:
        argument = s.kvm_clear_dirty_log(slot=slot, first_page=first, num_pages=pages)
        argument.dirty_bitmap = machine.hva if at is None else at
        return argument

    return make


def enable(*options: int, flags: int = 0) -> Callable[[Machine], Any]:
    return lambda machine: s.kvm_enable_cap(cap=caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags=flags, args=(options[0], 0, 0, 0))


ROWS = [
    Row("get", OK, get()),
    Row("get from a slot without a log", ENOENT, get(2)),
    Row("get from no slot", ENOENT, get(3)),
    Row("get from the last number", ENOENT, get(kvm.KVM_USER_MEM_SLOTS - 1)),
    Row("get from a number too high", EINVAL, get(kvm.KVM_USER_MEM_SLOTS)),
    Row("get from another address space", EINVAL, get(7 << 16 | 1)),
    Row("get to nowhere", EFAULT, get(at=WILD)),
    Row("get: the slot before the pointer", ENOENT, get(2, WILD)),
    Row("clear all", OK, clear()),
    Row("clear whole words", OK, clear(pages=64)),
    Row("clear the end", OK, clear(first=64, pages=PAGES - 64)),
    Row("clear nothing", OK, clear(pages=0, at=WILD)),
    Row("clear nothing behind the last word", EINVAL, clear(first=128, pages=0)),
    Row("clear from a first page within a word", EINVAL, clear(first=1, pages=64)),
    Row("clear a part of a word", EINVAL, clear(pages=63)),
    Row("clear more than there is", EINVAL, clear(pages=PAGES + 1)),
    Row("clear the end and more", EINVAL, clear(first=64, pages=64)),
    Row("clear behind the end", EINVAL, clear(first=128, pages=64)),
    Row("clear where the sum wraps", EINVAL, clear(first=(1 << 64) - 64, pages=PAGES)),
    Row("clear without a log", ENOENT, clear(2)),
    Row("clear no slot", ENOENT, clear(3)),
    Row("clear another address space", EINVAL, clear(7 << 16 | 1)),
    Row("clear: the first page before the slot", EINVAL, clear(3, first=1)),
    Row("clear: the slot before the range", ENOENT, clear(2, pages=PAGES + 1)),
    Row("clear: the range before the pointer", EINVAL, clear(pages=63, at=WILD)),
    Row("clear from nowhere", EFAULT, clear(at=WILD)),
    Row("manual protection", OK, enable(MANUAL)),
    Row("manual protection, initially set", OK, enable(MANUAL | INITIALLY_SET)),
    Row("no manual protection", OK, enable(0)),
    Row("initially set alone", EINVAL, enable(INITIALLY_SET)),
    Row("unknown option", EINVAL, enable(4)),
    Row("unknown option with manual", EINVAL, enable(MANUAL | 4)),
    Row("flags", EINVAL, enable(MANUAL, flags=1)),
]  # fmt: skip

REQUESTS = {
    s.kvm_dirty_log: ioctls.KVM_GET_DIRTY_LOG,
    s.kvm_clear_dirty_log: ioctls.KVM_CLEAR_DIRTY_LOG,
    s.kvm_enable_cap: ioctls.KVM_ENABLE_CAP,
}


@parametrize(ROWS)
def test_condition(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        machine.vm.set_user_memory_region(1, GPA, PAGES * PAGE, machine.hva, LOG)
        machine.vm.set_user_memory_region(2, 2 * GPA, PAGES * PAGE, machine.hva)
        argument = row.argument(machine)
        assert row.right(machine, machine.vm.ioctl_raw(REQUESTS[type(argument)], ctypes.addressof(argument)))


@pytest.mark.parametrize("request_name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP"])
def test_bad_pointer(any_host: Any, request_name: str) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.ioctl_raw(getattr(ioctls, request_name), 8) == -EFAULT


def test_capability(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.system.check_extension(caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) == 3
        assert machine.vm.check_extension(caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) == 3


STORE = code("c60701 f4", "mov byte ptr [rdi], 1; hlt")
LOAD = code("8a07 f4", "mov al, [rdi]; hlt")


class Logged(LongGuest):
    """A guest that stores where RDI points, and a slot of 2 MiB at 16 MiB that keeps a log."""

    def __init__(self, host: Any, options: int = 0, text: bytes = STORE) -> None:
        super().__init__(host, text)
        if options:
            self.vm.enable_cap(caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, options)
        self.logged = mmap.mmap(-1, 2 * MIB)
        self.closing.append(self.logged)
        self.slot(GPA, LOG)

    def slot(self, gpa: int, flags: int) -> None:
        self.vm.set_user_memory_region(1, gpa, 2 * MIB, address_of(self.logged), flags)

    def store(self, *pages: int) -> None:
        for page in pages:
            assert self.again(rdi=GPA + page * PAGE) == Hlt()

    def dirty(self) -> set[int]:
        """Pages that GET reports."""
        bits = int.from_bytes(self.vm.get_dirty_log(1, 512), "little")
        return {page for page in range(512) if bits >> page & 1}

    def clear(self, first: int, pages: int, *which: int) -> None:
        bits = (ctypes.c_uint64 * 8)()
        for page in which:
            bits[page - first >> 6] |= 1 << (page - first & 63)
        argument = s.kvm_clear_dirty_log(slot=1, first_page=first, num_pages=pages)
        argument.dirty_bitmap = ctypes.addressof(bits)
        assert self.vm.ioctl_raw(ioctls.KVM_CLEAR_DIRTY_LOG, ctypes.addressof(argument)) == 0


def test_get_hands_out_and_clears(any_host: Any) -> None:
    with Logged(any_host) as guest:
        assert guest.dirty() == set()
        guest.store(0, 65, 511, 65)
        assert guest.dirty() == {0, 65, 511} and guest.dirty() == set()
        guest.store(65)  # its translation is older than the GET
        assert guest.dirty() == {65}


def test_loads_are_hardly_logged(any_host: Any) -> None:
    """KVM may map a page writable at its first load, and counts it as written then."""
    with Logged(any_host, text=LOAD) as guest:
        guest.store(3)
        assert guest.dirty() <= ({3} if any_host.name == "kernel" else set())


def test_a_bitmap_that_cannot_be_written_is_lost(any_host: Any) -> None:
    with Logged(any_host) as guest:
        guest.store(7)
        argument = get(at=WILD)(guest)
        assert guest.vm.ioctl_raw(ioctls.KVM_GET_DIRTY_LOG, ctypes.addressof(argument)) == -EFAULT
        assert guest.dirty() == set()


def test_clear_works_without_manual_protection(any_host: Any) -> None:
    with Logged(any_host) as guest:
        guest.store(1, 2, 70)
        guest.clear(0, 64, 2, 3)
        assert guest.dirty() == {1, 70}


def test_manual_protection(any_host: Any) -> None:
    with Logged(any_host, MANUAL) as guest:
        guest.store(1, 2, 70)
        assert guest.dirty() == {1, 2, 70} and guest.dirty() == {1, 2, 70}
        guest.clear(64, 448, 70, 71)
        assert guest.dirty() == {1, 2}
        guest.store(70)
        assert guest.dirty() == {1, 2, 70}
        guest.clear(0, 512, *range(512))
        assert guest.dirty() == set()


def test_initially_set(any_host: Any) -> None:
    with Logged(any_host, MANUAL | INITIALLY_SET) as guest:
        assert guest.dirty() == set(range(512))
        guest.clear(0, 512, *range(512))
        guest.store(9)
        assert guest.dirty() == {9}
        guest.slot(GPA, 0)
        with pytest.raises(KvmError):
            guest.dirty()
        guest.slot(GPA, LOG)
        assert guest.dirty() == set(range(512))


def test_the_last_word_has_no_bits_behind_the_slot(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.vm.enable_cap(caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL | INITIALLY_SET)
        machine.vm.set_user_memory_region(1, GPA, PAGES * PAGE, machine.hva, LOG)
        assert int.from_bytes(machine.vm.get_dirty_log(1, PAGES), "little") == (1 << PAGES) - 1
        assert expect_errno(machine.vm.ioctl_raw(ioctls.KVM_CLEAR_DIRTY_LOG, ctypes.addressof(clear()(machine)))) == OK


def test_switching_the_log_on_notices_pages_already_written(any_host: Any) -> None:
    with Logged(any_host) as guest:
        guest.slot(GPA, 0)
        guest.store(5)
        guest.slot(GPA, LOG)
        assert guest.dirty() == set()
        guest.store(5)
        assert guest.dirty() == {5}


def test_the_log_moves_with_its_slot(any_host: Any) -> None:
    with Logged(any_host) as guest:
        guest.store(5)
        guest.slot(GPA + MIB, LOG)
        assert guest.dirty() == {5}
        assert guest.again(rdi=GPA + MIB) == Hlt() and guest.dirty() == {0}
