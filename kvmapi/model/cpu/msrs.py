"""Model-specific registers: the few the modelled CPU has, where each lives, and what a write may be.

Some live in the engine's CPU (EFER, segment bases), others are plain values, most of them in machine_msrs.py. An MSR
that is in neither does not exist: RDMSR and WRMSR of it go to user space where that was asked for
(KVM_CAP_X86_USER_SPACE_MSR), and raise #GP otherwise. MSRs of KVM's paravirtual features exist as long as user space has
not asked KVM to hold the guest to its CPUID (KVM_CAP_ENFORCE_PV_FEATURE_CPUID).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kvmapi.model.clock import tsc
from kvmapi.model.cpu import machine_msrs
from kvmapi.model.cpu.cpuid import EFER_SUPPORTED, Table
from kvmapi.model.cpu.machine_msrs import MachineMsrs
from kvmapi.model.cpu.state import FS, GS, MAX_PHYS_BITS, Registers

if TYPE_CHECKING:
    from kvmapi.model.cpu.policy import ExitPolicy
    from kvmapi.model.irq.lapic import Lapic

TSC, TSC_ADJUST, APIC_BASE, PAT = 0x10, 0x3B, 0x1B, 0x277
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
EFER, STAR, LSTAR, CSTAR, SFMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103
SEV_STATUS = 0xC0010131
TSC_DEADLINE, _X2APIC = 0x6E0, range(0x800, 0x900)
_PARAVIRTUAL = (0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x4B564D03, 0x4B564D05)  # clocks, steal time, poll control: clock/vcpu.py
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_CANONICAL = frozenset((LSTAR, CSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE))
_ONLY_32_BITS = frozenset((SYSENTER_ESP, SYSENTER_EIP, TSC_AUX))  # AMD processors drop the others
_PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))
_APIC_RESERVED, _APIC_X2, _APIC_ON = 0x2FF, 1 << 10, 1 << 11
# Unicorn executes SYSCALL, SYSENTER and SWAPGS itself: these must reach the engine through its own call.
IN_ENGINE = (STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, TSC_AUX)
INDEX_LIST = (
    SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, STAR, CSTAR, KERNEL_GS_BASE, SFMASK, LSTAR, TSC, PAT, TSC_AUX, *_PARAVIRTUAL,
    TSC_ADJUST, TSC_DEADLINE, machine_msrs.ARCH_CAPABILITIES, machine_msrs.PERF_CAPABILITIES, machine_msrs.MISC_ENABLE,
    0x17A, 0x17B, machine_msrs.PLATFORM_INFO, machine_msrs.MISC_FEATURES, machine_msrs.POWER_CTL, machine_msrs.UCODE_REV,
    machine_msrs.HWCR,
)  # fmt: skip
"""KVM_GET_MSR_INDEX_LIST: what user space saves, beside what travels in kvm_sregs (EFER, FS and GS bases, the APIC base)."""


def valid_apic_base(value: int, offered: Table) -> bool:
    """What KVM takes for the APIC base: an address within the physical width, and x2APIC only where CPUID offers it and
    the APIC is on.
    """
    if value & _APIC_RESERVED or value >> MAX_PHYS_BITS:
        return False
    return not value & _APIC_X2 or bool(value & _APIC_ON and offered.x2apic)


class NoSuchMsr(Exception):
    """The modelled CPU does not have this MSR, or not this value in it. `known` tells the two apart."""

    def __init__(self, number: int, known: bool = False) -> None:
        super().__init__(hex(number))
        self.known = known


class Unit(Protocol):
    """Somebody else who keeps MSRs. Both raise NoSuchMsr."""

    def read(self, number: int) -> int:
        """RDMSR and KVM_GET_MSRS."""

    def write(self, number: int, value: int, *, host: bool) -> None:
        """WRMSR and, where `host`, KVM_SET_MSRS."""


class Msrs:
    """The MSRs of one vCPU. `units` has those that others keep, by number."""

    def __init__(self, registers: Registers, policy: ExitPolicy, *, bootstrap: bool) -> None:
        self._registers = registers
        self.machine = MachineMsrs(policy)
        self.sev_status = 0
        self.offered = Table([])  # the guest's CPUID
        self.units: dict[int, Unit] = {}
        self.tsc: Callable[[], int] = tsc.read  # the guest's time-stamp counter
        self.enforces_pv_features = False  # KVM_CAP_ENFORCE_PV_FEATURE_CPUID
        self.lapic: Lapic | None = None
        self.apic_base = 0xFEE00800 | (0x100 if bootstrap else 0)
        self._values = {
            PAT: 0x0007040600070406,
            **dict.fromkeys(IN_ENGINE, 0),
        }

    def _check(self, number: int, host: bool) -> None:
        """Is it there for the guest at all? Raises NoSuchMsr."""
        if number == TSC_AUX and not host and not self.offered.tsc_aux:
            raise NoSuchMsr(number, known=True)

    def read(self, number: int, *, host: bool = False) -> int:
        """The value, or NoSuchMsr. `host`: for KVM_GET_MSRS, not for the guest."""
        if number == EFER:
            return self._registers.efer
        if number in (FS_BASE, GS_BASE):
            return self._registers.segment(FS if number == FS_BASE else GS).base
        if number == KERNEL_GS_BASE:
            return self._registers.native.read_msr(number)  # SWAPGS moves it inside the engine
        unit = self.units.get(number)
        if unit is not None:
            return unit.read(number)
        if number == SEV_STATUS and self.sev_status:
            return self.sev_status
        if number == APIC_BASE:
            return self.apic_base
        if self.lapic is not None and (number in _X2APIC or number == TSC_DEADLINE):
            return self.lapic.read_msr(number)
        if number == TSC_DEADLINE:
            return 0
        if number in machine_msrs.READABLE:
            found = self.machine.read(number, host)
            if found is None:
                raise NoSuchMsr(number, known=True)
            return found
        self._check(number, host)
        value = self._values.get(number)
        if value is None:
            raise NoSuchMsr(number)
        return value

    def write(self, number: int, value: int, *, host: bool = False) -> None:
        """Set it, or raise NoSuchMsr. `host`: from KVM_SET_MSRS, not from the guest."""
        if number in _CANONICAL and value >> 47 not in (0, 0x1FFFF):
            raise NoSuchMsr(number, known=True)
        if number == EFER:
            self._write_efer(value, host)
            return
        if number in (FS_BASE, GS_BASE):
            which = FS if number == FS_BASE else GS
            self._registers.set_segment(which, self._registers.segment(which)._replace(base=value))
            return
        unit = self.units.get(number)
        if unit is not None:
            unit.write(number, value, host=host)
            return
        if number in _ONLY_32_BITS:
            value &= 0xFFFFFFFF
        if number == APIC_BASE:
            self._write_apic_base(value, host)
            return
        if self.lapic is not None and (number in _X2APIC or number == TSC_DEADLINE):
            self.lapic.write_msr(number, value)
            return
        if number == TSC_DEADLINE:
            return
        if number in machine_msrs.WRITABLE:
            if not self.machine.write(number, value, host, self.offered.sse3):
                raise NoSuchMsr(number, known=True)
            return
        self._check(number, host)
        if number == PAT and any(value >> shift & 0xFF not in _PAT_TYPES for shift in range(0, 64, 8)):
            raise NoSuchMsr(number, known=True)
        if number not in self._values:
            raise NoSuchMsr(number)
        self._values[number] = value
        if number in IN_ENGINE:
            self._registers.native.write_msr(number, value)

    def _write_apic_base(self, value: int, host: bool) -> None:
        if not valid_apic_base(value, self.offered) or (self.lapic is not None and not self.lapic.set_base(value, host)):
            raise NoSuchMsr(APIC_BASE, known=True)
        self.apic_base = value

    def has_pv_feature(self, bit: int) -> bool:
        """Does the guest have this paravirtual feature? All of them, as long as nobody asked KVM to go by its CPUID."""
        return not self.enforces_pv_features or bool(self.offered.pv_features >> bit & 1)

    def _write_efer(self, value: int, host: bool) -> None:
        old = self._registers.efer
        if value & ~(EFER_SUPPORTED if host else self.offered.efer_valid):
            raise NoSuchMsr(EFER, known=True)
        if not host and (value ^ old) & _EFER_LME and self._registers.cr(0) >> 31 & 1:
            raise NoSuchMsr(EFER, known=True)  # long mode cannot be switched while paging is on
        self._registers.efer = value & ~_EFER_LMA | old & _EFER_LMA
        self._registers.settle()
