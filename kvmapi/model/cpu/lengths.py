"""How long instructions are, as the engine reads them, and which of them leak temporaries of its translator
(blocks.py).

Lengths only: what an instruction does is the engine's business. Where the engine and the manuals differ, this follows
the engine: it takes VEX prefixes and executes the SSE or integer instruction of that opcode; SSE4A's EXTRQ and
INSERTQ have two immediate bytes; some that take no operand in memory ignore that ModRM asks for one. An instruction
behind which the engine goes on with the block must have the right length. Those that end the block, because they jump
or because the engine refuses them, need not be recognized: going on behind them is only a waste.

What leaks was measured for each opcode, ModRM and prefix, in code of each width, real, protected and virtual-8086
mode, CPL 0 and 3 (tests/model/test_blocks.py does it again for a part of them). An opcode counts for the worst of its
forms.
"""

from __future__ import annotations

MAX_LENGTH = 15
ENDS, PREFIX, SLOW = 16, 17, 18  # in `Width.quick`, beside lengths


def _members(text: str) -> frozenset[int]:
    """Opcodes and ranges of opcodes: "00-03 0f"."""
    found: set[int] = set()
    for word in text.split():
        first, _, last = word.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


_LEGACY = _members("26 2e 36 3e 64-67 f0 f2 f3")
_MODRM = _members("00-03 08-0b 10-13 18-1b 20-23 28-2b 30-33 38-3b 62 63 69 6b 80-8f c0 c1 c4-c7 d0-d3 d8-df f6 f7 fe ff")
_IMM8 = _members("04 0c 14 1c 24 2c 34 3c 6a 6b 80 82 83 a8 b0-b7 c0 c1 c6 cd d4 d5 e4-e7")
_IMM_Z = _members("05 0d 15 1d 25 2d 35 3d 68 69 81 a9 b8-bf c7")  # two or four bytes
_OFFSETS = _members("a0-a3")  # of the size of an address
_ENDS = _members("70-7f 9a c2 c3 ca cb cd cf e0-e3 e8-eb f1 f4")
_ENDS_64 = _ENDS | _members("06 07 0e 16 17 1e 1f 27 2f 37 3f 60-62 82 ce d4-d6")  # undefined there
_ENTER = 0xC8
_PLAIN_0F = _members("05-09 0b 0e 30-37 77 80-8f a0-a2 a8-aa c8-cf")  # without ModRM
_IMM8_0F = _members("0f 70-73 a4 ac ba c2 c4-c6")
_ENDS_0F = _members("05 07 0b 34 35 80-8f")
_REGISTERS_0F = _members("20-23 50 71-73 78")  # ModRM means registers, whatever it says
_EXTRACT = 0x78  # with 66 or F2: EXTRQ and INSERTQ
_MMX_MOVES = 0xD6  # with F2 or F3: between MMX and SSE registers
LEAKS_0F = _members("20 70 78 a1 a9 b2 b4 b5 c6")
LEAKS_0F38 = _members("f0 f1")
_LEAKS_64 = _members("8e")
_LEAKS_32 = _LEAKS_64 | _members("ce d4 d5")
LEAKS = {64: _LEAKS_64, 32: _LEAKS_32, 16: _LEAKS_32 | _members("07 1f c4 c5")}


def _sizes(address: int) -> list[int]:
    """By ModRM: bytes of it, the SIB byte and the displacement in code whose addresses have this many bytes. A SIB
    byte may ask for four more.
    """
    sizes = []
    for modrm in range(256):
        mod, rm = modrm >> 6, modrm & 7
        if mod == 3:
            size = 1
        elif address == 2:
            size = 3 if mod == 2 or (mod == 0 and rm == 6) else 1 + mod
        else:
            size = 1 + (rm == 4) + (4 if mod == 2 or (mod == 0 and rm == 5) else mod)
        sizes.append(size)
    return sizes


_SIZES = {2: _sizes(2), 4: _sizes(4), 8: _sizes(8)}


class Width:
    """Code of one width. `quick` tells by opcode the length of an instruction that has neither ModRM nor leak, or ENDS,
    PREFIX (what follows is what counts) or SLOW (ask `decode`).
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._leaks = LEAKS[bits]
        self._ends = _ENDS_64 if bits == 64 else _ENDS
        self.quick = [self._classify(opcode) for opcode in range(256)]

    def _classify(self, opcode: int) -> int:
        bits = self.bits
        if opcode in self._ends:
            return ENDS
        if bits == 64 and 0x40 <= opcode < 0x50:
            return PREFIX if opcode < 0x48 else SLOW
        if opcode in _LEGACY:
            return SLOW if opcode in (0x66, 0x67, 0xF2, 0xF3) else PREFIX
        if opcode in (0x0F, _ENTER) or opcode in _MODRM or opcode in self._leaks:
            return SLOW
        if opcode in _OFFSETS:
            return 1 + bits // 8
        if opcode in _IMM_Z:
            return 3 if bits == 16 else 5
        return 2 if opcode in _IMM8 else 1

    def decode(self, code: bytes | bytearray, start: int) -> tuple[int, int]:
        """Length of the instruction at `start` and how many temporaries it leaks at most; (0, 0) where a block ends.
        There must be some 30 bytes more.
        """
        bits, at = self.bits, start
        narrow = other = False
        rex = repeat = 0
        opcode = code[at]
        while opcode in _LEGACY or (bits == 64 and 0x40 <= opcode < 0x50):
            rex = 0
            if opcode == 0x66:
                narrow = True
            elif opcode == 0x67:
                other = True
            elif opcode >= 0xF2:
                repeat = opcode
            elif 0x40 <= opcode < 0x50:
                rex = opcode
            at += 1
            if at - start >= MAX_LENGTH:
                return 0, 0
            opcode = code[at]
        at += 1
        address = (4 if bits != 32 else 2) if other else bits // 8
        if opcode == 0x0F:
            at, leak = _two_bytes(code, at, address, 0x66 if narrow else repeat)
        elif opcode in (0xC4, 0xC5) and bits != 16 and code[at] >= (0 if bits == 64 else 0xC0):
            at, leak = _vex(code, at, address, opcode == 0xC4)
        elif opcode in self._ends:
            return 0, 0
        else:
            immediate = 4 if rex >= 0x48 or (bits == 16) == narrow else 2
            leak = int(opcode in self._leaks)
            if opcode in _MODRM:
                modrm = code[at]
                if opcode == 0xFF and 0x10 <= modrm & 0x38 < 0x30:
                    return 0, 0
                at += operand(code, at, address)
                if 0xD8 <= opcode <= 0xDF:
                    leak = 2 if modrm >= 0xC0 else 1
                elif opcode in (0xF6, 0xF7) and modrm & 0x38 < 0x10:
                    at += immediate if opcode == 0xF7 else 1
            if opcode in _IMM8:
                at += 1
            elif opcode in _IMM_Z:
                at += 8 if rex >= 0x48 and 0xB8 <= opcode < 0xC0 else immediate
            elif opcode in _OFFSETS:
                at += address
            elif opcode == _ENTER:
                at += 3
        return (at - start, leak) if 0 < at - start <= MAX_LENGTH else (0, 0)


def operand(code: bytes | bytearray, at: int, address: int) -> int:
    """Bytes of the ModRM at `at` and all that belongs to it."""
    modrm = code[at]
    size = _SIZES[address][modrm]
    return size + 4 if address != 2 and modrm & 0xC7 == 4 and code[at + 1] & 7 == 5 else size


def _two_bytes(code: bytes | bytearray, at: int, address: int, prefix: int) -> tuple[int, int]:
    """The end of what has 0F before `at`, and its leak. The end is 0 where a block ends. `prefix` is the one of 66,
    F2 and F3 that selects the instruction, or 0.
    """
    opcode = code[at]
    if opcode == 0x38:
        return at + 2 + operand(code, at + 2, address), int(code[at + 1] in LEAKS_0F38)
    if opcode == 0x3A:
        return at + 3 + operand(code, at + 2, address), 1
    if opcode in _ENDS_0F:
        return 0, 0
    leak = int(opcode in LEAKS_0F)
    at += 1
    if opcode in _PLAIN_0F:
        return at, leak
    at += 1 if opcode in _REGISTERS_0F or (opcode == _MMX_MOVES and prefix >= 0xF2) else operand(code, at, address)
    if opcode == _EXTRACT:
        return (at + 2, 2) if prefix in (0x66, 0xF2) else (0, 0)
    return at + (opcode in _IMM8_0F), leak


def _vex(code: bytes | bytearray, at: int, address: int, three: bool) -> tuple[int, int]:
    """The same for what has C4 or C5 before `at`."""
    payload = code[at + three]
    at += 1 + three
    prefix = (0, 0x66, 0xF3, 0xF2)[payload & 3]
    table = code[at - 2] & 31 if three else 1
    if table == 1:
        return _two_bytes(code, at, address, prefix)
    if table == 2:
        return at + 1 + operand(code, at + 1, address), int(code[at] in LEAKS_0F38)
    return (at + 2 + operand(code, at + 1, address), 1) if table == 3 else (0, 0)


WIDTHS = {bits: Width(bits) for bits in (64, 32, 16)}
