"""Tiny flat guests in machine code, for what no bundled guest does. Each is 64-bit code for 0x100000 (docs/seams.md §4)."""

from __future__ import annotations

import struct
from pathlib import Path

from vmm.image import IMAGE_BASE, Image, Segment

SPIN = b"\xeb\xfe"  # 1: jmp 1b
HALT = b"\xf4"
TRIPLE_FAULT = b"\x0f\x0b"  # ud2; a flat image has no IDT
WRMSR, VMGEXIT = b"\x0f\x30", b"\xf3\x0f\x01\xd9"
SPIN_ON_EXITS = b"\x66\xba\xf8\x00" + b"\xee\xeb\xfd"  # mov dx, 0xf8; 1: out dx, al; jmp 1b
SPIN_IN_HYPERCALL = b"\x0f\x01\xd9" + SPIN  # vmmcall: on a paravirtual KVM it does not come back


def exit_with_eax() -> bytes:
    """OUT EAX to the exit port."""
    return b"\xe7\xf4\xf4"


def load(register: str, value: int) -> bytes:
    """mov rax/rbx/rcx/rdx, imm64."""
    number = {"rax": 0, "rcx": 1, "rdx": 2, "rbx": 3}[register]
    return bytes([0x48, 0xB8 + number]) + struct.pack("<Q", value)


def hypercall(gpa: int, pages: int, attributes: int, number: int = 12) -> bytes:
    """MAP_GPA_RANGE; the result is in RAX."""
    return load("rax", number) + load("rbx", gpa) + load("rcx", pages) + load("rdx", attributes) + b"\x0f\x01\xd9"


NEGATE = b"\xf7\xd8"  # neg eax: an errno becomes a positive exit code


def image(code: bytes) -> Image:
    """`code` as an image, without a file."""
    return Image("flat.bin", IMAGE_BASE, (Segment(IMAGE_BASE, len(code), code),))


def write(folder: Path, code: bytes) -> str:
    """`code` as a file, for `run_guest`."""
    path = folder / "flat.bin"
    path.write_bytes(code)
    return str(path)
