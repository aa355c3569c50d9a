"""DEBUGREGS, MP_STATE, the time stamp counter's frequency, CPUID and MSR lists' limits, TRANSLATE; bad pointers to all of them."""

from __future__ import annotations

import ctypes
from errno import E2BIG, EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.buffers import HeaderAndEntries
from kvmapi.exits import Hlt
from tests.conformance.rows import feature
from tests.conformance.snippets import ALIAS, CODE, HOLE, LongGuest, Machine, code

HLT = code("f4", "hlt")
DR6, DR7 = 0xFFFF0FF0, 0x400


# ---- what can be asked for
CAPABILITIES = (
    "SREGS2", "VCPU_EVENTS", "USER_NMI", "DEBUGREGS", "SET_GUEST_DEBUG", "X86_ROBUST_SINGLESTEP", "XSAVE", "GET_TSC_KHZ", "MP_STATE",
)  # fmt: skip


def test_capabilities(any_host: Any) -> None:
    with Machine(any_host) as machine:
        for name in CAPABILITIES:
            cap = getattr(caps, f"KVM_CAP_{name}")
            assert machine.system.check_extension(cap) == machine.vm.check_extension(cap) == 1, name
        assert machine.system.check_extension(caps.KVM_CAP_SET_GUEST_DEBUG2) == 0x1F0003, "the bits of KVM_SET_GUEST_DEBUG"
        assert machine.system.check_extension(caps.KVM_CAP_XCRS) or not feature(machine, "XSAVE")
        assert machine.vm.check_extension(caps.KVM_CAP_XSAVE2) >= ctypes.sizeof(v.kvm_xsave)


# ---- debug registers
def test_debugregs_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        registers = guest.vcpu.get_debugregs()
        assert (list(registers.db), registers.dr6, registers.dr7, registers.flags) == ([0] * 4, DR6, DR7, 0)
        registers.db[:] = [0x1111, 1 << 40, 0xFFFF800000000000, 4]
        registers.dr6, registers.dr7 = DR6 | 0xF, DR7 | 0x3000
        guest.vcpu.set_debugregs(registers)
        assert bytes(guest.vcpu.get_debugregs()) == bytes(registers)


@pytest.mark.parametrize(
    ("field", "value"), [("dr6", 1 << 32), ("dr6", 1 << 63), ("dr7", 1 << 32), ("dr7", DR7 | 1 << 63), ("flags", 1), ("flags", 1 << 63)]
)
def test_debugregs_that_are_refused(any_host: Any, field: str, value: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        registers = guest.vcpu.get_debugregs()
        registers.db[0] = 0x1234
        setattr(registers, field, value)
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_DEBUGREGS, ctypes.addressof(registers)) == -EINVAL
        assert guest.vcpu.get_debugregs().db[0] == 0, "refused whole"


def test_the_guest_reads_and_writes_them(any_host: Any) -> None:
    text = code("0f21c00f 21f10f21 fa0f23ce 0f23fff4", "mov rax, dr0; mov rcx, dr6; mov rdx, dr7; mov dr1, rsi; mov dr7, rdi; hlt")
    with LongGuest(any_host, text) as guest:
        registers = guest.vcpu.get_debugregs()
        registers.db[0], registers.dr6 = 0x123456789A, DR6 | 2
        guest.vcpu.set_debugregs(registers)
        assert guest.again(rsi=0xABCDEF, rdi=DR7 | 0x10000) == Hlt()
        regs = guest.regs()
        assert (regs.rax, regs.rcx, regs.rdx) == (0x123456789A, DR6 | 2, DR7)
        after = guest.vcpu.get_debugregs()
        assert (after.db[0], after.db[1]) == (0x123456789A, 0xABCDEF)
        if feature(guest, "hardware virtualization"):  # the paravirtual kernel keeps DR7 to itself
            assert after.dr7 == DR7 | 0x10000


# ---- MP_STATE
@pytest.mark.parametrize("state", range(11))
def test_mp_states_without_an_apic(any_host: Any, state: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        argument = v.kvm_mp_state(state)
        result = guest.vcpu.ioctl_raw(ioctls.KVM_SET_MP_STATE, ctypes.addressof(argument))
        assert result == (0 if state == kvm.KVM_MP_STATE_RUNNABLE else -EINVAL)
        assert guest.vcpu.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE
        assert guest.run() == Hlt()
        assert guest.vcpu.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE, "HLT leaves to user space, which waits"


def test_no_apic_state_without_an_apic(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        for name in ("KVM_GET_LAPIC", "KVM_SET_LAPIC"):
            assert guest.vcpu.ioctl_raw(getattr(ioctls, name), 8) == -EINVAL, "said before the pointer is looked at"


# ---- TSC
def test_tsc_khz(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        assert 100_000 <= guest.vcpu.ioctl_raw(ioctls.KVM_GET_TSC_KHZ) <= 10_000_000


# ---- CPUID and MSR lists
def _cpuid_argument(entries: list[v.kvm_cpuid_entry2], nent: int | None = None) -> Any:
    argument = HeaderAndEntries(v.kvm_cpuid2, v.kvm_cpuid_entry2, max(len(entries), 1))
    for at, entry in enumerate(entries):
        ctypes.memmove(ctypes.addressof(argument.entries[at]), ctypes.addressof(entry), ctypes.sizeof(entry))
    argument.header.nent = len(entries) if nent is None else nent
    return argument


def test_cpuid_limits(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.vm.create_vcpu(0)
        machine.vcpus.append(vcpu)
        many = [v.kvm_cpuid_entry2(function=0x40000100 + n) for n in range(257)]
        for count, expected in ((256, 0), (257, -E2BIG), (0, 0)):
            argument = _cpuid_argument(many, count)
            assert vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == expected
        argument = _cpuid_argument([])
        assert vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(argument.header)) == 0
        assert argument.header.nent == 0


def test_too_little_room_for_cpuid(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        argument = _cpuid_argument([], 1)
        assert vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(argument.header)) == -E2BIG
        assert argument.header.nent == 1, "the number needed is not told"


def test_cpuid_with_an_impossible_address_width(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.vm.create_vcpu(0)
        machine.vcpus.append(vcpu)
        for width, expected in ((48, 0), (57, 0), (0, 0), (47, -EINVAL), (64, -EINVAL)):
            argument = _cpuid_argument([v.kvm_cpuid_entry2(function=0x80000008, eax=width << 8 | 40)])
            assert vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == expected


def test_cpuid_is_fixed_once_the_vcpu_ran(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        entries = guest.system.supported_cpuid()
        guest.run()
        argument = _cpuid_argument(entries)
        if feature(guest, "hardware virtualization"):  # the paravirtual kernel changed some leaves, so these are others
            assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == 0, "the same again"
        argument = _cpuid_argument(entries[:-1])
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == -EINVAL
        at = next(n for n, entry in enumerate(entries) if entry.function == 0x80000002)
        argument = _cpuid_argument(entries)
        argument.entries[at].eax ^= 1
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_CPUID2, ctypes.addressof(argument.header)) == -EINVAL


def test_msr_list_limits(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        argument = HeaderAndEntries(v.kvm_msrs, v.kvm_msr_entry, 256)
        for at in range(256):
            argument.entries[at].index = 0x174
        for request in (ioctls.KVM_GET_MSRS, ioctls.KVM_SET_MSRS):
            for count, expected in ((255, 255), (256, -E2BIG), (1 << 31, -E2BIG), (0, 0)):
                argument.header.nmsrs = count
                assert guest.vcpu.ioctl_raw(request, ctypes.addressof(argument.header)) == expected


def test_every_listed_msr_can_be_read(any_host: Any) -> None:
    """KVM_GET_MSR_INDEX_LIST's MSRs exist on a vCPU that has the supported CPUID, and take back what they hold."""
    with LongGuest(any_host, HLT) as guest:
        numbers = [number for number in guest.system.msr_index_list() if number < 0x400000F0 or number >= 0xC0000000]
        got = {}
        for number in numbers:
            argument = HeaderAndEntries(v.kvm_msrs, v.kvm_msr_entry, 1)
            argument.header.nmsrs, argument.entries[0].index = 1, number
            if guest.vcpu.ioctl_raw(ioctls.KVM_GET_MSRS, ctypes.addressof(argument.header)) == 1:
                got[number] = argument.entries[0].data
        assert {0x10, 0x174, 0x175, 0x176, 0x277, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102} <= got.keys()
        if guest.host.name == "model":
            assert got.keys() == set(numbers)
        guest.vcpu.set_msrs({number: got[number] for number in (0x174, 0x277, 0xC0000081, 0xC0000084, 0xC0000102)})


# ---- TRANSLATE
def test_translate_fields(any_host: Any) -> None:
    """`writeable` and `usermode` are constants in KVM; an address without a mapping gives all ones."""
    with LongGuest(any_host, HLT) as guest:
        for address, physical, valid in (
            (CODE + 5, CODE + 5, 1),
            (ALIAS + CODE, CODE, 1),
            (HOLE, (1 << 64) - 1, 0),
            (1 << 47, (1 << 64) - 1, 0),
        ):
            argument = v.kvm_translation(linear_address=address)
            argument.physical_address, argument.usermode = 0x77, 1
            guest.vcpu.ioctl(ioctls.KVM_TRANSLATE, argument)
            assert (argument.linear_address, argument.physical_address, argument.valid) == (address, physical, valid)
            assert (argument.writeable, argument.usermode) == (1, 0)


# ---- pointers and the rest
POINTERS = [
    "GET_SREGS2", "SET_SREGS2", "GET_DEBUGREGS", "SET_DEBUGREGS", "GET_VCPU_EVENTS", "SET_VCPU_EVENTS", "GET_MP_STATE", "SET_MP_STATE",
    "INTERRUPT", "SET_GUEST_DEBUG", "TRANSLATE", "ENABLE_CAP",
]  # fmt: skip


@pytest.mark.parametrize("name", POINTERS)
def test_bad_pointers(any_host: Any, name: str) -> None:
    with LongGuest(any_host, HLT) as guest:
        for pointer in (0, 8, 1 << 63):
            assert guest.vcpu.ioctl_raw(getattr(ioctls, f"KVM_{name}"), pointer) == -EFAULT


def test_signal_mask_arguments(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        buffer = (ctypes.c_uint32 * 3)()
        for length, expected in ((8, 0), (4, -EINVAL), (0, -EINVAL), (16, -EINVAL), (128, -EINVAL), (1 << 31, -EINVAL)):
            buffer[0] = length
            assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SIGNAL_MASK, ctypes.addressof(buffer)) == expected
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SIGNAL_MASK, 0) == 0, "no mask: the thread's own"
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SIGNAL_MASK, 8) == -EFAULT


def test_enable_cap_of_a_vcpu(any_host: Any) -> None:
    from kvmapi.abi.structs import kvm_enable_cap

    with LongGuest(any_host, HLT) as guest:
        for argument in (kvm_enable_cap(cap=0xFFFF), kvm_enable_cap(cap=0xFFFF, flags=1)):
            assert guest.vcpu.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument)) == -EINVAL
