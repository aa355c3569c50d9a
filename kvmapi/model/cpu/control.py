"""MOV to CR0, CR4 and CR8, with the checks a processor makes and the engine does not.

The scan finds these instructions like the other sensitive ones (CR2 and CR3 stay with the engine, which handles them
as it should). Switching paging on and off moves the CPU into and out of long mode: EFER.LMA follows here. Source:
AMD64 Architecture Programmer's Manual, volume 2, sections 3.1 and 14.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.model.cpu.state import CS, F_L

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

CR0_PE, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 4, 1 << 29, 1 << 30, 1 << 31
_CR0_DEFINED = 0xE005003F
CR4_PAE, CR4_PCIDE = 1 << 5, 1 << 17
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10


def write(cpu: Cpu, number: int, value: int, cr4_valid: int) -> bool:
    """Write CR0, CR4 or CR8 as the guest's MOV does; False: the processor raises #GP and nothing changed."""
    if number == 8:
        if value >> 4:
            return False
        cpu.cr8 = value
        return True
    accepted = _write_cr0(cpu, value) if number == 0 else _write_cr4(cpu, value, cr4_valid)
    if accepted:
        cpu.registers.settle()
        cpu.mmu.generation = -1  # translations depend on PG, WP, PAE, SMEP, SMAP: drop them
    return accepted


def _write_cr0(cpu: Cpu, value: int) -> bool:
    registers = cpu.registers
    if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        return False
    efer, switched = registers.efer, (value ^ registers.cr(0)) & CR0_PG
    if switched and value & CR0_PG and efer & _EFER_LME:
        if not registers.cr(4) & CR4_PAE or registers.segment(CS).flags & F_L:
            return False
        registers.efer = efer | _EFER_LMA
    elif switched and not value & CR0_PG:
        if registers.long_mode or registers.cr(4) & CR4_PCIDE:
            return False
        registers.efer = efer & ~_EFER_LMA
    registers.set_cr(0, value & _CR0_DEFINED | CR0_ET)
    return True


def _write_cr4(cpu: Cpu, value: int, valid: int) -> bool:
    registers = cpu.registers
    if value & ~valid:
        return False
    if registers.efer & _EFER_LMA and not value & CR4_PAE:
        return False
    registers.set_cr(4, value)
    return True
