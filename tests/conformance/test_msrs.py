"""RDMSR, WRMSR and CPUID in the guest: what KVM answers, what goes to user space, what is #GP."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.exits import Hlt, Rdmsr, Wrmsr
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, LongGuest, Machine, code

VALUE = 0x8877665544332211
RDMSR = code("0f32f4", "rdmsr; hlt")
WRMSR = code("0f30f4", "wrmsr; hlt")
UNKNOWN = 0x40000ABC


def test_unknown_msr_is_gp(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.regs(rcx=UNKNOWN)
        assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == 0 and guest.frame().rip == CODE


def test_msr_exits(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, kvm.KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.regs(rcx=UNKNOWN, rax=VALUE, rdx=VALUE)
        assert guest.run() == Rdmsr(UNKNOWN, kvm.KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.vcpu.answer_msr(0x1122334455667788)
        assert guest.run() == Hlt()
        assert (guest.regs().rax, guest.regs().rdx) == (0x55667788, 0x11223344)
        guest.put(CODE, WRMSR)
        assert guest.again(rcx=UNKNOWN, rax=0x7AAAAAAA, rdx=0x5) == Wrmsr(UNKNOWN, 0x57AAAAAAA, kvm.KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.vcpu.answer_msr()
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 3
        assert isinstance(guest.again(rcx=UNKNOWN), Wrmsr)
        guest.vcpu.answer_msr(error=True)
        assert guest.run() == Hlt() and guest.vector() == 13


def test_known_msrs_in_the_guest(any_host: Any) -> None:
    with LongGuest(any_host, RDMSR) as guest:
        assert guest.again(rcx=0xC0000080) == Hlt() and guest.regs().rax == 0xD01  # EFER
        assert guest.again(rcx=0x277) == Hlt() and guest.regs().rdx == 0x00070406  # PAT at reset
        guest.put(CODE, WRMSR)
        assert guest.again(rcx=0xC0000100, rax=0x2000, rdx=0x10) == Hlt() and guest.vcpu.get_sregs().fs.base == 0x10_00002000
        if feature(guest, "an exact CPU"):  # QEMU's WRMSR takes any address
            assert guest.again(rcx=0xC0000082, rax=0, rdx=0x02000000) == Hlt() and guest.vector() == 13  # LSTAR not canonical, by any width
        if feature(guest, "hardware virtualization"):  # the paravirtual kernel takes any PAT
            assert guest.again(rcx=0x277, rax=2, rdx=0) == Hlt() and guest.vector() == 13  # PAT type 2 is reserved


def test_cpuid_is_what_user_space_set(any_host: Any) -> None:
    with LongGuest(any_host, code("0fa2f4", "cpuid; hlt")) as guest:
        entries = guest.system.supported_cpuid()
        for entry in entries:
            if entry.function == 0x40000000:
                entry.ebx, entry.ecx, entry.edx = 1, 2, 3
        guest.vcpu.set_cpuid2(entries)
        assert guest.again(rax=0x40000000, rcx=0) == Hlt()
        assert [guest.regs().rbx, guest.regs().rcx, guest.regs().rdx] == [1, 2, 3]


def test_the_msr_that_ends_a_list_reads_0(any_host: Any) -> None:
    """KVM_GET_MSRS does what comes before an unknown MSR, zeroes that one, and leaves the rest alone."""
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        entries = b"".join(struct.pack("<IIQ", number, 0, 0x5A) for number in (0x277, 0x12345678, 0x277))
        buffer = ctypes.create_string_buffer(struct.pack("<II", 3, 0) + entries)
        assert vcpu.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(buffer)) == 1
        assert [value for _, _, value in struct.iter_unpack("<IIQ", buffer.raw[8:56])] == [0x0007040600070406, 0, 0x5A]
