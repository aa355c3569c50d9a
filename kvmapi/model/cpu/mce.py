"""Machine checks: the MSRs of one vCPU's banks, KVM_X86_SETUP_MCE and KVM_X86_SET_MCE.

Nothing here ever fails by itself: a bank holds what user space injected, or what the guest wrote. What is offered is what
kvm_amd offers: 32 banks, MCG_CTL and recovery (SER), no CMCI. An injected error that was not corrected becomes #MC, or a
triple fault where the guest cannot take that. Source: set_msr_mce and get_msr_mce in arch/x86/kvm/msrs.c,
kvm_vcpu_ioctl_x86_setup_mce and _set_mce in x86.c (7.3).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from kvmapi.abi import caps
from kvmapi.model.caller import Errno

BANKS = 32
CAPABILITIES = {caps.KVM_CAP_MCE: BANKS}
_CTL_P, _SER_P = 1 << 8, 1 << 24
SUPPORTED_CAP = _CTL_P | _SER_P  # KVM_X86_GET_MCE_CAP_SUPPORTED
MCG_CAP, MCG_STATUS, MCG_CTL = 0x179, 0x17A, 0x17B
_P5 = (0, 1)  # MC_ADDR and MC_TYPE of a Pentium, which read 0
_BANKS_AT, _CTL2_AT = 0x400, 0x280
NUMBERS = frozenset((*_P5, MCG_CAP, MCG_STATUS, MCG_CTL, *range(_BANKS_AT, _BANKS_AT + 4 * BANKS), *range(_CTL2_AT, _CTL2_AT + BANKS)))
ONLY_READ = frozenset((*_P5, MCG_CAP))
_ALL = (1 << 64) - 1
_VALID, _OVER, _UNCORRECTED, _CONTEXT_CORRUPT, _SIGNALLED, _ACTION = 1 << 63, 1 << 62, 1 << 61, 1 << 57, 1 << 56, 1 << 55
_IN_PROGRESS = 1 << 2  # MCG_STATUS.MCIP
_CONTROL, _STATUS, _ADDRESS, _MISC = range(4)  # of a bank


class Injected(NamedTuple):
    """struct kvm_x86_mce, as far as KVM looks at it."""

    status: int
    addr: int
    misc: int
    mcg_status: int
    bank: int


class MachineChecks:
    """The banks of one vCPU."""

    def __init__(self) -> None:
        self._cap = BANKS
        self._status = self._control = 0
        self._banks = [0] * 4 * BANKS

    def _in_banks(self, number: int) -> bool:
        """Is it a register of a bank that there is? False too for MCi_CTL2, which is CMCI's."""
        return _BANKS_AT <= number < _BANKS_AT + 4 * (self._cap & 0xFF)

    def read(self, number: int, host: bool) -> int | None:
        """The value of one of NUMBERS; None is #GP."""
        if number in _P5:
            return 0
        if number == MCG_CAP:
            return self._cap
        if number == MCG_STATUS:
            return self._status
        if number == MCG_CTL:
            return self._control if host or self._cap & _CTL_P else None
        if self._in_banks(number):
            return self._banks[number - _BANKS_AT]
        return 0 if host and _CTL2_AT <= number < _CTL2_AT + (self._cap & 0xFF) else None

    def write(self, number: int, value: int, host: bool, status_writable: bool) -> bool:
        """Set one of NUMBERS; False is #GP. `status_writable`: HWCR.McStatusWrEn, without which a guest can only clear a
        bank's status.
        """
        if number == MCG_STATUS:
            self._status = value
        elif number == MCG_CTL:
            if value not in (0, _ALL) or (not self._cap & _CTL_P and (value or not host)):
                return False
            self._control = value
        elif self._in_banks(number):
            kind = number & 3
            if kind == _CONTROL and value and value | 1 << 10 | 1 != _ALL:  # what old guests leave out of all ones
                return False
            if kind == _STATUS and value and not host and not status_writable:
                return False
            self._banks[number - _BANKS_AT] = value
        else:
            return host and not value and _CTL2_AT <= number < _CTL2_AT + (self._cap & 0xFF)
        return True

    def setup(self, cap: int) -> None:
        """KVM_X86_SETUP_MCE. Errno: EINVAL."""
        banks = cap & 0xFF
        if not 0 < banks <= BANKS or cap & ~(SUPPORTED_CAP | 0xFF | 0xFF0000):
            raise Errno(errno.EINVAL)
        self._cap = cap
        if cap & _CTL_P:
            self._control = _ALL
        for bank in range(banks):
            self._banks[4 * bank] = _ALL

    def inject(self, error: Injected, enabled: bool) -> str:
        """KVM_X86_SET_MCE: "" where the guest hears nothing, "exception" for #MC, "shutdown" for a triple fault.
        `enabled` is CR4.MCE. Errno: EINVAL for a bank that is not there, and for a status that is not valid.
        """
        if error.bank >= self._cap & 0xFF or not error.status & _VALID:
            raise Errno(errno.EINVAL)
        at = 4 * error.bank
        status, before = error.status, self._banks[at + _STATUS]
        uncorrected = bool(status & _UNCORRECTED)
        if uncorrected and not error.mcg_status and not status & (_CONTEXT_CORRUPT | _SIGNALLED | _ACTION):
            self._record(at, status, error)  # no action is needed (UCNA): only CMCI would tell the guest
            return ""
        if uncorrected and ((self._cap & _CTL_P and self._control != _ALL) or self._banks[at] != _ALL):
            return ""
        if uncorrected and (self._status & _IN_PROGRESS or not enabled):
            return "shutdown"
        if uncorrected or not before & _VALID or not before & _UNCORRECTED:
            status_was = self._status
            self._record(at, status | (_OVER if before & _VALID else 0), error)
            if uncorrected:
                return "exception"
            self._status = status_was
            return ""
        self._banks[at + _STATUS] |= _OVER
        return ""

    def _record(self, at: int, status: int, error: Injected) -> None:
        self._banks[at + _STATUS], self._banks[at + _ADDRESS], self._banks[at + _MISC] = status, error.addr, error.misc
        self._status = error.mcg_status
