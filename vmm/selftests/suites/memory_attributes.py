"""KVM_SET_MEMORY_ATTRIBUTES: what it refuses. That it works is what `private_mem_conversions` shows.

Source: kvm_vm_ioctl_set_mem_attributes in virt/kvm/kvm_main.c (7.3).
"""

from __future__ import annotations

from errno import EINVAL

from kvmapi.abi import kvm
from kvmapi.vm import Vm
from vmm.selftests.api import Subtest, expect_errno, runs_on

PAGE, PRIVATE, END = 4096, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE, 1 << 64


@runs_on("sw-protected")
def test_ranges(vm: Vm, subtest: Subtest) -> None:
    """Nothing but whole pages that do not wrap. No memslot is needed."""
    wrapping = ((PAGE, END - PAGE), (END - PAGE, PAGE), (END - 2 * PAGE, 4 * PAGE))
    for gpa, size in ((1, PAGE), (PAGE // 2, PAGE), (0, 1), (0, PAGE + 8), (0, 0), *wrapping):
        with subtest(f"[{gpa:#x}, +{size:#x})"), expect_errno(EINVAL):
            vm.set_memory_attributes(gpa, size, PRIVATE)
    vm.set_memory_attributes(0, PAGE, PRIVATE)
    vm.set_memory_attributes(1 << 40, PAGE, 0)


@runs_on("sw-protected")
def test_attributes(vm: Vm, subtest: Subtest) -> None:
    """One attribute exists, PRIVATE, and no flag."""
    for bit in range(64):
        with subtest(f"flag {bit}"), expect_errno(EINVAL):
            vm.set_memory_attributes(0, PAGE, PRIVATE, flags=1 << bit)
        if 1 << bit == PRIVATE:
            continue
        for attributes in (1 << bit, 1 << bit | PRIVATE):
            with subtest(f"attributes {attributes:#x}"), expect_errno(EINVAL):
                vm.set_memory_attributes(0, PAGE, attributes)
