"""MSRs that are KVM's own: what they hold, what they refuse, what CPUID says now; machine checks; KVM_CAP_ONE_REG."""

from __future__ import annotations

import ctypes
from errno import E2BIG, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt, Shutdown
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, LongGuest, code
from tests.conformance.test_rings import RING3, RingGuest

RDMSR, WRMSR = code("0f32f4", "rdmsr; hlt"), code("0f30f4", "wrmsr; hlt")
GP, MC = 13, 18
PLATFORM_INFO, MISC_FEATURES, POWER_CTL, MISC_ENABLE, HWCR, TSC_AUX = 0xCE, 0x140, 0x1FC, 0x1A0, 0xC0010015, 0xC0000103
CAN_FAULT = 1 << 31
ALL = (1 << 64) - 1
VALID, OVER, UNCORRECTED, SIGNALLED = 1 << 63, 1 << 62, 1 << 61, 1 << 56
MCG_CAP, MCG_STATUS, MCG_CTL = 0x179, 0x17A, 0x17B
REG_MSR = 0x2030 << 48 | 2 << 32


@pytest.fixture
def guest(any_host: Any) -> Any:
    with LongGuest(any_host, RDMSR) as made:
        if not feature(made, "hardware virtualization"):
            pytest.skip("paravirtual: the guest's MSRs are emulated loosely")
        yield made


def amd(guest: LongGuest) -> None:
    if guest.system.supported_cpuid()[0].ebx != int.from_bytes(b"Auth", "little"):
        pytest.skip("kvm_amd's rules")


def write(guest: LongGuest, number: int, value: int) -> bool:
    """The guest's own WRMSR: did it succeed?"""
    guest.put(CODE, WRMSR)
    assert guest.again(rcx=number, rax=value & 0xFFFFFFFF, rdx=value >> 32) == Hlt()
    return bool(guest.regs().rip == CODE + 3)


def read(guest: LongGuest, number: int) -> int | None:
    """The guest's own RDMSR; None is #GP."""
    guest.put(CODE, RDMSR)
    assert guest.again(rcx=number, rax=ALL, rdx=ALL) == Hlt()
    return guest.regs().rdx << 32 | guest.regs().rax if guest.regs().rip == CODE + 3 else None


def refused(guest: LongGuest, number: int, value: int) -> bool:
    """Does KVM_SET_MSRS refuse it?"""
    entry = v.kvm_msr_entry(index=number, data=value)
    buffer = ctypes.create_string_buffer(bytes(v.kvm_msrs(nmsrs=1)) + bytes(entry))
    return bool(guest.vcpu.ioctl_raw(ioctls.KVM_SET_MSRS, ctypes.addressof(buffer)) == 0)


# ---- values and rules
def test_every_listed_msr_can_be_saved_and_restored(guest: LongGuest) -> None:
    numbers = set(guest.system.msr_index_list()) - {0x4B564D06}  # ASYNC_PF_INT needs an in-kernel APIC
    guest.vcpu.set_msrs(guest.vcpu.get_msrs(numbers))


def test_feature_msrs(guest: LongGuest) -> None:
    amd(guest)
    assert guest.vcpu.get_msrs([0x8B, PLATFORM_INFO, 0xC0011029]) == {0x8B: 0x01000065, PLATFORM_INFO: CAN_FAULT, 0xC0011029: 0}
    with guest.system.create_vm() as vm:
        vm.enable_cap(caps.KVM_CAP_DISABLE_QUIRKS2, kvm.KVM_X86_QUIRK_STUFF_FEATURE_MSRS)
        with vm.create_vcpu() as bare:
            assert set(bare.get_msrs([0x8B, PLATFORM_INFO, 0x10A, 0x345, 0xC0011029]).values()) == {0}
    assert not refused(guest, PLATFORM_INFO, CAN_FAULT | 0xFF00)
    guest.run()
    assert refused(guest, PLATFORM_INFO, CAN_FAULT), "the model of a vCPU that ran is fixed"
    assert not refused(guest, PLATFORM_INFO, CAN_FAULT | 0xFF00) and not refused(guest, 0x8B, 7)


def test_the_guest_may_be_kept_from_platform_info(guest: LongGuest) -> None:
    assert read(guest, PLATFORM_INFO) is not None and not write(guest, PLATFORM_INFO, 0)
    guest.vm.enable_cap(caps.KVM_CAP_MSR_PLATFORM_INFO, 0)
    assert read(guest, PLATFORM_INFO) is None and PLATFORM_INFO in guest.vcpu.get_msrs([PLATFORM_INFO])


@pytest.mark.parametrize("bit", range(64))
def test_hwcr(guest: LongGuest, bit: int) -> None:
    ignored, valid = (3, 6, 8), (18, 24)
    if bit == 35:
        return  # depends on CPUID
    assert refused(guest, HWCR, 1 << bit) == (bit not in ignored and bit not in valid)
    assert guest.vcpu.get_msrs([HWCR])[HWCR] == (1 << bit if bit in valid else 0)


def test_power_ctl_and_misc_enable(guest: LongGuest) -> None:
    assert write(guest, POWER_CTL, 0x1234) and read(guest, POWER_CTL) == 0x1234
    reset = read(guest, MISC_ENABLE)
    assert reset is not None and reset & 0x1800 == 0x1800
    assert not write(guest, MISC_ENABLE, 1) and write(guest, MISC_ENABLE, reset | 1) and read(guest, MISC_ENABLE) == reset | 1
    assert write(guest, MISC_ENABLE, reset | 1 << 7) and read(guest, MISC_ENABLE) == reset, "EMON cannot be changed"


def test_mtrrs(guest: LongGuest) -> None:
    assert write(guest, 0x200, 0x1000_0006) and write(guest, 0x201, 0xFFFF_F800)
    assert not write(guest, 0x200, 0x1000_0002) and not write(guest, 0x200, 0x1000_0106) and not write(guest, 0x201, 0xFFFF_F400)
    assert write(guest, 0x250, 0x0606_0606_0606_0606) and not write(guest, 0x250, 0x0606_0606_0602_0606)
    assert read(guest, 0x250) == 0x0606_0606_0606_0606 and read(guest, 0x200) == 0x1000_0006


def test_tsc_aux_needs_an_instruction_that_reads_it(guest: LongGuest) -> None:
    if not any(entry.function == 0x80000001 and entry.edx >> 27 & 1 for entry in guest.system.supported_cpuid()):
        pytest.skip("CPUID offers no RDTSCP")
    assert write(guest, TSC_AUX, 5) and read(guest, TSC_AUX) == 5
    with LongGuest(guest.host, RDMSR) as other:
        entries = other.system.supported_cpuid()
        for entry in entries:
            if entry.function == 0x80000001:
                entry.edx &= ~(1 << 27)
            if entry.function == 7:
                entry.ecx &= ~(1 << 22)
        other.vcpu.set_cpuid2(entries)
        other.vcpu.set_msrs({TSC_AUX: 7})
        assert not write(other, TSC_AUX, 5) and read(other, TSC_AUX) is None and other.vcpu.get_msrs([TSC_AUX]) == {TSC_AUX: 7}


# ---- CPUID as it is now
def leaf(guest: LongGuest, function: int) -> v.kvm_cpuid_entry2:
    """From KVM_GET_CPUID2."""
    raw = ctypes.create_string_buffer(8 + 256 * ctypes.sizeof(v.kvm_cpuid_entry2))
    ctypes.memmove(raw, bytes(v.kvm_cpuid2(nent=256)), 8)
    assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(raw)) == 0
    entries = (v.kvm_cpuid_entry2.from_buffer_copy(raw, 8 + at * 40) for at in range(int.from_bytes(raw[:4], "little")))
    return next(entry for entry in entries if entry.function == function)


def test_cpuid_follows_the_state(guest: LongGuest) -> None:
    guest.put(CODE, code("0fa2f4", "cpuid; hlt"))
    for on in (1, 0):
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 = sregs.cr4 & ~(1 << 18) | on << 18
        sregs.apic_base = sregs.apic_base & ~(1 << 11) | on << 11
        guest.vcpu.set_sregs(sregs)
        assert (leaf(guest, 1).ecx >> 27 & 1, leaf(guest, 1).edx >> 9 & 1) == (on, on)
        assert guest.again(rax=1, rcx=0) == Hlt() and (guest.regs().rcx >> 27 & 1, guest.regs().rdx >> 9 & 1) == (on, on)
        guest.vcpu.set_cpuid2(guest.system.supported_cpuid())  # none of this counts as a change


def test_get_cpuid2_needs_room(guest: LongGuest) -> None:
    header = ctypes.create_string_buffer(bytes(v.kvm_cpuid2(nent=1)) + bytes(40))
    assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(header)) == -E2BIG
    assert header.raw[:4] == bytes(v.kvm_cpuid2(nent=1))[:4]


def test_cpuid_faulting(guest: LongGuest) -> None:
    """In rings above 0 only, and only where PLATFORM_INFO says that the processor can."""
    assert refused(guest, MISC_FEATURES, 2)
    guest.vcpu.set_msrs({PLATFORM_INFO: 0})
    assert refused(guest, MISC_FEATURES, 1)
    guest.vcpu.set_msrs({PLATFORM_INFO: CAN_FAULT, MISC_FEATURES: 1})
    guest.put(CODE, code("0fa2f4", "cpuid; hlt"))
    assert guest.again(rax=0) == Hlt() and guest.regs().rip == CODE + 3
    with RingGuest(guest.host, code("0fa2 ebfe", "cpuid; 0: jmp 0b")) as user:
        user.vcpu.set_msrs({MISC_FEATURES: 1})
        assert user.fault() == (GP, 0, RING3)


# ---- machine checks
def test_banks(guest: LongGuest) -> None:
    amd(guest)
    supported = ctypes.c_uint64()
    assert guest.system.host.ioctl(guest.system.fd, ioctls.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.addressof(supported)) == 0
    assert supported.value == 1 << 8 | 1 << 24
    assert guest.system.check_extension(caps.KVM_CAP_MCE) == 32
    for cap, errno in ((0, EINVAL), (33, EINVAL), (10 | 1 << 10, EINVAL), (10 | 1 << 8, 0)):
        value = ctypes.c_uint64(cap)
        assert guest.vcpu.ioctl_raw(ioctls.KVM_X86_SETUP_MCE, ctypes.addressof(value)) == -errno
    assert guest.vcpu.get_msrs([MCG_CAP, MCG_CTL, 0x400, 0x401]) == {MCG_CAP: 10 | 1 << 8, MCG_CTL: ALL, 0x400: ALL, 0x401: 0}
    assert write(guest, 0x400, 0) and not write(guest, 0x400, 2) and not write(guest, 0x401, 1) and write(guest, 0x401, 0)
    assert read(guest, 0x400 + 40) is None and not write(guest, MCG_CAP, 0) and not write(guest, MCG_CTL, 1)


def inject(guest: LongGuest, status: int, bank: int = 1, mcg_status: int = 0) -> int:
    error = v.kvm_x86_mce(status=status, addr=0x1234, misc=0x56, mcg_status=mcg_status, bank=bank)
    return int(guest.vcpu.ioctl_raw(ioctls.KVM_X86_SET_MCE, ctypes.addressof(error)))


def test_injected_machine_checks(guest: LongGuest) -> None:
    amd(guest)
    value = ctypes.c_uint64(10 | 1 << 8)
    guest.vcpu.ioctl_raw(ioctls.KVM_X86_SETUP_MCE, ctypes.addressof(value))
    assert inject(guest, 0) == inject(guest, VALID, bank=10) == -EINVAL
    assert inject(guest, VALID | 5) == 0 and guest.vcpu.get_msrs([0x405, 0x406, 0x407]) == {0x405: VALID | 5, 0x406: 0x1234, 0x407: 0x56}
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 |= 1 << 6
    guest.vcpu.set_sregs(sregs)
    assert inject(guest, VALID | UNCORRECTED | SIGNALLED, mcg_status=4) == 0
    assert guest.run() == Hlt() and guest.vector() == MC
    assert guest.vcpu.get_msrs([0x405, MCG_STATUS]) == {0x405: VALID | UNCORRECTED | SIGNALLED | OVER, MCG_STATUS: 4}
    assert inject(guest, VALID | UNCORRECTED | SIGNALLED, bank=2) == 0
    assert isinstance(guest.run(), Shutdown), "a second one while the first is dealt with"


# ---- KVM_CAP_ONE_REG
def test_one_reg(guest: LongGuest) -> None:
    if not guest.system.check_extension(caps.KVM_CAP_ONE_REG):
        pytest.skip(f"{guest.host.name}: no KVM_CAP_ONE_REG")
    value = ctypes.c_uint64(0x1234)
    register = v.kvm_one_reg(id=REG_MSR | 0x174, addr=ctypes.addressof(value))
    assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_ONE_REG, ctypes.addressof(register)) == 0
    value.value = 0
    assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_ONE_REG, ctypes.addressof(register)) == 0 and value.value == 0x1234
    for wrong in (REG_MSR | 0x12345678, 0x174, REG_MSR & ~(3 << 52) | 0x174, 0x2030 << 48 | 3 << 32, REG_MSR | 1 << 40 | 0x174):
        register.id = wrong
        for request in (ioctls.KVM_GET_ONE_REG, ioctls.KVM_SET_ONE_REG):
            assert guest.vcpu.ioctl_raw(request, ctypes.addressof(register)) == -EINVAL
    listed = v.kvm_reg_list(n=5)
    assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_REG_LIST, ctypes.addressof(listed)) == 0 and listed.n == 0


def test_unknown_capabilities_of_a_vcpu(guest: LongGuest) -> None:
    for cap, flags in ((caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1), (0xFFFF, 0)):
        with pytest.raises(KvmError) as failure:
            guest.vcpu.enable_cap(cap, 1, flags=flags)
        assert failure.value.errno == EINVAL
