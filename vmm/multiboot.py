"""Multiboot 1: what a loader must find in an image, and what the image finds when it starts.

The header (magic, flags, checksum; 4-byte aligned in the first 8 KiB) says where the image goes: either by its own address fields (flag
bit 16), or as the ELF file that it is. ELF32 for i386 is what the specification means; ELF64 whose code begins in 32-bit mode is common
and loads in the same way.

The image starts in 32-bit protected mode: EAX 0x2BADB002, EBX the information structure, flat segments, paging and interrupts off, the
stack pointer not ours to give. The information holds the memory sizes, the command line, the memory map and the loader's name; no modules.
The command line begins with the image's file name, as loaders for kvm-unit-tests do: their `argv[0]`.

A file is hostile: each offset and size is checked against the file and against guest memory's limits before it is used, and what is
wrong is an `ImageError` of one sentence.

Multiboot Specification 0.6.96, sections 3.1 to 3.3; System V ABI for ELF.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import pairwise

from vmm import boot, pc
from vmm.image import MULTIBOOT, Image, ImageError, Segment

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH = 8192
"""Bytes of the file in which the whole header must lie."""

LOADER_NAME = b"sevmm"

_REQUIRED, _PAGE_ALIGN, _MEMORY_INFO, _ADDRESSES = 0xFFFF, 1 << 0, 1 << 1, 1 << 16
_INFO_MEMORY, _INFO_COMMAND_LINE, _INFO_MAP, _INFO_LOADER = 1 << 0, 1 << 2, 1 << 6, 1 << 9
_MAP_AT, _NAME_AT = 0x100, 0x80  # within the information page
_ET_EXEC, _PT_LOAD, _PT_INTERP = 2, 1, 3
_ELF32, _ELF64 = 1, 2
_MACHINES = {(_ELF32, 3), (_ELF64, 62)}  # i386, x86-64
_HEADERS = {_ELF32: struct.Struct("<16sHHIIIIIHHHHHH"), _ELF64: struct.Struct("<16sHHIQQQIHHHHHH")}
_PROGRAMS = {_ELF32: struct.Struct("<IIIIIIII"), _ELF64: struct.Struct("<IIQQQQQQ")}


def find_header(data: bytes) -> int | None:
    """Offset of the Multiboot header in a file that begins with `data`, or None."""
    area = data[:SEARCH]
    at = -1
    magic = struct.pack("<I", HEADER_MAGIC)
    while (at := area.find(magic, at + 1)) >= 0:
        if at % 4 == 0 and at + 12 <= len(area) and sum(struct.unpack_from("<3I", area, at)) & 0xFFFFFFFF == 0:
            return at
    return None


def recognises(data: bytes) -> bool:
    """Whether a file that begins with `data` is a Multiboot image."""
    return find_header(data) is not None


def load(name: str, data: bytes) -> Image:
    """The Multiboot image in `data`, the contents of the file `name`. Raises `ImageError`."""
    at = find_header(data)
    if at is None:
        raise ImageError(f"{name}: no Multiboot header in the first {SEARCH} bytes")
    (flags,) = struct.unpack_from("<I", data, at + 4)
    unknown = flags & _REQUIRED & ~(_PAGE_ALIGN | _MEMORY_INFO)
    if unknown:
        raise ImageError(f"{name}: its Multiboot header requires what is not offered here (flags {unknown:#x}; bit 2 is a video mode)")
    if flags & _ADDRESSES:
        entry, segments = _by_addresses(name, data, at)
    elif data[:4] == b"\x7fELF":
        entry, segments = _by_elf(name, data)
    else:
        raise ImageError(f"{name}: its Multiboot header has no address fields (flag bit 16), and the file is no ELF file")
    segments = tuple(sorted(segments, key=lambda s: s.gpa))
    if not segments:
        raise ImageError(f"{name}: nothing to load")
    for low, high in pairwise(segments):
        if high.gpa < low.end:
            raise ImageError(f"{name}: segments at {low.gpa:#x} and {high.gpa:#x} overlap")
    if not any(s.gpa <= entry < s.end for s in segments):
        raise ImageError(f"{name}: the entry point {entry:#x} is in no segment")
    return Image(name, entry, segments, protocol=MULTIBOOT)


def _by_addresses(name: str, data: bytes, at: int) -> tuple[int, tuple[Segment, ...]]:
    """Entry and the one segment of a header with address fields."""
    if at + 32 > len(data):
        raise ImageError(f"{name}: truncated: the Multiboot header at {at:#x} has no room for its address fields")
    header, start, end, bss_end, entry = struct.unpack_from("<5I", data, at + 12)
    if header < start or header - start > at:
        raise ImageError(f"{name}: corrupt: the Multiboot header at {header:#x} is not loaded from {start:#x} of the file")
    first = at - (header - start)
    size = end - start if end else len(data) - first
    if size < 0 or first + size > len(data):
        raise ImageError(f"{name}: truncated: its Multiboot header loads {size} bytes, the file has {len(data) - first}")
    memory = bss_end - start if bss_end else size
    if memory < size:
        raise ImageError(f"{name}: corrupt: the image ends at {bss_end:#x}, before its data does")
    _check_place(name, start, memory)
    return entry, (Segment(start, memory, data[first : first + size]),)


def _by_elf(name: str, data: bytes) -> tuple[int, tuple[Segment, ...]]:
    """Entry and segments of an ELF file, at their physical addresses."""
    bits = data[4] if len(data) > 4 else 0
    header, program = _HEADERS.get(bits), _PROGRAMS.get(bits)
    if header is None or program is None or len(data) < header.size or data[5] != 1:
        raise ImageError(f"{name}: a Multiboot image must be a little-endian ELF32 or ELF64 file, or give its addresses")
    _, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = header.unpack_from(data)
    if (bits, machine) not in _MACHINES:
        raise ImageError(f"{name}: made for machine {machine}, not for i386 or x86-64")
    if kind != _ET_EXEC:
        raise ImageError(f"{name}: not a statically linked executable (ELF type {kind}); link with -static -no-pie")
    if phnum == 0 or phentsize != program.size:
        raise ImageError(f"{name}: corrupt: {phnum} program headers of {phentsize} bytes")
    if phoff + phnum * program.size > len(data):
        raise ImageError(f"{name}: truncated: the program header table ends at byte {phoff + phnum * program.size}, of {len(data)}")
    physical = entry
    segments = []
    for vaddr, paddr, offset, filesz, memsz in _programs(name, data[phoff : phoff + phnum * program.size], bits):
        if filesz > memsz:
            raise ImageError(f"{name}: corrupt: a segment has {filesz} bytes in the file but {memsz} in memory")
        if offset + filesz > len(data):
            raise ImageError(f"{name}: truncated: the segment at {paddr:#x} ends at byte {offset + filesz}, the file has {len(data)}")
        _check_place(name, paddr, memsz)
        if vaddr <= entry < vaddr + memsz:
            physical = entry - vaddr + paddr
        segments.append(Segment(paddr, memsz, data[offset : offset + filesz]))
    return physical, tuple(segments)


def _programs(name: str, table: bytes, bits: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The loadable program headers: vaddr, paddr, offset, filesz, memsz. The two ELF classes order their fields differently."""
    for fields in _PROGRAMS[bits].iter_unpack(table):
        if fields[0] == _PT_INTERP:
            raise ImageError(f"{name}: wants a dynamic linker; link with -static -no-pie")
        offset, vaddr, paddr, filesz, memsz = fields[1:6] if bits == _ELF32 else fields[2:7]
        if fields[0] == _PT_LOAD and memsz:
            yield vaddr, paddr, offset, filesz, memsz


def _check_place(name: str, gpa: int, size: int) -> None:
    """A segment lies in low memory below our own structures, or from 1 MiB on below the hole. Guest memory's size is checked later."""
    if gpa >= boot.PAGE and gpa + size <= pc.AREA_START:
        return
    if gpa < pc.ONE_MIB:
        where = f"[{boot.PAGE:#x}, {pc.AREA_START:#x})"
        raise ImageError(f"{name}: a segment at {gpa:#x} is in low memory but not in {where}; link it at {pc.ONE_MIB:#x} or above")
    if gpa + size > boot.LOW_MEMORY_MAX:
        raise ImageError(f"{name}: too big: a segment ends at {gpa + size:#x}, above {boot.LOW_MEMORY_MAX:#x}")


def command_line(image: Image, arguments: bytes) -> bytes:
    """The guest's command line: the image's file name without blanks, then `arguments`; cut to what fits its page."""
    name = os.path.basename(image.path).encode(errors="surrogateescape").replace(b" ", b"_")
    return b" ".join(part for part in (name, arguments) if part)[: pc.MAX_COMMAND_LINE]


def information(memory: int) -> bytes:
    """The information page at `pc.INFORMATION` of a guest with `memory` bytes."""
    page = bytearray(boot.PAGE)
    (_, low), *_ = boot.memory_layout(memory)
    entries = b"".join(struct.pack("<IQQI", 20, *entry) for entry in pc.memory_map(memory))
    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MAP | _INFO_LOADER
    struct.pack_into("<3I", page, 0, flags, pc.EBDA >> 10, (low - pc.ONE_MIB) >> 10)
    struct.pack_into("<I", page, 16, pc.COMMAND_LINE)
    struct.pack_into("<2I", page, 44, len(entries), pc.INFORMATION + _MAP_AT)
    struct.pack_into("<I", page, 64, pc.INFORMATION + _NAME_AT)
    page[_NAME_AT : _NAME_AT + len(LOADER_NAME)] = LOADER_NAME
    page[_MAP_AT : _MAP_AT + len(entries)] = entries
    return bytes(page)


def pages(image: Image, memory: int, arguments: bytes) -> dict[int, bytes]:
    """What the loader puts beside the image, by GPA."""
    return {
        pc.GDT: pc.gdt(),
        pc.INFORMATION: information(memory),
        pc.COMMAND_LINE: command_line(image, arguments) + b"\0",
    }
