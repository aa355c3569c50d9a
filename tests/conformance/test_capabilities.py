"""KVM_CAP_*: what CHECK_EXTENSION answers for the system and for a VM, and what ENABLE_CAP takes."""

from __future__ import annotations

import ctypes
from errno import EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import structs as s
from tests.conformance.rows import OK, Row, expect_errno, feature, parametrize
from tests.conformance.snippets import Machine


def test_capabilities(any_host: Any) -> None:
    with Machine(any_host) as machine:
        system = machine.system
        for cap in (caps.KVM_CAP_USER_MEMORY, caps.KVM_CAP_USER_MEMORY2, caps.KVM_CAP_IMMEDIATE_EXIT, caps.KVM_CAP_CHECK_EXTENSION_VM):
            assert system.check_extension(cap) == machine.vm.check_extension(cap) == 1
        assert system.check_extension(caps.KVM_CAP_EXIT_HYPERCALL) == 1 << kvm.KVM_HC_MAP_GPA_RANGE
        assert system.check_extension(caps.KVM_CAP_NR_MEMSLOTS) == kvm.KVM_USER_MEM_SLOTS
        assert system.check_extension(0xFFFF) == 0 and system.check_extension((1 << 64) - 1) == 0
        private = system.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES)
        assert private in (0, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert machine.vm.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == 0  # a plain VM has none


ENABLE_CAP = [
    Row("hypercall exit", OK, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL, args=(1 << 12, 0, 0, 0))),
    Row("no hypercall exit", OK, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL)),
    Row("another hypercall", EINVAL, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL, args=(1 << 11, 0, 0, 0))),
    Row("hypercall bit 63", EINVAL, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL, args=(1 << 63, 0, 0, 0))),
    Row("user-space MSRs", OK, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_X86_USER_SPACE_MSR, args=(7, 0, 0, 0))),
    Row("unknown MSR reason", EINVAL, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_X86_USER_SPACE_MSR, args=(8, 0, 0, 0))),
    Row("unknown capability", EINVAL, lambda _: s.kvm_enable_cap(cap=0xFFFF)),
    Row("flags", EINVAL, lambda _: s.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL, flags=1)),
]


@parametrize(ENABLE_CAP)
def test_enable_cap(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        argument = row.argument(machine)
        assert expect_errno(machine.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument))) == row.expectation(machine)


CAPABILITIES = {
    "KVM_CAP_USER_MEMORY": 1, "KVM_CAP_USER_MEMORY2": 1, "KVM_CAP_SET_TSS_ADDR": 1, "KVM_CAP_SET_IDENTITY_MAP_ADDR": 1,
    "KVM_CAP_EXT_CPUID": 1, "KVM_CAP_MMU_SHADOW_CACHE_CONTROL": 1, "KVM_CAP_NR_MEMSLOTS": 32764, "KVM_CAP_MP_STATE": 1,
    "KVM_CAP_DESTROY_MEMORY_REGION_WORKS": 1, "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS": 1, "KVM_CAP_IMMEDIATE_EXIT": 1,
    "KVM_CAP_CHECK_EXTENSION_VM": 1, "KVM_CAP_ENABLE_CAP": 1, "KVM_CAP_ENABLE_CAP_VM": 1, "KVM_CAP_EXIT_HYPERCALL": 1 << 12,
    "KVM_CAP_X86_USER_SPACE_MSR": 1, "KVM_CAP_X86_MSR_FILTER": 1, "KVM_CAP_GET_MSR_FEATURES": 1, "KVM_CAP_SYS_ATTRIBUTES": 1,
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": 3, "KVM_CAP_MEMORY_FAULT_INFO": 1, "KVM_CAP_GUEST_MEMFD": 1,
    "KVM_CAP_INTERNAL_ERROR_DATA": 1, "KVM_CAP_READONLY_MEM": 1, "KVM_CAP_PV_MMU": 0, "KVM_CAP_ARM_SVE": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", CAPABILITIES)
def test_capability(any_host: Any, name: str) -> None:
    with Machine(any_host) as machine:
        number = getattr(caps, name)
        assert machine.system.check_extension(number) == machine.vm.check_extension(number) == CAPABILITIES[name]


def test_capabilities_of_private_memory(any_host: Any) -> None:
    with Machine(any_host) as probe:
        if not feature(probe, "SW_PROTECTED"):
            pytest.skip(f"{any_host.name}: no VM type SW_PROTECTED")
        assert probe.system.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == 8
        assert probe.system.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS) == 3
        assert probe.vm.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS) == 3
        assert probe.vm.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    with Machine(any_host, 1) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == 8
        assert machine.vm.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS) == 1
        assert machine.vm.check_extension(caps.KVM_CAP_READONLY_MEM) == 1
