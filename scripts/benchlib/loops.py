"""The machine code that is measured, as bytes for 64-bit mode; none of it depends on where it stands.

`data` is a GPA below 4 GiB and is used as a virtual address too: everything is mapped one to one. Unless said otherwise
a loop runs on into what is put behind it, such as HLT.
"""

from __future__ import annotations

import struct

HLT = b"\xf4"
ALU_INSTRUCTIONS = 4
"""Per round of `alu`."""
MEMORY_WORDS = 8192
"""Per pass of `memory`: 64 KiB, which an engine's TLB holds."""
MEMORY_INSTRUCTIONS = 6
"""Per word of `memory`."""


def _eax(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value)


def _ecx(value: int) -> bytes:
    return b"\xb9" + struct.pack("<I", value)


def _edx(value: int) -> bytes:
    return b"\xba" + struct.pack("<I", value)


def _edi(value: int) -> bytes:
    return b"\xbf" + struct.pack("<I", value)


def _again(body: bytes, counter: bytes) -> bytes:
    """`1: body; dec counter; jnz 1b`"""
    return body + counter + b"\x75" + struct.pack("b", -len(body + counter) - 2)


_DEC_RCX, _DEC_ECX, _DEC_EDX = b"\x48\xff\xc9", b"\xff\xc9", b"\xff\xca"


def alu(rounds: int) -> bytes:
    """mov ecx, rounds; 1: add rax, rcx; xor rbx, rax; dec rcx; jnz 1b"""
    return _ecx(rounds) + _again(b"\x48\x01\xc8\x48\x31\xc3", _DEC_RCX)


def alu_result(rounds: int) -> int:
    """RAX when `alu` is done, having started at 0."""
    return rounds * (rounds + 1) // 2 & 0xFFFFFFFFFFFFFFFF


def memory(passes: int, data: int) -> bytes:
    """mov edx, passes; 2: mov edi, data; mov ecx, MEMORY_WORDS; 1: mov rax, [rdi]; add rax, rbx; mov [rdi], rax; add rdi, 8; dec rcx;
    jnz 1b; dec edx; jnz 2b
    """
    words = _again(b"\x48\x8b\x07\x48\x01\xd8\x48\x89\x07\x48\x83\xc7\x08", _DEC_RCX)
    return _edx(passes) + _again(_edi(data) + _ecx(MEMORY_WORDS) + words, _DEC_EDX)


def touch(passes: int, data: int, count: int, stride: int, *, store: bool = False) -> bytes:
    """mov edx, passes; 2: mov edi, data; mov ecx, count; 1: mov rax, [rdi]; add rdi, stride; dec ecx; jnz 1b; dec edx; jnz 2b

    With `store`, mov [rdi], rax.
    """
    body = (b"\x48\x89\x07" if store else b"\x48\x8b\x07") + b"\x48\x81\xc7" + struct.pack("<i", stride)
    return _edx(passes) + _again(_edi(data) + _ecx(count) + _again(body, _DEC_ECX), _DEC_EDX)


def count_each(data: int, count: int, stride: int) -> bytes:
    """mov edi, data; mov ecx, count; 1: inc qword [rdi]; add rdi, stride; dec ecx; jnz 1b"""
    return _edi(data) + _ecx(count) + _again(b"\x48\xff\x07\x48\x81\xc7" + struct.pack("<i", stride), _DEC_ECX)


def atomics(rounds: int, data: int) -> bytes:
    """mov edi, data; mov ecx, rounds; 1: lock inc qword [rdi]; mov eax, 1; lock xadd [rdi], rax; dec ecx; jnz 1b

    Each round adds 2 to the counter at `data`.
    """
    return _edi(data) + _ecx(rounds) + _again(b"\xf0\x48\xff\x07" + _eax(1) + b"\xf0\x48\x0f\xc1\x07", _DEC_ECX)


def spin(data: int) -> bytes:
    """mov edi, data; 1: inc qword [rdi]; jmp 1b: it never ends, and the counter shows that it runs."""
    return _edi(data) + b"\x48\xff\x07\xeb\xfb"
