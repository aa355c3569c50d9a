"""Guests of a few bytes for measurements: machine code in an ELF64 file, so that no compiler and no library is part of what is timed.

They start as docs/seams.md section 4 says: 64-bit mode, ring 0, entry at 1 MiB.
"""

from __future__ import annotations

import struct
from pathlib import Path

ENTRY = 0x100000
ECHO_PORT, EXIT_PORT = 0xF8, 0xF4
_HEADER = 64 + 56


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _exit() -> bytes:
    return b"\x66\xba" + struct.pack("<H", EXIT_PORT) + b"\xef\xf4"  # mov dx, EXIT_PORT; out dx, eax; hlt


def out_loop(count: int) -> bytes:
    """`count` one-byte OUTs to the echo port, then exit code 0."""
    start = b"\xb9" + _u32(count) + b"\x66\xba" + struct.pack("<H", ECHO_PORT)  # mov ecx, count; mov dx, ECHO_PORT
    return start + b"\xee\xff\xc9\x75\xfb" + b"\x31\xc0" + _exit()  # 1: out dx, al; dec ecx; jnz 1b; xor eax, eax


def map_loop(count: int, gpa: int = 0x800000, pages: int = 1) -> bytes:
    """`count` MAP_GPA_RANGE hypercalls on a range, private and shared in turn; the exit code is the last result."""
    body = b"\xb8" + _u32(12) + b"\xbb" + _u32(gpa) + b"\xb9" + _u32(pages)  # mov eax, 12; mov ebx, gpa; mov ecx, pages
    body += b"\x44\x89\xc2\x83\xe2\x01\xc1\xe2\x04"  # mov edx, r8d; and edx, 1; shl edx, 4
    body += b"\x0f\x01\xd9\x41\xff\xc8"  # vmmcall; dec r8d
    return b"\x41\xb8" + _u32(count) + body + b"\x75" + struct.pack("b", -len(body) - 2) + _exit()


def write_elf(path: Path, code: bytes) -> Path:
    """Write `code` as an ELF64 executable that is loaded and entered at 1 MiB."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, ENTRY, ENTRY, len(code), len(code), 0x1000)
    path.write_bytes((header + segment).ljust(0x1000, b"\0") + code)
    return path
