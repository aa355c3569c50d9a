"""A vCPU's state: registers round trip, what SET_SREGS refuses, MSRs, CPUID, translation; bad pointers everywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from errno import E2BIG, EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.buffers import HeaderAndEntries
from kvmapi.errors import KvmError
from tests.conformance.rows import feature
from tests.conformance.snippets import ALIAS, CODE, HOLE, LongGuest, Machine, RealGuest, code

HLT = code("f4", "hlt")
NAMES = [field[0] for field in v.kvm_regs._fields_]


def test_regs_round_trip(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        regs = v.kvm_regs(**{name: 0x1111_0000_0000_0000 * (n % 7) + n for n, name in enumerate(NAMES)})
        regs.rflags, regs.rip = 0xAD7, 0x1234
        vcpu.set_regs(regs)
        assert bytes(vcpu.get_regs()) == bytes(regs)


@pytest.mark.parametrize("flags", [2, 0x202, 0x246, 0x8D7, 0x400 | 2, 0x3002, 0x40002])
def test_rflags_round_trip(any_host: Any, flags: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        guest.regs(rflags=flags)
        assert guest.regs().rflags == flags
        guest.run()
        assert guest.regs().rflags == flags, "HLT leaves the flags alone"


def test_the_guest_sees_the_registers_and_we_see_the_guests(any_host: Any) -> None:
    text = code(
        "4889d84b 8d0c3848 f7d24889 e64889ef 4d01d1f4",
        "mov rax, rbx; lea rcx, [r8 + r15]; not rdx; mov rsi, rsp; mov rdi, rbp; add r9, r10; hlt",
    )
    with LongGuest(any_host, text) as guest:
        guest.regs(rbx=5, r8=1 << 40, r15=7, rdx=0, rbp=99, r9=(1 << 64) - 1, r10=1)
        guest.run()
        regs = guest.regs()
        assert (regs.rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.r9) == (5, (1 << 40) + 7, (1 << 64) - 1, 0x20000, 99, 0)
        assert regs.rflags & 0x41 == 0x41  # ZF and CF of the last addition


def test_reset_state(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.vm.create_vcpu(0)
        machine.vcpus.append(vcpu)
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        assert (regs.rip, regs.rflags, regs.rsp) == (0xFFF0, 2, 0)
        assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF0000, 0xFFFF)
        types = [getattr(sregs, name).type for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")]
        if feature(machine, "hardware virtualization"):  # SVM's reset state, in which nothing has been accessed; KVM shows data as accessed
            assert types == [0xA, 3, 3, 3, 3, 2, 3, 2]
        else:
            assert types == [0xB, 3, 3, 3, 3, 3, 0xB, 2]
        assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x60000010, 0, 0, 0)
        assert (sregs.gdt.limit, sregs.idt.limit) == (0xFFFF, 0xFFFF)
        assert sregs.apic_base == 0xFEE00900
        assert vcpu.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE


def test_sregs_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.fs.base, sregs.gs.base, sregs.cr2, sregs.cr8 = 0x7000_1234_5678, 0xFFFF_8000_0000_0000, 0x123456789, 5
        guest.vcpu.set_sregs(sregs)
        again = guest.vcpu.get_sregs()
        for name in ("cs", "ds", "fs", "gs", "ss", "tr", "gdt", "idt"):
            assert bytes(getattr(again, name)) == bytes(getattr(sregs, name)), name
        for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
            assert getattr(again, name) == getattr(sregs, name), name


def change(**values: int) -> Callable[[v.kvm_sregs], None]:
    def apply(sregs: v.kvm_sregs) -> None:
        for name, value in values.items():
            setattr(sregs, name, value)

    return apply


REFUSED = [
    ("PG without PE", change(cr0=0x80000010)),
    ("NW without CD", change(cr0=0xA0010033)),
    ("CR0 upper half", change(cr0=1 << 32 | 0x80010033)),
    ("long mode without PAE", change(cr4=0x600)),
    ("long mode without LMA", change(efer=0x901)),
    ("LMA without paging", change(cr0=0x11)),
    ("CR3 beyond the physical width", change(cr3=1 << 52)),
    ("CR4 reserved", change(cr4=0x620 | 1 << 31)),
]


@pytest.mark.parametrize(("name", "make"), REFUSED, ids=[name for name, _ in REFUSED])
def test_refused_sregs(any_host: Any, name: str, make: Callable[[v.kvm_sregs], None]) -> None:
    with LongGuest(any_host, HLT) as guest:
        before = bytes(guest.vcpu.get_sregs())
        sregs = guest.vcpu.get_sregs()
        make(sregs)
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SREGS, ctypes.addressof(sregs)) == -EINVAL
        assert bytes(guest.vcpu.get_sregs()) == before, "refused whole"


@pytest.mark.parametrize("name", ["GET_REGS", "SET_REGS", "GET_SREGS", "SET_SREGS", "GET_MSRS", "SET_MSRS", "SET_CPUID2", "GET_CPUID2"])
@pytest.mark.parametrize("pointer", [0, 8, 1 << 63])
def test_bad_pointers(any_host: Any, name: str, pointer: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        assert guest.vcpu.ioctl_raw(getattr(ioctls, f"KVM_{name}"), pointer) == -EFAULT


def test_msrs_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        values = {0x174: 0x10, 0x175: 0x123456, 0xC0000081: 0x23001000000000, 0xC0000082: 0x5678, 0xC0000084: 0x700, 0xC0000102: 0x99000}
        guest.vcpu.set_msrs(values)
        assert guest.vcpu.get_msrs(list(values)) == values


def test_unknown_msrs_stop_the_list(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        with pytest.raises(KvmError) as caught:
            guest.vcpu.get_msrs([0x174, 0x40000FFF, 0x175])
        assert caught.value.arguments["done"] == 1
        with pytest.raises(KvmError) as caught:
            guest.vcpu.set_msrs({0x174: 0, 0xC0000082: 1 << 57, 0x175: 0})  # LSTAR not canonical
        assert caught.value.arguments["done"] == 1


def test_too_many_msrs(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        argument = HeaderAndEntries(v.kvm_msrs, v.kvm_msr_entry, 300)
        argument.header.nmsrs = 300
        assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(argument.header)) == -E2BIG
        argument.header.nmsrs = 0
        assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(argument.header)) == 0


def test_cpuid_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        wanted = guest.system.supported_cpuid()
        argument = HeaderAndEntries(v.kvm_cpuid2, v.kvm_cpuid_entry2, len(wanted))
        argument.header.nent = len(wanted)
        guest.vcpu.ioctl(ioctls.KVM_GET_CPUID2, argument.header)
        got = {(e.function, e.index) for e in argument.entries[: argument.header.nent]}
        entries = {(e.function, e.index) for e in wanted}
        assert got == entries if feature(guest, "hardware virtualization") else got <= entries  # some leaves are dropped there
        argument.header.nent = 1
        assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(argument.header)) == -E2BIG
        argument.header.nent = 100_000
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == -E2BIG


def test_mp_state_without_an_apic(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        guest.vcpu.set_mp_state(kvm.KVM_MP_STATE_RUNNABLE)
        with pytest.raises(KvmError) as caught:
            guest.vcpu.set_mp_state(kvm.KVM_MP_STATE_HALTED)
        assert caught.value.errno == EINVAL


def test_translate(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        assert guest.vcpu.translate(CODE + 5) == CODE + 5
        assert guest.vcpu.translate(ALIAS + CODE) == CODE
        assert guest.vcpu.translate(HOLE) is None
    with RealGuest(any_host, HLT) as real:
        assert real.vcpu.translate(0x1234) == 0x1234
