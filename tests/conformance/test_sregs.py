"""KVM_SET_SREGS and SREGS2 beyond the plain round trip: what the guest's CPUID decides, CR8, the APIC base, the bitmap, segments."""

from __future__ import annotations

import ctypes
from errno import EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.exits import FailEntry, Hlt, SetTpr
from kvmapi.vcpu import Vcpu
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, STACK, STUBS, LongGuest, Machine, code

HLT = code("f4", "hlt")
SCE, LME, LMA, NXE, SVME, FFXSR = 1, 1 << 8, 1 << 10, 1 << 11, 1 << 12, 1 << 14
VECTOR = 0x21


def without(guest: Machine, *features: tuple[int, str, int]) -> Vcpu:
    """A new vCPU with the supported CPUID less these (function, register, bit)."""
    vcpu = guest.vm.create_vcpu(len(guest.vcpus))
    guest.vcpus.append(vcpu)
    entries = guest.system.supported_cpuid()
    for entry in entries:
        for function, register, bit in features:
            if entry.function == function and entry.index == 0:
                setattr(entry, register, getattr(entry, register) & ~(1 << bit))
    vcpu.set_cpuid2(entries)
    return vcpu


def offered(guest: Machine, function: int, register: str, bit: int) -> bool:
    return any(
        entry.function == function and entry.index == 0 and getattr(entry, register) >> bit & 1 for entry in guest.system.supported_cpuid()
    )


def set_sregs(vcpu: Any, sregs: v.kvm_sregs) -> int:
    result: int = vcpu.ioctl_raw(ioctls.KVM_SET_SREGS, ctypes.addressof(sregs))
    return result


def guest_cpuid_counts(guest: Machine) -> None:
    """Skip where CR4 and EFER are not checked against the guest's CPUID."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("paravirtual: CR4 is checked against the host's CPUID, EFER not at all")


# ---- CPUID decides
CR4_BITS = [
    ("OSXSAVE", 18, 1, "ecx", 26), ("SMEP", 20, 7, "ebx", 7), ("SMAP", 21, 7, "ebx", 20), ("FSGSBASE", 16, 7, "ebx", 0),
    ("PKE", 22, 7, "ecx", 3), ("LA57", 12, 7, "ecx", 16), ("UMIP", 11, 7, "ecx", 2), ("VMXE", 13, 1, "ecx", 5), ("PCIDE", 17, 1, "ecx", 17),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bit", "function", "register", "cpuid_bit"), CR4_BITS, ids=[row[0] for row in CR4_BITS])
def test_cr4_bits_that_cpuid_offers(any_host: Any, name: str, bit: int, function: int, register: str, cpuid_bit: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        guest_cpuid_counts(guest)
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 |= 1 << bit
        assert set_sregs(guest.vcpu, sregs) == (0 if offered(guest, function, register, cpuid_bit) else -EINVAL)
        poor = without(guest, (function, register, cpuid_bit))
        guest.start_long(poor)
        sregs = poor.get_sregs()
        sregs.cr4 |= 1 << bit
        assert set_sregs(poor, sregs) == -EINVAL


EFER_BITS = [("NXE", NXE, 0x80000001, "edx", 20), ("SVME", SVME, 0x80000001, "ecx", 2), ("FFXSR", FFXSR, 0x80000001, "edx", 25)]


@pytest.mark.parametrize(("name", "bit", "function", "register", "cpuid_bit"), EFER_BITS, ids=[row[0] for row in EFER_BITS])
def test_efer_bits_that_cpuid_offers(any_host: Any, name: str, bit: int, function: int, register: str, cpuid_bit: int) -> None:
    """SET_SREGS asks the guest's CPUID; KVM_SET_MSRS asks only what the host supports."""
    with LongGuest(any_host, HLT) as guest:
        guest_cpuid_counts(guest)
        here = offered(guest, function, register, cpuid_bit)
        vcpu = guest.vcpus[0]
        sregs = vcpu.get_sregs()
        sregs.efer |= bit
        assert set_sregs(vcpu, sregs) == (0 if here else -EINVAL)
        poor = without(guest, (function, register, cpuid_bit))
        sregs = poor.get_sregs()
        sregs.efer |= bit
        assert set_sregs(poor, sregs) == -EINVAL
        if here:
            poor.set_msrs({0xC0000080: bit | SCE})
            assert poor.get_sregs().efer == bit | SCE


def test_long_mode_needs_cpuid(any_host: Any) -> None:
    """A vCPU without CPUID has no long mode and no NX: the usual 64-bit start is refused until CPUID is set."""
    with LongGuest(any_host, HLT) as guest:
        guest_cpuid_counts(guest)
        wanted = guest.vcpu.get_sregs()
        bare = guest.vm.create_vcpu(1)
        guest.vcpus.append(bare)
        wanted.apic_base = bare.get_sregs().apic_base
        assert set_sregs(bare, wanted) == -EINVAL
        bare.set_cpuid2(guest.system.supported_cpuid())
        assert set_sregs(bare, wanted) == 0


@pytest.mark.parametrize("bit", [1, 4, 9, 16, 22, 63])
def test_efer_bits_that_nobody_has(any_host: Any, bit: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        guest_cpuid_counts(guest)
        sregs = guest.vcpu.get_sregs()
        sregs.efer |= 1 << bit
        assert set_sregs(guest.vcpu, sregs) == -EINVAL


def test_the_guest_is_refused_what_its_cpuid_lacks(any_host: Any) -> None:
    """MOV to CR4 and WRMSR of EFER: #GP for a bit that the guest's CPUID does not offer, as on a processor without it."""
    with LongGuest(any_host, code("0f22e0f4", "mov cr4, rax; hlt")) as guest:
        guest_cpuid_counts(guest)
        poor = without(guest, (7, "ebx", 7), (0x80000001, "edx", 20))
        wanted = guest.vcpu.get_sregs()
        wanted.efer, wanted.apic_base = wanted.efer & ~NXE, poor.get_sregs().apic_base
        for vcpu, refused in ((guest.vcpus[0], False), (poor, True)):
            if vcpu is poor:
                assert set_sregs(poor, wanted) == 0
            number = guest.vcpus.index(vcpu)
            guest.put(CODE, code("0f22e0f4", "mov cr4, rax; hlt"))
            guest.regs(number, rip=CODE, rsp=STACK, rflags=2, rax=0x620 | 1 << 20)
            assert guest.run(number) == Hlt() and (guest.regs(number).rip == STUBS + 16 * 13 + 1) == refused
            guest.put(CODE, code("0f30f4", "wrmsr; hlt"))
            guest.regs(number, rip=CODE, rsp=STACK, rflags=2, rax=SCE | LME | LMA | NXE, rdx=0, rcx=0xC0000080)
            assert guest.run(number) == Hlt() and (guest.regs(number).rip == STUBS + 16 * 13 + 1) == refused


def test_64_bit_and_32_bit_code_at_once(any_host: Any) -> None:
    """CS.L with CS.D is accepted; the processor refuses to enter."""
    with LongGuest(any_host, HLT) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cs.db = 1
        assert set_sregs(guest.vcpu, sregs) == 0
        if feature(guest, "hardware virtualization"):
            found = guest.run()
            assert isinstance(found, FailEntry) and found.hardware_entry_failure_reason == 0xFFFFFFFF


# ---- CR8 and the APIC's base
def test_cr8_is_taken_from_kvm_run(any_host: Any) -> None:
    """Without an in-kernel APIC, kvm_run.cr8 is what counts at every entry, and KVM_SET_SREGS sets it only until then."""
    with LongGuest(any_host, code("440f20c0 440f22c3 f4", "mov rax, cr8; mov cr8, rbx; hlt")) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cr8 = 5
        guest.vcpu.set_sregs(sregs)
        assert guest.vcpu.get_sregs().cr8 == 5
        guest.vcpu.kvm_run.cr8 = 7
        if feature(guest, "hardware virtualization"):
            assert guest.again(rbx=3) == SetTpr(), "lowered: a user-space APIC may have an interrupt for it now"
            assert guest.regs().rip == CODE + 8 and guest.run() == Hlt()
        else:
            assert guest.again(rbx=3) == Hlt()
        assert (guest.regs().rax, guest.vcpu.get_sregs().cr8, guest.vcpu.kvm_run.cr8) == (7, 3, 3)
        guest.vcpu.kvm_run.cr8 = 16
        assert guest.vcpu.ioctl_raw(ioctls.KVM_RUN) == -EINVAL
        assert guest.vcpu.get_sregs().cr8 == 3 and guest.vcpu.kvm_run.cr8 == 3, "refused, and the right one is shown"


def test_a_wrong_cr8_is_not_taken_over(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cr8, sregs.cr2 = 16, 0x1234
        assert set_sregs(guest.vcpu, sregs) == 0
        assert (guest.vcpu.get_sregs().cr8, guest.vcpu.get_sregs().cr2) == (0, 0x1234)


@pytest.mark.parametrize(
    ("base", "accepted"),
    [(0xFEE00900, True), (0xFEE00800, True), (0xFEE00100, True), (0x12345900, True), (0xFEE00D00, True), (0xFEE00C00, True),
     (0xFEE00500, False), (0xFEE00901, False), (0xFEE00A00, False), (1 << 52 | 0x900, False)],
)  # fmt: skip
def test_apic_base(any_host: Any, base: int, accepted: bool) -> None:
    with LongGuest(any_host, HLT) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.apic_base = base
        if base & 1 << 10:  # x2APIC: where the guest's CPUID has it
            accepted &= any(leaf.function == 1 and leaf.ecx >> 21 & 1 for leaf in guest.system.supported_cpuid())
        assert set_sregs(guest.vcpu, sregs) == (0 if accepted else -EINVAL)
        wanted = base if accepted else 0xFEE00900
        assert guest.vcpu.get_sregs().apic_base == wanted
        guest.run()
        assert guest.vcpu.kvm_run.apic_base == wanted


# ---- the interrupt bitmap
def test_the_bitmap_queues_an_interrupt(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        for vector in (VECTOR, 0x30):
            guest.set_gate(vector, STUBS + 16 * vector)
            guest.put(STUBS + 16 * vector, b"\xf4")
        sregs = guest.vcpu.get_sregs()
        sregs.idt.limit = 0xFFF
        sregs.interrupt_bitmap[0] = 1 << VECTOR | 1 << 0x30
        guest.vcpu.set_sregs(sregs)
        assert list(guest.vcpu.get_sregs().interrupt_bitmap) == [1 << VECTOR, 0, 0, 0], "the lowest of them"
        sregs.interrupt_bitmap[0] = 0
        guest.vcpu.set_sregs(sregs)
        assert guest.vcpu.get_sregs().interrupt_bitmap[0] == 1 << VECTOR, "an empty bitmap takes nothing back"
        assert guest.again(rflags=0x202) == Hlt() and guest.vector() == VECTOR
        assert not any(guest.vcpu.get_sregs().interrupt_bitmap)


# ---- SREGS2
def test_sregs2_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        sregs2 = v.kvm_sregs2()
        guest.vcpu.ioctl(ioctls.KVM_GET_SREGS2, sregs2)
        assert bytes(sregs2)[:280] == bytes(guest.vcpu.get_sregs())[:280]
        assert (sregs2.flags, list(sregs2.pdptrs)) == (0, [0] * 4)
        sregs2.fs.base, sregs2.cr2 = 0x7000_1234_5678, 0x999
        guest.vcpu.ioctl(ioctls.KVM_SET_SREGS2, sregs2)
        again = v.kvm_sregs2()
        guest.vcpu.ioctl(ioctls.KVM_GET_SREGS2, again)
        assert bytes(again) == bytes(sregs2)
        assert guest.run() == Hlt()


@pytest.mark.parametrize("flags", [kvm.KVM_SREGS2_FLAGS_PDPTRS_VALID, 2, 1 << 63])
def test_sregs2_flags(any_host: Any, flags: int) -> None:
    """PDPTRs belong to PAE paging; other flags do not exist."""
    with LongGuest(any_host, HLT) as guest:
        sregs2 = v.kvm_sregs2()
        guest.vcpu.ioctl(ioctls.KVM_GET_SREGS2, sregs2)
        sregs2.flags, sregs2.cr2 = flags, 0x999
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SREGS2, ctypes.addressof(sregs2)) == -EINVAL
        assert guest.vcpu.get_sregs().cr2 == 0


def test_sregs2_does_not_take_an_interrupt_away(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        guest.vcpu.interrupt(VECTOR)
        sregs2 = v.kvm_sregs2()
        guest.vcpu.ioctl(ioctls.KVM_GET_SREGS2, sregs2)
        guest.vcpu.ioctl(ioctls.KVM_SET_SREGS2, sregs2)
        assert guest.vcpu.get_sregs().interrupt_bitmap[0] == 1 << VECTOR


# ---- segments
def test_how_segments_are_shown(any_host: Any) -> None:
    """SVM keeps no granularity bit and no accessed bit of data segments: they follow from the limit and from being present."""
    with LongGuest(any_host, HLT) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: shows what was set")
        sregs = guest.vcpu.get_sregs()
        sregs.ds.type, sregs.es.g, sregs.tr.type = 2, 0, 9
        sregs.fs.present, sregs.gs.unusable = 0, 1
        guest.vcpu.set_sregs(sregs)
        got = guest.vcpu.get_sregs()
        assert (got.ds.type, got.es.g, got.tr.type) == (3, 1, 0xB)
        assert (got.fs.present, got.fs.unusable, got.gs.present, got.gs.unusable) == (0, 1, 0, 1)


def test_the_segments_count_in_the_guest(any_host: Any) -> None:
    text = code(
        "64488b04 25000000 00654889 04250800 00008cc9 0f010c25 00010300 f4",
        "mov rax, fs:[0]; mov gs:[8], rax; mov ecx, cs; sidt [0x30100]; hlt",
    )
    with LongGuest(any_host, text) as guest:
        guest.put(DATA, bytes(range(8)))
        sregs = guest.vcpu.get_sregs()
        sregs.fs.base, sregs.gs.base = DATA, DATA + 8
        guest.vcpu.set_sregs(sregs)
        assert guest.run() == Hlt()
        assert guest.get(DATA + 16, 8) == bytes(range(8)) and guest.regs().rcx == 8
        assert guest.get(DATA + 0x100, 10) == sregs.idt.limit.to_bytes(2, "little") + sregs.idt.base.to_bytes(8, "little")


def test_kvm_run_fields(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        run = guest.vcpu.kvm_run
        run.flags, run.if_flag, run.ready_for_interrupt_injection = 0xFFFF, 9, 9
        assert guest.again() == Hlt()
        assert (run.flags, run.if_flag, run.ready_for_interrupt_injection, run.cr8) == (0, 0, 0, 0)
        assert guest.again(rflags=0x202) == Hlt()
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
