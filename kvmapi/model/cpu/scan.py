"""Find the instructions that must leave the engine, before it translates a page.

Unicorn's own I/O hooks stop too late (the rest of the block still runs). So each page is scanned when it is first
fetched, every place where such an instruction could start gets a native stop hook, and after a stop the decoded
instruction is at hand in `sites`. x86 has no instruction boundaries to go by: a candidate that turns out to be the
middle of another instruction is never reached as a start, so its hook never fires. A prefix may or may not belong to
the instruction that is really executed; every possible start gets an entry of its own, with the prefixes seen from
there.

Found here: IN OUT INS OUTS HLT RDMSR WRMSR CPUID XSETBV, MOV to CR0, CR3, CR4 and CR8 and from CR8, MOV to DRn,
SYSCALL SYSRET SYSENTER SYSEXIT, LTR of a register, with any legacy or REX prefix; LOCK before what cannot be locked; and
MMX instructions that would make the engine overwrite itself. VMCALL, VMMCALL and other invalid opcodes stop the engine by
themselves, and so do the above when they are longer than 15 bytes.

The same bytes may be code of another width the next moment, without being fetched again: `find` decodes for one, and
code.py asks for all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 15
_TWO_BYTE = rb"|\x0f(?:[\x05\x07\x20\x22\x23\x30\x32\x34\x35\xa2]|\x01\xd1|\x00[\xd8-\xdf])"
_SENSITIVE = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4]" + _TWO_BYTE, re.DOTALL)
_OR_FLAGS = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4\xfb\x9d\xcf]" + _TWO_BYTE, re.DOTALL)
_BIT_TEST = rb"\x0f(?:[\xa3\xab\xb3\xbb][\xc0-\xff]|\xba[\xe0-\xff])"  # BT BTS BTR BTC of a register
_ABORTS = [
    re.compile(b"([" + re.escape(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3") + rex + b"]+)" + _BIT_TEST, re.DOTALL)
    for rex in (b"", b"\x40-\x4f")
]
_WILD_MMX = re.compile(rb"[\x44-\x47\x4c-\x4f]\x0f(?:\x38[\x00-\x0b\x1c-\x1e]|\x3a\x0f)", re.DOTALL)
_FLAGS = {0xFB: "sti", 0x9D: "popf", 0xCF: "iret"}
FLAG_KINDS = frozenset(_FLAGS.values())
_AFTER_0F = {
    0x30: "wrmsr", 0x32: "rdmsr", 0xA2: "cpuid", 0x05: "syscall", 0x07: "sysret", 0x34: "sysenter", 0x35: "sysexit",
}  # fmt: skip
_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REX = frozenset(range(0x40, 0x50))
_LOCK, _REX_W = 0xF0, frozenset(range(0x48, 0x50))
_CONTROL_REGISTERS = frozenset((0, 3, 4, 8))
_SEGMENT_PREFIX = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
DS, _SS = 3, 2
# Opcode -> extensions (bits by ModRM.reg) that take LOCK. Source: AMD64 Architecture Programmer's Manual, volume 3, 1.2.5.
_LOCKABLE = {
    **{8 * operation + wide: 0xFF for operation in range(7) for wide in (0, 1)},  # ADD OR ADC SBB AND SUB XOR to memory
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), 0x7F), **dict.fromkeys((0x86, 0x87), 0xFF), **dict.fromkeys((0xF6, 0xF7), 0b1100),
    **dict.fromkeys((0xFE, 0xFF), 0b11),
    **dict.fromkeys((0x0FAB, 0x0FB3, 0x0FBB, 0x0FB0, 0x0FB1, 0x0FC0, 0x0FC1), 0xFF),
    0x0FBA: 0b11100000,
    0x0FC7: 0b10,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """One sensitive instruction. `size` is the operand's in bytes (8: REX.W); `port` None means DX; `segment` is of the
    string source.
    """

    kind: str  # in out ins outs hlt rdmsr wrmsr cpuid xsetbv mov_to_cr mov_from_cr mov_to_dr syscall...; ltr; sti popf iret; undefined
    length: int
    size: int = 4
    port: int | None = None
    repeat: bool = False
    address_size: int = 8
    segment: int = DS
    control: int = 0  # number of the control or debug register
    register: int = 0  # and of the general one
    fatal: bool = False  # the engine must not even translate it


def find(code: bytes | bytearray, usable: int, bits: int, flags: bool = False) -> dict[int, Site]:
    """Offsets below `usable` at which a sensitive instruction may start in `code` (a page and the first bytes of the
    next).
    """
    prefixes = _LEGACY | _REX if bits == 64 else _LEGACY
    sites: dict[int, Site] = {}
    for match in (_OR_FLAGS if flags else _SENSITIVE).finditer(code):
        opcode_at = match.start()
        start = opcode_at
        while True:
            if start < usable:
                site = decode(code, start, opcode_at, bits)
                if site is not None and site.length <= MAX_LENGTH:
                    sites[start] = site
            if start == 0 or opcode_at - start >= MAX_LENGTH - 1 or code[start - 1] not in prefixes:
                break
            start -= 1
    _find_locked(code, usable, bits, sites)
    if bits == 64:
        _find_wild_mmx(code, usable, sites)
    return sites


def _find_wild_mmx(code: bytes | bytearray, usable: int, sites: dict[int, Site]) -> None:
    """Add the SSSE3 instructions of MMX registers that have REX.R. A processor ignores that bit; the engine takes it as the number of a
    register behind the eighth, and overwrites its own state. No compiler writes them: #UD.
    """
    for match in _WILD_MMX.finditer(code):
        start = match.start()
        while True:
            if code[start] == 0x66:
                break
            if start < usable:
                sites[start] = Site("undefined", 1)
            if start == 0 or match.start() - start >= MAX_LENGTH - 1 or code[start - 1] not in _LEGACY | _REX:
                break
            start -= 1


def _find_locked(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add the places where LOCK stands before what cannot be locked: #UD on a processor, while the engine executes some of these
    and ends the process at others.
    """
    prefixes = _LEGACY | _REX if bits == 64 else _LEGACY
    at = code.find(_LOCK)
    while at >= 0:
        if not _lockable(code, at + 1, bits):
            start = at
            while True:
                if start < usable:
                    sites[start] = Site("undefined", 1, fatal=aborts(code, start, bits))
                if start == 0 or at - start >= MAX_LENGTH - 1 or code[start - 1] not in prefixes:
                    break
                start -= 1
        at = code.find(_LOCK, at + 1)


def _lockable(code: bytes | bytearray, at: int, bits: int) -> bool:
    """May the instruction whose LOCK prefix stands before `at` have one? True too where the bytes end."""
    while at < len(code) and (code[at] in _LEGACY or (bits == 64 and code[at] in _REX)):
        at += 1
    if at + 2 >= len(code) or code[at] in _REX:  # INC and DEC of registers: the engine refuses LOCK there
        return True
    opcode, modrm = code[at], code[at + 1]
    if opcode == 0x0F:
        opcode, modrm = 0x0F00 | code[at + 1], code[at + 2]
    extensions = _LOCKABLE.get(opcode, 0)
    return bool(extensions >> (modrm >> 3 & 7) & 1) and modrm < 0xC0


def aborts(code: bytes | bytearray, at: int, bits: int) -> bool:
    """Would translating the instruction at `at` end the process? The engine makes of a bit test of a register with LOCK
    code that its own generator calls impossible, and aborts. A stop hook does not help: the engine translates what is behind it.
    """
    match = _ABORTS[bits == 64].match(code, at)
    return match is not None and _LOCK in match.group(1)


def fatal(code: bytes | bytearray, usable: int) -> set[int]:
    """Offsets below `usable` at which an instruction may start that `aborts`, in code of any width."""
    found: set[int] = set()
    for match in _ABORTS[1].finditer(code):
        prefixes = match.group(1)
        found.update(match.start() + at for at in range(prefixes.rfind(_LOCK) + 1))
    return {at for at in found if at < usable}


def decode(code: bytes | bytearray, start: int, opcode_at: int, bits: int) -> Site | None:
    """The instruction whose prefixes begin at `start` and whose opcode stands at `opcode_at`; None if it is none of
    ours.
    """
    wide = narrow = False
    repeat = locked = False
    segment = DS
    for byte in code[start:opcode_at]:
        if byte == 0x66:
            wide = True
        elif byte == 0x67:
            narrow = True
        elif byte in (0xF2, 0xF3):
            repeat = True
        elif byte == _LOCK:
            locked = True
        elif byte in _SEGMENT_PREFIX and (bits != 64 or byte >= 0x64):
            segment = _SEGMENT_PREFIX[byte]
    # A REX prefix counts only right before the opcode; REX.W overrules an operand size prefix.
    rex = code[opcode_at - 1] if bits == 64 and opcode_at > start and code[opcode_at - 1] in _REX else 0
    wide = wide and rex not in _REX_W
    opcode = code[opcode_at]
    length = opcode_at - start + 1
    if locked:
        return Site("undefined", length)  # none of them takes LOCK; the engine would not mind
    if opcode == 0x0F:
        return _two_bytes(code, opcode_at, length, rex)
    small = 4 if (bits == 16) == wide else 2
    wide_address, narrow_address = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[bits]
    address_size = narrow_address if narrow else wide_address
    if opcode == 0xF4:
        return Site("hlt", length)
    if opcode in _FLAGS:
        return Site(_FLAGS[opcode], length)
    size = small if opcode & 1 else 1
    if opcode in (0x6C, 0x6D, 0x6E, 0x6F):
        return Site("ins" if opcode < 0x6E else "outs", length, size, None, repeat, address_size, segment)
    kind = "out" if opcode & 2 else "in"
    if opcode & 8:
        return Site(kind, length, size)
    if opcode_at + 1 >= len(code):
        return None
    return Site(kind, length + 1, size, code[opcode_at + 1])


def _two_bytes(code: bytes | bytearray, opcode_at: int, length: int, rex: int) -> Site | None:
    """What begins with 0F."""
    second = code[opcode_at + 1]
    if second in (0x20, 0x22, 0x23):
        return _control_register(code, opcode_at, length, rex)
    if second == 0x00:
        return Site("ltr", length + 2, register=code[opcode_at + 2] & 7 | (rex & 1) << 3)
    if second == 0x01:
        return Site("xsetbv", length + 2)
    return Site(_AFTER_0F[second], length + 1, 8 if rex in _REX_W else 4)


def _control_register(code: bytes | bytearray, opcode_at: int, length: int, rex: int) -> Site | None:
    """MOV to CR0, CR3, CR4, CR8 and the debug registers, or from CR8. The others are the engine's."""
    if opcode_at + 2 >= len(code):
        return None
    modrm = code[opcode_at + 2]
    control = modrm >> 3 & 7 | (rex & 4) << 1
    register = modrm & 7 | (rex & 1) << 3
    second = code[opcode_at + 1]
    if second == 0x23:
        kind, wanted = "mov_to_dr", control <= 7
    elif second == 0x22:
        kind, wanted = "mov_to_cr", control in _CONTROL_REGISTERS
    else:
        kind, wanted = "mov_from_cr", control == 8
    return Site(kind, length + 2, control=control, register=register) if wanted else None


_SEGMENT_LOADS = frozenset((0x8E, 0x07, 0x17, 0x1F, 0xC4, 0xC5, 0x9A, 0xEA, 0xCA, 0xCB, 0xCF))
_SEGMENT_LOADS_0F = frozenset((0x00, 0x02, 0x03, 0xA1, 0xA9, 0xB2, 0xB4, 0xB5))
_FAR = (0x18, 0x28)  # /3 and /5 of FF: far CALL and JMP


def _opcode(code: bytes, bits: int) -> tuple[int, int]:
    """The first opcode byte and the byte behind it."""
    at, prefixes = 0, _LEGACY | _REX if bits == 64 else _LEGACY
    while at < len(code) and code[at] in prefixes:
        at += 1
    opcode, second = (code[at : at + 2] + b"\0\0")[:2]
    return opcode, second


def casts_shadow(code: bytes, bits: int) -> bool:
    """Does the instruction at the start of `code` hold interrupts back for one more: STI, or a load of SS?"""
    opcode, second = _opcode(code, bits)
    return opcode in (0xFB, 0x17) or (opcode == 0x8E and second >> 3 & 7 == _SS) or (opcode, second) == (0x0F, 0xB2)


def loads_descriptor(code: bytes, bits: int) -> bool:
    """Does the instruction at the start of `code` read a descriptor: loads of segment registers, far transfers, LAR and
    its like?
    """
    opcode, second = _opcode(code, bits)
    if opcode == 0x0F:
        return second in _SEGMENT_LOADS_0F
    return opcode in _SEGMENT_LOADS or (opcode == 0xFF and second & 0x38 in _FAR)
