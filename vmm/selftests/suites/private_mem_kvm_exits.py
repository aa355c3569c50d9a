"""private_mem_kvm_exits_test: a private access without private memory behind it leaves KVM_RUN with EFAULT and a memory fault."""

from __future__ import annotations

from errno import EFAULT

from kvmapi.abi import kvm
from kvmapi.exit_types import MemoryFault
from vmm import boot
from vmm.selftests.api import Bench, MachineFactory, Slot, check_equal, runs_on
from vmm.selftests.waiting import wait_until

SLOT, GPA, SIZE = 10, 3 << 30, 4096

READER = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile uint64_t *word = (uint64_t *)0xc0000000UL, *beats = (uint64_t *)boot->test_area;

	(void)vcpu;
	ucall_sync(1);
	for (;;) {
		GUEST_ASSERT_EQ(*word, 0);
		++*beats;
	}
}
"""


def private_guest(machine: MachineFactory, guest_memfd: bool) -> Bench:
    """A guest about to read a page that has the attribute PRIVATE, and a guest_memfd or not."""
    m = machine(READER, slots=[Slot(SLOT, GPA, SIZE, guest_memfd=guest_memfd)])
    m.vm.set_memory_attributes(GPA, SIZE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    m.sync(stage=1)
    return m


def check_fault(fault: MemoryFault) -> None:
    """What the exit must say in either case."""
    check_equal(fault.errno, EFAULT, "what KVM_RUN returned")
    check_equal(fault.reason, kvm.KVM_EXIT_MEMORY_FAULT, "the exit reason")
    check_equal(fault.flags, kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, "the fault's flags")
    check_equal((fault.gpa, fault.size), (GPA, SIZE), "the fault's range")


@runs_on("sw-protected")
def test_private_access_memslot_deleted(machine: MachineFactory) -> None:
    """The slot is deleted under a guest that reads private memory."""
    m = private_guest(machine, guest_memfd=True)
    with m.background(lambda: m.until(MemoryFault)) as run:
        wait_until(lambda: any(m.memory.read(boot.TEST_AREA, 8)), m.patience, "the guest reads")
        m.vm.set_user_memory_region2(SLOT, GPA, 0, 0)
        check_fault(run.result())


@runs_on("sw-protected")
def test_private_access_memslot_not_private(machine: MachineFactory) -> None:
    """The slot has no private memory to begin with."""
    m = private_guest(machine, guest_memfd=False)
    check_fault(m.until(MemoryFault))
