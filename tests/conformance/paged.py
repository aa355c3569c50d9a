"""A guest of any paging mode with one page to be played with: `Paged`.

    with Paged(host, LONG) as guest:
        guest.set(1, guest.entry(1) & ~P)               # level 1: the table of 4 KiB pages
        assert guest.touch(READ) == Fault(14, 0, guest.va)

The first 2 MiB are mapped one to one, for everybody; the address `guest.va` goes through tables of its own to the page at
TARGET. `touch` loads CR3 again, so that nothing stale can be used, then makes one access in ring 0 or 3, and tells how it
ended: None when it was made, the Fault that was delivered, or the exit that came instead.

Ring 3 is entered by KVM_SET_SREGS: a paravirtual kernel has no IRET in 32-bit mode.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from kvmapi.abi.vcpu import kvm_regs, kvm_segment
from kvmapi.exits import Exit, Hlt
from kvmapi.host import Host
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, GDT, IDT, STACK, STUBS, TSS, WITH_ERROR, Machine, code

P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
WP, PSE, PAE, SMEP, SMAP, NXE = 1 << 16, 1 << 4, 1 << 5, 1 << 20, 1 << 21, 1 << 11
AC, RF = 1 << 18, 1 << 16
CODE32, DATA, TASK, USER_CODE32, USER_DATA, CODE64, USER_CODE64 = 0x08, 0x10, 0x18, 0x2B, 0x33, 0x38, 0x43
TARGET, OTHER, USER_STACK, ACCESS = 0x100000, 0x101000, 0x28000, CODE + 0x100
IDENTITY, TABLES, SECOND = 0x40000, 0x60000, 0x70000  # the table of level n is at TABLES + 0x1000 * n
RELOAD = code("0f20d80f 22d8", "mov rax, cr3; mov cr3, rax")
REWRITE = code("488b0348 8903f4", "mov rax, [rbx]; mov [rbx], rax; hlt")
HLT = b"\xf4"
READ, WRITE, FETCH, CHANGE = "read", "write", "fetch", "change"
INSTRUCTIONS = {
    READ: code("8b13f4", "mov edx, [rbx]; hlt"),
    WRITE: code("890bf4", "mov [rbx], ecx; hlt"),
    FETCH: code("ffe3", "jmp rbx"),
    CHANGE: code("010bf4", "add [rbx], ecx; hlt"),
}


@dataclass(frozen=True)
class Mode:
    """A paging mode: its levels from the root (the shift of the address for each) and where the page under test is."""

    name: str
    shifts: tuple[int, ...]
    va: int
    cr4: int = 0
    efer: int = 0

    @property
    def wide(self) -> bool:
        return len(self.shifts) > 2

    @property
    def levels(self) -> int:
        return len(self.shifts)

    def shift(self, level: int) -> int:
        return self.shifts[-level]

    def index(self, level: int, va: int) -> int:
        return va >> self.shift(level) & (0x1FF if self.wide else 0x3FF)


LONG = Mode("long mode", (39, 30, 21, 12), 0x80_0000_0000 + 0x3000, PAE, 0xD01)
PAE_MODE = Mode("PAE", (30, 21, 12), 0x4000_3000, PAE, NXE)
PSE_MODE = Mode("32-bit with PSE", (22, 12), 0x4000_3000, PSE)
PLAIN_MODE = Mode("32-bit", (22, 12), 0x4000_3000)
MODES = (LONG, PAE_MODE, PSE_MODE, PLAIN_MODE)


class Fault(NamedTuple):
    """What reached the guest's IDT; `cr2` of #PF."""

    vector: int
    error: int | None
    cr2: int | None = None


class Paged(Machine):
    """Ring 0 at CODE, ring 3 where asked for; every vector ends in a HLT of its own."""

    def __init__(self, host: Host, mode: Mode, *, cr4: int = 0, vcpus: int = 1) -> None:
        super().__init__(host)
        self.mode = mode
        self.va = mode.va
        self.cr0, self.cr4, self.efer = 0x80010031, mode.cr4 | cr4, mode.efer
        if mode is not LONG and not feature(self, "hardware virtualization"):
            self.__exit__()
            pytest.skip("a paravirtual KVM has no 32-bit paging: KVM_SET_SREGS clears CR0.PG")
        self._descriptors()
        self._identity()
        self.map(self.va, TARGET)
        for _ in range(vcpus):
            self.start(self.add_vcpu())

    # ---- tables
    @property
    def size(self) -> int:
        """Bytes of an entry."""
        return 8 if self.mode.wide else 4

    def word(self, gpa: int) -> int:
        return int.from_bytes(self.get(gpa, self.size), "little")

    def set_word(self, gpa: int, value: int) -> None:
        self.put(gpa, value.to_bytes(self.size, "little"))

    def _identity(self) -> None:
        levels, rights = self.mode.levels, P | W | U
        root = IDENTITY + 0x1000 * levels
        for level in range(levels, 2, -1):
            pae_top = self.mode.name == "PAE" and level == 3
            self.set_word(IDENTITY + 0x1000 * level, IDENTITY + 0x1000 * (level - 1) | (P if pae_top else rights))
        self.set_word(IDENTITY + 0x2000, IDENTITY + 0x1000 | rights)
        for page in range(512):
            self.set_word(IDENTITY + 0x1000 + page * self.size, page << 12 | rights | A | D)
        self.root, self.identity = root, IDENTITY + 0x1000

    def at(self, level: int, va: int | None = None) -> int:
        """GPA of the entry of the page under test (or of `va`, if it shares the tables) at this level."""
        table = self.root if level == self.mode.levels else TABLES + 0x1000 * level
        return table + self.mode.index(level, self.va if va is None else va) * self.size

    def map(self, va: int, gpa: int, rights: int = P | W | U) -> None:
        """Put `va` into the tables of the page under test."""
        for level in range(self.mode.levels, 1, -1):
            pae_top = self.mode.name == "PAE" and level == 3
            self.set_word(self.at(level, va), TABLES + 0x1000 * (level - 1) | (P if pae_top else P | W | U))
        self.set_word(self.at(1, va), gpa | rights)

    def entry(self, level: int) -> int:
        return self.word(self.at(level))

    def set(self, level: int, value: int) -> None:
        self.set_word(self.at(level), value)

    def change(self, level: int, on: int = 0, off: int = 0) -> None:
        self.set(level, self.entry(level) & ~off | on)

    def marks(self) -> list[int]:
        """Accessed and dirty bits, from the root to the leaf."""
        return [self.entry(level) & (A | D) for level in range(self.mode.levels, 0, -1)]

    # ---- descriptors and registers
    def _descriptors(self) -> None:
        flat32, data, flat64 = 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF
        user = 3 << 45
        task = TSS << 16 | 0x890000000067
        self.put(GDT, struct.pack("<9Q", 0, flat32, data, task, 0, flat32 | user, data | user, flat64, flat64 | user))
        self.put(TSS + 4, struct.pack("<QI", STACK | (0 if self.mode is LONG else DATA << 32), 0))
        for vector in range(32):
            entry = STUBS + 16 * vector
            if self.mode is LONG:
                self.put(IDT + 16 * vector, struct.pack("<HHHHII", entry, CODE64, 0x8E00, 0, 0, 0))
            else:
                self.put(IDT + 8 * vector, struct.pack("<HHHH", entry, CODE32, 0x8E00, 0))
            self.put(entry, HLT)

    def start(self, vcpu: object, rip: int = CODE, *, user: bool = False, rflags: int = 2, **values: int) -> None:
        """All registers of a vCPU that begins at `rip`."""
        number = self.vcpus.index(vcpu)  # type: ignore[arg-type]
        vcpu = self.vcpus[number]
        sregs = vcpu.get_sregs()
        long, level = self.mode is LONG, 3 if user else 0
        selector = (USER_CODE64 if user else CODE64) if long else USER_CODE32 if user else CODE32
        sregs.cs = _segment(selector, 0xB, level, long=long)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(USER_DATA if user else DATA, 3, level))
        # QEMU's CPU, on which the lab runs, dies of a busy 32-bit task register that it did not load itself.
        kind = 0xB if long or feature(self, "an exact CPU") else 9
        sregs.tr = kvm_segment(base=TSS, limit=0x67, selector=TASK, type=kind, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, 9 * 8 - 1
        sregs.idt.base, sregs.idt.limit = IDT, 32 * (16 if long else 8) - 1
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.cr2 = self.cr0, self.root, self.cr4, self.efer, 0
        vcpu.set_sregs(sregs)
        stack = (USER_STACK if user else STACK) - 0x800 * number
        vcpu.set_regs(kvm_regs(**{"rip": rip, "rsp": stack, "rflags": rflags, **values}))

    # ---- accesses
    def touch(
        self, kind: str = READ, va: int | None = None, *, user: bool = False, rflags: int = 2, reload: bool = True, value: int = 0x5A
    ) -> Fault | Exit | None:
        """One access of 4 bytes at `va`, or a fetch from there (a HLT is put at TARGET for that)."""
        va = self.va if va is None else va
        if kind == FETCH:
            self.put(TARGET + (va & 0xFFF), HLT)
        self.put(ACCESS, INSTRUCTIONS[kind])
        if reload:
            self.flush(user)
        self.start(self.vcpu, ACCESS, user=user, rflags=rflags, rbx=va, rcx=value)
        return self.outcome(self.run(), va if kind == FETCH else ACCESS, va if kind == FETCH else ACCESS + 2, user=user)

    def flush(self, user: bool = False) -> None:
        """Let the guest load CR3 again. A paravirtual kernel does not see for ring 3 what the VMM stored into tables: there
        the guest stores every entry once more, as it is.
        """
        self.put(CODE, RELOAD + HLT)
        self.start(self.vcpu)
        assert self.run() == Hlt() and self.regs().rip == CODE + len(RELOAD) + 1
        if user and not feature(self, "hardware virtualization"):
            for level in range(self.mode.levels, 0, -1):
                assert self.program(REWRITE, rbx=self.at(level)) == Hlt()

    def outcome(self, exit: Exit, began: int, done: int, *, user: bool = False) -> Fault | Exit | None:
        """What an instruction at `began` came to, with a HLT at `done` behind it."""
        if exit != Hlt():
            return exit
        rip = self.regs().rip
        if not user and rip == done + 1:
            return None
        vector = self.vector()
        assert vector is not None, f"a HLT at {rip - 1:#x}"
        error, pushed = (self._pushed(0), self._pushed(1)) if vector in WITH_ERROR else (None, self._pushed(0))
        if user and vector == 13 and pushed == done:
            return None  # HLT in ring 3
        assert pushed in (began, ACCESS), f"vector {vector} at {pushed:#x}"
        return Fault(vector, error, self.vcpu.get_sregs().cr2 if vector == 14 else None)

    def vector(self) -> int | None:
        """The vector whose HLT was reached; None for a HLT elsewhere."""
        at = int(self.regs().rip) - 1 - STUBS
        return at // 16 if 0 <= at < 32 * 16 else None

    def frame_error(self) -> int:
        """The error code on the stack."""
        return self._pushed(0)

    def frame_rip(self) -> int:
        """RIP above an error code."""
        return self._pushed(1)

    def _pushed(self, number: int) -> int:
        size = 8 if self.mode is LONG else 4
        return int.from_bytes(self.get(self.regs().rsp + number * size, size), "little")

    def second_root(self, gpa: int) -> int:
        """Another address space: the same identity map, and the page under test is at `gpa`."""
        level, size = self.mode.levels, self.size
        root = SECOND + 0x1000 * level
        self.put(root, self.get(self.root, 0x1000))
        table = root
        for below in range(level - 1, 0, -1):
            at = table + self.mode.index(below + 1, self.va) * size
            self.set_word(at, SECOND + 0x1000 * below | (P if self.mode.name == "PAE" and below == 2 else P | W | U))
            table = SECOND + 0x1000 * below
        self.set_word(table + self.mode.index(1, self.va) * size, gpa | P | W | U)
        return root

    def program(self, text: bytes, **values: int) -> Exit:
        """Run `text`, which ends in a HLT, in ring 0."""
        self.put(CODE, text)
        self.start(self.vcpu, **values)
        return self.run()


def _segment(selector: int, kind: int, level: int, *, long: bool = False) -> kvm_segment:
    return kvm_segment(
        base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, dpl=level, s=1, l=int(long), db=int(not long), g=1
    )
