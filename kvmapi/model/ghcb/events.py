"""What a guest may ask for through its GHCB, one handler each; string I/O, port I/O and MMIO are in io.py.

A handler works on KVM's general registers (`unit.registers`), which hold what the guest marked as valid and zeroes elsewhere,
and returns KVM_RUN's result, or None when the guest goes on. The GHCB says "done" before the handler is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.model.caller import Errno
from kvmapi.model.cpu.msrs import SEV_STATUS, NoSuchMsr
from kvmapi.model.cpu.state import RAX, RBX, RCX, RDX
from kvmapi.model.ghcb import msr_protocol
from kvmapi.model.ghcb.msr_protocol import Hold

if TYPE_CHECKING:
    from kvmapi.model.ghcb.page import Request
    from kvmapi.model.ghcb.unit import GhcbUnit

Handler = Callable[["GhcbUnit", "Request"], int | None]
_UD, _GP = 6, 13
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_ERROR_AT, _DATA_AT = 32, 48  # in kvm_run, of an MSR exit
_EINVAL = 22


def _nothing(unit: GhcbUnit, request: Request) -> None:
    """INVD, WBINVD, MONITOR and MWAIT do nothing in KVM. DR7 is the processor's to swap: KVM has nothing to do."""


def _cpuid(unit: GhcbUnit, request: Request) -> None:
    registers = unit.registers
    registers[RAX], registers[RBX], registers[RCX], registers[RDX] = unit.cpu.privileged.cpuid(request.rax & _U32, request.rcx & _U32)


def _fault(vector: int, error: int | None, unit: GhcbUnit, request: Request) -> int | None:
    """KVM injects this into the guest, where it stands."""
    return unit.cpu.raise_in_guest(vector, error)


def _unexpected(unit: GhcbUnit, request: Request) -> int:
    """The GHCB protocol has it, KVM never intercepts it and knows no handler."""
    return unit.cpu.page.internal_error(kvm.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, request.code, 0)


# ---- MSRs
def _msr(unit: GhcbUnit, request: Request) -> int | None:
    number, write = request.rcx & _U32, bool(request.info_1)
    value = request.rax & _U32 | (request.rdx & _U32) << 32 if write else 0
    allowed, policy = kvm.KVM_MSR_FILTER_WRITE if write else kvm.KVM_MSR_FILTER_READ, unit.policy
    if policy.msr_filter is not None and not policy.msr_filter.allows(number, allowed):
        return _msr_to_user(unit, number, value, write, kvm.KVM_MSR_EXIT_REASON_FILTER)
    try:
        if write:
            _write_msr(unit, number, value)
        else:
            _msr_read(unit, _read_msr(unit, number))
    except NoSuchMsr as why:
        reason = kvm.KVM_MSR_EXIT_REASON_INVAL if why.known else kvm.KVM_MSR_EXIT_REASON_UNKNOWN
        return _msr_to_user(unit, number, value, write, reason)
    return None


def _read_msr(unit: GhcbUnit, number: int) -> int:
    """KVM reaches no MSR that the guest has without it: NoSuchMsr on type 3, 0 on the legacy type."""
    if unit.protected.hides(number):
        return 0
    if number == SEV_STATUS:  # the processor's, and none of KVM's list
        raise NoSuchMsr(number)
    return unit.cpu.msrs.read(number)


def _write_msr(unit: GhcbUnit, number: int, value: int) -> None:
    if not unit.protected.drops(number, value):
        unit.cpu.msrs.write(number, value)


def _msr_read(unit: GhcbUnit, value: int) -> None:
    unit.registers[RAX], unit.registers[RDX] = value & _U32, value >> 32 & _U32


def _msr_to_user(unit: GhcbUnit, number: int, value: int, write: bool, reason: int) -> int | None:
    if not unit.policy.msr_reasons & reason:
        unit.inject(_GP)
        return None
    unit.cpu.privileged.pending = partial(_msr_answered, unit, write)
    exit_reason = kvm.KVM_EXIT_X86_WRMSR if write else kvm.KVM_EXIT_X86_RDMSR
    return unit.cpu.page.payload(exit_reason, "<B7xIIQ", 0, reason, number, value)


def _msr_answered(unit: GhcbUnit, write: bool) -> None:
    page = unit.cpu.page
    if page.read("<B", _ERROR_AT):
        unit.inject(_GP)
    elif not write:
        _msr_read(unit, page.read("<Q", _DATA_AT))


# ---- hypercalls
def _vmmcall(unit: GhcbUnit, request: Request) -> int | None:
    def done(result: int) -> None:
        unit.registers[RAX] = result & _U64

    if request.cpl:
        done(-kvm.KVM_EPERM)
        return None
    return unit.cpu.hypercalls.ask(request.rax, (request.rbx, request.rcx, request.rdx, request.rsi), True, done)


# ---- NMIs, other processors, what the hypervisor can do
def _nmi_complete(unit: GhcbUnit, request: Request) -> None:
    unit.cpu.events.nmi_masked = False
    unit.cpu.attention = True


def _reset_hold(unit: GhcbUnit, request: Request) -> int:
    return unit.wait(Hold.PAGE)


def _jump_table(unit: GhcbUnit, request: Request) -> None:
    """KVM keeps a number for the guest's firmware, and does not look at it."""
    if request.info_1 == abi.SVM_VMGEXIT_SET_AP_JUMP_TABLE:
        unit.sev.ap_jump_table = request.info_2
    elif request.info_1 == abi.SVM_VMGEXIT_GET_AP_JUMP_TABLE:
        unit.respond(abi.GHCB_HV_RESP_NO_ACTION, unit.sev.ap_jump_table)
    else:
        unit.malformed(abi.GHCB_ERR_INVALID_INPUT)


def _features(unit: GhcbUnit, request: Request) -> None:
    unit.respond(abi.GHCB_HV_RESP_NO_ACTION, msr_protocol.HYPERVISOR_FEATURES)


def _terminate(unit: GhcbUnit, request: Request) -> int:
    return msr_protocol.terminate(unit)


def _unsupported(unit: GhcbUnit, request: Request) -> int:
    """The guest has met a #VC that it does not know."""
    raise Errno(_EINVAL)


HANDLERS: dict[int, Handler] = {
    **dict.fromkeys((abi.SVM_EXIT_READ_DR7, abi.SVM_EXIT_WRITE_DR7, abi.SVM_EXIT_INVD, abi.SVM_EXIT_WBINVD), _nothing),
    **dict.fromkeys((abi.SVM_EXIT_MONITOR, abi.SVM_EXIT_MWAIT), _nothing),
    abi.SVM_EXIT_RDTSC: _unexpected,
    abi.SVM_EXIT_RDTSCP: partial(_fault, _UD, None),
    abi.SVM_EXIT_RDPMC: partial(_fault, _GP, 0),  # there are no counters
    abi.SVM_EXIT_CPUID: _cpuid,
    abi.SVM_EXIT_MSR: _msr,
    abi.SVM_EXIT_VMMCALL: _vmmcall,
    abi.SVM_VMGEXIT_NMI_COMPLETE: _nmi_complete,
    abi.SVM_VMGEXIT_AP_HLT_LOOP: _reset_hold,
    abi.SVM_VMGEXIT_AP_JUMP_TABLE: _jump_table,
    abi.SVM_VMGEXIT_HV_FEATURES: _features,
    abi.SVM_VMGEXIT_TERM_REQUEST: _terminate,
    abi.SVM_VMGEXIT_UNSUPPORTED_EVENT: _unsupported,
}
