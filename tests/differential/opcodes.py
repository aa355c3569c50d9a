"""What is known of an instruction from its opcode: which flags it reads, defines and leaves undefined, and whether two
processors can be compared on it at all.

`effect` looks at prefixes, opcode, ModRM and an immediate count, no further: it is no disassembler, and what it does
not know of counts as "no flags". An instruction is left out when its result is of this moment or this machine (time,
processor names), when it calls the kernel, when AMD's and Intel's processors are documented to differ in it, or when
the model's CPUID does not offer it and the judge's may.

Source of flags: AMD64 Architecture Programmer's Manual, volume 3, "Flags affected" of each instruction, and its
appendix F for instructions by CPUID feature.
"""

from __future__ import annotations

from typing import NamedTuple

CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
STATUS = CF | PF | AF | ZF | SF | OF
_LOGIC = (1, 4, 6)
_CONDITIONS = (OF, CF, ZF, CF | ZF, SF, PF, SF | OF, SF | OF | ZF)
_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")


class Decoded(NamedTuple):
    """The parts of an instruction that decide what it is. `modrm` is -1 at the end of the bytes; `after` is the offset behind
    the ModRM byte."""

    prefixes: bytes
    rex: int
    map: int  # 1: one byte, 2: 0F, 3: 0F 38, 4: 0F 3A, 5: VEX, EVEX or XOP
    opcode: int
    modrm: int
    after: int

    @property
    def reg(self) -> int:
        return self.modrm >> 3 & 7

    @property
    def in_register(self) -> bool:
        return self.modrm >> 6 == 3

    @property
    def mandatory(self) -> int:
        """The prefix that selects an SSE instruction: the last of F2 and F3, else 66, else 0."""
        repeats = [byte for byte in self.prefixes if byte in (0xF2, 0xF3)]
        return repeats[-1] if repeats else 0x66 if 0x66 in self.prefixes else 0


class Effect(NamedTuple):
    """Flags as bit masks; `left_out` says why it is not compared."""

    reads: int = 0
    defines: int = 0
    undefined: int = 0
    left_out: str = ""


def decode(code: bytes, bits: int) -> Decoded:
    """Prefixes, opcode and ModRM at the beginning of `code` (bytes missing at its end count as zero)."""
    at = 0
    while at < min(len(code), 15) and code[at] in _LEGACY:
        at += 1
    prefixes, rex = code[:at], 0
    while bits == 64 and at < min(len(code), 15) and (code[at] & 0xF0 == 0x40 or code[at] in _LEGACY):
        rex = code[at] if code[at] & 0xF0 == 0x40 else 0
        if not rex:
            prefixes += code[at : at + 1]
        at += 1
    rest = code[at : at + 5] + bytes(5)
    kind, opcode, size = 1, rest[0], 1
    if opcode == 0x0F:
        kind, opcode, size = 2, rest[1], 2
        if opcode in (0x38, 0x3A):
            kind, opcode, size = 3 if opcode == 0x38 else 4, rest[2], 3
    elif (opcode in (0xC4, 0xC5, 0x62) and (bits == 64 or rest[1] >> 6 == 3)) or (opcode == 0x8F and rest[1] & 0x1F >= 8):
        size = 3 if opcode == 0xC5 else 4
        pp = rest[2 if size == 4 else 1] & 3
        kind, opcode = 5, rest[size - 1] | (rest[1] & 0x1F if size == 4 else 1) << 8 | opcode << 16 | pp << 24
    modrm = code[at + size] if at + size < len(code) else -1
    return Decoded(prefixes, rex, kind, opcode, modrm, at + size + 1)


def effect(code: bytes, bits: int, cl: int | None = None) -> Effect:
    """Of the instruction at the beginning of `code`. `cl`: the count in CL, if known."""
    if all(byte in _LEGACY or (bits == 64 and byte & 0xF0 == 0x40) for byte in code):
        return Effect()  # prefixes of the INT3 behind the snippet
    parts = decode(code, bits)
    if bits == 32 and set(parts.prefixes) & {0x2E, 0x64, 0x65}:
        return Effect(left_out="null selectors, and stores through CS: a compatibility segment's own checks")
    if bits == 64 and {0x64, 0x65} & set(parts.prefixes) and {0x26, 0x2E, 0x36, 0x3E} & set(parts.prefixes):
        return Effect(left_out="an ignored segment prefix behind one that counts: the engine forgets the first")
    if parts.map == 1:
        return _one_byte(parts, code, bits, cl)
    if parts.map == 2:
        return _two_bytes(parts, code, bits, cl)
    return _long_opcode(parts)


def _alu(which: int) -> Effect:
    reads = CF if which in (2, 3) else 0
    return Effect(reads, STATUS & ~AF, AF) if which in _LOGIC else Effect(reads, STATUS)


def _shift(which: int, width: int, count: int | None) -> Effect:
    reads = CF if which in (2, 3) else 0
    if count is None:
        return Effect(reads, 0, OF | AF | CF if which > 3 else OF)
    masked = count & (63 if width == 64 else 31)
    if which in (2, 3):
        rotations = masked % (width + 1) if width < 32 else masked
        return Effect(reads, CF if rotations else 0, OF if masked != 1 and masked else 0)
    if not masked:
        return Effect()
    undefined = (0 if masked == 1 else OF) | (AF if which > 3 else 0)
    if which in (4, 5, 6) and masked >= width:
        undefined |= CF
    return Effect(0, (STATUS if which > 3 else CF | OF) & ~undefined, undefined)


def _width(parts: Decoded, byte: bool) -> int:
    return 8 if byte else 64 if parts.rex & 8 else 16 if 0x66 in parts.prefixes else 32


def _immediate(parts: Decoded, code: bytes, bits: int) -> int | None:
    """The byte behind ModRM, SIB and displacement; None when it takes more to know where that is."""
    if parts.in_register:
        return code[parts.after] if parts.after < len(code) else None
    if bits == 32 and 0x67 in parts.prefixes:
        return None
    at, rm, mod = parts.after, parts.modrm & 7, parts.modrm >> 6
    if rm == 4:
        sib = code[at] if at < len(code) else 0
        at, rm = at + 1, 5 if mod == 0 and sib & 7 == 5 else 4
    at += (4 if rm == 5 else 0) if mod == 0 else 1 if mod == 1 else 4
    return code[at] if at < len(code) else None


_NEAR_BRANCHES = frozenset((*range(0x70, 0x80), *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB, 0xC2, 0xC3))
_SIMPLE = {
    0x27: Effect(CF | AF, STATUS & ~OF, OF), 0x2F: Effect(CF | AF, STATUS & ~OF, OF),
    0x37: Effect(AF, CF | AF, OF | SF | ZF | PF), 0x3F: Effect(AF, CF | AF, OF | SF | ZF | PF),
    0x69: Effect(0, CF | OF, SF | ZF | AF | PF), 0x6B: Effect(0, CF | OF, SF | ZF | AF | PF),
    0x84: _alu(4), 0x85: _alu(4), 0xA8: _alu(4), 0xA9: _alu(4), 0x9C: Effect(STATUS), 0x9D: Effect(0, STATUS | DF),
    0x9E: Effect(0, STATUS & ~OF), 0x9F: Effect(STATUS & ~OF), 0xA6: Effect(0, STATUS), 0xA7: Effect(0, STATUS), 0xAE: Effect(0, STATUS),
    0xAF: Effect(0, STATUS), 0xCE: Effect(OF), 0xD4: Effect(0, SF | ZF | PF, OF | AF | CF), 0xD5: Effect(0, SF | ZF | PF, OF | AF | CF),
    0xD6: Effect(CF), 0xE0: Effect(ZF), 0xE1: Effect(ZF), 0xF5: Effect(CF, CF), 0xF8: Effect(0, CF), 0xF9: Effect(0, CF),
    0xFC: Effect(0, DF),
    0xFD: Effect(0, DF), 0xF1: Effect(left_out="INT1: a trap that the tracer sees"),
}  # fmt: skip


def _one_byte(parts: Decoded, code: bytes, bits: int, cl: int | None) -> Effect:
    opcode = parts.opcode
    if 0x66 in parts.prefixes and (opcode in _NEAR_BRANCHES or (opcode == 0xFF and parts.reg in (2, 4))) and bits == 64:
        return Effect(left_out="near branches with an operand size prefix: AMD's and Intel's processors differ")
    if opcode < 0x40 and opcode & 7 < 6:
        return _alu(opcode >> 3)
    if opcode & 0xF0 == 0x40:
        return Effect(0, STATUS & ~CF)
    if opcode & 0xF0 == 0x70:
        return Effect(_CONDITIONS[opcode >> 1 & 7])
    if 0x80 <= opcode <= 0x83:
        return _alu(parts.reg)
    if opcode in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3):
        count = 1 if opcode < 0xD2 and opcode >= 0xD0 else cl if opcode >= 0xD2 else _immediate(parts, code, bits)
        return _shift(parts.reg, _width(parts, not opcode & 1), count)
    if opcode in (0xF6, 0xF7):
        mul, div = Effect(0, CF | OF, SF | ZF | AF | PF), Effect(0, 0, STATUS)
        return (_alu(4), _alu(4), Effect(), Effect(0, STATUS), mul, mul, div, div)[parts.reg]
    if opcode in (0xFE, 0xFF) and parts.reg < 2:
        return Effect(0, STATUS & ~CF)
    if opcode in (0xA6, 0xA7, 0xAE, 0xAF) and {0xF2, 0xF3} & set(parts.prefixes):
        return Effect()  # a count of 0 leaves the flags alone
    if opcode == 0x63 and bits == 32:
        return Effect(0, ZF)
    if opcode in (0xC6, 0xC7) and parts.modrm == 0xF8:
        return Effect(left_out="XABORT, XBEGIN: not offered")
    if opcode == 0x8F and parts.reg:
        return Effect(left_out="XOP, or undefined")
    if opcode == 0x90 and parts.rex & 1 and 0xF3 in parts.prefixes:
        return Effect(left_out="PAUSE or XCHG of R8, by the processor")
    if opcode == 0xCD and parts.modrm == 0x80:
        return Effect(left_out="a system call")
    if (opcode == 0x8E and parts.reg == 2) or opcode == 0x17:
        return Effect(left_out="a load of SS: single steps skip the next instruction")
    if opcode in (0x06, 0x0E, 0x16, 0x1E) and bits == 32 and 0x66 not in parts.prefixes:
        return Effect(left_out="PUSH of a segment register stores two bytes or four, by the processor")
    if opcode == 0xFF and parts.reg in (3, 5) and parts.rex & 8:
        return Effect(left_out="far branches of 64 bits are Intel's")
    if opcode == 0x8E:
        return (
            Effect(left_out="a null selector leaves the segment's base on AMD's processors, and clears it on Intel's")
            if bits == 64
            else Effect()
        )
    if 0xD8 <= opcode <= 0xDF and parts.in_register:
        if opcode in (0xDB, 0xDF) and parts.reg in (5, 6):
            return Effect(0, STATUS)
        if opcode in (0xDA, 0xDB) and parts.reg < 4:
            return Effect((CF, ZF, CF | ZF, PF)[parts.reg])
    return _SIMPLE.get(opcode, Effect())


_BIT, _COUNT = Effect(0, CF, STATUS & ~CF), Effect(0, ZF | CF, OF | SF | AF | PF)
_VENDORS = "AMD's and Intel's processors differ"
_LEFT_OUT = {
    0x05: "a system call", 0x34: "a system call", 0x35: "a system call", 0x07: "a system call", 0x31: "the time", 0x33: "the time",
    0xA2: "the processor's name", 0x0D: "PREFETCHW: not offered", 0x0E: "3DNow!: not offered", 0x0F: "3DNow!: not offered",
    0x78: "SSE4A, VMX: not offered", 0x79: "SSE4A, VMX: not offered", 0x37: "GETSEC: not offered", 0x1A: "MPX: not offered",
    0x1B: "MPX: not offered", 0x1E: "CET: not offered", 0x09: "WBNOINVD: not offered", 0xAA: "RSM", 0xFF: f"UD0: {_VENDORS}",
    0x52: "an approximation, each processor's own", 0x53: "an approximation, each processor's own",
    0xB9: f"UD1: {_VENDORS}", 0xB2: "a load of SS", 0x1C: "CLDEMOTE: not offered",
    0xA6: "PadLock: not offered", 0xA7: "PadLock: not offered",
}  # fmt: skip


def _two_bytes(parts: Decoded, code: bytes, bits: int, cl: int | None) -> Effect:
    opcode = parts.opcode
    if opcode in _LEFT_OUT:
        return Effect(left_out=_LEFT_OUT[opcode])
    if opcode in (0x00, 0x01):
        if opcode == 0 and parts.reg in (2, 3, 4, 5):
            return Effect(0, ZF if parts.reg > 3 else 0)
        if opcode == 1 and not parts.in_register and parts.reg in (2, 3, 6, 7):
            return Effect()
        return Effect(left_out="descriptor tables, UMIP, and instructions of many features")
    if opcode == 0x02:
        return Effect(left_out="LAR gives bits that the manuals leave undefined")
    if opcode == 0x03:
        return Effect(0, ZF)
    if opcode == 0xB1 and parts.in_register and not parts.rex & 8:
        return Effect(left_out="CMPXCHG of a 32-bit register that differs clears its upper half or not, by the processor")
    if opcode in (0xA0, 0xA8) and bits == 32 and 0x66 not in parts.prefixes:
        return Effect(left_out="PUSH of a segment register stores two bytes or four, by the processor")
    if opcode & 0xF0 in (0x40, 0x80, 0x90):
        if opcode & 0xF0 == 0x80 and 0x66 in parts.prefixes and bits == 64:
            return Effect(left_out=f"near branches with an operand size prefix: {_VENDORS}")
        return Effect(_CONDITIONS[opcode >> 1 & 7])
    if opcode in (0x2E, 0x2F, 0xB0, 0xB1, 0xC0, 0xC1):
        return Effect(0, STATUS)
    if opcode in (0xA3, 0xAB, 0xB3, 0xBB, 0xBA):
        return _BIT if opcode != 0xBA or parts.reg > 3 else Effect()
    if opcode in (0xA4, 0xA5, 0xAC, 0xAD):
        return _double_shift(parts, _immediate(parts, code, bits) if opcode & 1 == 0 else cl)
    if opcode == 0xAF:
        return Effect(0, CF | OF, SF | ZF | AF | PF)
    if opcode == 0xB8:
        return Effect(0, STATUS) if 0xF3 in parts.prefixes else Effect(left_out="JMPE: reserved")
    if opcode in (0xBC, 0xBD):
        return _COUNT if 0xF3 in parts.prefixes else Effect(0, ZF, STATUS & ~ZF)
    if opcode in (0xB4, 0xB5) and parts.rex & 8:
        return Effect(left_out="far pointers of 64 bits are Intel's")
    if opcode == 0xAE:
        return _group15(parts)
    if opcode == 0xC7:
        return Effect(0, ZF) if parts.reg == 1 else Effect(left_out="RDRAND, XSAVES and the like")
    if opcode & 0xF8 == 0xC8 and 0x66 in parts.prefixes and not parts.rex & 8:
        return Effect(left_out="BSWAP of 16 bits is undefined")
    return Effect()


def _double_shift(parts: Decoded, count: int | None) -> Effect:
    width = _width(parts, False)
    if count is None:
        return Effect(0, 0, STATUS, "" if width > 16 else "SHLD of 16 bits by an unknown count")
    masked = count & (63 if width == 64 else 31)
    if masked > width:
        return Effect(left_out="a double shift by more than the operand's size is undefined")
    if not masked:
        return Effect()
    undefined = AF | (0 if masked == 1 else OF)
    return Effect(0, STATUS & ~undefined, undefined)


def _group15(parts: Decoded) -> Effect:
    if parts.mandatory == 0xF3 and parts.in_register and parts.reg < 4:
        return Effect()  # RDFSBASE and its like
    if parts.mandatory or (not parts.in_register and parts.reg in (0, 4, 5, 6)):
        return Effect(left_out="state images with x87 addresses or more components, and cache and wait instructions that are not offered")
    return Effect()


_MAP38 = frozenset((*range(12), 0x10, 0x14, 0x15, 0x17, 0x1C, 0x1D, 0x1E, *range(0x20, 0x26), *range(0x28, 0x2C), *range(0x30, 0x36),
                    *range(0x37, 0x42), 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xF0, 0xF1))  # fmt: skip
_MAP3A = frozenset((*range(8, 16), *range(0x14, 0x18), 0x20, 0x21, 0x22, 0x40, 0x41, 0x42, 0x44, *range(0x60, 0x64), 0xDF))


def _long_opcode(parts: Decoded) -> Effect:
    opcode = parts.opcode
    if parts.map == 5:
        return Effect(left_out="BMI, AVX, XOP: not offered")
    if parts.map == 4:
        if opcode in (0x60, 0x61, 0x62, 0x63):
            return Effect(0, STATUS)
        return Effect() if opcode in _MAP3A else Effect(left_out="an instruction of 0F 3A that is not offered")
    if opcode == 0x17:
        return Effect(0, STATUS)
    return Effect() if opcode in _MAP38 else Effect(left_out="an instruction of 0F 38 that is not offered")
