"""KVM_SET_MEMORY_ATTRIBUTES: the checks in order, on VMs that have private memory and on those that have not."""

from __future__ import annotations

import ctypes
from errno import EFAULT, EINVAL, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.structs import kvm_memory_attributes
from tests.conformance.rows import OK, Differs, Row, feature, parametrize
from tests.conformance.snippets import MIB, PAGE, Machine

PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
NONE = Differs("memory attributes", ENOTTY, "no VM type with private memory is built in, so the ioctl is not either")
TOP = 1 << 64


def call(gpa: int = 0, size: int = PAGE, attributes: int = 0, flags: int = 0) -> Any:
    return lambda machine: kvm_memory_attributes(gpa, size, attributes, flags)


PLAIN = [
    Row("shared on a plain VM", OK, call(), differs=(NONE,)),
    Row("private on a plain VM", EINVAL, call(attributes=PRIVATE), differs=(NONE,)),
]
CHECKS = [
    Row("private", OK, call(attributes=PRIVATE)),
    Row("shared", OK, call()),
    Row("no slot is needed", OK, call(1 << 40, 1 << 30, PRIVATE)),
    Row("twice", OK, call(attributes=PRIVATE), setup=lambda machine: machine.vm.set_memory_attributes(0, PAGE, PRIVATE)),
    Row("flags", EINVAL, call(flags=1)),
    Row("flag bit 63", EINVAL, call(flags=1 << 63)),
    Row("READ attribute", EINVAL, call(attributes=1)),
    Row("unknown attribute", EINVAL, call(attributes=1 << 63)),
    Row("PRIVATE and an unknown one", EINVAL, call(attributes=PRIVATE | 1)),
    Row("size 0", EINVAL, call(size=0)),
    Row("wraps", EINVAL, call(TOP - PAGE, 2 * PAGE)),
    Row("ends at 2^64", EINVAL, call(TOP - PAGE, PAGE)),
    Row("gpa unaligned", EINVAL, call(gpa=0x800)),
    Row("size unaligned", EINVAL, call(size=0x800)),
]  # fmt: skip


def do(machine: Machine, argument: Any) -> int:
    return machine.vm.ioctl_raw(ioctls.KVM_SET_MEMORY_ATTRIBUTES, ctypes.addressof(argument))


@parametrize(PLAIN)
def test_plain(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        assert row.right(machine, do(machine, row.argument(machine)))


@parametrize(CHECKS)
def test_sw_protected(any_host: Any, row: Row) -> None:
    with Machine(any_host) as probe:
        if not feature(probe, "SW_PROTECTED"):
            pytest.skip(f"{any_host.name}: no VM type SW_PROTECTED")
    with Machine(any_host, 1) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == PRIVATE
        if row.setup is not None:
            row.setup(machine)
        assert row.right(machine, do(machine, row.argument(machine)))


def test_bad_pointer(any_host: Any) -> None:
    with Machine(any_host) as machine:
        expected = EFAULT if feature(machine, "memory attributes") else ENOTTY
        assert machine.vm.ioctl_raw(ioctls.KVM_SET_MEMORY_ATTRIBUTES, 8) == -expected


def test_memfds_of_a_vm_with_private_memory_cannot_start_shared(any_host: Any) -> None:
    with Machine(any_host) as probe:
        if not feature(probe, "SW_PROTECTED"):
            pytest.skip(f"{any_host.name}: no VM type SW_PROTECTED")
    with Machine(any_host, 1) as machine:
        from kvmapi.abi.structs import kvm_create_guest_memfd

        argument = kvm_create_guest_memfd(size=MIB, flags=kvm.GUEST_MEMFD_FLAG_INIT_SHARED)
        assert machine.vm.ioctl_raw(ioctls.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(argument)) == -EINVAL
        assert machine.vm.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS) == kvm.GUEST_MEMFD_FLAG_MMAP
