"""Tiny images of the two foreign protocols, in machine code, for what the bundled multiboot guest does not show."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = 0x1BADB002
OUT_EAX = b"\xe7\xf4\xf4"  # out 0xf4, eax; hlt


def header(flags: int = 0, *addresses: int) -> bytes:
    """A Multiboot header; `addresses`: header, load, load end, bss end, entry (flag bit 16)."""
    return struct.pack("<3I", MAGIC, flags, -(MAGIC + flags) & 0xFFFFFFFF) + struct.pack(f"<{len(addresses)}I", *addresses)


def by_addresses(code: bytes, load: int = 0x200000, before: bytes = b"", bss: int = 0x1000) -> bytes:
    """A Multiboot image that is no ELF file: `before` is not loaded, the header is, and the code right behind it."""
    end = load + 32 + len(code)
    return before + header(1 << 16, load, load, end, end + bss, load + 32) + code


def elf(code: bytes, bits: int = 1, gpa: int = 0x200000, vaddr: int | None = None, memory: int = 0x3000, entry: int | None = None) -> bytes:
    """A Multiboot ELF image of class `bits` (1: 32 bits, 2: 64 bits) with one segment: the header, and the code behind it."""
    vaddr = gpa if vaddr is None else vaddr
    entry = vaddr + 12 if entry is None else entry
    data = header() + code
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    if bits == 1:
        file = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        file += struct.pack("<IIIIIIII", 1, 84, vaddr, gpa, len(data), memory, 7, 4)
    else:
        file = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        file += struct.pack("<IIQQQQQQ", 1, 7, 120, vaddr, gpa, len(data), memory, 4)
    return file + data


def bzimage(
    code32: bytes, code64: bytes = b"", version: int = 0x20C, loadflags: int = 1, preferred: int = 0x100000, room: int = 0x10000
) -> bytes:
    """A bzImage whose kernel is `code32` at its start and, if there is one, `code64` at 0x200."""
    kernel = code32.ljust(0x200, b"\x90") + code64 if code64 else code32
    file = bytearray(1024)
    file[0x1F1] = 1
    struct.pack_into("<I", file, 0x1F4, -(-len(kernel) // 16))
    file[0x1FE:0x202] = b"\x55\xaa\xeb\x66"
    file[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", file, 0x206, version)
    file[0x211] = loadflags
    struct.pack_into("<HI", file, 0x236, int(bool(code64)), 255)
    struct.pack_into("<QI", file, 0x258, preferred, room)
    return bytes(file) + kernel


def write(folder: Path, data: bytes, name: str = "foreign.img") -> str:
    """`data` as a file, for `load` and `run_guest`."""
    path = folder / name
    path.write_bytes(data)
    return str(path)
