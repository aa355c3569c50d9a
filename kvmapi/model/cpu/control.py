"""MOV to control registers, to and from debug registers, MOV from CR8, XSETBV, LTR, MONITOR and MWAIT, with the checks a
processor makes and the engine does not.

The scan finds these instructions like the other sensitive ones. MOV to CR2, MOV from the other control registers,
LMSW and CLTS stay with the engine, which handles them as it should. Switching paging on and off moves the CPU into and
out of long mode: EFER.LMA follows here. Source: AMD64 Architecture Programmer's Manual, volume 2,
sections 3.1, 5.2, 5.3 and 14.6; what KVM checks in kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, kvm_set_dr and kvm_set_xcr
(arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import fpu, runtime_cpuid
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.state import CS, F_L
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.scan import Site

CR0_PE, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 4, 1 << 29, 1 << 30, 1 << 31
_CR0_DEFINED = 0xE005003F
CR4_DE, CR4_PSE, CR4_PAE, CR4_PGE, CR4_PCIDE, CR4_OSXSAVE, CR4_SMEP = 1 << 3, 1 << 4, 1 << 5, 1 << 7, 1 << 17, 1 << 18, 1 << 20
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_PDPTE_PRESENT, _PDPTE_RESERVED = 1, 0x1E6
_UD, _GP = 6, 13
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_RAX, _RCX, _RDX = 0, 1, 2


def mov_to_cr(cpu: Cpu, site: Site) -> int | None:
    """MOV to CR0, CR3, CR4 or CR8: KVM_RUN's result, or None to go on. Raises Fault."""
    registers, before = cpu.registers, cpu.cr8
    value = registers.gpr(site.register) & (_U64 if registers.long_mode else _U32)
    if registers.cpl or not write(cpu, site.control, value, cpu.cpuid.cr4_valid):
        raise Fault(_GP, 0)
    cpu.privileged.advance(site.length)
    if site.control == 8 and value < before and cpu.lapic is None:  # user space's APIC may have an interrupt that is let through now
        return cpu.page.head(kvm.KVM_EXIT_SET_TPR)
    return None


def mov_from_cr8(cpu: Cpu, site: Site) -> None:
    """MOV from CR8. Raises Fault."""
    if cpu.registers.cpl:
        raise Fault(_GP, 0)
    cpu.registers.set_gpr(site.register, cpu.cr8)
    cpu.privileged.advance(site.length)


def mov_to_dr(cpu: Cpu, site: Site) -> int | None:
    """MOV to a debug register. DR4 and DR5 are other names of DR6 and DR7, unless CR4.DE is set. Raises Fault."""
    registers, number = cpu.registers, _debug_register(cpu, site)
    if cpu.debug.detects_access:
        return cpu.debug.access_detected()
    value = registers.gpr(site.register) & (_U64 if registers.long_mode else _U32)
    if number >= 6 and value >> 32:
        raise Fault(_GP, 0)
    cpu.debug.write_register(number, value)
    cpu.privileged.advance(site.length)
    return None


def mov_from_dr(cpu: Cpu, site: Site) -> int | None:
    """MOV from a debug register. Raises Fault."""
    number = _debug_register(cpu, site)
    if cpu.debug.detects_access:
        return cpu.debug.access_detected()
    value = cpu.debug.registers()[number]
    cpu.registers.set_gpr(site.register, value if cpu.registers.long_mode else value & _U32)
    cpu.privileged.advance(site.length)
    return None


def _debug_register(cpu: Cpu, site: Site) -> int:
    """Its number. Raises Fault."""
    if cpu.registers.cpl:
        raise Fault(_GP, 0)
    if site.control in (4, 5) and cpu.registers.cr(4) & CR4_DE:
        raise Fault(_UD, None)
    return site.control + 2 if site.control in (4, 5) else site.control


def xsetbv(cpu: Cpu, site: Site) -> None:
    """XSETBV of XCR0, the only one there is. Raises Fault."""
    registers = cpu.registers
    number, low, high = (registers.gpr(register) & _U32 for register in (_RCX, _RAX, _RDX))
    if not registers.cr(4) & CR4_OSXSAVE:
        raise Fault(_UD, None)
    if registers.cpl or number or high or not low & fpu.X87 or low & ~fpu.SUPPORTED:
        raise Fault(_GP, 0)
    struct.pack_into("<Q", registers.native.state, cpu.where.xcr0, low)
    cpu.privileged.advance(site.length)


def ltr(cpu: Cpu, site: Site) -> int | None:
    """LTR of a null selector, which the engine would load; the rest is the engine's. Raises Fault."""
    registers = cpu.registers
    if registers.cr(0) & CR0_PE and not registers.cpl and not registers.gpr(site.register) & 0xFFFC:
        raise Fault(_GP, 0)
    return cpu.after_step(cpu.step())


def monitor_mwait(cpu: Cpu, site: Site) -> None:
    """MONITOR and MWAIT: KVM executes them as NOPs. A guest without MWAIT gets #UD only where user space disabled the quirk
    that it never does. What a processor checks, it checks first (ECX names no extension that there is). Raises Fault.
    """
    if cpu.registers.cpl:
        raise Fault(_UD, None)
    if cpu.registers.gpr(_RCX) & (_U32 if site.kind == "monitor" else _U32 & ~1):
        raise Fault(_GP, 0)
    if not cpu.policy.has_quirk(kvm.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS) and not runtime_cpuid.has_mwait(cpu):
        raise Fault(_UD, None)
    cpu.privileged.advance(site.length)


def undefined(_cpu: Cpu, _site: Site) -> None:
    """An instruction that no processor has, but the engine."""
    raise Fault(_UD, None)


def vmmcall(cpu: Cpu, site: Site) -> int | None:
    """VMMCALL. (In an SEV-ES guest ghcb/intercepts.py has it.)"""
    return cpu.hypercalls.execute(site.length)


INSTRUCTIONS = {
    "mov_to_cr": mov_to_cr,
    "mov_from_cr": mov_from_cr8,
    "mov_to_dr": mov_to_dr,
    "mov_from_dr": mov_from_dr,
    "monitor": monitor_mwait,
    "mwait": monitor_mwait,
    "xsetbv": xsetbv,
    "ltr": ltr,
    "vmmcall": vmmcall,
    "undefined": undefined,
}


def write(cpu: Cpu, number: int, value: int, cr4_valid: int) -> bool:
    """Write CR0, CR3, CR4 or CR8 as the guest's MOV does; False: the processor raises #GP and nothing changed."""
    if number == 8:
        if value >> 4:
            return False
        cpu.cr8 = value
        return True
    accepted = _write_cr3(cpu, value) if number == 3 else _write_cr0(cpu, value) if number == 0 else _write_cr4(cpu, value, cr4_valid)
    if accepted:
        cpu.registers.settle()
        cpu.native.flush_tlb()  # translations depend on CR3, PG, WP, PAE, SMEP, SMAP: drop them
    return accepted


def _write_cr0(cpu: Cpu, value: int) -> bool:
    registers = cpu.registers
    if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        return False
    efer, changed = registers.efer, value ^ registers.cr(0)
    loads = value & CR0_PG and not efer & _EFER_LME and registers.cr(4) & CR4_PAE and changed & (CR0_PG | CR0_CD | CR0_NW)
    if loads and not load_pdptes(cpu, registers.cr(3)):
        return False
    if changed & value & CR0_PG and efer & _EFER_LME:
        if not registers.cr(4) & CR4_PAE or registers.segment(CS).flags & F_L:
            return False
        registers.efer = efer | _EFER_LMA
    elif changed & CR0_PG and not value & CR0_PG:
        if registers.long_mode or registers.cr(4) & CR4_PCIDE:
            return False
        registers.efer = efer & ~_EFER_LMA
    registers.set_cr(0, value & _CR0_DEFINED | CR0_ET)
    cpu.hides_et = False
    return True


def _write_cr3(cpu: Cpu, value: int) -> bool:
    registers = cpu.registers
    if registers.efer & _EFER_LMA:
        if (value & ~cpu.mmu.c_mask) >> cpu.mmu.max_phys_bits:
            return False
    elif _paging_without_lma(cpu) and registers.cr(4) & CR4_PAE and not load_pdptes(cpu, value):
        return False
    registers.set_cr(3, value)
    return True


def _write_cr4(cpu: Cpu, value: int, valid: int) -> bool:
    registers = cpu.registers
    if value & ~valid:
        return False
    changed = value ^ registers.cr(4)
    if registers.efer & _EFER_LMA and not value & CR4_PAE:
        return False
    loads = value & CR4_PAE and _paging_without_lma(cpu) and changed & (CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP)
    if loads and not load_pdptes(cpu, registers.cr(3)):
        return False
    registers.set_cr(4, value)
    return True


def _paging_without_lma(cpu: Cpu) -> bool:
    return bool(cpu.registers.cr(0) & CR0_PG and not cpu.registers.efer & _EFER_LMA)


def load_pdptes(cpu: Cpu, cr3: int) -> bool:
    """May the four page-directory-pointer entries of PAE paging that `cr3` points to be loaded? False: one has a
    reserved bit set, or no memory is there. The MMU reads them from memory at each walk.
    """
    mmu, table = cpu.mmu, cr3 & 0xFFFFFFE0
    try:
        page = mmu.physical.page(table // PAGE, bool(mmu.c_mask), False)
    except Refused:
        return False
    reserved = _PDPTE_RESERVED | ((1 << 64) - (1 << mmu.max_phys_bits)) & ~mmu.c_mask
    return not any(entry & _PDPTE_PRESENT and entry & reserved for entry in struct.unpack_from("<4Q", page, table % PAGE))
