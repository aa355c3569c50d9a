"""/dev/kvm: what it answers, what it refuses, and that unknown requests get the kernel's errno on each kind of fd."""

from __future__ import annotations

import ctypes
import os
import resource
from errno import E2BIG, EBADF, EEXIST, EFAULT, EINVAL, EIO, EMFILE, ENOTTY, ENXIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.abi.vcpu import kvm_cpuid2, kvm_cpuid_entry2
from kvmapi.buffers import HeaderAndEntries
from tests.conformance.rows import OK, Differs, Row, expect_errno, parametrize
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


def test_index_lists_say_how_many(any_host: Any) -> None:
    """With too little room the count is written and nothing else."""
    with Machine(any_host) as machine:
        for request in (ioctls.KVM_GET_MSR_INDEX_LIST, ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST):
            words = (ctypes.c_uint32 * 1024)(*[0x55555555] * 1024)
            words[0] = 1
            assert machine.system.ioctl_raw(request, ctypes.addressof(words)) == -E2BIG
            count = words[0]
            assert 1 < count < 1024 and words[1] == 0x55555555
            assert machine.system.ioctl_raw(request, ctypes.addressof(words)) == OK
            assert words[0] == count and 0x55555555 not in words[1 : count + 1] and words[count + 1] == 0x55555555


def test_feature_msrs(any_host: Any) -> None:
    """KVM_GET_MSRS on /dev/kvm reads features, and what KVM_GET_MSR_INDEX_LIST names as 0; it stops at the first other MSR."""
    with Machine(any_host) as machine:
        numbers = machine.system.msr_feature_index_list()
        assert 0x10A in numbers
        entries = (ctypes.c_uint64 * 600)()

        def ask(*wanted: int) -> int:
            for at, number in enumerate(wanted):
                entries[1 + 2 * at], entries[2 + 2 * at] = number, 0x55
            entries[0] = len(wanted)
            return int(machine.system.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(entries)))

        assert ask(*numbers) == len(numbers) and 0x55 not in entries[2 : 2 + 2 * len(numbers) : 2]
        assert ask(0x10A, 0x40000ABC, 0x10A) == 1 and entries[6] == 0x55
        assert ask(0x174) == 1 and entries[2] == 0
        assert ask() == 0
        entries[0] = 256
        assert machine.system.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(entries)) == -E2BIG
        assert machine.system.ioctl_raw(ioctls.KVM_GET_MSRS, 8) == -EFAULT


def _attribute(group: int, number: int, address: int = 0, flags: int = 0) -> Any:
    return lambda machine: s.kvm_device_attr(flags, group, number, address or machine.hva)


GET_ATTRIBUTE = [
    Row("XCR0 of guests", OK, _attribute(0, 0)),
    Row("another of group 0", ENXIO, _attribute(0, 1)),
    Row("unknown group", ENXIO, _attribute(77, 0)),
    Row("value nowhere", EFAULT, _attribute(0, 0, 8)),
    Row("attribute before the address", ENXIO, _attribute(0, 1, 8)),
    Row("flags are not looked at", OK, _attribute(0, 0, flags=1)),
    Row("VMSA features", OK, _attribute(1, 0), needs="SEV"),  # without SEV: ENXIO, or 0 where kvm_amd could have it
    Row("unknown attribute of SEV", ENXIO, _attribute(1, 99)),
]


@parametrize(GET_ATTRIBUTE)
def test_device_attributes(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        argument = ctypes.addressof(value := row.argument(machine))
        assert row.right(machine, machine.system.ioctl_raw(ioctls.KVM_GET_DEVICE_ATTR, argument))
        there = machine.system.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, argument)
        assert expect_errno(there) == (OK if row.expectation(machine) == EFAULT else row.expectation(machine)), value


@pytest.mark.parametrize("request_name", ["KVM_GET_DEVICE_ATTR", "KVM_HAS_DEVICE_ATTR", "KVM_GET_SUPPORTED_CPUID"])
def test_bad_pointers(any_host: Any, request_name: str) -> None:
    with Machine(any_host) as machine:
        for pointer in (0, 8, 0xFFFF888000000000):
            assert machine.system.ioctl_raw(getattr(ioctls, request_name), pointer) == -EFAULT


def test_device_attributes_are_not_of_vms(any_host: Any) -> None:
    with Machine(any_host) as machine:
        argument = s.kvm_device_attr(group=0, attr=0)
        assert machine.vm.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(argument)) == -ENOTTY


def test_cpuid_room(any_host: Any) -> None:
    """More room than KVM has entries is fine; a count too small stays as it was."""
    with Machine(any_host) as machine:
        argument = HeaderAndEntries(kvm_cpuid2, kvm_cpuid_entry2, 300)
        argument.header.nent = 300
        assert machine.system.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(argument.header)) == OK
        count = argument.header.nent
        assert 4 < count <= 256
        argument.header.nent = count - 1
        assert machine.system.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(argument.header)) == -E2BIG
        assert argument.header.nent == count - 1
        argument.header.nent = count
        assert machine.system.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(argument.header)) == OK


PLAIN_NUMBERS = [
    ("KVM_SET_TSS_ADDR", 0, OK),
    ("KVM_SET_TSS_ADDR", 0xFFFFD000, OK),
    ("KVM_SET_TSS_ADDR", 0xFFFFD001, EINVAL),
    ("KVM_SET_TSS_ADDR", 1 << 32, EINVAL),
    ("KVM_SET_NR_MMU_PAGES", 0, EINVAL),
    ("KVM_SET_NR_MMU_PAGES", 63, EINVAL),
    ("KVM_SET_NR_MMU_PAGES", 64, OK),
    ("KVM_SET_NR_MMU_PAGES", 1 << 20, OK),
    ("KVM_GET_NR_MMU_PAGES", 0, ENOTTY),
    ("KVM_SET_IDENTITY_MAP_ADDR", 8, EFAULT),
]


@pytest.mark.parametrize(("request_name", "argument", "expected"), PLAIN_NUMBERS)
def test_vm_numbers(any_host: Any, request_name: str, argument: int, expected: int) -> None:
    with Machine(any_host) as machine:
        assert expect_errno(machine.vm.ioctl_raw(getattr(ioctls, request_name), argument)) == expected


def test_the_identity_map_is_set_before_vcpus(any_host: Any) -> None:
    with Machine(any_host) as machine:
        address = ctypes.c_uint64(0xFFFBC000)
        assert machine.vm.ioctl_raw(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(address)) == OK
        machine.add_vcpu()
        assert machine.vm.ioctl_raw(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(address)) == -EINVAL
        assert machine.vm.ioctl_raw(ioctls.KVM_SET_IDENTITY_MAP_ADDR, 8) == -EINVAL  # before it looks at the pointer


def test_no_fd_left(any_host: Any, no_leaks: None) -> None:
    """EMFILE, and nothing stays behind: the vCPU's id is free, the memory is given back."""
    with Machine(any_host) as machine:
        memfd = s.kvm_create_guest_memfd(size=4096)
        makers = [
            (machine.system, ioctls.KVM_CREATE_VM, 0),
            (machine.vm, ioctls.KVM_CREATE_VCPU, 3),
            (machine.vm, ioctls.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(memfd)),
        ]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.dup(machine.vm.fd)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            answers = [fd.ioctl_raw(request, argument) for fd, request, argument in makers]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert answers == [-EMFILE] * 3
        for fd, request, argument in makers:
            result = fd.ioctl_raw(request, argument)
            assert result >= 0
            any_host.close(result)


def test_a_forked_child_gets_eio(any_host: Any) -> None:
    """VMs and vCPUs belong to one mm; the child can make its own, and what it closes is not the parent's."""
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        child = os.fork()
        if not child:
            answers = [
                machine.vm.ioctl_raw(ioctls.KVM_CHECK_EXTENSION, 3),
                vcpu.ioctl_raw(ioctls.KVM_GET_REGS, 0),
                vcpu.ioctl_raw(0xAEFE, 0),
            ]
            own = machine.system.ioctl_raw(ioctls.KVM_CREATE_VM, 0)
            vcpu.close()
            machine.vm.close()
            os._exit(0 if answers == [-EIO] * 3 and own >= 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert machine.vm.check_extension(caps.KVM_CAP_USER_MEMORY) == 1
        assert vcpu.get_regs().rflags == 2


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
