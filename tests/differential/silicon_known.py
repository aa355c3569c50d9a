"""What is known to differ between the model's engine and silicon, each with its reason: the table that a disagreement of
test_silicon.py is looked up in. docs/fidelity.md has the same facts for people.

A rule looks at the last instruction of the smallest snippet that still differs, and at what differs; it names the fields
that it explains. A disagreement is known when every field is explained. Where the two end with different vectors, all
that differs follows from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.differential.opcodes import Decoded, decode
from tests.differential.traced import CODE

Differing = dict[str, tuple[Any, Any]]
_UD, _SS, _GP, _PF = 6, 12, 13, 14
_MXCSR_STICKY = 0x3F
_PADDING = b"\xcc" * 5  # what stands behind a snippet


@dataclass(frozen=True, slots=True)
class Rule:
    """`when` gets the decoded instruction, its bytes and what differs as name -> (model, processor), and says which names it
    explains.
    """

    name: str
    why: str
    when: Callable[[Decoded, bytes, Differing], set[str]]


def _vectors(differing: Differing) -> tuple[int, int]:
    return differing.get("vector", (-99, -99))


def _all_if(condition: bool, differing: Differing) -> set[str]:
    return set(differing) if condition else set()


def _write_bit(_: Decoded, __: bytes, differing: Differing) -> set[str]:
    model, real = differing.get("error", (0, 0))
    return {"error"} if model | 2 == real and model != real else set()


def _is_sse_map(parts: Decoded) -> bool:
    return parts.map in (2, 3, 4)


def _exponents(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    if not _is_sse_map(parts) or "st" not in differing:
        return set()
    model, real = differing["st"]
    return {"st"} if all(model[at : at + 8] == real[at : at + 8] for at in range(0, 80, 10)) else set()


def _tags(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"ftw", "fsw", "st"} if _is_sse_map(parts) and {"ftw", "fsw"} & set(differing) else set()


def _is_x87(parts: Decoded) -> bool:
    return parts.map == 1 and 0xD8 <= parts.opcode <= 0xDF


def _x87(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"fsw", "ftw", "st", "fcw", "data", "rflags", "cr2", "error"} if _is_x87(parts) else set()


def _x87_outcome(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    model, real = _vectors(differing)
    return _all_if(_is_x87(parts) and parts.in_register and _UD in (model, real), differing)


def _sticky(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    model, real = differing.get("mxcsr", (0, 0))
    return {"mxcsr"} if parts.map in (2, 4) and not (model ^ real) & ~_MXCSR_STICKY else set()


def _test_alias(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 1 and parts.opcode in (0xF6, 0xF7) and parts.reg == 1 and "rip" in differing, differing)


def _predicate(parts: Decoded, code: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 2 and parts.opcode == 0xC2 and _vectors(differing)[0] == _UD, differing)


def _ldmxcsr(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 2 and parts.opcode == 0xAE and parts.reg == 2 and _vectors(differing)[1] == _GP, differing)


def _enter(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    faults = _vectors(differing)[1] == _PF or "cr2" in differing
    return _all_if(parts.map == 1 and parts.opcode == 0xC8 and faults, differing)


def _blsi(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rflags"} if parts.map == 5 and parts.opcode & 0xFF == 0xF3 and parts.reg == 3 else set()


def _not_canonical(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    branch = parts.map == 1 and "rip" in differing and (parts.opcode in (0xC2, 0xC3) or (parts.opcode == 0xFF and parts.reg in (2, 4)))
    return _all_if(branch and differing["rip"][0] >> 47 not in (0, 0x1FFFF), differing)


def _unaligned(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    _, real = _vectors(differing)
    ran = "vector" not in differing and differing.get("rip", (0, 0))[0] > differing.get("rip", (0, 0))[1]  # and faulted later
    return _all_if(_is_sse_map(parts) and not parts.in_register and (real == _GP or ran), differing)


def _half_moves(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    register = parts.in_register and parts.map == 2
    model, real = differing.get("rip", (0, 0))
    refused = _vectors(differing)[1] == _UD or ("vector" not in differing and model > real)  # or #UD for another reason later
    shifts = parts.map == 2 and parts.opcode in (0x71, 0x72, 0x73) and not parts.in_register
    return _all_if(refused and (shifts or (register and parts.opcode in (0x12, 0x13, 0x16, 0x17, 0x2B, 0xE7))), differing)


def _masked_store(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    masked = parts.map == 2 and parts.opcode == 0xF7
    return _all_if(masked and _vectors(differing)[1] in (_PF, _UD), differing) or ({"cr2", "data", "stack"} if masked else set())


def _stack_segment(_: Decoded, __: bytes, differing: Differing) -> set[str]:
    return {"vector"} if _vectors(differing) == (_GP, _SS) else set()


def _no_such_register(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"vector"} if parts.map == 2 and 0x20 <= parts.opcode <= 0x23 and _vectors(differing) == (_GP, _UD) else set()


def _iret(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 1 and parts.opcode == 0xCF and _vectors(differing)[1] in (_GP, 11, _SS), differing)


_FLOAT = frozenset((0x51, *range(0x58, 0x60), 0xC2, 0x7C, 0x7D, 0xD0, 0xE6, 0x2A, 0x2C, 0x2D, 0x08, 0x09, 0x0A, 0x0B, 0x40, 0x41))


def _denormals(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"xmm", "mxcsr", "st"} if parts.map in (2, 4) and parts.opcode in _FLOAT else set()


def _bzhi(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return set(differing) if parts.map == 5 and parts.opcode & 0xFF == 0xF5 and "vector" not in differing else set()


def _rex_ah(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rflags", "rax", "rsp"} if parts.map == 1 and parts.opcode in (0x9E, 0x9F) and parts.rex else set()


def _int_with_prefix(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rip"} if parts.map == 1 and parts.opcode == 0xCD and (parts.rex or parts.prefixes) else set()


def _branch_of_32_bits(_: Decoded, __: bytes, differing: Differing) -> set[str]:
    model, real = differing.get("rip", (0, 0))
    return {"rip", "cr2"} if model >> 32 and model & 0xFFFFFFFF == real else set()


def _ret(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rsp"} if parts.map == 1 and parts.opcode in (0xC2, 0xCA) else set()


def _flags_at_fault(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    repeated = parts.map == 1 and parts.opcode in (0xA6, 0xA7, 0xAE, 0xAF)
    rotate = parts.map == 1 and parts.opcode in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3) and parts.reg in (2, 3)
    setcc = parts.map == 2 and 0x90 <= parts.opcode <= 0x9F
    return {"rflags", "error"} if repeated or ((rotate or setcc) and not parts.in_register) else set()


def _two_pages(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    model, real = differing.get("error", (0, 0))
    return {"error", "cr2"} if not parts.in_register and "vector" not in differing and (model ^ real) & ~3 == 0 != model ^ real else set()


def _hints(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 2 and parts.opcode in (0x18, 0x19, 0x1D) and _vectors(differing)[0] == _UD, differing)


def _prefixes(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    repeat, size = bool({0xF2, 0xF3} & set(parts.prefixes)), 0x66 in parts.prefixes
    refused = (repeat or size) and _vectors(differing)[1] in (_UD, _GP)
    return _all_if(_is_sse_map(parts) and (refused or (repeat and size)), differing)


def _base(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map == 2 and parts.opcode == 0xAE and parts.reg in (2, 3) and _vectors(differing)[1] == _GP, differing)


def _locked(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rflags"} if 0xF0 in parts.prefixes and parts.map == 1 and parts.opcode in (0xF6, 0xF7) and parts.reg == 3 else set()


def _behind_a_block(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    model, real = differing.get("rip", (0, 0))
    return _all_if(
        "vector" not in differing and "cr2" not in differing and CODE <= model < real and real & 0xFFF in (0, *range(0xFF0, 0x1000)),
        differing,
    )


def _alignment_checks(_: Decoded, __: bytes, differing: Differing) -> set[str]:
    return _all_if(_vectors(differing)[1] == 17, differing)


def _cmpxchg8b(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"rflags"} if parts.map == 2 and parts.opcode == 0xC7 and parts.reg == 1 else set()


def _past_the_page(_: Decoded, __: bytes, differing: Differing) -> set[str]:
    return _all_if(_vectors(differing) in ((_UD, _PF), (_GP, _PF)) and differing.get("cr2", (0, 0))[1] == CODE + 0x1000, differing)


def _half_loads(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"xmm", "cr2"} if parts.map == 2 and parts.opcode in (0x10, 0x6F, 0xF0, 0x12, 0x16) and not parts.in_register else set()


def _with_itself(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    itself = parts.in_register and parts.modrm & 7 == parts.reg
    return {"xmm", "st"} if parts.map == 3 and parts.opcode in (1, 2, 3, 5, 6, 7) and itself else set()


def _bextr(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return set(differing) if parts.map == 5 and parts.opcode & 0xFF == 0xF7 and "vector" not in differing else set()


def _extensions(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    known = parts.map == 1 and (parts.opcode in (0xC6, 0xC7) or (parts.opcode == 0xFF and parts.reg == 7))
    movbe = parts.map == 3 and parts.opcode in (0xF0, 0xF1) and parts.in_register
    return _all_if((known or movbe) and _UD in _vectors(differing), differing)


def _round(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    narrow = (parts.map == 4 and parts.opcode in (0x0A, 0x0B, 0x21, 0x17, 0x14, 0x20)) or (
        parts.map == 2 and parts.opcode in (0x2C, 0x2D, 0x5A, 0xE6)
    )
    return _all_if(narrow and not parts.in_register, differing)


def _strings_of_32_bits(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    string = parts.map == 1 and parts.opcode in (0xA4, 0xA5, 0xAA, 0xAB, 0xAC, 0xAD, 0xA6, 0xA7, 0xAE, 0xAF) and 0x67 in parts.prefixes
    return set(differing) & {"rsi", "rdi", "rcx"} if string else set()


def _scan_of_zero(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    scan = parts.map == 2 and parts.opcode in (0xBC, 0xBD) and 0xF3 not in parts.prefixes and not parts.rex & 8
    return {name for name, (model, real) in differing.items() if name[0] == "r" and model == real & 0xFFFFFFFF} if scan else set()


def _far_return(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return {"cr2"} if parts.map == 1 and parts.opcode in (0xCA, 0xCB, 0xCF) else set()


def _wild_mmx(parts: Decoded, _: bytes, differing: Differing) -> set[str]:
    return _all_if(parts.map in (3, 4) and bool(parts.rex & 4) and _vectors(differing)[0] == _UD, differing)


RULES = (
    Rule(
        "#PF of a read-modify-write",
        "the engine asks for the page of such an operand as for a load, so a page that is not there gives an error code without W",
        _write_bit,
    ),
    Rule(
        "MMX and the x87 exponents",
        "a write to an MMX register sets the exponent of its x87 register to all ones; the engine leaves it",
        _exponents,
    ),
    Rule(
        "MMX and the x87 tags",
        "the engine marks the x87 registers as used before an operand's fault, and not at SSSE3's instructions",
        _tags,
    ),
    Rule(
        "alignment of SSE operands",
        "#GP on a processor for an operand that is not aligned to 16 bytes; the engine does not look",
        _unaligned,
    ),
    Rule("register forms of moves to and from memory", "MOVLPS and its like: #UD on a processor", _half_moves),
    Rule("MASKMOVDQU", "the engine stores byte by byte, and faults at the first byte that it stores", _masked_store),
    Rule("x87 arithmetic", "the engine's x87 has no stack faults, no C1, and flags of its own for unmasked and denormal operands", _x87),
    Rule(
        "reserved x87 opcodes", "aliases of FCOM, FXCH and FSTP that processors execute, and others that only the engine does", _x87_outcome
    ),
    Rule("MXCSR's sticky flags", "the engine does not record floating-point exceptions in MXCSR", _sticky),
    Rule("TEST with /1", "an undocumented alias of TEST r/m, imm that processors execute", _test_alias),
    Rule("CMPPS with a predicate above 7", "processors ignore the upper bits without VEX; the engine raises #UD", _predicate),
    Rule("LDMXCSR of reserved bits", "#GP on a processor; the engine takes them", _ldmxcsr),
    Rule("ENTER to a stack that is not there", "a processor checks that the new top of the stack could be written", _enter),
    Rule("CF of BLSI", "the engine computes it as for BLSR, the other way round", _blsi),
    Rule("a near branch to a non-canonical address", "#GP on the branch on a processor; the engine faults at the target", _not_canonical),
    Rule("#SS of a non-canonical address", "the model does not know that an access was to the stack, and raises #GP", _stack_segment),
    Rule("control and debug registers that do not exist", "#UD before #GP in ring 3 on a processor", _no_such_register),
    Rule(
        "denormals and NaNs",
        "the engine takes the larger of two NaNs, as the x87 does, and looks at FTZ and DAZ in arithmetic only",
        _denormals,
    ),
    Rule("BZHI of a whole operand", "the engine clears the highest bit when the index says that nothing is to be cleared", _bzhi),
    Rule("LAHF and SAHF with REX", "the engine takes SPL for AH", _rex_ah),
    Rule("INT with a prefix", "the frame of a fault at INT n points behind the prefix", _int_with_prefix),
    Rule("branches of 32-bit code", "RIP and CR2 are not cut to 32 bits where the fetch behind a branch faults", _branch_of_32_bits),
    Rule(
        "a fault of two pages",
        "an access across a page that is read-only and one that is not there: which one the fault tells of",
        _two_pages,
    ),
    Rule("RET with an immediate", "the engine takes the number of bytes as signed", _ret),
    Rule("flags at a fault", "a rotate through carry of missing memory, and a repeated comparison that is interrupted", _flags_at_fault),
    Rule("hints with a register", "reserved no-operations on a processor, #UD in the engine", _hints),
    Rule("F2 and F3 before what does not take them", "#UD on a processor; the engine ignores them", _prefixes),
    Rule("WRFSBASE and WRGSBASE of a non-canonical address", "#GP on a processor; the engine takes it", _base),
    Rule("LOCK NEG", "the engine computes the flags of something else", _locked),
    Rule("a far return to missing memory", "the order in which the words are popped", _far_return),
    Rule("SSSE3 of MMX registers with REX.R", "the model refuses them: the engine would overwrite itself", _wild_mmx),
    Rule(
        "a fetch behind a block",
        "where the next page cannot be fetched, the fault's frame points to the beginning of the block, of which nothing was executed",
        _behind_a_block,
    ),
    Rule("BSF and BSR of zero", "the destination stays; whether its upper half does too depends on the processor", _scan_of_zero),
    Rule("an undefined opcode at the end of a page", "a processor fetches the whole instruction first, and faults at that", _past_the_page),
    Rule("alignment checks", "#AC is not raised", _alignment_checks),
    Rule("flags after CMPXCHG8B", "the engine computes them from those of an earlier instruction, all but ZF", _cmpxchg8b),
    Rule("a load across pages", "half of the register is loaded when the second page faults", _half_loads),
    Rule("PHADD and PHSUB of a register with itself", "the engine reads what it has written", _with_itself),
    Rule("BEXTR of a whole operand", "the engine clears the highest bit", _bextr),
    Rule("opcode extensions and forms", "MOV of C7 with an extension, MOVBE of registers: #UD on a processor", _extensions),
    Rule("ROUNDSS and its like", "the engine loads 16 bytes where the operand has 4 or 8", _round),
    Rule(
        "string instructions with 32-bit addresses",
        "a count of 0 leaves the upper halves on some processors and clears them on others",
        _strings_of_32_bits,
    ),
    Rule("IRET in ring 3", "the engine takes EFLAGS.VM from the stack in ring 3 and in long mode", _iret),
)


def rule_for(snippet: Any, differing: Differing) -> Rule | None:
    """The rule (the first of those) that explains this; None if something stays unexplained."""
    _, code = snippet.parts[-1]
    parts = decode(code + _PADDING, snippet.bits)
    if any(_blsi(decode(earlier, snippet.bits), earlier, differing) for _, earlier in snippet.parts[:-1]):
        return next(rule for rule in RULES if rule.when is _blsi)  # whoever reads its CF differs too
    matching = [(rule, names) for rule in RULES if (names := rule.when(parts, code, differing) & set(differing))]
    explained = set().union(*(names for _, names in matching)) if matching else set()
    return matching[0][0] if explained == set(differing) else None
