"""/dev/kvm: what it answers, what it refuses, and that unknown requests get the kernel's errno on each kind of fd."""

from __future__ import annotations

import ctypes
from errno import E2BIG, EBADF, EEXIST, EFAULT, EINVAL, ENOTTY, ENXIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.abi.vcpu import kvm_cpuid2, kvm_cpuid_entry2
from kvmapi.buffers import HeaderAndEntries
from tests.conformance.rows import OK, Differs, Row, expect_errno, feature, parametrize
from tests.conformance.snippets import Machine


def value(number: int) -> Any:
    return lambda machine: number


CREATE_VM = [
    Row("plain", OK, value(kvm.KVM_X86_DEFAULT_VM)),
    Row("SW_PROTECTED", OK, value(1), differs=(Differs("SW_PROTECTED", EINVAL, "KVM_SW_PROTECTED_VM is not built in"),)),
    Row("SEV", OK, value(2), differs=(Differs("SEV", EINVAL, "no SEV"),)),
    Row("type 6", EINVAL, value(6)),
    Row("type 31", EINVAL, value(31)),
    Row("type 32", EINVAL, value(32)),
    Row("type 2^32", EINVAL, value(1 << 32)),
    Row("type 2^63", EINVAL, value(1 << 63)),
]


@parametrize(CREATE_VM)
def test_create_vm(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        result = machine.system.ioctl_raw(ioctls.KVM_CREATE_VM, row.argument(machine))
        assert expect_errno(result) == row.expectation(machine)
        if result >= 0:
            any_host.close(result)


def test_vm_types_are_what_create_vm_takes(any_host: Any) -> None:
    with Machine(any_host) as machine:
        types = machine.system.check_extension(caps.KVM_CAP_VM_TYPES)
        assert types & 1 and types == machine.vm.check_extension(caps.KVM_CAP_VM_TYPES)
        for number in range(8):
            result = machine.system.ioctl_raw(ioctls.KVM_CREATE_VM, number)
            assert (result >= 0) == bool(types >> number & 1)
            if result >= 0:
                any_host.close(result)


def test_version_and_mapping(any_host: Any) -> None:
    with Machine(any_host) as machine:
        system = machine.system
        assert system.api_version() == 12 and system.vcpu_mmap_size() >= 2 * 4096
        assert system.ioctl_raw(ioctls.KVM_GET_API_VERSION, 1) == -EINVAL
        assert system.ioctl_raw(ioctls.KVM_GET_VCPU_MMAP_SIZE, 1) == -EINVAL


@pytest.mark.parametrize(("fd_kind", "expected"), [("system", EINVAL), ("vm", ENOTTY), ("vcpu", EINVAL)])
def test_unknown_requests(any_host: Any, fd_kind: str, expected: int) -> None:
    with Machine(any_host) as machine:
        fd = {"system": machine.system, "vm": machine.vm, "vcpu": machine.add_vcpu()}[fd_kind]
        assert fd.ioctl_raw(0xAEFE, 0) == -expected
        assert fd.ioctl_raw(0xAEFE, 1 << 40) == -expected
        foreign = fd.ioctl_raw(0x5401 if fd_kind == "vcpu" else 0x54FE, 0)  # a terminal's request
        assert foreign == -expected


def test_requests_of_another_kind_of_fd(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        assert machine.system.ioctl_raw(ioctls.KVM_CREATE_VCPU) == -EINVAL
        assert machine.vm.ioctl_raw(ioctls.KVM_RUN) == -ENOTTY
        assert machine.vm.ioctl_raw(ioctls.KVM_CREATE_VM) == -ENOTTY
        assert vcpu.ioctl_raw(ioctls.KVM_CREATE_VCPU, 1) == -EINVAL


def test_closed_and_foreign_fds(any_host: Any) -> None:
    plain = any_host.memfd_create("test", 0)
    try:
        assert any_host.ioctl(plain, ioctls.KVM_CREATE_VM, 0) == -ENOTTY
    finally:
        any_host.close(plain)
    assert any_host.ioctl(plain, ioctls.KVM_CREATE_VM, 0) == -EBADF
    assert any_host.ioctl(-1, ioctls.KVM_GET_API_VERSION, 0) == -EBADF
    with pytest.raises(OSError) as caught:
        any_host.close(plain)
    assert caught.value.errno == EBADF


def test_only_the_low_32_bits_of_a_request_count(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.system.ioctl_raw(ioctls.KVM_GET_API_VERSION | 1 << 32) == 12


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


def test_supported_cpuid(any_host: Any) -> None:
    with Machine(any_host) as machine:
        system = machine.system
        assert {0, 1, 0x40000000, 0x80000000, 0x80000001} <= {entry.function for entry in system.supported_cpuid()}
        argument = HeaderAndEntries(kvm_cpuid2, kvm_cpuid_entry2, 2)
        for room in (0, 2):
            argument.header.nent = room
            assert system.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(argument.header)) == -E2BIG
        assert system.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, 8) == -EFAULT


def test_msr_index_list(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert {0x10, 0x174, 0xC0000080} - {0xC0000080} <= set(machine.system.msr_index_list())
        assert machine.system.ioctl_raw(ioctls.KVM_GET_MSR_INDEX_LIST, 8) == -EFAULT


def test_device_attributes(any_host: Any) -> None:
    with Machine(any_host) as machine:
        unknown = s.kvm_device_attr(group=77, attr=0)
        answer = machine.system.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(unknown))
        assert answer == -ENXIO
        known = s.kvm_device_attr(group=1, attr=0)
        answer = machine.system.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(known))
        assert answer == (OK if feature(machine, "SEV") else -ENXIO)


@pytest.mark.parametrize(("index", "expected"), [(0, OK), (1, OK), (1 << 31, EINVAL), (1 << 20, EINVAL), (1 << 33, EINVAL)])
def test_create_vcpu(any_host: Any, index: int, expected: int) -> None:
    with Machine(any_host) as machine:
        result = machine.vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, index)
        assert expect_errno(result) == expected
        if result >= 0:
            assert machine.vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, index) == -EEXIST
            any_host.close(result)
            assert machine.vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, index) == -EEXIST, "the id stays taken while the VM lives"


def test_plain_vms_have_no_sev_commands(any_host: Any) -> None:
    from kvmapi.abi import sev

    with Machine(any_host) as machine:
        command = sev.kvm_sev_cmd(id=sev.KVM_SEV_LAUNCH_FINISH)
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(command)) == -ENOTTY
        region = s.kvm_enc_region(machine.hva, 4096)
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, ctypes.addressof(region)) == -ENOTTY
