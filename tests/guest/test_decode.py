"""The #VC handler's decoder as a library of this process, judged by a CPU: Unicorn executes what it decoded.

Instructions are put together from all opcodes the decoder knows, all ModRM and SIB bytes, and prefixes; each is decoded with
random registers and then executed with the same ones, while hooks note the access and the registers are compared.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import unicorn
from unicorn import x86_const as x86

from guest import build

pytestmark = pytest.mark.gcc

uc: Any = unicorn
IN, OUT, INS, OUTS, LOAD, LOAD_ZERO, LOAD_SIGN, STORE, STORE_VALUE, ADD = range(10)
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
REGISTERS = [getattr(x86, f"UC_X86_REG_{name.upper()}") for name in NAMES]
FRAME = (
    "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rdi", "rsi", "rbp", "rbx", "rdx", "rcx", "rax",
    "vector", "error", "rip", "cs", "rflags", "rsp", "ss",
)  # fmt: skip
CODE, CODE_SIZE, DATA, MASK = 0x100000, 0x100000, 0x20000, (1 << 64) - 1


class Frame(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in FRAME]


class Instruction(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_uint), ("length", ctypes.c_uint), ("size", ctypes.c_uint), ("width", ctypes.c_uint),
        ("repeat", ctypes.c_bool), ("port", ctypes.c_uint16), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
        ("reg", ctypes.POINTER(ctypes.c_uint64)), ("shift", ctypes.c_uint),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("decode") / "decode.so"
    gcc = next(filter(None, map(shutil.which, build.COMPILERS)))
    subprocess.run([gcc, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fno-builtin",
                    "-o", target, build.LIBRARY / "decode.c"], check=True)  # fmt: skip
    library = ctypes.CDLL(str(target))
    library.decode.restype = ctypes.c_bool
    library.get_register.restype = ctypes.c_uint64
    return library


def decode(library: Any, code: bytes, frame: Frame, where: int = CODE) -> Instruction | None:
    """The decoder's answer for `code` if it were at `where`."""
    buffer = ctypes.create_string_buffer(code, max(len(code), 1))
    found = Instruction()
    if not library.decode(buffer, ctypes.byref(frame), ctypes.byref(found)):
        return None
    if relative(code):  # the code is not where the CPU executes it
        found.address = found.address - ctypes.addressof(buffer) + where & MASK
    return found


def relative(code: bytes) -> bool:
    """Is the memory operand relative to RIP?"""
    rest = code.lstrip(b"\x66")
    rest = rest[1:] if rest[0] & 0xF0 == 0x40 else rest
    modrm = rest[2] if rest[0] == 0x0F else rest[1]
    return modrm & 0xC7 == 5


class Access(NamedTuple):
    """One access to memory as the CPU makes it."""

    write: bool
    address: int
    size: int
    value: int


class Cpu:
    """A CPU in 64-bit mode, all of whose data is one page wherever it is touched. Each instruction has a place of its own, because
    what was translated before is not translated again.
    """

    def __init__(self) -> None:
        self.cpu: Any = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        self.cpu.mem_map(CODE, CODE_SIZE)
        self.cpu.mem_map(DATA, 0x1000)
        self.cpu.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self.cpu.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        self.cpu.hook_add(uc.UC_HOOK_MEM_READ | uc.UC_HOOK_MEM_WRITE, self._access)
        self.seen: list[Access] = []
        self.page, self.where = 0, CODE

    def _fill(self, cpu: Any, address: int, access: int, entry: Any, data: object) -> bool:
        code = CODE <= address < CODE + CODE_SIZE
        entry.paddr, entry.perms = address & ~0xFFF if code else DATA, uc.UC_PROT_ALL
        if not code:
            self.page = address & ~0xFFF & MASK
        return True

    def _access(self, cpu: Any, access: int, address: int, size: int, value: int, data: object) -> None:
        self.seen.append(Access(access == uc.UC_MEM_WRITE, self.page | address & 0xFFF, size, value & (1 << 8 * size) - 1))

    def run(self, code: bytes, frame: Frame, content: bytes) -> tuple[list[Access], int]:
        """The accesses of one instruction and its length; registers are left in the CPU."""
        self.seen.clear()
        self.cpu.ctl(uc.unicorn_const.UC_CTL_TLB_FLUSH, uc.unicorn_const.UC_CTL_IO_WRITE)
        self.cpu.mem_write(self.where, code)
        self.cpu.mem_write(DATA, content)
        for register, name in zip(REGISTERS, NAMES):
            self.cpu.reg_write(register, getattr(frame, name))
        self.cpu.reg_write(x86.UC_X86_REG_RFLAGS, 2)
        self.cpu.emu_start(self.where, 0, count=1)
        length = self.cpu.reg_read(x86.UC_X86_REG_RIP) - self.where
        self.where += 16
        return list(self.seen), length


def encodings() -> list[bytes]:
    """Every opcode with every ModRM that has a memory operand, SIBs and prefixes taken by turns."""
    rng = random.Random(6)
    opcodes = [bytes([n]) for n in (0x00, 0x01, 0x63, 0x88, 0x89, 0x8A, 0x8B, 0xC6, 0xC7)]
    opcodes += [bytes([0x0F, n]) for n in (0xB6, 0xB7, 0xBE, 0xBF)]
    rexes = [b"", *(bytes([0x40 + n]) for n in range(16))]
    found = []
    for opcode, modrm in itertools.product(opcodes, range(0xC0)):
        if opcode in (b"\xc6", b"\xc7") and modrm >> 3 & 7:
            continue
        for rex in rng.sample(rexes, 2):
            narrow = b"\x66" if rng.random() < 0.3 else b""
            if opcode in (b"\xc6", b"\xc7") and rex and rex[0] & 4:
                continue  # means nothing, but the judge takes it for a part of the opcode
            if opcode == b"\x63" and (not rex or not rex[0] & 8):
                continue
            body = bytes([modrm])
            mod, rm = modrm >> 6, modrm & 7
            if rm == 4:
                sib = rng.randrange(256)
                body += bytes([sib])
            displacement = {0: 4 if rm == 5 or (rm == 4 and body[1] & 7 == 5) else 0, 1: 1, 2: 4}[mod]
            body += rng.randbytes(displacement)
            if opcode == b"\xc6":
                body += rng.randbytes(1)
            elif opcode == b"\xc7":
                body += rng.randbytes(4 if not narrow or (rex and rex[0] & 8) else 2)
            found.append(narrow + rex + opcode + body)
    return found


def random_frame(rng: random.Random) -> Frame:
    """Registers that give canonical addresses, whatever is added up."""
    frame = Frame()
    for name in FRAME:
        setattr(frame, name, rng.getrandbits(40))
    return frame


def test_memory_operands_are_what_the_cpu_touches(decoder: Any) -> None:
    rng, cpu, checked = random.Random(7), Cpu(), set()
    for code in encodings():
        frame = random_frame(rng)
        content = rng.randbytes(0x1000)
        before = Frame.from_buffer_copy(frame)
        found = decode(decoder, code, frame, cpu.where)
        assert found is not None, code.hex()
        assert bytes(frame) == bytes(before), "decoding changes nothing"
        if found.address & 0xFFF > 0xFF0 or CODE <= found.address < CODE + CODE_SIZE:
            continue
        accesses, length = cpu.run(code, frame, content)
        assert found.length == length, code.hex()
        place = (found.address, found.size)
        reads, writes = [a for a in accesses if not a.write], [a for a in accesses if a.write]
        assert {(a.address, a.size) for a in accesses} == {place}, code.hex()
        checked.add((found.operation, found.size))
        at = found.address & 0xFFF
        memory = int.from_bytes(content[at : at + found.size], "little")
        held = decoder.get_register(ctypes.byref(found), found.size)
        limit = (1 << 8 * found.size) - 1
        if found.operation in (LOAD, LOAD_ZERO, LOAD_SIGN):
            assert len(reads) == 1 and not writes
            width = found.size if found.operation == LOAD else found.width
            if found.operation == LOAD_SIGN and memory >> 8 * found.size - 1:
                memory |= MASK & ~limit
            decoder.set_register(ctypes.byref(found), width, ctypes.c_uint64(memory))
        else:
            expected = {STORE: held, STORE_VALUE: found.value & limit, ADD: memory + held & limit}[found.operation]
            assert [a.value for a in writes] == [expected], code.hex()
            assert len(reads) == (found.operation == ADD)
        after = [cpu.cpu.reg_read(register) for register in REGISTERS]
        assert [getattr(frame, name) for name in NAMES] == after, f"{code.hex()}: registers"
    widths = {(LOAD_ZERO, 1), (LOAD_ZERO, 2), (LOAD_SIGN, 1), (LOAD_SIGN, 2), (LOAD_SIGN, 4)}
    assert checked == widths | {(operation, size) for operation in (LOAD, STORE, STORE_VALUE, ADD) for size in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("code", "operation", "size", "port", "repeat"),
    [
        ("e412", IN, 1, 0x12, False), ("e512", IN, 4, 0x12, False), ("66e5ff", IN, 2, 0xFF, False),
        ("e6f4", OUT, 1, 0xF4, False), ("e7f4", OUT, 4, 0xF4, False), ("66e7f4", OUT, 2, 0xF4, False),
        ("ec", IN, 1, 0xBEEF, False), ("ed", IN, 4, 0xBEEF, False), ("66ed", IN, 2, 0xBEEF, False), ("48ed", IN, 4, 0xBEEF, False),
        ("ee", OUT, 1, 0xBEEF, False), ("ef", OUT, 4, 0xBEEF, False), ("66ef", OUT, 2, 0xBEEF, False),
        ("6c", INS, 1, 0xBEEF, False), ("6d", INS, 4, 0xBEEF, False), ("f3666d", INS, 2, 0xBEEF, True), ("66f36d", INS, 2, 0xBEEF, True),
        ("6e", OUTS, 1, 0xBEEF, False), ("f36e", OUTS, 1, 0xBEEF, True), ("f36f", OUTS, 4, 0xBEEF, True),
    ],
)  # fmt: skip
def test_port_accesses(decoder: Any, code: str, operation: int, size: int, port: int, repeat: bool) -> None:
    frame = Frame(rdx=0x1234BEEF)
    found = decode(decoder, bytes.fromhex(code) + b"\x66", frame)
    assert found is not None
    assert (found.operation, found.size, found.port, found.repeat) == (operation, size, port, repeat)
    assert found.length == len(code) // 2


@pytest.mark.parametrize(
    "code",
    [
        "f3ec", "f3e412",  # a repeat without a string
        "f2ec", "2eec", "67ec", "f08800", "648800", "666688 00", "f3f36c",  # prefixes that nobody here writes
        "8bc0", "00c0", "0fb6c0", "c6c000", "4863c0",  # registers on both sides
        "c608 00", "c738 00000000", "8000 01", "8300 01", "fe00", "f600 01", "a4", "a100000000000000 00", "6300",  # others
        "0fa2", "0f32", "0f01d9", "0f0b", "90", "cc", "f4",
    ],
)  # fmt: skip
def test_anything_else_is_refused(decoder: Any, code: str) -> None:
    frame = Frame()
    assert decode(decoder, bytes.fromhex(code) + bytes(8), frame) is None


def test_registers_of_each_width(decoder: Any) -> None:
    """32 bits clear the upper half, fewer leave the rest alone; AH to BH without a REX prefix, SPL to DIL with one."""
    for code, name, shift in (("8820", "rax", 8), ("8838", "rbx", 8), ("408838", "rdi", 0), ("408820", "rsp", 0)):
        frame = Frame(rax=0x1122334455667788, rbx=0x99AABBCCDDEEFF00, rdi=0x0102030405060708, rsp=0x1112131415161718)
        found = decode(decoder, bytes.fromhex(code), frame)
        assert found is not None and found.shift == shift
        before = getattr(frame, name)
        assert decoder.get_register(ctypes.byref(found), 1) == before >> shift & 0xFF
        decoder.set_register(ctypes.byref(found), 1, ctypes.c_uint64(0x5A))
        assert getattr(frame, name) == before & ~(0xFF << shift) | 0x5A << shift
    for size, expected in ((2, 0x1122334455660000 | 0xFFFE), (4, 0xFFFFFFFE), (8, MASK - 1)):
        frame = Frame(rax=0x1122334455667788)
        found = decode(decoder, bytes.fromhex("8b00"), frame)
        decoder.set_register(ctypes.byref(found), size, ctypes.c_uint64(MASK - 1))
        assert frame.rax == expected


def test_no_byte_beyond_the_instruction_is_read(tmp_path: Path, decoder: Any) -> None:
    """Each encoding at the very end of a page whose successor is not there."""
    memory = mmap.mmap(-1, 2 * 4096)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + 4096), 4096, 0) == 0
    try:
        for code in [*encodings()[::7], *map(bytes.fromhex, ("e412", "66ed", "f36c"))]:
            memory[4096 - len(code) : 4096] = code
            found = Instruction()
            assert decoder.decode(ctypes.c_void_p(base + 4096 - len(code)), ctypes.byref(Frame()), ctypes.byref(found))
            assert found.length == len(code)
    finally:
        libc.mprotect(ctypes.c_void_p(base + 4096), 4096, 3)
