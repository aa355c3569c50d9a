"""Find the instructions that must leave the engine, before it translates a page.

Unicorn's own I/O hooks stop too late (the rest of the block still runs). So each page is scanned when it is first
fetched, every place where such an instruction could start gets a native stop hook, and after a stop the decoded
instruction is at hand in `sites`. x86 has no instruction boundaries to go by: a candidate that turns out to be the
middle of another instruction is never reached as a start, so its hook never fires. A prefix may or may not belong to
the instruction that is really executed; every possible start gets an entry of its own, with the prefixes seen from
there.

Found here: IN OUT INS OUTS HLT RDMSR WRMSR CPUID, MOV to CR0, CR4 and CR8 and from CR8, with any legacy or REX
prefix. VMCALL, VMMCALL and other invalid opcodes stop the engine by themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 15
_SENSITIVE = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4]|\x0f[\x20\x22\x30\x32\xa2]", re.DOTALL)
_OR_FLAGS = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4\xfb\x9d\xcf]|\x0f[\x20\x22\x30\x32\xa2\x07]", re.DOTALL)
_FLAGS = {0xFB: "sti", 0x9D: "popf", 0xCF: "iret"}
_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REX = frozenset(range(0x40, 0x50))
_SEGMENT_PREFIX = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
DS = 3


@dataclass(frozen=True, slots=True)
class Site:
    """One sensitive instruction. `size` is the operand's in bytes; `port` None means DX; `segment` is of the string
    source.
    """

    kind: str  # in out ins outs hlt rdmsr wrmsr cpuid mov_to_cr mov_from_cr; sti popf iret sysret
    length: int
    size: int = 4
    port: int | None = None
    repeat: bool = False
    address_size: int = 8
    segment: int = DS
    control: int = 0  # number of the control register
    register: int = 0  # and of the general one


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
                if site is not None:
                    sites[start] = site
            if start == 0 or opcode_at - start >= MAX_LENGTH - 1 or code[start - 1] not in prefixes:
                break
            start -= 1
    return sites


def decode(code: bytes | bytearray, start: int, opcode_at: int, bits: int) -> Site | None:
    """The instruction whose prefixes begin at `start` and whose opcode stands at `opcode_at`."""
    wide = narrow = False
    repeat = False
    segment = DS
    for byte in code[start:opcode_at]:
        if byte == 0x66:
            wide = True
        elif byte == 0x67:
            narrow = True
        elif byte in (0xF2, 0xF3):
            repeat = True
        elif byte in _SEGMENT_PREFIX:
            segment = _SEGMENT_PREFIX[byte]
    opcode = code[opcode_at]
    length = opcode_at - start + 1
    small = 4 if (bits == 16) == wide else 2
    wide_address, narrow_address = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[bits]
    address_size = narrow_address if narrow else wide_address
    if opcode == 0xF4:
        return Site("hlt", length)
    if opcode == 0x0F and code[opcode_at + 1] in (0x20, 0x22):
        return _control_register(code, start, opcode_at, length, bits)
    if opcode == 0x0F:
        return Site({0x30: "wrmsr", 0x32: "rdmsr", 0xA2: "cpuid", 0x07: "sysret"}[code[opcode_at + 1]], length + 1)
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


def _control_register(code: bytes | bytearray, start: int, opcode_at: int, length: int, bits: int) -> Site | None:
    """MOV to CR0, CR4 or CR8, or from CR8. The others are the engine's."""
    if opcode_at + 2 >= len(code):
        return None
    modrm = code[opcode_at + 2]
    rex = code[opcode_at - 1] if bits == 64 and opcode_at > start and code[opcode_at - 1] in _REX else 0
    control = modrm >> 3 & 7 | (rex & 4) << 1
    register = modrm & 7 | (rex & 1) << 3
    if code[opcode_at + 1] == 0x22:
        kind, wanted = "mov_to_cr", control in (0, 4, 8)
    else:
        kind, wanted = "mov_from_cr", control == 8
    return Site(kind, length + 2, control=control, register=register) if wanted else None
