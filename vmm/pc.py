"""The PC that a foreign guest finds, in numbers: memory map, descriptor table, page tables, first registers.

A guest of our own contract needs none of this (docs/seams.md §4). A Multiboot or Linux image was written for a PC: it asks for memory by
e820, expects flat segments of a GDT, and pokes at a local APIC, a serial port and a timer.

    0x01000..0x90000  the image's, if it wants it (and RAM otherwise)
    0x90000 GDT   0x91000 Multiboot information or boot_params   0x92000 command line   0x93000.. page tables (64-bit entry)
    0x9FC00..0xA0000 reserved (the extended BIOS data area of a PC)
    0xA0000..0x100000 RAM in our memslot, but not in the memory map: text screen, and from 0xE0000 the ACPI tables
    0x100000..        RAM up to 3 GiB; the rest from 4 GiB

Selectors are those of the Linux boot protocol: 0x10 code, 0x18 data. Multiboot leaves them open, and such a guest must load a GDT of its
own before it changes a segment register.

Everything is computed as bytes and register values, as in `vmm.boot`; `vmm.foreign` puts it in place.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm import boot

if TYPE_CHECKING:
    from kvmapi.abi.vcpu import kvm_regs, kvm_sregs

GDT, INFORMATION, COMMAND_LINE, TABLES = 0x90000, 0x91000, 0x92000, 0x93000
AREA_START, AREA_END = GDT, 0xA0000
CODE, DATA = 0x10, 0x18
EBDA, LOW_END, RESERVED, ONE_MIB = 0x9FC00, 0xA0000, 0xE0000, 0x100000
E820_RAM, E820_RESERVED = 1, 2
MAX_COMMAND_LINE = boot.PAGE - 1

_CODE32, _CODE64, _DATA = 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
_PE_MP_ET_NE, _PG, _PAE, _LME_LMA = 0x33, 1 << 31, 1 << 5, 0x500
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_MAPPED_GIB = 4


def memory_map(memory: int) -> list[tuple[int, int, int]]:
    """The e820 entries of a guest with `memory` bytes: `(gpa, size, type)`, ascending, without overlap."""
    (_, low), *high = boot.memory_layout(memory)
    entries = [
        (0, EBDA, E820_RAM),
        (EBDA, LOW_END - EBDA, E820_RESERVED),
        (RESERVED, ONE_MIB - RESERVED, E820_RESERVED),
        (ONE_MIB, low - ONE_MIB, E820_RAM),
    ]
    return entries + [(gpa, size, E820_RAM) for gpa, size in high]


def gdt(long: bool = False) -> bytes:
    """Two null descriptors, code at 0x10 (64-bit if `long`), data at 0x18; all flat."""
    return struct.pack("<4Q", 0, 0, _CODE64 if long else _CODE32, _DATA)


def identity_tables() -> bytes:
    """The identity map of the first 4 GiB in 2 MiB pages, as the bytes from `TABLES` on: what a 64-bit entry finds in CR3."""
    pml4 = [TABLES + boot.PAGE | _PRESENT_WRITABLE] + [0] * 511
    pdpt = [TABLES + boot.PAGE * (2 + gib) | _PRESENT_WRITABLE for gib in range(_MAPPED_GIB)] + [0] * (512 - _MAPPED_GIB)
    leaves = [number * boot.LARGE | _PRESENT_WRITABLE | _LARGE for number in range(512 * _MAPPED_GIB)]
    return struct.pack(f"<{512 * (2 + _MAPPED_GIB)}Q", *pml4, *pdpt, *leaves)


def set_system_registers(sregs: kvm_sregs, long: bool = False) -> None:
    """Flat segments, no IDT, interrupts impossible. 32-bit: protected mode without paging. `long`: 64-bit mode on `identity_tables`."""
    boot.set_segment(sregs.cs, CODE, type=11, s=1, l=int(long), db=int(not long))
    for data in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        boot.set_segment(data, DATA, type=3, s=1, db=1)
    boot.set_segment(sregs.tr, 0, type=11, s=0, limit=boot.TSS_LIMIT)
    boot.set_segment(sregs.ldt, 0, type=2, s=0, limit=0)
    sregs.ldt.present, sregs.ldt.unusable = 0, 1
    sregs.gdt.base, sregs.gdt.limit = GDT, len(gdt()) - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _PE_MP_ET_NE, 0, 0, 0
    if long:
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _PE_MP_ET_NE | _PG, TABLES, _PAE, _LME_LMA


def set_registers(regs: kvm_regs, rip: int, **values: int) -> None:
    """RIP, RFLAGS with interrupts off, and `values`; all other general registers are 0."""
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16))):
        setattr(regs, name, values.get(name, 0))
    regs.rip, regs.rflags = rip, 2
