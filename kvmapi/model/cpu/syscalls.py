"""SYSCALL, SYSRET, SYSENTER and SYSEXIT: the engine leaves the first and third out, and takes too much for the others.

They load CS and SS without looking at descriptors: flat segments of a fixed kind. As on AMD processors SYSENTER and
SYSEXIT are undefined in long mode, and SYSRET does not look whether RCX is canonical: the fetch does, in ring 3.
Source: AMD64 Architecture Programmer's Manual, volume 3, and volume 2, section 6.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.msrs import CSTAR, LSTAR, SFMASK, STAR, SYSENTER_CS, SYSENTER_EIP, SYSENTER_ESP
from kvmapi.model.cpu.state import CS, EFER_LMA, F_DB, F_DPL_SHIFT, F_G, F_L, F_P, F_S, RFLAGS_VM, SS, Registers, Segment

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_RCX, _RDX, _RSP, _R11 = 1, 2, 4, 11
_SCE = 1
_IF, _RF = 1 << 9, 1 << 16
_FLAGS = 0x3F7FD5  # the bits of RFLAGS that exist and that software sets
_UD, _GP = 6, 13
_CODE, _DATA = 0xB << 8, 3 << 8


def execute(cpu: Cpu, kind: str, length: int, wide: bool) -> None:
    """One of the four, whose first byte RIP points to. `wide`: with REX.W. Raises Fault."""
    _EXECUTE[kind](cpu, length, wide)
    cpu.registers.settle()


def _load(registers: Registers, selector: int, stack: int, level: int, *, bits64: bool = False) -> None:
    common = F_P | F_S | F_G | level << F_DPL_SHIFT
    registers.set_segment(CS, Segment(selector, 0, 0xFFFFFFFF, common | _CODE | (F_L if bits64 else F_DB)))
    registers.set_segment(SS, Segment(stack, 0, 0xFFFFFFFF, common | _DATA | F_DB))


def _protected(registers: Registers, flags: int) -> bool:
    return bool(registers.cr(0) & 1) and not flags & RFLAGS_VM


def _syscall(cpu: Cpu, length: int, _wide: bool) -> None:
    registers, flags = cpu.registers, cpu.native.flags()
    if not registers.efer & _SCE or not _protected(registers, flags):
        raise Fault(_UD, None)
    star = cpu.msrs.read(STAR)
    kernel = star >> 32 & 0xFFFC
    if registers.efer & EFER_LMA:
        long = registers.long_mode
        registers.set_gpr(_RCX, registers.rip + length & (0xFFFFFFFFFFFFFFFF if long else 0xFFFFFFFF))
        registers.set_gpr(_R11, flags & ~_RF)
        registers.rip = cpu.msrs.read(LSTAR if long else CSTAR)
        registers.set_flags(flags & ~(cpu.msrs.read(SFMASK) | _RF))
        _load(registers, kernel, kernel + 8 & 0xFFFC, 0, bits64=True)
    else:
        registers.set_gpr(_RCX, registers.rip + length & 0xFFFFFFFF)
        registers.rip = star & 0xFFFFFFFF
        registers.set_flags(flags & ~(_IF | _RF | RFLAGS_VM))
        _load(registers, kernel, kernel + 8 & 0xFFFC, 0)


def _sysret(cpu: Cpu, _length: int, wide: bool) -> None:
    registers, flags = cpu.registers, cpu.native.flags()
    if not registers.efer & _SCE or not _protected(registers, flags):
        raise Fault(_UD, None)
    if registers.cpl:
        raise Fault(_GP, 0)
    user, rcx = cpu.msrs.read(STAR) >> 48, registers.gpr(_RCX)
    wide = wide and registers.long_mode
    if registers.efer & EFER_LMA:
        registers.set_flags(registers.gpr(_R11) & _FLAGS & ~(_RF | RFLAGS_VM))
    else:
        registers.set_flags(flags | _IF)
    registers.rip = rcx if wide else rcx & 0xFFFFFFFF
    _load(registers, user + (16 if wide else 0) & 0xFFFC | 3, user + 8 & 0xFFFC | 3, 3, bits64=wide)


def _sysenter(cpu: Cpu, _length: int, _wide: bool) -> None:
    registers, flags = cpu.registers, cpu.native.flags()
    if registers.efer & EFER_LMA:
        raise Fault(_UD, None)
    selector = cpu.msrs.read(SYSENTER_CS) & 0xFFFC
    if not registers.cr(0) & 1 or not selector:
        raise Fault(_GP, 0)
    registers.set_flags(flags & ~(_IF | _RF | RFLAGS_VM))
    registers.set_gpr(_RSP, cpu.msrs.read(SYSENTER_ESP) & 0xFFFFFFFF)
    registers.rip = cpu.msrs.read(SYSENTER_EIP) & 0xFFFFFFFF
    _load(registers, selector, selector + 8 & 0xFFFC, 0)


def _sysexit(cpu: Cpu, _length: int, _wide: bool) -> None:
    registers, flags = cpu.registers, cpu.native.flags()
    if registers.efer & EFER_LMA:
        raise Fault(_UD, None)
    selector = cpu.msrs.read(SYSENTER_CS) & 0xFFFC
    if not _protected(registers, flags) or registers.cpl or not selector:
        raise Fault(_GP, 0)
    registers.set_gpr(_RSP, registers.gpr(_RCX) & 0xFFFFFFFF)
    registers.rip = registers.gpr(_RDX) & 0xFFFFFFFF
    _load(registers, selector + 16 & 0xFFFC | 3, selector + 24 & 0xFFFC | 3, 3)


_EXECUTE = {"syscall": _syscall, "sysret": _sysret, "sysenter": _sysenter, "sysexit": _sysexit}
