"""Does a 64-bit instruction reach memory through the stack segment? Then a non-canonical address is #SS, not #GP.

The engine says which address was refused, not through which segment. A little decoding tells: pushes, pops, calls and
returns use the stack, and so does an operand whose base is RSP or RBP, unless FS or GS overrides. Source: AMD64
Architecture Programmer's Manual, volume 3, section 1.4 (ModRM and SIB) and volume 1, section 2.1.
"""

from __future__ import annotations

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
    """Is `address`, which the 64-bit instruction `code` accesses, of the stack segment? False when `code` is too short."""
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
