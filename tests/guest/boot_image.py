"""Test support: a bundled guest and its boot structures in memory, as docs/seams.md section 4 lays them down.

Written against the page, not against vmm/boot.py, so that the two readings check each other.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

MEMORY, TEST_AREA, TEST_SIZE, SHARED_PAGE = 32 << 20, 0x800000, 0x800000, 0x5000
MMIO, MSR = 0xD0000000, 0x40000ABC
PLAIN, SW_PROTECTED, SEV, SEV_ES = 0, 1, 2, 3
FEATURE_HYPERCALL, FEATURE_MSR, FEATURE_IMPLICIT, FEATURE_MMIO = 1, 2, 4, 8
PML4, BOOT_INFO, GHCBS = 0x8000, 0x4000, 0x400000


def stack_top(vcpu: int) -> int:
    return 0x40000 + 0x2000 * (vcpu + 1)


def symbol(image: ELFFile, name: str) -> Any:
    """The entry of `name` in the symbol table."""
    table: Any = image.get_section_by_name(".symtab")
    (found,) = table.get_symbol_by_name(name)
    return found


def prepare(memory: mmap.mmap, elf: Path, arguments: str, *, vm_type: int, features: int, vcpus: int = 1, c_mask: int = 0) -> int:
    """Fills `memory` (GPA 0 first) and returns the entry point."""
    with elf.open("rb") as file:
        image = ELFFile(file)
        for segment in image.iter_segments("PT_LOAD"):
            memory[segment["p_paddr"] : segment["p_paddr"] + segment["p_filesz"]] = segment.data()
        stubs = symbol(image, "vector_stubs")["st_value"]
        entry = int(image["e_entry"])
    _descriptors(memory, stubs, vcpus)
    ghcbs = range(GHCBS, GHCBS + 0x1000 * vcpus, 0x1000) if vm_type == SEV_ES else range(0)
    _page_tables(memory, c_mask, ghcbs)
    _put(memory, BOOT_INFO, int.from_bytes(b"SEVMMBI1", "little"), vm_type, c_mask, MEMORY, vcpus, PML4)
    _put(memory, BOOT_INFO + 48, SHARED_PAGE, TEST_AREA, TEST_SIZE, MMIO, features, MSR, GHCBS if ghcbs else 0)
    text = arguments.encode() + b"\0"
    memory[BOOT_INFO + 256 : BOOT_INFO + 256 + len(text)] = text
    return entry


def _descriptors(memory: mmap.mmap, stubs: int, vcpus: int) -> None:
    _put(memory, 0x1000, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    for vcpu in range(vcpus):
        tss = 0xC0000 + 128 * vcpu
        _put(memory, 0x1018 + 16 * vcpu, 0x67 | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24) << 56, 0)
        memory[tss + 4 : tss + 12] = struct.pack("<Q", stack_top(vcpu))
    for vector in range(32):
        at = stubs + 16 * vector
        gate = at & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (at >> 16 & 0xFFFF) << 48
        _put(memory, 0x2000 + 16 * vector, gate, at >> 32)


def _page_tables(memory: mmap.mmap, c_mask: int, ghcbs: range) -> None:
    _put(memory, PML4, 0x9003 | c_mask)
    _put(memory, 0x9000, *(0xA003 + 0x1000 * index | c_mask for index in range(4)))
    _put(memory, 0xA000, *(0xE003 + 0x1000 * index | c_mask for index in range(8)))
    for page in range(1, 4096):
        shared = page << 12 == SHARED_PAGE or page << 12 in ghcbs or TEST_AREA <= page << 12 < TEST_AREA + TEST_SIZE
        _put(memory, 0xE000 + 8 * page, page << 12 | 3 | (0 if shared else c_mask))
    _put(memory, 0xA000 + 8 * 8, *(page << 21 | 0x83 | c_mask for page in range(8, MEMORY >> 21)))
    _put(memory, 0xA000 + 8 * (MMIO >> 21), MMIO | 0x83)


def _put(memory: mmap.mmap, gpa: int, *words: int) -> None:
    memory[gpa : gpa + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)
