"""GHCB requests that KVM answers itself, and how it validates them. Numbers and order: sev_handle_vmgexit and what it calls
in arch/x86/kvm/svm/sev.c of 7.3.
"""

from __future__ import annotations

import ctypes
from errno import EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import ghcb as abi
from kvmapi.abi.vcpu import kvm_regs
from kvmapi.exits import Exit, Hlt, Hypercall, InternalError, Rdmsr, SystemEvent, Wrmsr
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import Machine
from tests.model.es_code import GHCB_AT, Caller
from tests.model.es_guest import BOTH, PLAIN, SEV_ES, raw

pytestmark = pytest.mark.model
OK, EXCEPTION, MALFORMED = 0, 1, 2
USAGE, SCRATCH, MISSING, INPUT, EVENT = 2, 3, 4, 5, 6
GP = (EXCEPTION, 0x8000030D)
JUNK = 0x5EC0DE5EC0DE
EFER, PAT, TSC, STATUS, OURS = 0xC0000080, 0x277, 0x10, 0xC0010131, 0x40000ABC


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


@pytest.fixture
def guest(host: ModelHost) -> Any:
    with Caller(host) as guest:
        yield guest


# ---- what every answer has
def test_an_answer_has_four_registers_and_clears_what_the_guest_said(guest: Caller) -> None:
    assert guest.ask(abi.SVM_EXIT_CPUID, rax=0x40000000, rcx=0, rbp=JUNK, rsp=JUNK, r8=JUNK) == (OK, 0)
    assert guest.valid() == {"sw_exit_info_1", "sw_exit_info_2", "rax", "rbx", "rcx", "rdx"}
    assert guest.respond_registers() == (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)
    save = guest.ghcb.save
    assert (save.rbp, save.rsp, save.r8) == (JUNK,) * 3, "what KVM does not answer stays as it is"


def test_registers_that_are_not_marked_count_as_zero(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_WBINVD, rax=1)
    guest.ghcb.save.rbx, guest.ghcb.save.rcx, guest.ghcb.save.rdx = JUNK, JUNK, JUNK
    assert guest.call() == Hlt() and guest.answer() == (OK, 0)
    assert guest.respond_registers() == (1, 0, 0, 0)


def test_the_protocol_version_field_is_not_looked_at(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_WBINVD)
    guest.ghcb.protocol_version = 77
    assert guest.call() == Hlt() and guest.answer() == (OK, 0)


# ---- validation
@pytest.mark.parametrize("field", ["sw_exit_code", "sw_exit_info_1", "sw_exit_info_2"])
def test_exit_code_and_information_are_always_needed(guest: Caller, field: str) -> None:
    guest.fill(abi.SVM_EXIT_WBINVD)
    bit = getattr(abi.ghcb_save_area, field).offset // 8
    guest.ghcb.save.valid_bitmap[bit // 8] &= ~(1 << bit % 8) & 0xFF
    assert guest.call() == Hlt() and guest.answer() == (MALFORMED, MISSING)


NEEDED: list[tuple[int, int, dict[str, int]]] = [
    (abi.SVM_EXIT_WRITE_DR7, 0, {"rax": 0x400}),
    (abi.SVM_EXIT_RDPMC, 0, {"rcx": 0}),
    (abi.SVM_EXIT_CPUID, 0, {"rax": 0, "rcx": 0}),
    (abi.SVM_EXIT_CPUID, 0, {"rax": 0xD, "rcx": 0, "xcr0": 1}),
    (abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4, {"rax": 0}),
    (abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4 | abi.SVM_IOIO_STR_MASK, {"sw_scratch": GHCB_AT + 0x800}),
    (abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4 | abi.SVM_IOIO_STR_MASK | 1, {"sw_scratch": GHCB_AT + 0x800}),
    (abi.SVM_EXIT_MSR, 0, {"rcx": TSC}),
    (abi.SVM_EXIT_MSR, 1, {"rcx": TSC, "rax": 0, "rdx": 0}),
    (abi.SVM_EXIT_VMMCALL, 0, {"rax": 1, "cpl": 0}),
    (abi.SVM_EXIT_MONITOR, 0, {"rax": 0, "rcx": 0, "rdx": 0}),
    (abi.SVM_EXIT_MWAIT, 0, {"rax": 0, "rcx": 0}),
    (abi.SVM_VMGEXIT_MMIO_READ, 0xD0000000, {"sw_scratch": GHCB_AT + 0x800}),
    (abi.SVM_VMGEXIT_MMIO_WRITE, 0xD0000000, {"sw_scratch": GHCB_AT + 0x800}),
]


@pytest.mark.parametrize(("code", "info_1", "fields"), NEEDED, ids=lambda value: hex(value) if isinstance(value, int) else "+".join(value))
def test_each_request_needs_its_fields(guest: Caller, code: int, info_1: int, fields: dict[str, int]) -> None:
    for left_out in fields:
        rest = {name: value for name, value in fields.items() if name != left_out}
        if left_out == "xcr0":
            rest["rax"] = 0xD
        assert guest.ask(code, info_1, **rest) == (MALFORMED, MISSING), f"without {left_out}"
    guest.fill(code, info_1, **fields)
    guest.call()
    assert guest.answer() != (MALFORMED, MISSING)


def test_an_in_needs_nothing(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4 | 1)
    assert guest.call() != Hlt() and guest.answer() == (OK, 0)


def test_the_usage_comes_first(guest: Caller) -> None:
    guest.fill(abi.SVM_VMGEXIT_PSC)
    guest.ghcb.save.valid_bitmap[:] = bytes(16)
    guest.ghcb.ghcb_usage = 1
    assert guest.call() == Hlt() and guest.answer() == (MALFORMED, USAGE)
    guest.ghcb.ghcb_usage = 0
    guest.ghcb.save.valid_bitmap[:] = bytes(16)
    assert guest.call() == Hlt() and guest.answer() == (MALFORMED, EVENT), "then what only SEV-SNP guests may ask"


UNKNOWN = [
    0, 0x26, 0x36, 0x78, 0x80, 0x8D, 0x400, 0x403, 0xFFFF, abi.SVM_VMGEXIT_PSC, abi.SVM_VMGEXIT_GUEST_REQUEST,
    abi.SVM_VMGEXIT_EXT_GUEST_REQUEST, abi.SVM_VMGEXIT_AP_CREATION, 0x80000006, 0x8000FFFC, 0x80010000,
    1 << 32 | abi.SVM_EXIT_CPUID, (1 << 64) - 1,
]  # fmt: skip


@pytest.mark.parametrize("code", UNKNOWN, ids=hex)
def test_events_that_kvm_does_not_take(guest: Caller, code: int) -> None:
    assert guest.ask(code) == (MALFORMED, EVENT)


@pytest.mark.parametrize("number", [abi.SVM_EXIT_INVD, abi.SVM_EXIT_WBINVD, abi.SVM_EXIT_READ_DR7], ids=hex)
def test_what_kvm_does_nothing_about(guest: Caller, number: int) -> None:
    assert guest.ask(number) == (OK, 0)


@pytest.mark.parametrize("code", [abi.SVM_EXIT_MONITOR, abi.SVM_EXIT_MWAIT, abi.SVM_EXIT_WRITE_DR7], ids=hex)
def test_nor_about_these(guest: Caller, code: int) -> None:
    assert guest.ask(code, rax=7, rcx=8, rdx=9) == (OK, 0)
    assert guest.respond_registers() == (7, 0, 8, 9)


# ---- CPUID
def test_cpuid_follows_cr4(guest: Caller) -> None:
    assert guest.ask(abi.SVM_EXIT_CPUID, rax=1, rcx=0) == (OK, 0)
    eax, _, ecx, edx = guest.respond_registers()
    assert eax == guest.system.supported_cpuid()[1].eax and ecx >> 26 & 3 == 1 and edx >> 0 & 1, "XSAVE, but CR4.OSXSAVE is clear"
    assert guest.ask(abi.SVM_EXIT_CPUID, rax=1 << 40 | 0x8000001F, rcx=1 << 40) == (OK, 0), "32 bits of each count"
    assert guest.respond_registers()[0] == 0b1010


# ---- MSRs
def test_an_msr_of_kvms(guest: Caller) -> None:
    assert guest.ask(abi.SVM_EXIT_MSR, 1, rcx=TSC, rax=0x11, rdx=0x22) == (OK, 0)
    assert guest.ask(abi.SVM_EXIT_MSR, 0, rcx=TSC) == (OK, 0)
    rax, _, _, rdx = guest.respond_registers()
    assert rdx in (0x22, 0x23) and 0x22 << 32 < (rdx << 32 | rax) < (0x22 << 32) + 60_000_000_000


@BOTH
@pytest.mark.parametrize("number", [EFER, PAT, 0xC0000082, abi.MSR_AMD64_SEV_ES_GHCB, 0x1D9])
def test_what_the_guest_has_without_kvm_kvm_cannot_give(host: ModelHost, type: int, number: int) -> None:
    with Caller(host, type) as guest:
        expected = (OK, 0) if type == PLAIN else GP
        assert guest.ask(abi.SVM_EXIT_MSR, 1, rcx=number, rax=1, rdx=0) == expected
        assert guest.ask(abi.SVM_EXIT_MSR, 0, rcx=number) == expected
        assert guest.respond_registers() == (0, 0, number, 0)


@pytest.mark.parametrize("number", [STATUS, 0xC0010132, 0x12345678])
@pytest.mark.parametrize("write", [0, 1])
def test_an_msr_that_kvm_does_not_have(guest: Caller, number: int, write: int) -> None:
    assert guest.ask(abi.SVM_EXIT_MSR, write, rcx=number, rax=0, rdx=0) == GP


def test_msrs_in_user_space(guest: Caller) -> None:
    guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, kvm.KVM_MSR_EXIT_REASON_UNKNOWN | kvm.KVM_MSR_EXIT_REASON_INVAL)
    guest.fill(abi.SVM_EXIT_MSR, 0, rcx=OURS)
    exit_ = guest.call()
    assert isinstance(exit_, Rdmsr) and (exit_.index, exit_.msr_reason) == (OURS, kvm.KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.vcpu.kvm_run.msr.data = 0x1122334455667788
    assert guest.run() == Hlt() and guest.answer() == (OK, 0)
    assert guest.respond_registers() == (0x55667788, 0, OURS, 0x11223344)
    guest.fill(abi.SVM_EXIT_MSR, 1, rcx=OURS, rax=1 << 32 | 5, rdx=6)
    exit_ = guest.call()
    assert isinstance(exit_, Wrmsr) and (exit_.index, exit_.data) == (OURS, 6 << 32 | 5)
    guest.vcpu.kvm_run.msr.error = 1
    assert guest.run() == Hlt() and guest.answer() == GP
    guest.fill(abi.SVM_EXIT_MSR, 0, rcx=EFER)
    exit_ = guest.call()
    assert isinstance(exit_, Rdmsr) and exit_.msr_reason == kvm.KVM_MSR_EXIT_REASON_INVAL, "type 3 refuses it with EINVAL"
    guest.vcpu.kvm_run.msr.error = 1
    assert guest.run() == Hlt() and guest.answer() == GP


# ---- VMMCALL
def test_map_gpa_range(guest: Caller) -> None:
    fields = {"rax": kvm.KVM_HC_MAP_GPA_RANGE, "rbx": 0x80000, "rcx": 2, "rdx": 0x10, "cpl": 0}
    assert guest.ask(abi.SVM_EXIT_VMMCALL, **fields) == (OK, 0)
    assert guest.respond_registers()[0] == (1 << 64) - 1000, "not enabled: -KVM_ENOSYS"
    guest.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 1 << kvm.KVM_HC_MAP_GPA_RANGE)
    guest.fill(abi.SVM_EXIT_VMMCALL, **fields)
    exit_ = guest.call()
    assert isinstance(exit_, Hypercall) and exit_.args[:3] == (0x80000, 2, 0x10) and exit_.flags == kvm.KVM_EXIT_HYPERCALL_LONG_MODE
    guest.vcpu.kvm_run.hypercall.ret = 0xFFFFFFFF_FFFFFFEA
    assert guest.run() == Hlt() and guest.answer() == (OK, 0)
    assert guest.respond_registers() == (0xFFFFFFFF_FFFFFFEA, 0x80000, 2, 0x10)
    assert guest.ask(abi.SVM_EXIT_VMMCALL, **{**fields, "rbx": 0x80001}) == (OK, 0)
    assert guest.respond_registers()[0] == (1 << 64) - EINVAL
    assert guest.ask(abi.SVM_EXIT_VMMCALL, **{**fields, "cpl": 3}) == (OK, 0)
    assert guest.respond_registers()[0] == (1 << 64) - 1, "-KVM_EPERM"


# ---- exceptions, and what ends KVM_RUN
def test_rdpmc_faults_in_the_guest(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_RDPMC, rcx=0)
    assert guest.call() == Hlt()
    assert guest.report().vector == 13 and guest.report().words[0] == 0 and guest.answer() == (OK, 0)


def test_rdtscp_is_not_for_asking(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_RDTSCP)
    assert guest.call() == Hlt() and guest.report().vector == 6


def test_nor_rdtsc(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_RDTSC)
    exit_ = guest.call()
    assert isinstance(exit_, InternalError) and exit_.suberror == kvm.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    assert exit_.data == (abi.SVM_EXIT_RDTSC, 0)
    assert guest.run() == Hlt() and guest.answer() == (OK, 0)


def test_termination(guest: Caller) -> None:
    guest.fill(abi.SVM_VMGEXIT_TERM_REQUEST, 0x10, 0x20)
    exit_ = guest.call()
    assert isinstance(exit_, SystemEvent) and (exit_.type, exit_.data) == (kvm.KVM_SYSTEM_EVENT_SEV_TERM, (GHCB_AT,))
    assert guest.run() == Hlt() and guest.answer() == (OK, 0), "KVM lets it go on"


def test_an_event_that_the_guest_does_not_know(guest: Caller) -> None:
    guest.fill(abi.SVM_VMGEXIT_UNSUPPORTED_EVENT, 1, 2)
    guest.put(0x61000, GHCB_AT.to_bytes(8, "little"))
    assert raw(guest.vcpu, ioctls.KVM_RUN, 0) == EINVAL and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_UNKNOWN
    assert guest.run() == Hlt() and guest.answer() == (OK, 0)


# ---- the rest
def test_hypervisor_features(guest: Caller) -> None:
    assert guest.ask(abi.SVM_VMGEXIT_HV_FEATURES) == (OK, 3)


def test_the_jump_table_is_the_vms(host: ModelHost) -> None:
    with Caller(host) as guest, Caller(host) as other:
        assert guest.ask(abi.SVM_VMGEXIT_AP_JUMP_TABLE, 1) == (OK, 0)
        assert guest.ask(abi.SVM_VMGEXIT_AP_JUMP_TABLE, 0, 0x123456789) == (OK, 0)
        assert guest.ask(abi.SVM_VMGEXIT_AP_JUMP_TABLE, 1, 77) == (OK, 0x123456789)
        assert guest.ask(abi.SVM_VMGEXIT_AP_JUMP_TABLE, 2) == (MALFORMED, INPUT)
        assert other.ask(abi.SVM_VMGEXIT_AP_JUMP_TABLE, 1) == (OK, 0)


# ---- what the VMM sees
def test_the_legacy_type_shows_the_registers_of_the_request(host: ModelHost) -> None:
    with Caller(host, PLAIN) as guest:
        guest.fill(abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4, rax=0x1111, rbx=0x2222, rcx=0x3333, rdx=0x4444, rsi=0x5555, rdi=JUNK, r8=JUNK)
        exit_: Exit = guest.call()
        assert exit_ != Hlt()
        regs = guest.vcpu.get_regs()
        assert (regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi) == (0x1111, 0x2222, 0x3333, 0x4444, 0x5555)
        assert (regs.rdi, regs.rsp, regs.r8, regs.r14) == (0, 0, 0, 0), "and none that the guest did not give"
        regs.rbx, regs.r8 = 0x6666, 0x7777
        guest.vcpu.set_regs(regs)
        assert guest.run() == Hlt()
        assert guest.respond_registers() == (0x1111, 0x6666, 0x3333, 0x4444), "what user space sets there goes back"
        assert guest.ghcb.save.r8 == JUNK


def test_type_3_shows_nothing_at_any_exit(host: ModelHost) -> None:
    with Caller(host) as guest:
        guest.fill(abi.SVM_EXIT_IOIO, 0x80 << 16 | 1 << 4, rax=0x1111)
        guest.call()
        room = kvm_regs()
        assert raw(guest.vcpu, ioctls.KVM_GET_REGS, room) == EINVAL and not any(bytes(room))
        assert guest.run() == Hlt()
        assert raw(guest.vcpu, ioctls.KVM_SET_REGS, room) == EINVAL


def test_a_guest_that_moved_goes_on_with_its_ghcb(host: ModelHost) -> None:
    with Caller(host, PLAIN) as guest, Machine(host, PLAIN, slot=False) as other:
        assert guest.ask(abi.SVM_EXIT_WBINVD) == (OK, 0)
        other.add_vcpu()
        other.vm.set_user_memory_region(0, 0, len(guest.memory), guest.hva)
        other.vm.enable_cap(caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, guest.vm.fd)
        file: Any = host.file(other.vcpu.fd)
        assert file.ghcb.msr == GHCB_AT
        guest.fill(abi.SVM_EXIT_CPUID, rax=0x40000000, rcx=0)
        assert other.run() == Hlt() and guest.respond_registers()[1] == 0x4B4D564B


def test_layout() -> None:
    offsets = {"cpl": 0xCB, "xss": 0x140, "rax": 0x1F8, "rcx": 0x308, "rdx": 0x310, "rbx": 0x318, "rsi": 0x330, "r15": 0x378}
    offsets |= {"sw_exit_code": 0x390, "sw_scratch": 0x3A8, "xcr0": 0x3E8, "valid_bitmap": 0x3F0, "x87_state_gpa": 0x400}
    assert {name: getattr(abi.ghcb_save_area, name).offset for name in offsets} == offsets
    assert ctypes.sizeof(abi.ghcb) == abi.GHCB_SIZE
    assert (abi.ghcb.shared_buffer.offset, abi.ghcb.protocol_version.offset, abi.ghcb.ghcb_usage.offset) == (0x800, 0xFFA, 0xFFC)


def test_a_guest_of_version_1(host: ModelHost) -> None:
    with Caller(host, SEV_ES, version=1) as guest:
        assert guest.ask(abi.SVM_VMGEXIT_HV_FEATURES) == (OK, 3), "KVM does not ask for the version here"
