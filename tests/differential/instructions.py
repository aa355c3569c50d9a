"""Random integer instructions of user programs, encoded for 64-bit and for real mode, with what is known of the flags.

An `Instruction` says which flags it reads, which it gives a defined value and which it leaves undefined: processors
differ in the last, so a block inserts a CMP before an instruction that would read one (`assemble`), and says at its end
which flags may be compared. All memory operands are in a data area; nothing reads the time or the processor's name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis.strategies as st

CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
STATUS = CF | PF | AF | ZF | SF | OF
ALU = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
LOGIC = ("and", "or", "xor", "test")
SHIFTS = ("rol", "ror", "rcl", "rcr", "shl", "shr", None, "sar")
NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
CONDITIONS = (("o", OF), ("b", CF), ("e", ZF), ("be", CF | ZF), ("s", SF), ("p", PF), ("l", SF | OF), ("le", SF | OF | ZF))
STRINGS = (("movs", 0xA4, 0), ("cmps", 0xA6, STATUS), ("stos", 0xAA, 0), ("lods", 0xAC, 0), ("scas", 0xAE, STATUS))
SP, CX = 4, 1
DATA_SIZE = 0x400


class Instruction(NamedTuple):
    """One instruction, or a few that belong together. Flags: `reads`, `gives` (defined afterwards), `spoils`."""

    text: str
    code: bytes
    reads: int = 0
    gives: int = 0
    spoils: int = 0


class Mode(NamedTuple):
    """Where code and data are, and how wide the machine is."""

    bits: int
    code: int
    data: int
    stack: int

    @property
    def widths(self) -> tuple[int, ...]:
        return (1, 2, 4, 8) if self.bits == 64 else (1, 2, 4)

    def prefix(self, width: int, reg: int = 0, rm: int = 0) -> bytes:
        """Operand size and REX for register numbers in ModRM."""
        size = b"\x66" if (width, self.bits) in ((2, 64), (4, 16)) else b""
        if self.bits == 16:
            return size
        return size + bytes([0x40 | (width == 8) << 3 | (reg >> 3) << 2 | rm >> 3])

    def rr(self, width: int, opcode: bytes, reg: int, rm: int) -> bytes:
        """An instruction with two registers."""
        return self.prefix(width, reg, rm) + opcode + bytes([0xC0 | (reg & 7) << 3 | rm & 7])

    def rm(self, width: int, opcode: bytes, reg: int, offset: int) -> bytes:
        """An instruction with a register and the data area's word at `offset`."""
        at = self.data + offset
        if self.bits == 16:
            return self.prefix(width) + opcode + bytes([(reg & 7) << 3 | 6]) + at.to_bytes(2, "little")
        return self.prefix(width, reg) + opcode + bytes([(reg & 7) << 3 | 4, 0x25]) + at.to_bytes(4, "little")

    def load(self, register: int, value: int) -> bytes:
        """MOV of a small number to a register, whole."""
        if self.bits == 16:
            return bytes([0x66, 0xB8 | register]) + value.to_bytes(4, "little")
        return bytes([0x40 | register >> 3, 0xB8 | register & 7]) + value.to_bytes(4, "little")


@st.composite
def instructions(draw: Any, mode: Mode) -> Instruction:
    """One random instruction."""
    width = draw(st.sampled_from(mode.widths))
    one, two = (draw(st.sampled_from(registers(mode, width))) for _ in range(2))
    offset = draw(st.integers(0, DATA_SIZE // 8 - 1)) * 8 + draw(st.sampled_from([0, 0, 1, 7]))
    number = draw(st.integers(0, 255))
    wide = width > 1
    return draw(st.sampled_from(_KINDS))(mode, width, wide, one, two, min(offset, DATA_SIZE - 8), number)


def registers(mode: Mode, width: int) -> list[int]:
    """Numbers that name a register other than the stack pointer (4 names AH where there is no REX)."""
    there = range(16 if mode.bits == 64 else 8)
    return [number for number in there if number != SP or (width == 1 and mode.bits == 16)]


def _name(number: int, width: int) -> str:
    return f"r{number}.{width}" if number > 7 else f"{NAMES[number]}.{width}"


def _alu(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    which = number % 8
    name, form = ALU[which], number // 8 % 4
    reads = CF if name in ("adc", "sbb") else 0
    spoils = AF if name in LOGIC else 0
    opcode = which * 8
    if form == 0:
        code, words = mode.rr(width, bytes([opcode + wide]), two, one), _name(two, width)
    elif form == 1:
        code, words = mode.rm(width, bytes([opcode + wide]), one, offset), f"to data+{offset:#x}"
    elif form == 2:
        code, words = mode.rm(width, bytes([opcode + 2 + wide]), one, offset), f"data+{offset:#x}"
    else:
        code, words = mode.rr(width, bytes([0x83 if wide else 0x80]), which, one) + bytes([number]), hex(number)
    return Instruction(f"{name} {_name(one, width)}, {words}", code, reads, STATUS & ~spoils, spoils)


def _test(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    code = mode.rr(width, bytes([0x84 + wide]), two, one)
    return Instruction(f"test {_name(one, width)}, {_name(two, width)}", code, 0, STATUS & ~AF, AF)


def _unary(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    name, opcode, extension, gives = (
        ("inc", 0xFE, 0, STATUS & ~CF),
        ("dec", 0xFE, 1, STATUS & ~CF),
        ("not", 0xF6, 2, 0),
        ("neg", 0xF6, 3, STATUS),
    )[number % 4]
    return Instruction(f"{name} {_name(one, width)}", mode.rr(width, bytes([opcode + wide]), extension, one), 0, gives)


def _multiply(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    spoils = SF | ZF | AF | PF
    if number % 3 == 2 and wide:
        return Instruction(f"imul {_name(one, width)}, {_name(two, width)}", mode.rr(width, b"\x0f\xaf", one, two), 0, CF | OF, spoils)
    name, extension = (("mul", 4), ("imul", 5))[number % 2]
    return Instruction(f"{name} {_name(one, width)}", mode.rr(width, bytes([0xF6 + wide]), extension, one), 0, CF | OF, spoils)


def _divide(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    """May raise #DE: then the flags are pushed, so all must be defined before."""
    name, extension = (("div", 6), ("idiv", 7))[number % 2]
    return Instruction(f"{name} {_name(one, width)}", mode.rr(width, bytes([0xF6 + wide]), extension, one), STATUS, 0, STATUS)


def _shift(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    extension = (0, 1, 2, 3, 4, 5, 7, 7)[number % 8]
    name = SHIFTS[extension]
    count = (number * 7) % (70 if mode.bits == 64 else 40)
    masked = count & (63 if width == 8 else 31)
    rotate = extension < 4
    effective = masked % (8 * width + 1) if extension in (2, 3) else masked
    reads = CF if extension in (2, 3) else 0
    code = mode.rr(width, bytes([0xC0 + wide]), extension, one) + bytes([count])
    if number & 8:
        one = two if two != CX else 0
        code = bytes([0xB1, count]) + mode.rr(width, bytes([0xD2 + wide]), extension, one)
    text = f"{name} {_name(one, width)}, {count}{' in cl' if number & 8 else ''}"
    if masked == 0 or (extension in (2, 3) and effective == 0):
        return Instruction(text, code, STATUS, 0, OF if masked else 0)
    spoils = (0 if masked == 1 else OF) | (0 if rotate else AF)
    if not rotate and extension != 7 and masked > 8 * width:
        spoils |= CF
    gives = (CF | OF if rotate else STATUS) & ~spoils
    return Instruction(text, code, reads, gives, spoils)


def _bit(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    width = max(width, 2)
    name, extension = (("bt", 4), ("bts", 5), ("btr", 6), ("btc", 7))[number % 4]
    code = mode.rr(width, b"\x0f\xba", extension, one) + bytes([number])
    return Instruction(f"{name} {_name(one, width)}, {number}", code, 0, CF, OF | SF | AF | PF)


def _scan(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    width = max(width, 2)
    first = mode.load(two, number | 1 << 12)
    code = first + mode.rr(width, bytes([0x0F, 0xBC + number % 2]), one, two)
    return Instruction(f"mov {_name(two, 4)}, ..; {('bsf', 'bsr')[number % 2]} {_name(one, width)}", code, 0, ZF, STATUS & ~ZF)


def _move(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    target = max(width, 2)
    stack = 2 if mode.bits == 16 else 4  # no prefix, whatever the operand's size is
    push = mode.prefix(stack, 0, one) + bytes([0x50 | one & 7])
    pop = mode.prefix(stack, 0, two) + bytes([0x58 | two & 7])
    forms = (
        ("mov", mode.rr(width, bytes([0x88 + wide]), two, one)),
        ("mov to data", mode.rm(width, bytes([0x88 + wide]), one, offset)),
        ("mov from data", mode.rm(width, bytes([0x8A + wide]), one, offset)),
        ("xchg", mode.rr(width, bytes([0x86 + wide]), two, one)),
        ("movzx b", mode.rr(target, b"\x0f\xb6", one, two)),
        ("movzx w", mode.rr(4, b"\x0f\xb7", one, two)),
        ("movsx b", mode.rr(target, b"\x0f\xbe", one, two)),
        ("movsx w", mode.rr(4, b"\x0f\xbf", one, two)),
        ("bswap", mode.prefix(8 if width == 8 else 4, 0, one) + bytes([0x0F, 0xC8 | one & 7])),
        ("cbw/cdqe", mode.prefix(max(width, 2)) + b"\x98"),
        ("cwd/cqo", mode.prefix(max(width, 2)) + b"\x99"),
        ("push, pop", push + pop),
        ("cmc", b"\xf5"), ("clc", b"\xf8"), ("stc", b"\xf9"), ("cld", b"\xfc"), ("std", b"\xfd"),
    )  # fmt: skip
    name, code = forms[number % len(forms)]
    # In real mode number 4 is the stack pointer wherever the operand is no byte: those forms become something else.
    if mode.bits == 16 and SP in (one, two) and (wide or name not in ("mov", "mov to data", "mov from data", "xchg")):
        name, code = "clc", b"\xf8"
    flags = {"cmc": (CF, CF), "clc": (0, CF), "stc": (0, CF)}.get(name, (0, 0))
    return Instruction(f"{name} {_name(one, width)}, {_name(two, width)}, data+{offset:#x}", code, *flags)


def _exchange(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    name, opcode = (("xadd", 0xC0), ("cmpxchg", 0xB0))[number % 2]
    code = mode.rm(width, bytes([0x0F, opcode + wide]), one, offset)
    return Instruction(f"{name} data+{offset:#x}, {_name(one, width)}", code, 0, STATUS)


def _condition(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    (name, reads), inverted = CONDITIONS[number % 8], number >> 3 & 1
    condition = 2 * (0, 1, 2, 3, 4, 5, 6, 7)[number % 8] + inverted
    said = ("not " if inverted else "") + name
    form = number >> 4 & 3
    if form == 0:
        return Instruction(f"set {said} {_name(one, 1)}", mode.rr(1, bytes([0x0F, 0x90 | condition]), 0, one), reads)
    if form == 1 and wide:
        return Instruction(
            f"cmov {said} {_name(one, width)}, {_name(two, width)}", mode.rr(width, bytes([0x0F, 0x40 | condition]), one, two), reads
        )
    skipped = mode.rr(1, b"\x80", 0, one) + b"\x05"
    code = bytes([0x70 | condition, len(skipped)]) + skipped
    return Instruction(f"jump if {said} over add {_name(one, 1)}, 5", code, STATUS, 0, 0)


def _flags(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    value = (number * 0x111) & (STATUS | DF)
    if number & 1:
        push = b"\x68" + value.to_bytes(2 if mode.bits == 16 else 4, "little")
        return Instruction(f"push {value:#x}; popf", push + b"\x9d", 0, STATUS)
    if number & 2:
        return Instruction("lahf; cmc; sahf", b"\x9f\xf5\x9e", STATUS, 0)
    return Instruction("pushf; pop ax", b"\x9c\x58", STATUS)


def _string(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    name, opcode, gives = STRINGS[number % 5]
    repeat = ((b"", ""), (b"\xf3", "rep "), (b"\xf2", "repne "))[number // 5 % 3 if gives else number // 5 % 2]
    middle = mode.data + DATA_SIZE // 2
    count = number % 9
    setup = mode.load(6, middle - (offset & 0x7F)) + mode.load(7, middle + (offset >> 3 & 0x7F)) + mode.load(1, count)
    code = setup + repeat[0] + mode.prefix(width) + bytes([opcode + wide])
    reads = STATUS if gives else 0  # a count of 0 leaves the flags alone
    return Instruction(f"{repeat[1]}{name}.{width}, cx={count}", code, reads, 0 if reads else gives)


def _decimal(mode: Mode, width: int, wide: bool, one: int, two: int, offset: int, number: int) -> Instruction:
    """Decimal adjustments exist in 16- and 32-bit code only."""
    if mode.bits == 64:
        return _alu(mode, width, wide, one, two, offset, number)
    forms = (
        ("daa", b"\x27", CF | AF, STATUS & ~OF, OF),
        ("das", b"\x2f", CF | AF, STATUS & ~OF, OF),
        ("aaa", b"\x37", AF, CF | AF, OF | SF | ZF | PF),
        ("aas", b"\x3f", AF, CF | AF, OF | SF | ZF | PF),
        ("aam", b"\xd4" + bytes([number & 0x1F]), STATUS, SF | ZF | PF, OF | AF | CF),
        ("aad", b"\xd5" + bytes([number & 0x1F]), 0, SF | ZF | PF, OF | AF | CF),
    )
    return Instruction(*forms[number % 6])


_KINDS = (
    _alu, _alu, _alu, _test, _unary, _multiply, _divide, _shift, _shift, _bit, _scan, _move, _move, _move, _exchange, _condition,
    _condition, _flags, _string, _decimal,
)  # fmt: skip


def assemble(mode: Mode, block: list[Instruction]) -> tuple[bytes, int]:
    """(code with a HLT at its end, flags that are defined then). A CMP comes before who would read an undefined flag."""
    code, defined = b"", STATUS
    compare = mode.rr(2, b"\x39", 3, 2)
    for instruction in block:
        if instruction.reads & ~defined:
            code, defined = code + compare, STATUS
        code += instruction.code
        defined = defined & ~instruction.spoils | instruction.gives
    return code + b"\xf4", defined
