"""KVM_PRE_FAULT_MEMORY: its checks, how far it comes, and what it writes back (virt/kvm/kvm_main.c, mmu/mmu.c)."""

from __future__ import annotations

import ctypes
import mmap
from errno import EFAULT, EINVAL, ENOENT
from typing import Any, NamedTuple

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.vcpu import kvm_pre_fault_memory
from kvmapi.exits import MemoryFault
from tests.conformance.rows import OK, expect_errno, feature
from tests.conformance.snippets import MIB, PAGE, Machine, address_of, protect

PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
TOP = 1 << 64
SLOT, READONLY, HOLE, UNMAPPED = 16 * MIB, 32 * MIB, 48 * MIB, 64 * MIB
"""Two slots of 2 MiB, nothing, and a slot of one page of user memory followed by seven that cannot be accessed."""


class Case(NamedTuple):
    """A range, and what must come: errno, and how much is left."""

    name: str
    gpa: int
    size: int
    expected: int
    left: int | None = None  # None: all of it
    flags: int = 0


CASES = [
    Case("one page", SLOT, PAGE, OK, 0),
    Case("a whole slot", SLOT, 2 * MIB, OK, 0),
    Case("an odd part", SLOT + 3 * PAGE, 128 * PAGE, OK, 0),
    Case("a read-only slot", READONLY, 2 * MIB, OK, 0),
    Case("off the end", SLOT + 2 * MIB - PAGE, 3 * PAGE, OK, 2 * PAGE),
    Case("behind the end", SLOT + 2 * MIB, 2 * PAGE, ENOENT),
    Case("a hole", HOLE, PAGE, ENOENT),
    Case("user memory that is not there", UNMAPPED + PAGE, PAGE, EFAULT),
    Case("up to what is not there", UNMAPPED, 3 * PAGE, OK, 2 * PAGE),
    Case("flags", SLOT, PAGE, EINVAL, flags=1),
    Case("flag bit 63", SLOT, PAGE, EINVAL, flags=1 << 63),
    Case("gpa unaligned", SLOT + 1, PAGE, EINVAL),
    Case("size unaligned", SLOT, PAGE + 1, EINVAL),
    Case("nothing", SLOT, 0, EINVAL),
    Case("a wrap", TOP - PAGE, 2 * PAGE, EINVAL),
    Case("up to 2^64", TOP - PAGE, PAGE, EINVAL),
    Case("flags before the slot", HOLE, PAGE, EINVAL, flags=1),
]


class Prepared(Machine):
    """The slots above and a vCPU; skips where the host has no pre-fault."""

    def __init__(self, host: Any, type: int = 0) -> None:
        super().__init__(host, type)
        self.user = mmap.mmap(-1, 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.closing.append(self.user)
        hva = address_of(self.user)
        self.vm.set_user_memory_region(1, SLOT, 2 * MIB, hva)
        self.vm.set_user_memory_region(2, READONLY, 2 * MIB, hva, kvm.KVM_MEM_READONLY)
        if not feature(self, "pre-fault"):
            self.__exit__()
            pytest.skip(f"{host.name}: no KVM_CAP_PRE_FAULT_MEMORY")
        self.add_vcpu()

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
        """(errno, gpa and size as written back)."""
        argument = kvm_pre_fault_memory(gpa=gpa, size=size, flags=flags)
        argument.padding[4] = 77
        result = expect_errno(self.vcpu.ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, ctypes.addressof(argument)))
        assert argument.flags == flags and argument.padding[4] == 77
        return result, argument.gpa, argument.size


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_condition(any_host: Any, case: Case) -> None:
    hole = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with Prepared(any_host) as machine:
        at = address_of(hole)
        machine.vm.set_user_memory_region(3, UNMAPPED, 8 * PAGE, at)
        protect(at + PAGE, 7 * PAGE, 0)
        left = case.size if case.left is None else case.left
        assert machine.pre_fault(case.gpa, case.size, case.flags) == (case.expected, case.gpa + case.size - left, left)


def test_pointer_and_capability(any_host: Any) -> None:
    with Prepared(any_host) as machine:
        assert machine.vcpu.ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, 8) == -EFAULT
        assert machine.vm.check_extension(caps.KVM_CAP_PRE_FAULT_MEMORY) == 1


def test_a_result_that_cannot_be_written(any_host: Any) -> None:
    with Prepared(any_host) as machine:
        page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page[:24] = bytes(kvm_pre_fault_memory(gpa=SLOT, size=PAGE))[:24]
        protect(address_of(page), PAGE, mmap.PROT_READ)
        assert machine.vcpu.ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, address_of(page)) == -EFAULT


def test_it_populates_user_memory(any_host: Any) -> None:
    """A page that was given back is there again: a read of it would be zero in any case, so the pages are counted."""
    with Prepared(any_host) as machine:
        before = resident(machine.user)
        assert machine.pre_fault(SLOT, 2 * MIB) == (OK, SLOT + 2 * MIB, 0)
        assert before == 0 and resident(machine.user) == 512


def resident(memory: mmap.mmap) -> int:
    """How many pages of a mapping of whole pages have an entry in our page tables."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address_of(memory) // PAGE * 8)
        entries = pagemap.read(len(memory) // PAGE * 8)
    return sum(entries[at + 7] >> 7 for at in range(0, len(entries), 8))


@pytest.fixture
def protected(any_host: Any) -> Prepared:
    with Machine(any_host) as probe:
        if not feature(probe, "SW_PROTECTED"):
            pytest.skip(f"{any_host.name}: no VM type SW_PROTECTED")
    return Prepared(any_host, 1)


def test_private_memory(protected: Prepared) -> None:
    with protected as machine, machine.vm.create_guest_memfd(2 * MIB) as memfd:
        machine.vm.set_user_memory_region2(4, 80 * MIB, 2 * MIB, machine.hva, guest_memfd=memfd.fd)
        machine.vm.set_memory_attributes(80 * MIB, MIB, PRIVATE)
        assert machine.pre_fault(80 * MIB, 2 * MIB) == (OK, 82 * MIB, 0)  # half private, half shared
        memfd.close()
        assert machine.pre_fault(80 * MIB, PAGE) == (EFAULT, 80 * MIB, PAGE)


def test_private_without_a_file(protected: Prepared) -> None:
    with protected as machine:
        machine.vm.set_memory_attributes(SLOT + PAGE, PAGE, PRIVATE)
        assert machine.pre_fault(SLOT, 3 * PAGE) == (OK, SLOT + PAGE, 2 * PAGE)
        assert machine.pre_fault(SLOT + PAGE, 2 * PAGE) == (EFAULT, SLOT + PAGE, 2 * PAGE)
        assert machine.vcpu.exit(EFAULT) == MemoryFault(PRIVATE, SLOT + PAGE, PAGE, EFAULT)


def test_private_without_a_slot(protected: Prepared) -> None:
    with protected as machine:
        machine.vm.set_memory_attributes(HOLE, PAGE, PRIVATE)
        assert machine.pre_fault(HOLE, PAGE) == (EFAULT, HOLE, PAGE)
        assert machine.pre_fault(HOLE + PAGE, PAGE) == (ENOENT, HOLE + PAGE, PAGE)
