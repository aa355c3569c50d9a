"""Templates of instructions, and random instructions made of them, for 64-bit and 32-bit code.

A row is `name opcode form sizes`: the opcode with its mandatory prefix, then what follows it, then what operand sizes it has:

    /r /0../7 /*    a ModRM byte: both operands, an extension of the opcode, any extension
    +r              the register is in the opcode
    ib iw iz iq     immediates (iz: as wide as the operand, at most 4 bytes; iq: 8 with REX.W)
    m, x            memory only, registers only
    B W D Q         sizes; B takes the opcode as it is, the others the opcode | 1 if B is there too; - means none
    32, 64          that kind of code only
    v v1 v2 v3      VEX in map 2 (`map3`: 3), with an operand in VEX.vvvv or an extension; pp0 to pp3: VEX.pp
    rep, lock       sometimes with such a prefix
    rel8 rel32 moffs   a branch's distance, an address
    a16             a memory operand that must be aligned (one time in ten it is not)

Memory operands are made to hit what they should (`State.pointers` says which registers hold which addresses at the
start), with every form of addressing. Where a snippet has several instructions the later ones may find other values
there: then they fault, which is compared as well.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.differential import rows, rows_vector
from tests.differential.traced import CODE, DATA, DATA_SIZE, FIXED, STACK

_SIZES = {"B": 1, "W": 2, "D": 4, "Q": 8}
SP = 4


class Row(NamedTuple):
    """One template."""

    name: str
    prefix: bytes
    opcode: bytes
    forms: frozenset[str]
    sizes: tuple[int, ...]


def _parse(line: str) -> Row:
    name, text, *rest = line.split()
    data = bytes.fromhex(text.replace("_", ""))
    prefix = data[:1] if "_" in text else b""
    sizes = [word for word in rest if set(word) <= set("BWDQ-")]
    return Row(name, prefix, data[len(prefix) :], frozenset(rest), tuple(_SIZES[letter] for letter in "".join(sizes) if letter in _SIZES))


TABLE: dict[str, list[Row]] = {
    group: [_parse(line) for line in text.strip().splitlines()] for group, text in {**rows.ROWS, **rows_vector.ROWS}.items()
}
"""Rows by group."""


class Pointers(NamedTuple):
    """What the encoder knows of the registers at the start of a snippet."""

    values: list[int]
    fs_base: int
    gs_base: int
    bits: int


def target(rng: random.Random, size: int, aligned: bool) -> int:
    """An address for a memory operand: mostly data, sometimes an edge, read-only or missing memory."""
    kind = rng.random()
    if kind < 0.82:
        at = DATA + rng.randrange(0, DATA_SIZE - 64)
        return at & -16 if aligned or rng.random() < 0.6 else at
    if kind < 0.90:
        return DATA + 0x1000 - rng.randrange(1, 17) if not aligned or rng.random() < 0.1 else DATA + 0xFF0
    if kind < 0.94:
        return FIXED + rng.randrange(0, 0x400) * (16 if aligned else 1) % 0x1000
    if kind < 0.97:
        return DATA + DATA_SIZE - rng.randrange(0, 17)
    return rng.choice((CODE + 0x100, STACK + 0x100, DATA - 8, 0, 0xFFF0, FIXED - 1))


def build(rng: random.Random, row: Row, about: Pointers) -> bytes:
    """One instruction from a row. RIP-relative operands are wrong until `at` is known: they are not made."""
    forms, bits = row.forms, about.bits
    if any(form[0] == "v" for form in forms):
        return _vex(rng, row, about)
    choices = [size for size in row.sizes if size != 8 or bits == 64]
    size = rng.choice(choices) if choices else 0
    opcode = bytearray(row.opcode)
    if size > 1 and 1 in row.sizes:
        opcode[-1] |= 1
    rex = 8 if size == 8 else 0
    prefixes = b"\x66" if size == 2 else b""
    if "rep" in forms:
        prefixes += rng.choice((b"", b"", b"\xf3", b"\xf3", b"\xf2"))
    if "lock" in forms and rng.random() < 0.3:
        prefixes += b"\xf0"
    tail = b""
    registers = 16 if bits == 64 else 8
    has_modrm = forms & {"/r", "/*", "/0", "/1", "/2", "/3", "/4", "/5", "/6", "/7"}
    if has_modrm:
        reg = rng.randrange(registers)
        for form in has_modrm - {"/r", "/*"}:
            reg = int(form[1])
        if "m" in forms or ("x" not in forms and rng.random() < 0.5):
            more, memory, tail = _memory(rng, about, target(rng, size or 16, "a16" in forms and rng.random() < 0.9))
            prefixes += memory
        else:
            rm = _register(rng, registers)
            more, tail = rm >> 3, bytes([0xC0 | rm & 7])
        rex |= more | (reg >> 3) << 2
        tail = bytes([tail[0] | (reg & 7) << 3]) + tail[1:]
    elif "+r" in forms:
        rm = _register(rng, registers)
        rex |= rm >> 3
        opcode[-1] |= rm & 7
    tail += _immediate(rng, forms, size, bits)
    head = bytes([0x40 | rex]) if rex else b""
    if bits == 64 and not rex and rng.random() < 0.1:
        head = b"\x40"
    if rng.random() < 0.02 and bits == 64:
        prefixes += rng.choice((b"\x2e", b"\x3e", b"\x26", b"\x36", b"\x26" if "iz" in forms else b"\x66"))
    return prefixes + row.prefix + head + bytes(opcode) + tail


def _vex(rng: random.Random, row: Row, about: Pointers) -> bytes:
    """An instruction of BMI1 or BMI2."""
    registers = len(about.values)
    extension = [int(form[1]) for form in row.forms if form[0] == "v" and len(form) == 2]
    reg = extension[0] if extension else rng.randrange(registers)
    pp = next(int(form[2]) for form in row.forms if form[:2] == "pp")
    wide = about.bits == 64 and rng.random() < 0.5
    if rng.random() < 0.5:
        rm = rng.randrange(registers)
        more, prefixes, tail = rm >> 3, b"", bytes([0xC0 | rm & 7])
    else:
        more, prefixes, tail = _memory(rng, about, target(rng, 8, False))
    other = rng.randrange(registers) if "map3" not in row.forms else 0
    if about.bits == 32 and wide:
        wide = False
    first = (~(reg >> 3 << 2 | more) & 7) << 5 | (3 if "map3" in row.forms else 2)
    second = wide << 7 | (~other & 15) << 3 | (rng.random() < 0.02) << 2 | pp
    tail = bytes([tail[0] | (reg & 7) << 3]) + tail[1:] + (_number(rng, 1) if "ib" in row.forms else b"")
    return prefixes + bytes([0xC4, first, second]) + row.opcode + tail


def _register(rng: random.Random, registers: int) -> int:
    """Less often the stack pointer: what follows needs it."""
    number = rng.randrange(registers)
    return rng.randrange(registers) if number == SP else number


def _number(rng: random.Random, size: int) -> bytes:
    top = 1 << 8 * size
    value = rng.choice((0, 1, top - 1, top >> 1, (top >> 1) - 1, rng.randrange(top), rng.randrange(top), rng.randrange(256)))
    return (value % top).to_bytes(size, "little")


def _immediate(rng: random.Random, forms: frozenset[str], size: int, bits: int) -> bytes:
    out = b""
    if "iw" in forms:
        out += _number(rng, 2)
    if "ib" in forms:
        out += _number(rng, 1)
    if "iz" in forms:
        out += _number(rng, min(size or 4, 4))
    if "iq" in forms:
        out += _number(rng, size or 4)
    if "rel8" in forms:
        out += bytes([rng.choice((0, 0, 0x30, 0x40, 0x7F, 0x80))])
    if "rel32" in forms:
        out += rng.choice((0, 0x40, 0x100, 0xFFFFFF00)).to_bytes(4, "little")
    if "moffs" in forms:
        out += (DATA + rng.randrange(0, 0x1FF0)).to_bytes(8 if bits == 64 else 4, "little")
    return out


def _memory(rng: random.Random, about: Pointers, wanted: int) -> tuple[int, bytes, bytes]:
    """(REX.X and REX.B, prefixes, ModRM with reg 0 and what follows) for an operand at `wanted`."""
    prefixes, top = b"", 1 << about.bits
    segment = rng.random()
    if segment < 0.06 and about.bits == 64:
        which = rng.randrange(2)
        prefixes, wanted = (b"\x64", b"\x65")[which : which + 1][0], wanted - (about.fs_base, about.gs_base)[which]
    if about.bits == 64 and rng.random() < 0.05:
        prefixes, top = prefixes + b"\x67", 1 << 32
    values = [value % top for value in about.values]
    registers = len(values)
    for _ in range(3):
        base = rng.randrange(registers)
        if rng.random() < 0.4:
            index, scale = rng.randrange(registers), rng.randrange(4)
            if index == SP:
                continue
            made = _displaced(rng, (wanted - values[base] - (values[index] << scale)) % top, top)
            if made is not None:
                sib = scale << 6 | (index & 7) << 3 | base & 7
                mod, displacement = made if made[0] or base & 7 != 5 else (1, b"\0")
                return index >> 3 << 1 | base >> 3, prefixes, bytes([mod << 6 | 4, sib]) + displacement
        else:
            made = _displaced(rng, (wanted - values[base]) % top, top)
            if made is not None:
                mod, displacement = made if made[0] or base & 7 != 5 else (1, b"\0")
                sib = bytes([0x24 if rng.random() < 0.9 else 0x64]) if base & 7 == SP else b""
                return base >> 3, prefixes, bytes([mod << 6 | base & 7]) + sib + displacement
    absolute = (wanted % (1 << 32)).to_bytes(4, "little")
    if about.bits == 64:
        return 0, prefixes, b"\x04\x25" + absolute
    return 0, prefixes, b"\x05" + absolute


def _displaced(rng: random.Random, distance: int, top: int) -> tuple[int, bytes] | None:
    """(mod, displacement bytes) if the distance fits."""
    signed = distance - top if distance >= top >> 1 else distance
    if signed == 0 and rng.random() < 0.8:
        return 0, b""
    if -128 <= signed < 128 and rng.random() < 0.9:
        return 1, signed.to_bytes(1, "little", signed=True)
    if -(1 << 31) <= signed < 1 << 31:
        return 2, signed.to_bytes(4, "little", signed=True)
    return None


def wild(rng: random.Random, about: Pointers) -> bytes:
    """Random prefixes and a random opcode of any map, with an operand that makes sense if it has one."""
    prefixes = b"".join(bytes([rng.choice(b"\x66\x66\xf2\xf3\xf0\x67\x2e\x64")]) for _ in range(rng.choice((0, 0, 0, 1, 1, 2))))
    head = bytes([0x40 | rng.randrange(16)]) if about.bits == 64 and rng.random() < 0.3 else b""
    escape = rng.choice((b"", b"", b"\x0f", b"\x0f", b"\x0f", b"\x0f\x38", b"\x0f\x3a"))
    reg = rng.randrange(8) << 3
    if rng.random() < 0.5:
        more, extra, tail = _memory(rng, about, target(rng, 16, rng.random() < 0.8))
        if head:
            head = bytes([head[0] & 0xFC | more])
        elif more:
            head = bytes([0x40 | more])
        prefixes += extra
    else:
        tail = bytes([0xC0 | rng.randrange(8)])
    return prefixes + head + escape + rng.randbytes(1) + bytes([tail[0] | reg]) + tail[1:] + rng.choice((b"", _number(rng, 4)))


def instruction(rng: random.Random, group: str, about: Pointers) -> tuple[str, bytes]:
    """(name, bytes) of a random instruction of a group of TABLE, or of "wild" and "bytes"."""
    if group == "bytes":
        return "bytes", rng.randbytes(rng.randrange(1, 16))
    if group == "wild":
        return "wild", wild(rng, about)
    rows = TABLE[group]
    while True:
        row = rng.choice(rows)
        if str(96 - about.bits) not in row.forms:  # "32" keeps a row out of 64-bit code, "64" out of 32-bit code
            return row.name, build(rng, row, about)
