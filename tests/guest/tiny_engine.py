"""Test support: just enough machine around a Unicorn CPU to run a guest with private memory where no KVM can.

Every GPA has two backings, one private and one shared. `SEV`: the C-bit of the leaf entry picks one. `SW_PROTECTED`: the
attribute of the page does, as MAP_GPA_RANGE sets it. `PLAIN`: always the shared one. Exceptions are not delivered, MMIO
is not there: the guests that run here (convert, fault, private-memory) need neither. This is not the project's model,
which has to be right about much more; it is a second opinion on the guests.
"""

from __future__ import annotations

import collections
import ctypes
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import unicorn
from boot_image import (
    BOOT_INFO,
    FEATURE_HYPERCALL,
    FEATURE_IMPLICIT,
    MEMORY,
    PML4,
    SEV,
    SEV_ES,
    SW_PROTECTED,
    TEST_AREA,
    TEST_SIZE,
    prepare,
    stack_top,
)
from tiny_vmm import Result
from unicorn import unicorn_const
from unicorn import x86_const as x86

uc: Any = unicorn  # its annotations do not say what it exports

C_MASK = 1 << 51
SHARED_BASE = 1 << 40  # where the engine sees the shared backing; any address above all GPAs will do
EINVAL = 22


class Engine:
    """One vCPU. `private` and `shared` are the two backings, for tests to look into."""

    def __init__(self, vm_type: int, lazy: bool = False, on_stage: Callable[[int, Engine], None] = lambda stage, engine: None) -> None:
        self.vm_type, self.lazy, self.on_stage = vm_type, lazy, on_stage
        self.c_mask = C_MASK if vm_type in (SEV, SEV_ES) else 0
        self.attributes: set[int] = set()
        self.result = Result()
        self.private, self.shared = mmap.mmap(-1, MEMORY), mmap.mmap(-1, MEMORY)
        self.tables = self.private if self.c_mask else self.shared
        self.cpu: Any = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        for base, backing in ((0, self.private), (SHARED_BASE, self.shared)):
            address = ctypes.addressof(ctypes.c_char.from_buffer(backing))
            self.cpu.mem_map_ptr(base, MEMORY, uc.UC_PROT_ALL, address)
        self.cpu.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self.cpu.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        self.cpu.hook_add(uc.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        if lazy:
            self.attributes.update(range(TEST_AREA >> 12, TEST_AREA + TEST_SIZE >> 12))

    def run(self, elf: Path, arguments: str = "") -> Result:
        features = FEATURE_IMPLICIT if self.lazy else FEATURE_HYPERCALL
        rip = prepare(self.tables, elf, arguments, vm_type=self.vm_type, features=features, c_mask=self.c_mask)
        cpu = self.cpu
        cpu.reg_write(x86.UC_X86_REG_CR4, 0x620)
        cpu.reg_write(x86.UC_X86_REG_CR3, PML4 | self.c_mask)
        cpu.msr_write(0xC0000080, 0xD01)
        cpu.reg_write(x86.UC_X86_REG_CR0, 0x80010033)
        cpu.reg_write(x86.UC_X86_REG_RDI, BOOT_INFO)
        cpu.reg_write(x86.UC_X86_REG_RSI, 0)
        cpu.reg_write(x86.UC_X86_REG_RSP, stack_top(0) - 8)
        while not self.result.end:
            try:
                cpu.emu_start(rip, 0xFFFF_FFFF_FFFF_F000)  # a guest that exits halts afterwards, which ends emu_start
                self.result.end = self.result.end or "HLT"
            except uc.UcError:
                rip = cpu.reg_read(x86.UC_X86_REG_RIP)
                if self.result.end:
                    break
                if self.tables[rip : rip + 3] != b"\x0f\x01\xd9":
                    raise
                self._hypercall()
                rip += 3
        return self.result

    def _fill(self, cpu: object, address: int, access: int, entry: Any, data: object) -> bool:
        table, at, pte = PML4, address & ~0xFFF, 0
        for shift in (39, 30, 21, 12):
            (pte,) = struct.unpack_from("<Q", self.tables, table + 8 * (address >> shift & 511))
            if not pte & 1:
                return False
            table = pte & 0x000F_FFFF_FFFF_F000 & ~self.c_mask
            if pte & 0x80 and shift == 21:
                table |= at & 0x1FF000
                break
        if self.lazy and table >> 12 in self.attributes:
            self.result.exits["MEMORY_FAULT"] += 1
            self._convert(table, 1, False)
        by_attribute = self.vm_type == SW_PROTECTED and table >> 12 in self.attributes
        private = bool(pte & self.c_mask) or by_attribute
        entry.paddr = table if private else SHARED_BASE + table
        entry.perms = uc.UC_PROT_ALL
        return True

    def _out(self, cpu: object, port: int, size: int, value: int, data: object) -> None:
        self.result.exits["IO"] += 1
        if port == 0x3F8:
            self.result.console += chr(value & 0xFF)
        elif port == 0xF9:
            self.on_stage(value & 0xFF, self)
        elif port == 0xF4:
            self.result.code, self.result.end = value & 0xFF, "exit"

    def _hypercall(self) -> None:
        names = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)
        number, gpa, pages, attributes = (self.cpu.reg_read(name) for name in names)
        answer = 0
        if number != 12 or gpa % 4096 or not pages or (gpa >> 12) + pages >= 1 << 64:
            answer = (1 << 64) - EINVAL
        else:
            self.result.exits["HYPERCALL"] += 1
            self._convert(gpa, pages, bool(attributes & 16))
        self.cpu.reg_write(x86.UC_X86_REG_RAX, answer)

    def _convert(self, gpa: int, pages: int, private: bool) -> None:
        self.result.conversions.append((gpa, pages << 12, private))
        frames = range(gpa >> 12, (gpa >> 12) + pages)
        (self.attributes.update if private else self.attributes.difference_update)(frames)
        if not self.lazy:  # a fault is in the middle of a fill: the entry it fills is the one that changes
            self.cpu.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)


def counts(conversions: list[tuple[int, int, bool]]) -> collections.Counter[bool]:
    """Pages converted, by direction (True: to private)."""
    total: collections.Counter[bool] = collections.Counter()
    for _, size, private in conversions:
        total[private] += size >> 12
    return total
