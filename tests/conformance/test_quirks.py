"""Quirks that user space can disable (KVM_CAP_DISABLE_QUIRKS2), and what else it chooses for a VM's processors."""

from __future__ import annotations

from errno import EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, kvm
from kvmapi.errors import KvmError
from kvmapi.exits import Exit, Hlt, InternalError, Io, Shutdown
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, MMIO, PD_ALIAS, PD_MMIO, LongGuest, code
from tests.conformance.test_rings import RING3, RingGuest

UD, GP, PF = 6, 13, 14
U64 = 1 << 64
ALIAS = 1 << 30  # where the tables map GPA 0 once more
MONITOR, MWAIT = code("0f01c8f4", "monitor; hlt"), code("0f01c9f4", "mwait; hlt")
CPUID_1 = code("0fa2f4", "cpuid; hlt")
MISC_ENABLE, ENABLE_MWAIT = 0x1A0, 1 << 18


def disable(guest: LongGuest, quirks: int) -> None:
    guest.vm.enable_cap(caps.KVM_CAP_DISABLE_QUIRKS2, quirks)


def exact(guest: LongGuest) -> None:
    """A paravirtual kernel runs guest code its own way."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("paravirtual: emulates the guest's privileged instructions by itself")


def amd(guest: LongGuest) -> None:
    """Skip where VMMCALL is not the processor's own."""
    exact(guest)
    if guest.system.supported_cpuid()[0].ebx != int.from_bytes(b"Auth", "little"):
        pytest.skip("the processor's own hypercall is VMCALL")


def test_unknown_quirks_are_refused(any_host: Any) -> None:
    with LongGuest(any_host, MONITOR) as guest:
        known = guest.vm.check_extension(caps.KVM_CAP_DISABLE_QUIRKS2)
        assert known & kvm.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
        for bit in range(64):
            if known >> bit & 1:
                disable(guest, 1 << bit)
            else:
                with pytest.raises(KvmError) as refused:
                    disable(guest, 1 << bit)
                assert refused.value.errno == EINVAL
        guest.vm.enable_cap(caps.KVM_CAP_DISABLE_QUIRKS, U64 - 1)  # the older capability drops what it does not know


# ---- hypercalls
def test_the_wrong_hypercall_is_patched(any_host: Any) -> None:
    with LongGuest(any_host, code("0f01c1f4", "vmcall; hlt")) as guest:
        amd(guest)
        assert guest.again(rax=kvm.KVM_HC_SCHED_YIELD, rbx=0) == Hlt()
        assert guest.regs().rax == 0 and guest.get(CODE, 4) == code("0f01d9f4", "vmmcall; hlt")


def test_the_wrong_hypercall_is_undefined_without_the_quirk(any_host: Any) -> None:
    with LongGuest(any_host, code("0f01c1f4", "vmcall; hlt")) as guest:
        amd(guest)
        disable(guest, kvm.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
        assert guest.again(rax=kvm.KVM_HC_SCHED_YIELD) == Hlt() and guest.vector() == UD and guest.frame().rip == CODE
        assert guest.get(CODE, 3) == code("0f01c1", "vmcall")
        guest.put(CODE, code("0f01d9f4", "vmmcall; hlt"))
        assert guest.again(rax=kvm.KVM_HC_SCHED_YIELD) == Hlt() and guest.regs().rip == CODE + 4


def test_patching_read_only_code_faults(any_host: Any) -> None:
    with LongGuest(any_host, code("0f01c1f4", "vmcall; hlt")) as guest:
        amd(guest)
        guest.put(PD_ALIAS, (int.from_bytes(guest.get(PD_ALIAS, 8), "little") & ~2).to_bytes(8, "little"))
        sregs = guest.vcpu.get_sregs()
        sregs.cr0 |= 1 << 16  # WP
        guest.vcpu.set_sregs(sregs)
        assert guest.again(rip=ALIAS + CODE) == Hlt() and guest.vector() == PF
        assert (guest.frame().error, guest.vcpu.get_sregs().cr2, guest.frame().rip) == (3, ALIAS + CODE, ALIAS + CODE)
        assert guest.get(CODE, 3) == code("0f01c1", "vmcall")


def test_paravirtual_features_are_enforced(any_host: Any) -> None:
    with LongGuest(any_host, code("0f32f4", "rdmsr; hlt")) as guest:
        exact(guest)
        assert guest.again(rcx=0x4B564D05) == Hlt() and guest.regs().rax == 1  # POLL_CONTROL
        entries = guest.system.supported_cpuid()
        for entry in entries:
            if entry.function == 0x40000001:
                assert entry.eax >> kvm.KVM_FEATURE_PV_SCHED_YIELD & 1 and entry.eax >> kvm.KVM_FEATURE_POLL_CONTROL & 1
                entry.eax = 0
    with LongGuest(any_host, code("0f32f4", "rdmsr; hlt")) as guest:
        guest.vcpu.set_cpuid2(entries)
        assert guest.again(rcx=0x4B564D05) == Hlt() and guest.regs().rip == CODE + 3, "not asked to be enforced"
        guest.vcpu.enable_cap(caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        assert guest.again(rcx=0x4B564D05) == Hlt() and guest.vector() == GP
        guest.put(CODE, code("0f01d9f4", "vmmcall; hlt"))
        assert guest.again(rax=kvm.KVM_HC_SCHED_YIELD) == Hlt() and guest.regs().rax == U64 - 1000


# ---- MONITOR and MWAIT
@pytest.mark.parametrize("text", [MONITOR, MWAIT])
def test_monitor_and_mwait_do_nothing(any_host: Any, text: bytes) -> None:
    with LongGuest(any_host, text) as guest:
        exact(guest)
        assert guest.again(rax=DATA, rcx=0, rdx=0) == Hlt() and guest.regs().rip == CODE + 4
        assert guest.again(rax=DATA, rcx=1 << 8, rdx=0) == Hlt() and guest.vector() == GP


@pytest.mark.parametrize("text", [MONITOR, MWAIT])
@pytest.mark.parametrize("by_msr", [False, True])
def test_mwait_can_be_undefined(any_host: Any, text: bytes, by_msr: bool) -> None:
    """Whether the guest has it says CPUID; or MISC_ENABLE, and then CPUID follows."""
    with LongGuest(any_host, text) as guest:
        exact(guest)
        disable(guest, kvm.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | (kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT if by_msr else 0))
        assert guest.again(rax=DATA, rcx=0, rdx=0) == Hlt() and guest.vector() == UD
    with LongGuest(any_host, text) as guest:
        disable(guest, kvm.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | (kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT if by_msr else 0))
        entries = guest.system.supported_cpuid()
        for entry in entries:
            if entry.function == 1 and not by_msr:
                entry.ecx |= 1 << 3
        guest.vcpu.set_cpuid2(entries)
        if by_msr:
            guest.vcpu.set_msrs({MISC_ENABLE: guest.vcpu.get_msrs([MISC_ENABLE])[MISC_ENABLE] | ENABLE_MWAIT})
        assert guest.again(rax=DATA, rcx=0, rdx=0) == Hlt() and guest.regs().rip == CODE + 4
        guest.put(CODE, CPUID_1)
        assert guest.again(rax=1, rcx=0) == Hlt() and guest.regs().rcx >> 3 & 1


# ---- port I/O
def test_rip_at_port_7e(any_host: Any) -> None:
    with LongGuest(any_host, code("e67ef4", "out 0x7e, al; hlt")) as guest:
        exact(guest)
        assert isinstance(guest.run(), Io) and guest.regs().rip == CODE + 2
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 3
    with LongGuest(any_host, code("e67ef4", "out 0x7e, al; hlt")) as guest:
        disable(guest, kvm.KVM_X86_QUIRK_OUT_7E_INC_RIP)
        assert isinstance(guest.run(), Io) and guest.regs().rip == CODE
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 3


@pytest.mark.parametrize(("count", "made"), [(3, 1), (3, 2)])
def test_user_space_changes_the_count(any_host: Any, count: int, made: int) -> None:
    """What was asked for may be more than the guest takes now."""
    with LongGuest(any_host, code("f36cf4", "rep insb; hlt")) as guest:
        exact(guest)
        exit: Exit = guest.again(rdi=DATA, rcx=count, rdx=0x80)
        assert isinstance(exit, Io)
        guest.regs(rcx=made)
        done = 0
        while isinstance(exit, Io):
            guest.vcpu.answer_io(exit, b"\xaa" * exit.count * exit.size)
            exit, done = guest.run(), done + 1
            assert done < 5
        assert exit == Hlt() and guest.regs().rcx == 0 and guest.regs().rdi == DATA + made
        assert guest.get(DATA, 4) == b"\xaa" * made + bytes(4 - made)


# ---- emulation failures
FLDS = code("d900f4", "fld dword ptr [rax]; hlt")


def test_x87_at_mmio_cannot_be_emulated(any_host: Any) -> None:
    with LongGuest(any_host, FLDS) as guest:
        exact(guest)
        exit = guest.again(rax=MMIO)
        assert isinstance(exit, InternalError) and exit.suberror == kvm.KVM_INTERNAL_ERROR_EMULATION
        assert guest.regs().rip == CODE


@pytest.mark.parametrize("asked", [False, True])
def test_emulation_failures_of_user_code(any_host: Any, asked: bool) -> None:
    with RingGuest(any_host, FLDS) as guest:
        exact(guest)
        guest.vm.enable_cap(caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE, int(asked))
        with pytest.raises(KvmError):
            guest.vm.enable_cap(caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2)
        at = PD_MMIO + 8 * (MMIO >> 21 & 511)
        guest.put(at, (int.from_bytes(guest.get(at, 8), "little") | 4).to_bytes(8, "little"))
        guest.regs(rax=MMIO)
        if asked:
            exit = guest.run()
            assert isinstance(exit, InternalError) and exit.suberror == kvm.KVM_INTERNAL_ERROR_EMULATION
            assert guest.regs().rip == RING3
        else:
            assert guest.fault() == (UD, None, RING3)


# ---- events
def test_triple_faults_from_user_space(any_host: Any) -> None:
    with LongGuest(any_host, code("f4", "hlt")) as guest:
        flag = kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        events = guest.vcpu.get_vcpu_events()
        assert not events.flags & flag
        events.flags |= flag
        with pytest.raises(KvmError) as refused:
            guest.vcpu.set_vcpu_events(events)
        assert refused.value.errno == EINVAL
        guest.vm.enable_cap(caps.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
        events = guest.vcpu.get_vcpu_events()
        assert events.flags & flag and not events.triple_fault.pending
        events.triple_fault.pending = 1
        guest.vcpu.set_vcpu_events(events)
        assert guest.vcpu.get_vcpu_events().triple_fault.pending == 1
        assert isinstance(guest.run(), Shutdown) and guest.vcpu.get_vcpu_events().triple_fault.pending == 0
