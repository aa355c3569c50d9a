"""The MSR protocol: requests in the GHCB MSR itself, for a guest that has no GHCB yet.

Bits 11:0 say what is asked; the answer takes the place of the question. What KVM does not know leaves the MSR as it is.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.model.platform import C_BIT

if TYPE_CHECKING:
    from kvmapi.model.ghcb.unit import GhcbUnit

HYPERVISOR_FEATURES = abi.GHCB_HV_FT_SNP | abi.GHCB_HV_FT_SNP_AP_CREATION  # KVM's, offered to SEV-ES guests too
_RAX, _RCX, _RDX, _RBX = range(4)
_IN_ORDER = (_RAX, _RBX, _RCX, _RDX)  # EAX EBX ECX EDX, as the request counts them


class Hold(Enum):
    """In which way a processor waits for its startup IPI."""

    NONE = 0
    PAGE = 1
    MSR = 2


def sev_info(version: int) -> int:
    """The MSR after reset: the versions on offer and the position of the C-bit."""
    versions = version << abi.GHCB_MSR_VER_MAX_POS | abi.GHCB_PROTOCOL_MIN << abi.GHCB_MSR_VER_MIN_POS
    return versions | C_BIT << abi.GHCB_MSR_CBIT_POS | abi.GHCB_MSR_SEV_INFO_RESP


def handle(unit: GhcbUnit) -> int | None:
    """The request in the MSR: KVM_RUN's result, or None when the guest goes on."""
    handler = _HANDLERS.get(unit.msr & abi.GHCB_MSR_INFO_MASK)
    return handler(unit) if handler is not None else None


def _set(value: int, bits: int, mask: int, position: int) -> int:
    return value & ~(mask << position) | (bits & mask) << position


def _answer(value: int, response: int) -> int:
    return value & ~abi.GHCB_MSR_INFO_MASK | response


def _sev_info(unit: GhcbUnit) -> None:
    unit.msr = sev_info(unit.sev.ghcb_version)


def _cpuid(unit: GhcbUnit) -> None:
    """One register of a leaf; ECX counts as 0."""
    leaf = unit.msr >> abi.GHCB_MSR_CPUID_FUNC_POS & abi.GHCB_MSR_CPUID_FUNC_MASK
    values = unit.cpu.privileged.cpuid(leaf, 0)
    for number, value in zip(_IN_ORDER, values):
        unit.registers[number] = value
    value = values[unit.msr >> abi.GHCB_MSR_CPUID_REG_POS & abi.GHCB_MSR_CPUID_REG_MASK]
    unit.msr = _answer(_set(unit.msr, value, abi.GHCB_MSR_CPUID_VALUE_MASK, abi.GHCB_MSR_CPUID_VALUE_POS), abi.GHCB_MSR_CPUID_RESP)


def hold_ended(msr: int, result: int) -> int:
    """The MSR when a processor comes back from its hold; `result` is not 0 when a startup IPI ended it."""
    value = _set(msr, result, abi.GHCB_MSR_AP_RESET_HOLD_RESULT_MASK, abi.GHCB_MSR_AP_RESET_HOLD_RESULT_POS)
    return _answer(value, abi.GHCB_MSR_AP_RESET_HOLD_RESP)


def _hold(unit: GhcbUnit) -> int:
    result = unit.wait(Hold.MSR)
    unit.msr = hold_ended(unit.msr, 0)
    return result


def _features(unit: GhcbUnit) -> None:
    value = _set(unit.msr, HYPERVISOR_FEATURES, abi.GHCB_MSR_HV_FT_MASK, abi.GHCB_MSR_HV_FT_POS)
    unit.msr = _answer(value, abi.GHCB_MSR_HV_FT_RESP)


def terminate(unit: GhcbUnit) -> int:
    """KVM_SYSTEM_EVENT_SEV_TERM with the MSR: the guest gives up, or asks for what SEV-SNP guests only have."""
    return unit.cpu.page.payload(kvm.KVM_EXIT_SYSTEM_EVENT, "<IIQ", kvm.KVM_SYSTEM_EVENT_SEV_TERM, 1, unit.msr)


_HANDLERS = {
    abi.GHCB_MSR_SEV_INFO_REQ: _sev_info,
    abi.GHCB_MSR_CPUID_REQ: _cpuid,
    abi.GHCB_MSR_AP_RESET_HOLD_REQ: _hold,
    abi.GHCB_MSR_HV_FT_REQ: _features,
    abi.GHCB_MSR_PREF_GPA_REQ: terminate,
    abi.GHCB_MSR_REG_GPA_REQ: terminate,
    abi.GHCB_MSR_PSC_REQ: terminate,
    abi.GHCB_MSR_TERM_REQ: terminate,
}
