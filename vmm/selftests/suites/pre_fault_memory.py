"""pre_fault_memory_test: KVM_PRE_FAULT_MEMORY populates a range, tells how far it came, and stops where no memory is.

The range is at the end of guest-physical memory. While the first attempt runs, a second thread deletes the memslot and then makes it again;
whatever that attempt met, the next one must end as it should.
"""

from __future__ import annotations

import ctypes
import threading
from errno import EINTR, ENOENT

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.vcpu import kvm_pre_fault_memory
from kvmapi.system import System
from vmm.selftests.api import Bench, MachineFactory, Slot, Subtest, check_equal, check_result, fail, runs_on, skip

SLOT, PAGE, AREA = 10, 4096, 2 << 20
SIZE = AREA + PAGE
GVA = 3 << 30

READER = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot;
	(void)vcpu;
	for (uint64_t at = 0xc0000000UL; at < 0xc0000000UL + PAGE_2M + PAGE_SIZE; at += PAGE_SIZE)
		GUEST_ASSERT_EQ(*(volatile uint64_t *)at, 0);
	return 0;
}
"""


@runs_on("plain", "sw-protected")
def test_pre_fault_memory(machine: MachineFactory, system: System, subtest: Subtest) -> None:
    """Shared memory."""
    pre_fault_memory(machine, system, subtest, private=False)


@runs_on("sw-protected")
def test_pre_fault_memory_private(machine: MachineFactory, system: System, subtest: Subtest) -> None:
    """Private memory: the slot's guest_memfd."""
    pre_fault_memory(machine, system, subtest, private=True)


def pre_fault_memory(machine: MachineFactory, system: System, subtest: Subtest, private: bool) -> None:
    """The three ranges, then the guest reads every page."""

    def prepare(m: Bench) -> None:
        if not m.vm.check_extension(caps.KVM_CAP_PRE_FAULT_MEMORY):
            skip("this KVM has no KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY = 0); use a kernel from 6.11 on, or --on model")
        m.add_slot(Slot(SLOT, near_the_end(system), SIZE, guest_memfd=private, gva=GVA))

    m = machine(READER, prepare=prepare)
    gpa = m.memory.slots[-1].gpa
    if private:
        m.vm.set_memory_attributes(gpa, SIZE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    for name, offset, size, left in (
        ("2 MiB", 0, AREA, 0),
        ("over the end of the slot", AREA, 2 * PAGE, PAGE),
        ("behind the slot", SIZE, PAGE, PAGE),
    ):
        with subtest(name):
            attempt(m, gpa, offset, size, left)
    m.done()


def near_the_end(system: System) -> int:
    """The last 2 MiB-aligned GPA at which the slot fits with a page behind it, by the width of the guest's physical addresses."""
    width = next(int(entry.eax) & 0xFF for entry in system.supported_cpuid() if entry.function == 0x80000008)
    return ((1 << width) - SIZE - PAGE) // AREA * AREA


class Slotkeeper(threading.Thread):
    """Deletes the slot at once, and makes it again when told to."""

    def __init__(self, m: Bench) -> None:
        super().__init__(daemon=True)
        self.bench = m
        self.slot = next(slot for slot in m.memory.slots if slot.id == SLOT)
        self.go, self.again = threading.Event(), threading.Event()
        self.failure: OSError | None = None

    def run(self) -> None:
        """Delete, wait, make."""
        self.go.wait(self.bench.patience)
        try:
            self.put(0)
            self.again.wait(self.bench.patience)
            self.put(self.slot.size)
        except OSError as failure:
            self.failure = failure

    def put(self, size: int) -> None:
        """The slot with its memory, or (size 0) without the slot."""
        slot, vm = self.slot, self.bench.vm
        if slot.guest_memfd is None:
            vm.set_user_memory_region(slot.id, slot.gpa, size, slot.hva)
        else:
            vm.set_user_memory_region2(slot.id, slot.gpa, size, slot.hva, guest_memfd=slot.guest_memfd.fd)

    def finish(self) -> None:
        """The slot is there again."""
        self.again.set()
        self.join(self.bench.patience)
        if self.failure is not None:
            raise self.failure


def attempt(m: Bench, gpa: int, offset: int, size: int, left: int) -> None:
    """Pre-fault `[gpa + offset, ... + size)`; in the end `left` bytes must be undone, because no slot is there."""
    keeper, raced = Slotkeeper(m), False
    keeper.start()
    keeper.go.set()
    wanted = kvm_pre_fault_memory(gpa=gpa + offset, size=size)
    while True:
        before = wanted.size
        result = m.vcpus[0].ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, ctypes.addressof(wanted))
        if (wanted.size < before) == (result < 0):
            fail(
                f"KVM_PRE_FAULT_MEMORY returned {result} and left {wanted.size:#x} of {before:#x} bytes: exactly one of progress and error"
            )
        if result == -EINTR:
            continue
        if not raced:
            raced = True
            keeper.finish()
            if wanted.size:
                continue  # what the race left is not the answer
        if not wanted.size or result < 0:
            break
    check_equal(wanted.size, left, "bytes left")
    check_equal(wanted.gpa, gpa + offset + size - left, "where it stopped")
    check_result(result, -ENOENT if left else 0, "the last KVM_PRE_FAULT_MEMORY")
