"""Find the instructions that must leave the engine, before it translates a page.

Unicorn's own I/O hooks stop too late (the rest of the block still runs). So each page is scanned when it is first
fetched, every place where such an instruction could start gets a native stop hook, and after a stop `CodeCache.site`
tells the decoded instruction. x86 has no instruction boundaries to go by: a candidate that turns out to be the
middle of another instruction is never reached as a start, so its hook never fires. A prefix may or may not belong to
the instruction that is really executed; every possible start gets an entry of its own, with the prefixes seen from
there.

Found here: IN OUT INS OUTS HLT RDMSR WRMSR RDTSC RDTSCP CPUID XSETBV MONITOR MWAIT VMMCALL, MOV to CR0, CR3, CR4 and CR8 and
from CR8, MOV to and from DRn, SYSCALL SYSRET SYSENTER SYSEXIT, LTR of a register, and with `flags` STI POPF IRET; with any legacy or REX
prefix (with LOCK they are undefined). hazards.py adds what the engine gets wrong. VMCALL and other invalid opcodes
stop the engine by themselves, and so do the above when they are longer than 15 bytes. (VMMCALL would, too; but how it then stops
costs several times as much as a hook.)

The same bytes may be code of another width the next moment, without being fetched again: `find` decodes for one, and
code.py asks for all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 15
_TWO_BYTE = rb"|\x0f(?:[\x05\x07\x20-\x23\x30-\x32\x34\x35\xa2]|\x01[\xc8\xc9\xd1\xd9\xf9]|\x00[\xd8-\xdf])"
_SENSITIVE = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4]" + _TWO_BYTE, re.DOTALL)
_OR_FLAGS = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4\xfb\x9d\xcf]" + _TWO_BYTE, re.DOTALL)
_FLAGS = {0xFB: "sti", 0x9D: "popf", 0xCF: "iret"}
WATCHED = frozenset((*_FLAGS.values(), "lazy"))  # kinds that stop the engine only while somebody waits
_AFTER_0F = {
    0x30: "wrmsr", 0x31: "rdtsc", 0x32: "rdmsr", 0xA2: "cpuid", 0x05: "syscall", 0x07: "sysret", 0x34: "sysenter", 0x35: "sysexit",
}  # fmt: skip
LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
REX = frozenset(range(0x40, 0x50))
LOCK, REX_W = 0xF0, frozenset(range(0x48, 0x50))
_CONTROL_REGISTERS = frozenset((0, 3, 4, 8))
_SEGMENT_PREFIX = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
DS, _SS = 3, 2
_AFTER_0F_01 = {0xC8: "monitor", 0xC9: "mwait", 0xD1: "xsetbv", 0xD9: "vmmcall", 0xF9: "rdtscp"}


@dataclass(frozen=True, slots=True)
class Site:
    """One sensitive instruction. `size` is the operand's in bytes (8: REX.W); `port` None means DX; `segment` is of the
    string source.
    """

    kind: str  # by which privileged.py finds who executes it
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
    prefixes = LEGACY | REX if bits == 64 else LEGACY
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
    return sites


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
        elif byte == LOCK:
            locked = True
        elif byte in _SEGMENT_PREFIX and (bits != 64 or byte >= 0x64):
            segment = _SEGMENT_PREFIX[byte]
    # A REX prefix counts only right before the opcode; REX.W overrules an operand size prefix.
    rex = code[opcode_at - 1] if bits == 64 and opcode_at > start and code[opcode_at - 1] in REX else 0
    wide = wide and rex not in REX_W
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
    if 0x20 <= second <= 0x23:
        return _control_register(code, opcode_at, length, rex)
    if second == 0x00:
        return Site("ltr", length + 2, register=code[opcode_at + 2] & 7 | (rex & 1) << 3)
    if second == 0x01:
        return Site(_AFTER_0F_01[code[opcode_at + 2]], length + 2)
    return Site(_AFTER_0F[second], length + 1, 8 if rex in REX_W else 4)


def _control_register(code: bytes | bytearray, opcode_at: int, length: int, rex: int) -> Site | None:
    """MOV to CR0, CR3, CR4, CR8 and the debug registers, or from CR8. The others are the engine's."""
    if opcode_at + 2 >= len(code):
        return None
    modrm = code[opcode_at + 2]
    control = modrm >> 3 & 7 | (rex & 4) << 1
    register = modrm & 7 | (rex & 1) << 3
    second = code[opcode_at + 1]
    if second & 1:
        kind, wanted = "mov_to_dr" if second == 0x23 else "mov_from_dr", control <= 7
    elif second == 0x22:
        kind, wanted = "mov_to_cr", control in _CONTROL_REGISTERS
    else:
        kind, wanted = "mov_from_cr", control == 8
    return Site(kind, length + 2, control=control, register=register) if wanted else None
