"""KVM_X86_SET_MSR_FILTER: its checks, which accesses it denies, and what becomes of those."""

from __future__ import annotations

import ctypes
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.exits import Hlt, Rdmsr, Wrmsr
from kvmapi.vm import MsrRange
from tests.conformance.rows import OK, Row, parametrize
from tests.conformance.snippets import CODE, LongGuest, Machine, code

READ, WRITE = kvm.KVM_MSR_FILTER_READ, kvm.KVM_MSR_FILTER_WRITE
DENY = kvm.KVM_MSR_FILTER_DEFAULT_DENY
FILTER = kvm.KVM_MSR_EXIT_REASON_FILTER
MOST = kvm.KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8  # MSRs in one range
WILD = 0xFFFF888000000000
RDMSR = code("0f32f4", "rdmsr; hlt")
WRMSR = code("0f30f4", "wrmsr; hlt")
FS_BASE, SFMASK, UNKNOWN = 0xC0000100, 0xC0000084, 0x40000ABC


def made(flags: int = 0, *ranges: tuple[int, int, int, int | None]) -> Any:
    """struct kvm_msr_filter; a range is (flags, MSRs, base, address of the bitmap or None for a good one)."""

    def make(machine: Machine) -> Any:
        argument = s.kvm_msr_filter(flags=flags)
        for at, (kinds, msrs, base, bitmap) in enumerate(ranges):
            argument.ranges[at] = s.kvm_msr_filter_range(kinds, msrs, base, machine.hva if bitmap is None else bitmap)
        return argument

    return make


ROWS = [
    Row("empty", OK, made()),
    Row("one range", OK, made(0, (READ, 1, 0x174, None))),
    Row("reads and writes, default deny", OK, made(DENY, (READ | WRITE, 1, 0x174, None))),
    Row("deny everything", EINVAL, made(DENY)),
    Row("deny with an empty range", EINVAL, made(DENY, (READ, 0, 0x174, None))),
    Row("unknown flag", EINVAL, made(2, (READ, 1, 0x174, None))),
    Row("range without kinds", EINVAL, made(0, (0, 1, 0x174, None))),
    Row("range of an unknown kind", EINVAL, made(0, (READ | 4, 1, 0x174, None))),
    Row("an empty range is not looked at", OK, made(0, (4, 0, 0, WILD), (READ, 1, 0x174, None))),
    Row("the largest range", OK, made(0, (READ, MOST, 0, None))),
    Row("one more", EINVAL, made(0, (READ, MOST + 1, 0, None))),
    Row("2^32 - 1 MSRs", EINVAL, made(0, (READ, (1 << 32) - 1, 0, None))),
    Row("a range over the end of the numbers", OK, made(0, (READ, 64, (1 << 32) - 32, None))),
    Row("bitmap nowhere", EFAULT, made(0, (READ, 1, 0x174, WILD))),
    Row("kinds before the bitmap", EINVAL, made(0, (0, 1, 0x174, WILD))),
    Row("size before the bitmap", EINVAL, made(0, (READ, MOST + 1, 0, WILD))),
    Row("ranges in order", EFAULT, made(0, (READ, 1, 0, WILD), (0, 1, 0, None))),
    Row("flags before ranges", EINVAL, made(2, (READ, 1, 0, WILD))),
    Row("sixteen ranges", OK, made(0, *((READ, 1, 0x400 + n, None) for n in range(16)))),
]  # fmt: skip


@parametrize(ROWS)
def test_condition(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        argument = row.argument(machine)
        assert row.right(machine, machine.vm.ioctl_raw(ioctls.KVM_X86_SET_MSR_FILTER, ctypes.addressof(argument)))


def test_bad_pointer_and_capability(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.ioctl_raw(ioctls.KVM_X86_SET_MSR_FILTER, 8) == -EFAULT
        assert machine.system.check_extension(caps.KVM_CAP_X86_MSR_FILTER) == machine.vm.check_extension(caps.KVM_CAP_X86_MSR_FILTER) == 1


def reads(guest: LongGuest, number: int) -> bool:
    """Does RDMSR work in the guest?"""
    guest.put(CODE, RDMSR)
    assert guest.again(rcx=number) == Hlt()
    return bool(guest.regs().rip == CODE + 3)


def writes(guest: LongGuest, number: int, value: int = 0) -> bool:
    guest.put(CODE, WRMSR)
    assert guest.again(rcx=number, rax=value, rdx=0) == Hlt()
    return bool(guest.regs().rip == CODE + 3)


def test_default_deny(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.set_msr_filter([MsrRange(SFMASK, 1, b"\x01", READ)], default_deny=True)
        assert reads(guest, SFMASK) and not writes(guest, SFMASK)
        assert not reads(guest, FS_BASE) and guest.vector() == 13 and guest.frame().error == 0
        guest.vm.set_msr_filter([])
        assert reads(guest, FS_BASE) and writes(guest, SFMASK)


def test_bits_and_kinds(any_host: Any) -> None:
    """A 0 bit denies; the first range that holds the MSR for this kind of access decides."""
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.set_msr_filter([MsrRange(SFMASK - 1, 2, b"\x01", WRITE), MsrRange(SFMASK, 1, b"\x01", READ | WRITE)])
        assert reads(guest, SFMASK) and not writes(guest, SFMASK) and writes(guest, SFMASK - 1)
        assert reads(guest, FS_BASE)


def test_a_failed_filter_changes_nothing(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.set_msr_filter([MsrRange(SFMASK, 1, b"\x00", READ)])
        argument = made(0, (READ, 1, FS_BASE, WILD))(guest)
        assert guest.vm.ioctl_raw(ioctls.KVM_X86_SET_MSR_FILTER, ctypes.addressof(argument)) == -EFAULT
        assert not reads(guest, SFMASK) and reads(guest, FS_BASE)


def test_filter_exits(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, FILTER)
        guest.vm.set_msr_filter([MsrRange(FS_BASE, 1, b"\x00", READ | WRITE), MsrRange(UNKNOWN, 1, b"\x00", READ)])
        assert guest.again(rcx=FS_BASE) == Rdmsr(FS_BASE, FILTER)
        guest.vcpu.answer_msr(0x123_0000_0456)
        assert guest.run() == Hlt() and (guest.regs().rax, guest.regs().rdx) == (0x456, 0x123)
        assert guest.again(rcx=UNKNOWN) == Rdmsr(UNKNOWN, FILTER)  # filtered before it is looked for
        guest.vcpu.answer_msr(error=True)
        assert guest.run() == Hlt() and guest.vector() == 13
        guest.put(CODE, WRMSR)
        assert guest.again(rcx=FS_BASE, rax=0x2000, rdx=1) == Wrmsr(FS_BASE, 0x1_00002000, FILTER)
        guest.vcpu.answer_msr()
        assert guest.run() == Hlt() and guest.vcpu.get_sregs().fs.base == 0
        assert guest.again(rcx=UNKNOWN) == Hlt() and guest.vector() == 13  # unknown, and that was not asked for


def test_user_space_is_not_filtered(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.set_msr_filter([MsrRange(SFMASK, 1, b"\x00", READ | WRITE)])
        guest.vcpu.set_msrs({SFMASK: 0x200})
        assert guest.vcpu.get_msrs([SFMASK]) == {SFMASK: 0x200}


@pytest.mark.parametrize("reasons", [FILTER, 0])
def test_switching_the_exits_off(any_host: Any, reasons: int) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.set_msr_filter([MsrRange(FS_BASE, 1, b"\x00", READ)])
        guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, FILTER)
        guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, reasons)
        assert guest.again(rcx=FS_BASE) == (Rdmsr(FS_BASE, FILTER) if reasons else Hlt())
