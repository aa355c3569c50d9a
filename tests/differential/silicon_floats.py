"""What is known to differ between the model's engine and silicon in x87, MMX and SSE: see silicon_known.py.

The rules look at values: a sum of two ordinary numbers that is wrong is not known, whatever the instruction.
"""

from __future__ import annotations

from tests.differential.silicon_seen import GP, PF, SS, UD, Seen, all_if

_MXCSR_STICKY, _FTZ_DAZ = 0x3F, 0x8040
_EXCEPTIONS, _C0, _C1, _C2, _C3, _SF, _IE, _DE, _UE = 0x3F, 0x100, 0x200, 0x400, 0x4000, 0x40, 1, 2, 16
_BUSY = 0x8080  # B and ES
_CONSTANTS = range(0x29, 0x2E)  # ModRM of FLDL2T to FLDLN2, of D9
_TOP = 0x3800


def _is_sse(seen: Seen) -> bool:
    return seen.parts.map in (2, 3, 4)


def _is_mmx(seen: Seen) -> bool:
    return _is_sse(seen) and (0x66 not in seen.parts.prefixes or (seen.parts.map == 2 and seen.parts.opcode in (0x2A, 0x2C, 0x2D)))


def _emms(seen: Seen) -> set[str]:
    emms = seen.parts.map == 2 and seen.parts.opcode == 0x77
    sides = [_registers(side.fields["st"], side.fields["fsw"] >> 11 & 7) for side in seen.ends]
    return {"fsw", "st"} if emms and not _status(seen) & ~_TOP and sides[0] == sides[1] else set()


def _registers(image: bytes, top: int) -> list[bytes]:
    """The ten bytes of each x87 register by its number, not by its place in the stack."""
    return [image[10 * ((number - top) & 7) :][:10] for number in range(8)]


def _same_but_exponents(seen: Seen) -> bool:
    sides = [_registers(side.fields["st"], side.fields["fsw"] >> 11 & 7) for side in seen.ends]
    return all(model[:8] == real[:8] and (model == real or real[8:] == b"\xff\xff") for model, real in zip(*sides))


def _exponents(seen: Seen) -> set[str]:
    return {"st"} if _is_mmx(seen) and "st" in seen.differing and _same_but_exponents(seen) else set()


def _tags(seen: Seen) -> set[str]:
    """TOP 0 and all in use on one side, nothing changed on the other."""
    if not _is_mmx(seen) or not {"ftw", "fsw"} & set(seen.differing):
        return set()
    used = [side.fields["ftw"] == 0xFF and not side.fields["fsw"] & _TOP for side in seen.ends]
    st = {"st"} if _same_but_exponents(seen) else set()
    return {"ftw", "fsw"} | st if any(used) and not (seen.made("fsw") ^ seen.real("fsw")) & ~_TOP else set()


def _wild_mmx(seen: Seen) -> set[str]:
    return all_if(seen.parts.map in (3, 4) and seen.parts.rex & 4 and seen.vectors[0] == UD, seen)


# ---- SSE
def _unaligned(seen: Seen) -> set[str]:
    return all_if(_is_sse(seen) and not seen.parts.in_register and seen.stopped(GP), seen)


def _forms(seen: Seen) -> set[str]:
    parts = seen.parts
    memory_only = (0x12, 0x13, 0x16, 0x17, 0x2B, 0xE7, 0xC3)
    register_only = (0x50, 0x71, 0x72, 0x73, 0xC5, 0xD7, 0xF7)
    wrong = parts.opcode in (memory_only if parts.in_register else register_only)
    return all_if(parts.map == 2 and wrong and seen.stopped(UD), seen)


def _masked_store(seen: Seen) -> set[str]:
    masked = seen.parts.map == 2 and seen.parts.opcode == 0xF7 and seen.parts.in_register
    return all_if(masked and (seen.stopped(PF, GP, SS) or seen.vectors == (PF, PF)), seen)


def _prefixes(seen: Seen) -> set[str]:
    refused = {0x66, 0xF2, 0xF3} & set(seen.parts.prefixes) and seen.stopped(UD)
    return all_if(_is_sse(seen) and refused, seen)


def _several_prefixes(seen: Seen) -> set[str]:
    return all_if(_is_sse(seen) and len({0x66, 0xF2, 0xF3} & set(seen.parts.prefixes)) > 1, seen)


def _predicate(seen: Seen) -> set[str]:
    return all_if(seen.parts.map == 2 and seen.parts.opcode == 0xC2 and seen.vectors[0] == UD, seen)


def _ldmxcsr(seen: Seen) -> set[str]:
    return all_if(seen.parts.map == 2 and seen.parts.opcode == 0xAE and seen.parts.reg == 2 and seen.stopped(GP), seen)


_ARITHMETIC = {2: frozenset((0x51, *range(0x58, 0x60), 0xC2, 0x7C, 0x7D, 0xD0)), 4: frozenset((8, 9, 10, 11, 0x40, 0x41))}
_CONVERSIONS = frozenset((0x2A, 0x2C, 0x2D, 0x2E, 0x2F, 0xE6))


def _sticky(seen: Seen) -> set[str]:
    """The processor has flags that the model lacks."""
    model, real = seen.differing.get("mxcsr", (0, 0))
    of_floats = seen.parts.opcode in _ARITHMETIC.get(seen.parts.map, ()) or (seen.parts.map == 2 and seen.parts.opcode in _CONVERSIONS)
    if seen.parts.map == 2 and seen.parts.opcode == 0xAE and seen.parts.reg == 3 and model | real == real:  # STMXCSR behind it
        return {"mxcsr", "data", "stack"} if not (model ^ real) & ~_MXCSR_STICKY else set()
    return {"mxcsr"} if of_floats and not (model ^ real) & ~_MXCSR_STICKY and model | real == real else set()


def _is_nan(value: int, size: int) -> bool:
    return value & (1 << 8 * size - 1) - 1 > (0x7F800000 if size == 4 else 0x7FF << 52)


def _lanes(seen: Seen, size: int) -> list[tuple[int, int]]:
    model, real = seen.differing["xmm"]
    pairs = [
        (int.from_bytes(model[at : at + size], "little"), int.from_bytes(real[at : at + size], "little")) for at in range(0, 256, size)
    ]
    return [(left, right) for left, right in pairs if left != right]


def _nans(seen: Seen) -> set[str]:
    """Each number that differs is a NaN on both sides."""
    if "xmm" not in seen.differing or seen.parts.opcode not in _ARITHMETIC.get(seen.parts.map, ()):
        return set()
    return {"xmm"} if any(all(_is_nan(a, size) and _is_nan(b, size) for a, b in _lanes(seen, size)) for size in (4, 8)) else set()


def _denormals(seen: Seen) -> set[str]:
    """FTZ or DAZ is set, and each number that differs is a zero on the processor (a mask, for comparisons)."""
    floats = seen.parts.opcode in _ARITHMETIC.get(seen.parts.map, ())
    if not floats or not seen.real("mxcsr") & _FTZ_DAZ:
        return set()
    if "xmm" not in seen.differing or seen.parts.opcode in (0xC2, 0x51):
        return {"xmm"}
    return {"xmm"} if any(all(b & (1 << 8 * size - 1) - 1 == 0 for _, b in _lanes(seen, size)) for size in (4, 8)) else set()


def _dot_product(seen: Seen) -> set[str]:
    """One unit in the last place or the sign of a zero: the products are added in another order."""
    if seen.parts.map != 4 or seen.parts.opcode not in (0x40, 0x41) or "xmm" not in seen.differing:
        return set()
    size = 4 if seen.parts.opcode == 0x40 else 8
    near = (1, 1 << 8 * size - 1)
    return {"xmm"} if all(abs(a - b) in near or (_is_nan(a, size) and _is_nan(b, size)) for a, b in _lanes(seen, size)) else set()


def _ordered(seen: Seen) -> set[str]:
    strings = seen.parts.map == 4 and 0x60 <= seen.parts.opcode <= 0x63
    return {"xmm", "rcx", "rflags"} if strings and seen.code[-1] & 0xC == 0xC else set()


_NARROW = {4: frozenset((0x0A, 0x0B, 0x21, 0x17, 0x14, 0x20)), 2: frozenset((0x2A, 0x2C, 0x2D, 0x5A, 0xE6, 0x60, 0x61, 0x62))}


def _round(seen: Seen) -> set[str]:
    narrow = seen.parts.opcode in _NARROW.get(seen.parts.map, ()) and not seen.parts.in_register
    return all_if(narrow and PF in seen.vectors, seen)


# ---- x87
def _x87(seen: Seen) -> tuple[int, int, int]:
    """(opcode, extension, ModRM & 0x3f of a register form else -1); zeroes for another instruction."""
    parts = seen.parts
    if parts.map != 1 or not 0xD8 <= parts.opcode <= 0xDF:
        return 0, 0, 0
    return parts.opcode, parts.reg, parts.modrm & 0x3F if parts.in_register else -1


def _status(seen: Seen) -> int:
    """The bits of the status word that differ."""
    return int(seen.made("fsw") ^ seen.real("fsw"))


def _stack_faults(seen: Seen) -> set[str]:
    real = seen.real("fsw")
    faulted = _x87(seen)[0] and real & (_SF | _IE) == _SF | _IE and not seen.made("fsw") & _SF
    return {"fsw", "ftw", "st", "data", "stack", "rflags"} if faulted else set()


def _x87_exceptions(seen: Seen) -> set[str]:
    return {"fsw"} if _x87(seen)[0] and not _status(seen) & ~(_EXCEPTIONS | _C1) else set()


def _x87_conditions(seen: Seen) -> set[str]:
    opcode, _, modrm = _x87(seen)
    pointer = opcode == 0xD9 and modrm in (0x36, 0x37)  # FDECSTP, FINCSTP
    allowed = _C0 | _C1 | _C2 | _C3 if pointer else 0
    if opcode == 0xD9 and modrm == 0x3A:  # FSQRT
        allowed = _C0 | _C1 | _C2 | _C3 | _IE
    return {"fsw"} if allowed and not _status(seen) & ~allowed else set()


def _comparison_flags(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rflags", (0, 0))
    compares = any(part.map == 1 and part.opcode in (0xDB, 0xDF) and part.reg in (5, 6) and part.in_register for part in seen.parsed)
    return {"rflags"} if compares and not (model ^ real) & ~0x890 else set()


def _reserved_control(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    control = not (seen.made("fcw") ^ seen.real("fcw")) & ~0xE0C0
    fxrstor = seen.parts.map == 2 and seen.parts.opcode == 0xAE and seen.parts.reg == 1
    loads = fxrstor or (modrm < 0 and (opcode, extension) in ((0xD9, 4), (0xD9, 5), (0xDD, 4)))
    return {"fcw", "fsw"} if loads and control and not _status(seen) & ~_BUSY else set()


def _environment(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    return {"data", "stack"} if modrm < 0 and extension == 6 and opcode in (0xD9, 0xDD) else set()


def _environment_missing(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    return all_if(modrm < 0 and extension == 4 and opcode in (0xD9, 0xDD) and seen.vectors[1] in (PF, GP, SS), seen)


def _flushed(seen: Seen) -> set[str]:
    underflow = seen.real("fsw") & _UE and seen.real("mxcsr") & 0x8000
    return {"st", "data", "stack"} if _x87(seen)[0] and underflow else set()


def _constants(seen: Seen) -> set[str]:
    opcode, _, modrm = _x87(seen)
    if opcode != 0xD9 or modrm not in _CONSTANTS or "st" not in seen.differing:
        return set()
    model, real = seen.differing["st"]
    near = abs(int.from_bytes(model[:8], "little") - int.from_bytes(real[:8], "little")) == 1
    return {"st"} if near and model[8:] == real[8:] else set()


def _tag_of_a_store(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    return {"ftw"} if opcode in (0xDD, 0xDF, 0xD9) and extension in (2, 3) and modrm >= 0 else set()


def _odd_operands(seen: Seen) -> set[str]:
    """A denormal number, or an encoding that is no number, is involved."""
    return {"st", "data", "stack"} if _x87(seen)[0] and seen.real("fsw") & (_IE | _DE) else set()


def _packed_decimals(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    return {"data", "stack"} if opcode == 0xDF and extension == 6 and modrm < 0 else set()


def _extract(seen: Seen) -> set[str]:
    infinite = seen.real("st")[18:20] == b"\xff\x7f"  # what became ST(1), the exponent
    return {"st"} if _x87(seen)[0] == 0xD9 and _x87(seen)[2] == 0x34 and infinite else set()


def _scale(seen: Seen) -> set[str]:
    return {"st"} if _x87(seen)[0] == 0xD9 and _x87(seen)[2] == 0x3D else set()


_RESERVED = {
    (0xD9, 2), (0xD9, 3), (0xD9, 4), (0xD9, 5), (0xDA, 4), (0xDA, 5), (0xDA, 6), (0xDA, 7), (0xDB, 4), (0xDB, 7), (0xDC, 2), (0xDC, 3),
    (0xDD, 1), (0xDD, 6), (0xDD, 7), (0xDE, 2), (0xDE, 3), (0xDF, 0), (0xDF, 1), (0xDF, 2), (0xDF, 3), (0xDF, 4), (0xDF, 7),
}  # fmt: skip


def _reserved(seen: Seen) -> set[str]:
    opcode, extension, modrm = _x87(seen)
    return all_if(modrm >= 0 and (opcode, extension) in _RESERVED and UD in seen.vectors, seen)


RULES = (
    ("MMX and the x87 exponents", "a write to an MMX register sets its exponent to all ones; the engine leaves it", _exponents),
    ("MMX and the x87 tags", "the engine marks them as used before an operand's fault, and not at SSSE3's instructions", _tags),
    ("TOP after EMMS", "the engine leaves it", _emms),
    ("SSSE3 of MMX registers with REX.R", "the model refuses them: the engine would overwrite itself", _wild_mmx),
    ("alignment of SSE operands", "#GP on a processor for an operand not aligned to 16 bytes; the engine does not look", _unaligned),
    ("register and memory forms", "MOVLPS of a register, MOVMSKPS of memory and their like: #UD on a processor", _forms),
    ("MASKMOVDQU", "the engine stores byte by byte, and faults at the first byte that it stores", _masked_store),
    ("a prefix before what does not take it", "#UD on a processor; the engine ignores it", _prefixes),
    ("66, F2 and F3 together", "the engine lets 66 or the first one decide, processors the last of F2 and F3", _several_prefixes),
    ("CMPPS with a predicate above 7", "processors ignore the upper bits without VEX; the engine raises #UD", _predicate),
    ("LDMXCSR of reserved bits", "#GP on a processor; the engine takes them", _ldmxcsr),
    ("MXCSR's sticky flags", "the engine does not record floating-point exceptions in MXCSR", _sticky),
    ("NaNs", "of two NaNs the engine takes the larger, as the x87 does", _nans),
    ("denormals", "the engine has no FTZ for SSE, and DAZ for arithmetic only", _denormals),
    ("DPPS and DPPD", "the order of additions", _dot_product),
    ("PCMPxSTRx that searches", "the engine misses a match that the end of the second operand cuts off", _ordered),
    ("narrow operands", "the engine loads 16 bytes where ROUNDSS and its like have 4 or 8", _round),
    ("x87 stack faults", "the engine has none", _stack_faults),
    ("x87 exception flags and C1", "recorded in part only; the engine knows no C1", _x87_exceptions),
    ("x87 condition codes", "FDECSTP and FINCSTP clear them in the engine, FSQRT of a negative number sets them", _x87_conditions),
    ("flags of FCOMI", "OF, SF and AF are not cleared", _comparison_flags),
    ("x87 control word", "reserved bits, and exceptions that become unmasked", _reserved_control),
    ("FNSTENV and FNSAVE", "tags, and addresses of the last instruction", _environment),
    (
        "FLDENV and FRSTOR of missing memory",
        "registers change before the fault; what is not used is not read",
        _environment_missing,
    ),
    ("x87 underflow with MXCSR.FTZ", "the engine applies FTZ to the x87", _flushed),
    ("x87 constants", "rounded to nearest whatever the control word says", _constants),
    ("the tag of FST's destination", "the engine leaves it", _tag_of_a_store),
    ("x87 denormals and unsupported encodings", "the engine computes with them, or stores another NaN", _odd_operands),
    ("FBSTP", "the engine does not round, and stores other digits of what does not fit", _packed_decimals),
    ("FXTRACT of an infinity", "the engine gives a finite exponent", _extract),
    ("FSCALE", "overflow and underflow", _scale),
    ("reserved x87 opcodes", "aliases that processors execute, and others that only the engine does", _reserved),
)
