"""Instructions that the engine gets wrong so badly that it must not execute them, or not even translate them.

Found by comparing random snippets with a processor (tests/differential) and by fuzzing (scripts/fuzz):

- LOCK before what cannot be locked is #UD on a processor. The engine executes some of these, and at bit tests of a
  register its code generator aborts the process: those (`fatal`) are exits of the engine, which it does not
  translate.
- CMPXCHG8B and CMPXCHG16B compute flags from what the engine brings up to date only before a hook: they get one that
  does nothing (they are *watched*, see scan.py).
- LOOPE and LOOPNE whose count ends leave the flags of another instruction, unless they begin a block: those that jump
  backward are executed alone (forward ones are no loops, and their bytes are common).
- PHADDW and its like of a register with itself, as every sum over a register has them, read what they have just
  written: the lower half is right, and the upper one, which is the same, is copied from it.
- PCMPESTRM and PCMPESTRI with lengths that do not fit 32 bits read far outside their operands.
- Instructions with a VEX prefix it executes as those without: #UD.
- SSSE3 instructions on MMX registers with REX.R write behind the registers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmapi.model.cpu import scan
from kvmapi.model.cpu.scan import LEGACY, LOCK, MAX_LENGTH, REX, REX_W, Site

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_RAX, _RDX = 0, 2
_BIT_TEST = rb"\x0f(?:[\xa3\xab\xb3\xbb][\xc0-\xff]|\xba[\xe0-\xff])"  # BT BTS BTR BTC of a register
_ABORTS = [
    re.compile(b"([" + re.escape(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3") + rex + b"]+)" + _BIT_TEST, re.DOTALL)
    for rex in (b"", b"\x40-\x4f")
]
_WILD_MMX = re.compile(rb"[\x44-\x47\x4c-\x4f]\x0f(?:\x38[\x00-\x0b\x1c-\x1e]|\x3a\x0f)", re.DOTALL)
_WIDE_EXCHANGE = re.compile(rb"\x0f\xc7[\x08-\x0f\x48-\x4f\x88-\x8f]", re.DOTALL)
_VEX_64, _VEX = re.compile(rb"[\xc4\xc5]"), re.compile(rb"[\xc4\xc5](?=[\xc0-\xff])")
_HORIZONTAL = re.compile(rb"\x0f\x38[\x01-\x03\x05-\x07][\xc0\xc9\xd2\xdb\xe4\xed\xf6\xff]", re.DOTALL)
_LOOP_WHILE = re.compile(rb"[\xe0\xe1][\x80-\xff]", re.DOTALL)
_EXPLICIT_LENGTH = re.compile(rb"\x0f\x3a[\x60\x61]", re.DOTALL)
# Opcode -> extensions (bits by ModRM.reg) that take LOCK. Source: AMD64 Architecture Programmer's Manual, volume 3,
# 1.2.5.
_LOCKABLE = {
    **{8 * operation + wide: 0xFF for operation in range(7) for wide in (0, 1)},  # ADD OR ADC SBB AND SUB XOR to memory
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), 0x7F), **dict.fromkeys((0x86, 0x87), 0xFF), **dict.fromkeys((0xF6, 0xF7), 0b1100),
    **dict.fromkeys((0xFE, 0xFF), 0b11),
    **dict.fromkeys((0x0FAB, 0x0FB3, 0x0FBB, 0x0FB0, 0x0FB1, 0x0FC0, 0x0FC1), 0xFF),
    0x0FBA: 0b11100000,
    0x0FC7: 0b10,
}  # fmt: skip


def find(code: bytes | bytearray, usable: int, bits: int, flags: bool = False) -> dict[int, Site]:
    """Everything at which the engine must stop: what scan.find finds, and these."""
    sites = scan.find(code, usable, bits, flags)
    _find_locked(code, usable, bits, sites)
    _find_lazy(code, usable, bits, sites)
    _find_explicit_lengths(code, usable, bits, sites)
    _find_loops(code, usable, bits, sites)
    _find_horizontal(code, usable, bits, sites)
    _find_vex(code, usable, bits, sites)
    if bits == 64:
        _find_wild_mmx(code, usable, sites)
    return sites


def starts(code: bytes | bytearray, opcode_at: int, usable: int, bits: int) -> Iterator[int]:
    """Where the instruction may start whose opcode stands at `opcode_at`: there, and at each prefix before it."""
    prefixes, start = LEGACY | REX if bits == 64 else LEGACY, opcode_at
    while True:
        if start < usable:
            yield start
        if start == 0 or opcode_at - start >= MAX_LENGTH - 1 or code[start - 1] not in prefixes:
            return
        start -= 1


def _find_vex(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add instructions with a VEX prefix, which a processor without AVX does not know: #UD. The engine takes each for
    what it is without the prefix, and would execute a privileged one unseen. Outside 64-bit code C4 and C5 are LES
    and LDS before an operand in memory.
    """
    for match in (_VEX_64 if bits == 64 else _VEX).finditer(code):
        for start in starts(code, match.start(), usable, bits):
            sites[start] = Site("undefined", 1)


def _find_lazy(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add CMPXCHG8B and CMPXCHG16B to those that are watched. Nobody waits for them, but the engine must not
    translate them without a hook: only before a hook does it bring up to date what it computes flags from, and this
    instruction's helper relies on it.
    """
    for match in _WIDE_EXCHANGE.finditer(code):
        for start in starts(code, match.start(), usable, bits):
            sites.setdefault(start, Site("lazy", match.end() - start))


def _find_horizontal(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add PHADDW, PHADDD, PHADDSW, PHSUBW, PHSUBD and PHSUBSW of a register with itself. `size` is the register's in
    bytes.
    """
    for match in _HORIZONTAL.finditer(code):
        at = match.start()
        rex = code[at - 1] if bits == 64 and at and code[at - 1] in REX else 0
        for start in starts(code, at, usable, bits):
            counts = rex if start < at else 0
            wide = 0x66 in code[start:at]
            if not wide or (counts >> 2 ^ counts) & 1 == 0:
                number = code[at + 3] & 7 | ((counts & 1) << 3 if wide else 0)
                sites[start] = Site("horizontal", match.end() - start, 16 if wide else 8, register=number)


def _find_loops(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add LOOPE and LOOPNE that jump backward. One that jumps forward is no loop, and its bytes are common in other
    instructions.
    """
    for match in _LOOP_WHILE.finditer(code):
        for start in starts(code, match.start(), usable, bits):
            sites.setdefault(start, Site("alone", match.end() - start))


def _find_explicit_lengths(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add PCMPESTRM and PCMPESTRI, whose lengths in RAX and RDX the engine cuts to 32 bits and takes as they are when
    negating does not make them positive: it then reads far outside the operands, and the process dies.
    """
    for match in _EXPLICIT_LENGTH.finditer(code):
        opcode_at = match.start()
        size = 8 if bits == 64 and opcode_at and code[opcode_at - 1] in REX_W else 4
        for start in starts(code, opcode_at, usable, bits):
            sites[start] = Site("pcmpestr", match.end() + 2 - start, size)


def _find_wild_mmx(code: bytes | bytearray, usable: int, sites: dict[int, Site]) -> None:
    """Add the SSSE3 instructions of MMX registers that have REX.R. A processor ignores that bit; the engine takes it
    as the number of a register behind the eighth, and overwrites its own state. No compiler writes them: #UD.
    """
    for match in _WILD_MMX.finditer(code):
        for start in starts(code, match.start(), usable, 64):
            if 0x66 in code[start : match.start()]:
                break
            sites[start] = Site("undefined", 1)


def _find_locked(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add the places where LOCK stands before what cannot be locked: #UD on a processor, while the engine executes
    some of these and ends the process at others.
    """
    at = code.find(LOCK)
    while at >= 0:
        if not _lockable(code, at + 1, bits):
            for start in starts(code, at, usable, bits):
                sites[start] = Site("undefined", 1, fatal=aborts(code, start, bits))
        at = code.find(LOCK, at + 1)


def _lockable(code: bytes | bytearray, at: int, bits: int) -> bool:
    """May the instruction whose LOCK prefix stands before `at` have one? True too where the bytes end."""
    while at < len(code) and (code[at] in LEGACY or (bits == 64 and code[at] in REX)):
        at += 1
    if at + 2 >= len(code) or code[at] in REX:  # INC and DEC of registers: the engine refuses LOCK there
        return True
    opcode, modrm = code[at], code[at + 1]
    if opcode == 0x0F:
        opcode, modrm = 0x0F00 | code[at + 1], code[at + 2]
    extensions = _LOCKABLE.get(opcode, 0)
    return bool(extensions >> (modrm >> 3 & 7) & 1) and modrm < 0xC0


def aborts(code: bytes | bytearray, at: int, bits: int) -> bool:
    """Would translating the instruction at `at` end the process? The engine makes of a bit test of a register with
    LOCK code that its own generator calls impossible, and aborts. A stop hook does not help: the engine translates
    what is behind it.
    """
    match = _ABORTS[bits == 64].match(code, at)
    return match is not None and LOCK in match.group(1)


def fatal(code: bytes | bytearray, usable: int) -> set[int]:
    """Offsets below `usable` at which an instruction may start that `aborts`, in code of any width."""
    found: set[int] = set()
    for match in _ABORTS[1].finditer(code):
        prefixes = match.group(1)
        found.update(match.start() + at for at in range(prefixes.rfind(LOCK) + 1))
    return {at for at in found if at < usable}


# ---- executed by the stepper; each gives KVM_RUN's result, or None to go on
def _explicit_lengths(cpu: Cpu, site: Site) -> int | None:
    """PCMPESTRM or PCMPESTRI, with lengths that the engine can take. Beyond 16 all are the same. Lengths that it can
    take stay as they are: the operand's address may be in their registers too.
    """
    registers, bits = cpu.registers, 64 if site.size == 8 else 32
    kept = [(number, registers.gpr(number)) for number in (_RAX, _RDX)]
    for number, value in kept:
        low = value & (1 << bits) - 1
        if min(low, (1 << bits) - low) >= 1 << 31:
            registers.set_gpr(number, 16)
    error = cpu.step()
    for number, value in kept:
        registers.set_gpr(number, value)
    return cpu.after_step(error)


def _alone(cpu: Cpu, site: Site) -> int | None:
    """An instruction that the engine gets right when nothing stands before it in its block."""
    return cpu.after_step(cpu.step(flush=False))


def _horizontal(cpu: Cpu, site: Site) -> int | None:
    """PHADDW or one of its kind, of a register with itself: both halves of the result are the same."""
    registers, where = cpu.registers, cpu.where
    before = registers.rip
    result = cpu.after_step(cpu.step(flush=False))
    if registers.rip == before + site.length & 0xFFFFFFFFFFFFFFFF:
        at, half = (where.xmm + 64 * site.register, 8) if site.size == 16 else (where.fpregs + 16 * site.register, 4)
        cpu.native.state[at + half : at + 2 * half] = cpu.native.state[at : at + half]
    return result


INSTRUCTIONS = {"pcmpestr": _explicit_lengths, "alone": _alone, "horizontal": _horizontal}
