"""A guest in 32-bit protected mode without paging, ring 0: `ProtectedGuest`, like the guests of snippets.py.

    with ProtectedGuest(host, code("cd21", "int 0x21", 32)) as guest:
        assert guest.run() == Hlt() and guest.vector() == 0x21

Memory: GDT, IDT and two TSSs below 0x9000, code at CODE, ring 0's stack below STACK, ring 3's below USER_STACK. The GDT
has a segment of each kind that a gate can name; vectors enter `hlt`s through 32-bit interrupt gates of privilege level
3, so that code of any level may use INT n.

The guest loads its task register itself and comes to ring 3 by IRET: QEMU's CPU, on which the lab runs, dies of a task
register that KVM_SET_SREGS loaded. A paravirtual kernel has no IRET, and gets the state as a whole.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.abi.vcpu import kvm_regs, kvm_segment
from kvmapi.host import Host
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, GDT, IDT, STACK, STUBS, TSS, Machine, code

CODE32, DATA32, TSS_SELECTOR, USER_CODE, USER_DATA, CODE16, DATA16 = 0x08, 0x10, 0x18, 0x23, 0x2B, 0x30, 0x38
CONFORMING, ABSENT_CODE, ABSENT_DATA, SPARE, TASK, LDT_SELECTOR = 0x40, 0x48, 0x50, 0x58, 0x60, 0x68
TASK_TSS, USER_STACK, PROLOGUE = 0x7800, 0x28000, 0xF800
LOAD_TASK = code("50b81800 00000f00 d858", "push eax; mov eax, 0x18; ltr ax; pop eax", 32)
TO_CODE = code("68000001 00c3", "push 0x10000; ret", 32)
TO_RING_3 = code("6a2b6800 8002009c 6a236800 000100cf", "push 0x2b; push 0x28000; pushfd; push 0x23; push 0x10000; iretd", 32)
WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17))
INTERRUPT16, TRAP16, INTERRUPT32, TRAP32, TASK_GATE = 6, 7, 14, 15, 5


def segment_descriptor(base: int, limit: int, access: int, flags: int) -> bytes:
    """A descriptor: `access` is byte 5, `flags` the upper half of byte 6 (G 8, D/B 4, L 2), `limit` in its units."""
    return struct.pack("<HHBBBB", limit & 0xFFFF, base & 0xFFFF, base >> 16 & 0xFF, access, flags << 4 | limit >> 16, base >> 24)


class Frame32(NamedTuple):
    """What a 32-bit gate pushes; ESP and SS only when the privilege level changed, the rest only from virtual-8086 mode."""

    error: int | None
    eip: int
    cs: int
    eflags: int
    esp: int
    ss: int
    es: int
    ds: int
    fs: int
    gs: int


class ProtectedGuest(Machine):
    """32-bit code, flat segments. `user`: begins in ring 3."""

    def __init__(self, host: Host, text: bytes, *, user: bool = False) -> None:
        super().__init__(host)
        table = [
            bytes(8),
            segment_descriptor(0, 0xFFFFF, 0x9B, 12), segment_descriptor(0, 0xFFFFF, 0x93, 12),
            segment_descriptor(TSS, 0x27F, 0x89, 0),
            segment_descriptor(0, 0xFFFFF, 0xFB, 12), segment_descriptor(0, 0xFFFFF, 0xF3, 12),
            segment_descriptor(0, 0xFFFF, 0x9B, 0), segment_descriptor(0, 0xFFFF, 0x93, 0),
            segment_descriptor(0, 0xFFFFF, 0x9F, 12),
            segment_descriptor(0, 0xFFFFF, 0x1B, 12), segment_descriptor(0, 0xFFFFF, 0x13, 12),
            bytes(8),
            segment_descriptor(TASK_TSS, 0x67, 0x89, 0),
            bytes(8),
        ]  # fmt: skip
        self.put(GDT, b"".join(table))
        for vector in range(256):
            self.set_gate(vector, STUBS + 16 * vector)
            self.put(STUBS + 16 * vector, b"\xf4")
        self.put(TSS, struct.pack("<III", 0, STACK, DATA32))
        self.put(TSS + 0x66, struct.pack("<H", 0x80))  # the I/O permission bitmap: 0x80 to the end, all ports refused
        self.put(TSS + 0x80, b"\xff" * 0x200)
        self.put(CODE, text)
        self._start(user)

    def _start(self, user: bool) -> None:
        vcpu = self.add_vcpu()
        sregs = vcpu.get_sregs()
        at_once = user and not feature(self, "hardware virtualization")
        sregs.cs = _flat(USER_CODE, 0xB, 3) if at_once else _flat(CODE32, 0xB, 0)
        sregs.ss = _flat(USER_DATA, 3, 3) if at_once else _flat(DATA32, 3, 0)
        for name in ("ds", "es", "fs", "gs"):
            setattr(sregs, name, _flat(USER_DATA, 3, 3) if user else _flat(DATA32, 3, 0))
        sregs.tr = kvm_segment(base=TSS, limit=0x27F, selector=TSS_SELECTOR, type=0xB, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, 14 * 8 - 1
        sregs.idt.base, sregs.idt.limit = IDT, 256 * 8 - 1
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x11, 0, 0, 0
        vcpu.set_sregs(sregs)
        self.put(PROLOGUE, LOAD_TASK + (TO_RING_3 if user else TO_CODE))
        here = feature(self, "hardware virtualization")
        vcpu.set_regs(kvm_regs(rip=PROLOGUE if here else CODE, rsp=USER_STACK if at_once else STACK, rflags=2))

    def set_gate(
        self, vector: int, entry: int, selector: int = CODE32, kind: int = INTERRUPT32, *, dpl: int = 3, present: bool = True
    ) -> None:
        """A gate of any kind; for a task gate the entry counts for nothing."""
        access = (0x80 if present else 0) | dpl << 5 | kind
        self.put(IDT + 8 * vector, struct.pack("<HHHH", entry & 0xFFFF, selector, access << 8, entry >> 16))

    def set_descriptor(self, selector: int, data: bytes) -> None:
        self.put(GDT + (selector & ~7), data)

    def vector(self) -> int:
        """The vector whose `hlt` was reached."""
        return (int(self.regs().rip) - 1 - STUBS) // 16

    def frame(self, size: int = 4, base: int = 0, vector: int | None = None) -> Frame32:
        """The frame of the handler that was reached, of dwords or (`size` 2) of words."""
        vector = self.vector() if vector is None else vector
        words = list(struct.unpack("<10" + {2: "H", 4: "I"}[size], self.get(base + self.regs().rsp, 10 * size)))
        error = words.pop(0) if vector in WITH_ERROR else None
        return Frame32(error, *[*words, 0][:9])


def _flat(selector: int, kind: int, level: int) -> kvm_segment:
    return kvm_segment(base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, dpl=level, s=1, db=1, g=1)
