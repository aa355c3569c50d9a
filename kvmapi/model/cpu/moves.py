"""Plain MOV between a register (or an immediate) and memory, decoded: what drivers use for device registers.

Any instruction may touch MMIO, and mmio.py executes any. These few need no execution: the engine said which address
the access had, so only the operand's size, the register and the instruction's length are wanted. Encodings: AMD64 APM
volume 3, appendix A: 88-8B, A0-A3, C6 /0 and C7 /0, with any prefixes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvmapi.model.cpu.state import Registers

_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67")
_TO_MEMORY, _FROM_MEMORY = frozenset((0x88, 0x89)), frozenset((0x8A, 0x8B))
_U64 = 0xFFFFFFFFFFFFFFFF


class Move(NamedTuple):
    """One MOV. `size` in bytes; `register` by the encoder's number, `high` for AH CH DH BH; `immediate` if not None is
    what is stored.
    """

    length: int
    size: int
    store: bool
    register: int
    high: bool = False
    immediate: int | None = None


def decode(code: bytes, bits: int) -> Move | None:
    """The MOV at the start of `code`, or None: another instruction, or too few bytes."""
    at, wide, narrow, rex = 0, False, False, 0
    while at < len(code) and code[at] in _PREFIXES:
        wide |= code[at] == 0x66
        narrow |= code[at] == 0x67
        at += 1
    if bits == 64 and at < len(code) and code[at] & 0xF0 == 0x40:
        rex, at = code[at], at + 1
    if at + 1 >= len(code):
        return None
    opcode = code[at]
    size = 1 if not opcode & 1 else 8 if rex & 8 else 4 if (bits == 16) == wide else 2
    address_size = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[bits][narrow]
    if 0xA0 <= opcode <= 0xA3:
        return _whole(Move(at + 1 + address_size, size, opcode >= 0xA2, 0), code)
    end = _operand_end(code, at + 1, address_size)
    if end is None:
        return None
    register = code[at + 1] >> 3 & 7
    if opcode in _TO_MEMORY or opcode in _FROM_MEMORY:
        high = size == 1 and not rex and register >= 4
        return _whole(Move(end, size, opcode in _TO_MEMORY, register - 4 if high else register | (rex & 4) << 1, high), code)
    if opcode in (0xC6, 0xC7) and not register:
        length = min(size, 4)
        value = int.from_bytes(code[end : end + length], "little", signed=True) & (1 << 8 * size) - 1
        return _whole(Move(end + length, size, True, 0, immediate=value), code)
    return None


def _whole(move: Move, code: bytes) -> Move | None:
    return move if move.length <= min(len(code), 15) else None


def _operand_end(code: bytes, at: int, address_size: int) -> int | None:
    """Where the ModRM byte at `at`, its SIB and its displacement end; None for a register operand."""
    modrm = code[at]
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return None
    end = at + 1
    if address_size == 2:
        return end + (2 if mod == 2 or (mod == 0 and rm == 6) else mod)
    if rm == 4:
        if end >= len(code):
            return None
        rm, end = code[end] & 7, end + 1
    return end + (4 if mod == 2 or (mod == 0 and rm == 5) else mod)


def value(move: Move, registers: Registers) -> bytes:
    """What a store writes."""
    number = move.immediate
    if number is None:
        number = registers.gpr(move.register) >> (8 if move.high else 0)
    return (number & (1 << 8 * move.size) - 1).to_bytes(move.size, "little")


def load(move: Move, registers: Registers, data: bytes) -> None:
    """Put what a load read into its register: 32 bits clear the upper half, fewer keep the rest."""
    number = int.from_bytes(data, "little")
    if move.size < 4:
        shift = 8 if move.high else 0
        old = registers.gpr(move.register)
        number = old & ~((1 << 8 * move.size) - 1 << shift) & _U64 | number << shift
    registers.set_gpr(move.register, number)
