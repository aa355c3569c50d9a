"""What an instruction does with its operands, told from its bytes: where the engine does not say enough.

- The engine says which address was refused, not through which segment: a non-canonical address is #SS when it is of
  the stack segment, #GP otherwise. Pushes, pops, calls and returns use the stack, and so does an operand whose base
  is RSP or RBP, unless FS or GS overrides.
- It does not say that an access is one to a descriptor table, made with the supervisor's rights.
- It loads before it stores where a processor asks for the right to store first.

Source: AMD64 Architecture Programmer's Manual, volume 3, section 1.4 (ModRM and SIB) and appendix A.
"""

from __future__ import annotations

from kvmapi.model.cpu.scan import LEGACY, REX

_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_OVERRIDES = frozenset(b"\x64\x65")
_STACK = frozenset((*range(0x50, 0x60), 0x68, 0x6A, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCF, 0xE8))
_STACK_0F = frozenset((0xA0, 0xA1, 0xA8, 0xA9))
_MODRM = frozenset((
    *(op for op in range(0x40) if op & 7 < 4), 0x63, 0x69, 0x6B, *range(0x80, 0x90), 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4),
    *range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF,
))  # fmt: skip
_NO_MODRM_0F = frozenset((*range(5, 10), 0x0B, 0x0E, *range(0x30, 0x38), 0x77, *range(0x80, 0x90), 0xA2, 0xAA, *range(0xC8, 0xD0)))
_RSP, _RBP = 4, 5
_NEAR = 64  # bytes around RSP that a push or pop with another operand in memory may mean


def through_stack(code: bytes, address: int, rsp: int) -> bool:
    """Is `address`, which the 64-bit instruction `code` accesses, of the stack segment? False when `code` is too
    short.
    """
    try:
        return _decode(code, address, rsp)
    except IndexError:
        return False


def _decode(code: bytes, address: int, rsp: int) -> bool:
    at, overridden, rex = 0, False, 0
    while code[at] in _PREFIXES:
        overridden |= code[at] in _OVERRIDES
        at += 1
    if code[at] & 0xF0 == 0x40:
        rex, at = code[at], at + 1
    opcode = code[at]
    at += 1
    if opcode in _STACK:
        return True
    if opcode == 0x0F:
        opcode = code[at]
        at += 1
        if opcode in _STACK_0F:
            return True
        if opcode in _NO_MODRM_0F:
            return False
        at += opcode in (0x38, 0x3A)
    elif opcode not in _MODRM:
        return False
    elif (opcode == 0x8F or (opcode == 0xFF and code[at] >> 3 & 7 in (2, 3, 6))) and (address - rsp + _NEAR) % (1 << 64) < 2 * _NEAR:
        return True
    return not overridden and _base(code, at, rex) in (_RSP, _RBP)


def _base(code: bytes, at: int, rex: int) -> int | None:
    """The number of the operand's base register; None for a register operand, or none in the address."""
    mod, base = code[at] >> 6, code[at] & 7
    if mod == 3:
        return None
    if base == _RSP:  # a SIB byte follows
        base = code[at + 1] & 7
    if base == _RBP and mod == 0:  # a displacement alone, or RIP and a displacement
        return None
    return base | (rex & 1) << 3


# ---- what the model must know of an instruction, in code of any width
_SEGMENT_LOADS = frozenset((0x8E, 0x07, 0x17, 0x1F, 0xC4, 0xC5, 0x9A, 0xEA, 0xCA, 0xCB, 0xCF))
_SEGMENT_LOADS_0F = frozenset((0x00, 0x02, 0x03, 0xA1, 0xA9, 0xB2, 0xB4, 0xB5))
_FAR = (0x18, 0x28)  # /3 and /5 of FF: far CALL and JMP

# Opcode -> extensions (bits by ModRM.reg) that load from memory and store to it. CMP, TEST and the bit tests only load.
_MODIFIES = {
    **{8 * operation + wide: 0xFF for operation in range(7) for wide in (0, 1)},
    **dict.fromkeys((0x80, 0x81, 0x83), 0x7F), **dict.fromkeys((0x86, 0x87, 0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3), 0xFF),
    **dict.fromkeys((0xF6, 0xF7), 0b1100), **dict.fromkeys((0xFE, 0xFF), 0b11),
    **dict.fromkeys((0x0FA4, 0x0FA5, 0x0FAB, 0x0FAC, 0x0FAD, 0x0FB0, 0x0FB1, 0x0FB3, 0x0FBB, 0x0FC0, 0x0FC1), 0xFF),
    0x0FBA: 0b11100000,
    0x0FC7: 0b10,
}  # fmt: skip


def _opcode(code: bytes, bits: int) -> tuple[int, int]:
    """The first opcode byte and the byte behind it."""
    at, prefixes = 0, LEGACY | REX if bits == 64 else LEGACY
    while at < len(code) and code[at] in prefixes:
        at += 1
    opcode, second = (code[at : at + 2] + b"\0\0")[:2]
    return opcode, second


def loads_descriptor(code: bytes, bits: int) -> bool:
    """Does the instruction at the start of `code` read a descriptor: loads of segment registers, far transfers, LAR and
    its like?
    """
    opcode, second = _opcode(code, bits)
    if opcode == 0x0F:
        return second in _SEGMENT_LOADS_0F
    return opcode in _SEGMENT_LOADS or (opcode == 0xFF and second & 0x38 in _FAR)


def unknown_to_kvm(code: bytes, bits: int) -> bool:
    """Is the instruction at the start of `code` x87's, with an operand in memory? KVM's emulator has none of these but
    FNSTCW and FNSTSW (opcode_map of arch/x86/kvm/emulate.c).
    """
    opcode, modrm = _opcode(code, bits)
    return 0xD8 <= opcode <= 0xDF and modrm < 0xC0 and not (opcode in (0xD9, 0xDD) and modrm >> 3 & 7 == 7)


def modifies_memory(code: bytes, bits: int) -> bool:
    """Does the instruction at the start of `code` load an operand from memory to store it again?"""
    at, prefixes = 0, LEGACY | REX if bits == 64 else LEGACY
    while at < len(code) and code[at] in prefixes:
        at += 1
    opcode, modrm, after = (code[at : at + 3] + b"\0\0\0")[:3]
    if opcode == 0x0F:
        opcode, modrm = 0x0F00 | modrm, after
    return modrm < 0xC0 and bool(_MODIFIES.get(opcode, 0) >> (modrm >> 3 & 7) & 1)
