"""CPUID as it is now: the table that user space set, with the bits that follow the vCPU's state.

KVM owns these bits, whatever user space says of them: OSXSAVE follows CR4, APIC the APIC base, MWAIT the MISC_ENABLE MSR
where user space disabled that quirk, and the size of the XSAVE area XCR0. The guest reads them so, KVM_GET_CPUID2 tells
them so, and KVM_SET_CPUID2 does not count them when it compares. Source: kvm_update_cpuid_runtime in
arch/x86/kvm/cpuid.c (7.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu.cpuid import OSXSAVE, XSAVE_BYTES, Leaf

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_CR4_OSXSAVE, _APIC_ON = 1 << 18, 1 << 11
_MWAIT, _APIC = 1 << 3, 1 << 9  # leaf 1: ECX, EDX
_XSAVE_LEAF = 0xD
_DYNAMIC = frozenset(((1, 0), (_XSAVE_LEAF, 0)))


def _switch(word: int, bit: int, on: bool | int) -> int:
    return word | bit if on else word & ~bit


def now(cpu: Cpu, row: Leaf) -> Leaf:
    """One row of a table, as this vCPU's state makes it."""
    if (row.function, row.subleaf) not in _DYNAMIC:
        return row
    if row.function == _XSAVE_LEAF:
        return row._replace(ebx=XSAVE_BYTES)  # of x87 and SSE, which the area always has room for
    ecx = _switch(row.ecx, OSXSAVE, cpu.registers.cr(4) & _CR4_OSXSAVE)
    if not cpu.policy.has_quirk(kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
        ecx = _switch(ecx, _MWAIT, cpu.msrs.machine.enables_mwait)
    return row._replace(ecx=ecx, edx=_switch(row.edx, _APIC, cpu.msrs.apic_base & _APIC_ON))


def rows(cpu: Cpu, table: list[Leaf]) -> list[Leaf]:
    """All of a table."""
    return [now(cpu, row) for row in table]


def read(cpu: Cpu, function: int, index: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX of the guest's CPUID."""
    row = cpu.cpuid.find(function, index)
    return (0, 0, 0, 0) if row is None else now(cpu, row)[3:7]


def has_mwait(cpu: Cpu) -> bool:
    """Are MONITOR and MWAIT there for the guest, if it is held to that?"""
    if cpu.policy.has_quirk(kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
        return cpu.cpuid.mwait
    return cpu.msrs.machine.enables_mwait
