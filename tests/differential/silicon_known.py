"""What is known to differ between the model's engine and silicon, each with its reason: the table that a disagreement of
test_silicon.py is looked up in. docs/fidelity.md has the same facts for people.

A rule looks at one instruction of the smallest snippet that still differs (the one at which the processor stopped, or the
last), at what differs, and at what both sides ended with. It names the opcodes it is about and the fields that it
explains, and as far as possible the values. A disagreement is known when every field is explained; x87 and SSE have
rules of their own (silicon_floats.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.differential import silicon_floats
from tests.differential.silicon import Snippet
from tests.differential.silicon_seen import AC, BR, GP, NP, PF, SS, UD, Differing, Seen, all_if, look
from tests.differential.traced import CODE

_RETURNS = (0xCA, 0xCB, 0xCF)
_STRINGS = frozenset((0xA4, 0xA5, 0xA6, 0xA7, *range(0xAA, 0xB0)))


@dataclass(frozen=True, slots=True)
class Rule:
    """`when` says which names of what differs it explains."""

    name: str
    why: str
    when: Callable[[Seen], set[str]]


def _test_alias(seen: Seen) -> set[str]:
    parts = seen.parts
    return all_if(parts.map == 1 and parts.opcode in (0xF6, 0xF7) and parts.reg == 1 and "rip" in seen.differing, seen)


def _enter(seen: Seen) -> set[str]:
    enter = seen.parts.map == 1 and seen.parts.opcode == 0xC8
    return all_if(enter and seen.stopped(PF, SS, GP), seen) or ({"rbp"} if enter and 0x66 in seen.parts.prefixes else set())


def _not_canonical(seen: Seen) -> set[str]:
    parts = seen.parts
    far = parts.map == 1 and (parts.opcode in (0xC2, 0xC3) or (parts.opcode == 0xFF and parts.reg in (2, 4)))
    known = far and seen.stopped(GP) and seen.made("rip") >> 47 not in (0, 0x1FFFF)
    return {"rip", "rsp", "vector", "error", "cr2", "stack", "data"} if known else set()


def _stack_segment(seen: Seen) -> set[str]:
    return {"vector"} if seen.vectors == (GP, SS) else set()


def _no_such_register(seen: Seen) -> set[str]:
    return {"vector"} if seen.parts.map == 2 and 0x20 <= seen.parts.opcode <= 0x23 and seen.vectors == (GP, UD) else set()


def _iret(seen: Seen) -> set[str]:
    parts = seen.parts
    return all_if(parts.map == 1 and parts.opcode == 0xCF and seen.stopped(GP, NP, SS), seen)


def _far_return(seen: Seen) -> set[str]:
    parts = seen.parts
    if parts.map != 1 or parts.opcode not in _RETURNS:
        return set()
    narrow = seen.snippet.bits == 64 and not parts.rex & 8 and seen.stopped(SS, PF, GP) and seen.made("cr2") >> 32 == 0
    return set(seen.differing) if narrow and seen.vectors[0] == PF and seen.vectors[1] != PF else {"cr2"}


def _ret(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rsp", (0, 0))
    return {"rsp"} if seen.parts.map == 1 and seen.parts.opcode in (0xC2, 0xCA) and real - model == 0x10000 else set()


def _rex_ah(seen: Seen) -> set[str]:
    return all_if(any(part.map == 1 and part.opcode in (0x9E, 0x9F) and part.rex for part in seen.parsed), seen)


def _int_with_prefix(seen: Seen) -> set[str]:
    return {"rip"} if seen.parts.map == 1 and seen.parts.opcode == 0xCD and (seen.parts.rex or seen.parts.prefixes) else set()


def _branch_of_32_bits(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rip", (0, 0))
    return {"rip", "cr2"} if seen.snippet.bits == 32 and model >> 32 and model & 0xFFFFFFFF == real else set()


def _flags_at_fault(seen: Seen) -> set[str]:
    """Undefined flags at most where nothing was executed; a carry that was rotated in."""
    parts = seen.parts
    rotate = parts.map == 1 and parts.opcode in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3) and parts.reg in (2, 3) and not parts.in_register
    compares = parts.map == 1 and parts.opcode in (0xA6, 0xA7, 0xAE, 0xAF)
    setcc = parts.map == 2 and 0x90 <= parts.opcode <= 0x9F and not parts.in_register
    faulted = seen.vectors[1] in (PF, GP, SS) and "rip" not in seen.differing
    return {"rflags"} if ((rotate or compares or setcc) and faulted) or (compares and seen.vectors == (1, 1)) else set()


def _two_pages(seen: Seen) -> set[str]:
    """Both fault, at the same instruction, at the two ends of one operand or with P or W of the other."""
    if seen.vectors != (PF, PF) or "rip" in seen.differing or (seen.parts.in_register and seen.parts.map != 1):
        return set()
    error, where = seen.differing.get("error", (0, 0)), seen.differing.get("cr2", (0, 0))
    return {"error", "cr2"} if abs(where[0] - where[1]) < 512 and (error[0] ^ error[1]) & ~3 == 0 else set()


def _partly_stored(seen: Seen) -> set[str]:
    """An operand that ends in a page which is not there: what stands before it."""
    model, _ = seen.differing.get("cr2", (seen.made("cr2"), 0))
    if seen.vectors != (PF, PF) or "rip" in seen.differing or seen.parts.in_register or model & 0xFFF:
        return set()
    stores = (seen.parts.map == 2 and seen.parts.opcode in (0x11, 0x7F, 0xE7, 0x13, 0x17, 0x2B)) or (
        seen.parts.map == 1 and 0xD9 <= seen.parts.opcode <= 0xDF
    )
    loads = seen.parts.map == 2 and seen.parts.opcode in (0x10, 0x6F, 0xF0, 0x12, 0x16)
    return {"data", "stack", "cr2"} if stores else {"xmm", "cr2"} if loads else set()


def _hints(seen: Seen) -> set[str]:
    return all_if(seen.parts.map == 2 and seen.parts.opcode in (0x18, 0x19, 0x1D) and seen.vectors[0] == UD, seen)


def _base(seen: Seen) -> set[str]:
    parts = seen.parts
    return all_if(parts.map == 2 and parts.opcode == 0xAE and parts.reg in (2, 3) and parts.in_register and seen.stopped(GP), seen)


def _locked(seen: Seen) -> set[str]:
    """The flags; everything, if somebody used them."""
    where = [0xF0 in part.prefixes and part.map == 1 and part.opcode in (0xF6, 0xF7) and part.reg == 3 for part in seen.parsed]
    return all_if(any(where[:-1]), seen) or ({"rflags"} if where[-1] else set())


def _behind_a_block(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rip", (0, 0))
    same = "vector" not in seen.differing and "cr2" not in seen.differing
    return all_if(same and CODE <= model < real and real & 0xFFF in (0, *range(0xFF0, 0x1000)), seen)


def _alignment_checks(seen: Seen) -> set[str]:
    return all_if(seen.stopped(AC), seen)


def _cmpxchg8b(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rflags", (0, 0))
    if any(part.map == 2 and part.opcode == 0xC7 and part.reg == 1 for part in seen.parsed[:-1]):
        return set(seen.differing)  # somebody used them
    return {"rflags"} if seen.parts.map == 2 and seen.parts.opcode == 0xC7 and seen.parts.reg == 1 and not (model ^ real) & 0x40 else set()


def _past_the_page(seen: Seen) -> set[str]:
    return all_if(seen.vectors in ((UD, PF), (GP, PF)) and seen.real("cr2") == CODE + 0x1000, seen)


def _extensions(seen: Seen) -> set[str]:
    parts = seen.parts
    moves = parts.map == 1 and parts.opcode in (0xC6, 0xC7, 0x8F) and parts.reg
    group5 = parts.map == 1 and parts.opcode == 0xFF and parts.reg == 7
    bits = parts.map == 2 and parts.opcode == 0xBA and parts.reg < 4
    wide = parts.map == 1 and parts.opcode in (0xC6, 0xC7) and not parts.reg and parts.rex & 4 and seen.vectors[0] == UD
    return all_if(((moves or group5 or bits) and seen.stopped(UD)) or wide, seen)


def _movbe(seen: Seen) -> set[str]:
    parts = seen.parts
    return all_if(parts.map == 3 and parts.opcode in (0xF0, 0xF1) and parts.in_register and UD in seen.vectors, seen)


def _strings_of_32_bits(seen: Seen) -> set[str]:
    string = seen.parts.map == 1 and seen.parts.opcode in _STRINGS and 0x67 in seen.parts.prefixes and seen.snippet.bits == 64
    found = {name for name in ("rsi", "rdi", "rcx") if name in seen.differing}
    return {name for name in found if not (seen.differing[name][0] ^ seen.differing[name][1]) & 0xFFFFFFFF} if string else set()


def _scan_of_zero(seen: Seen) -> set[str]:
    parts = seen.parts
    scan = parts.map == 2 and parts.opcode in (0xBC, 0xBD) and 0xF3 not in parts.prefixes and not parts.rex & 8
    return {name for name, (model, real) in seen.differing.items() if name[0] == "r" and model == real & 0xFFFFFFFF} if scan else set()


def _cmpxchg(seen: Seen) -> set[str]:
    model, real = seen.differing.get("rax", (0, 0))
    return {"rax"} if seen.parts.map == 2 and seen.parts.opcode == 0xB1 and model == real & 0xFFFFFFFF else set()


def _loops_forward(seen: Seen) -> set[str]:
    return {"rflags"} if any(part.map == 1 and part.opcode in (0xE0, 0xE1) and part.modrm < 0x80 for part in seen.parsed) else set()


def _null_segment(seen: Seen) -> set[str]:
    """An access through DS or ES that was loaded with a null selector."""
    loads = any(part.map == 1 and part.opcode in (0x8E, 0xC4, 0xC5, 0x1F, 0x07) for part in seen.parsed)
    return all_if(seen.snippet.bits == 32 and loads and seen.vectors[1] == GP and seen.real("error") == 0, seen)


def _processor_number(seen: Seen) -> set[str]:
    """Linux's GDT has one that tells LSL the processor's number; the model's guest has none."""
    return all_if(any(seen.real(name) & ~7 == 0x78 != seen.made(name) & ~7 for name in ("ds", "es", "fs", "gs")), seen)


def _arpl(seen: Seen) -> set[str]:
    arpl = seen.snippet.bits == 32 and seen.parts.map == 1 and seen.parts.opcode == 0x63
    return all_if(arpl and seen.vectors[0] == PF and seen.made("error") == 7, seen)


def _bound(seen: Seen) -> set[str]:
    return all_if(seen.snippet.bits == 32 and seen.parts.map == 1 and seen.parts.opcode == 0x62 and seen.vectors == (PF, BR), seen)


def _narrow_addresses(seen: Seen) -> set[str]:
    narrow = 0x67 in seen.parts.prefixes and seen.snippet.bits == 64
    return all_if(narrow and seen.vectors == (PF, GP) and seen.made("cr2") >> 32 == 0xFFFFFFFF, seen)


_OWN = (
    Rule("TEST with /1", "an undocumented alias of TEST r/m, imm that processors execute", _test_alias),
    Rule("ENTER", "a processor checks that the new top of the stack could be written, and with 66 leaves the upper RBP", _enter),
    Rule("a near branch to a non-canonical address", "#GP on the branch on a processor; the engine faults at the target", _not_canonical),
    Rule("#SS of a non-canonical address", "the model knows of some instructions only that the access was to the stack", _stack_segment),
    Rule("control and debug registers that do not exist", "#UD before #GP in ring 3 on a processor", _no_such_register),
    Rule("LAHF and SAHF with REX", "the engine takes SPL for AH", _rex_ah),
    Rule("INT with a prefix", "the frame of a fault at INT n points behind the prefix", _int_with_prefix),
    Rule("branches of 32-bit code", "RIP and CR2 are not cut to 32 bits where the fetch behind a branch faults", _branch_of_32_bits),
    Rule("a fault of two pages", "an access across two pages that are refused: which one the fault tells of", _two_pages),
    Rule("a store or a load across pages", "the half in the first page is there when the second page faults", _partly_stored),
    Rule("RET with an immediate", "the engine takes the number of bytes as signed", _ret),
    Rule("flags at a fault", "a rotate through carry of missing memory, and a repeated comparison that is interrupted", _flags_at_fault),
    Rule("hints with a register", "reserved no-operations on a processor, #UD in the engine", _hints),
    Rule("WRFSBASE and WRGSBASE of a non-canonical address", "#GP on a processor; the engine takes it", _base),
    Rule("LOCK NEG", "the engine computes the flags of the old value", _locked),
    Rule("a far return", "the order in which words are popped; without REX.W the stack pointer is cut to 32 bits", _far_return),
    Rule(
        "a fetch behind a block",
        "where the next page cannot be fetched, the fault's frame points to the beginning of the block, of which nothing was executed",
        _behind_a_block,
    ),
    Rule("BSF and BSR of zero", "the destination stays; whether its upper half does too depends on the processor", _scan_of_zero),
    Rule("an undefined opcode at the end of a page", "a processor fetches the whole instruction first, and faults at that", _past_the_page),
    Rule("alignment checks", "#AC is not raised", _alignment_checks),
    Rule("flags after CMPXCHG8B", "the engine computes them from those of an earlier instruction, all but ZF", _cmpxchg8b),
    Rule(
        "opcode extensions",
        "MOV, POP, FF and BA with an undefined one: #UD on a processor; MOV of C6, C7 with REX.R: not",
        _extensions,
    ),
    Rule("CMPXCHG of 32 bits", "where the operands are equal, the engine clears the upper half of RAX", _cmpxchg),
    Rule("MOVBE of registers", "#UD on a processor, or CRC32 by another prefix", _movbe),
    Rule("string instructions with 32-bit addresses", "the upper halves stay with a count of 0, by the processor", _strings_of_32_bits),
    Rule("IRET in ring 3", "the engine takes EFLAGS.VM from the stack in ring 3 and in long mode", _iret),
    Rule("LOOPE and LOOPNE that jump forward", "their flags are another instruction's when the count ends", _loops_forward),
    Rule("null segments in 32-bit code", "the engine does not refuse an access through a null selector", _null_segment),
    Rule("a descriptor of Linux's own", "no difference of processors", _processor_number),
    Rule("ARPL of read-only memory", "the engine stores even if nothing changes", _arpl),
    Rule("BOUND across pages", "a processor compares with the first bound before it loads the second", _bound),
    Rule("32-bit addresses in 64-bit code", "with FS or GS, the engine does not cut the sum of the registers", _narrow_addresses),
)
RULES = _OWN + tuple(Rule(*row) for row in silicon_floats.RULES)


def rule_for(snippet: Snippet, differing: Differing) -> Rule | None:
    """The rule (the first of those) that explains this; None if something stays unexplained."""
    seen = look(snippet, differing)
    matching = [(rule, names) for rule in RULES if (names := rule.when(seen) & set(differing))]
    explained = set().union(*(names for _, names in matching)) if matching else set()
    return matching[0][0] if explained == set(differing) else None
