"""Short pieces of machine code, and a VM around them: what the tests of KVM_RUN are written with.

    code("b041 e610 f4", "mov al, 0x41; out 0x10, al; hlt")

is the bytes (first), and what they mean (second; GNU as, Intel syntax; `test_snippets` compares the two where `as`
is installed, so that a comment cannot lie). `LongGuest` and `RealGuest` put such code in a fresh VM:

    with LongGuest(host, code("f4", "hlt")) as guest:
        assert guest.run() == Hlt()

Memory of a LongGuest: page tables, GDT and IDT below 0x10000, code at 0x10000, stack below 0x20000, data from
0x30000. Everything is mapped in 2 MiB pages, one to one; the same memory appears again at ALIAS + GPA, with the C-bit
clear where the guest has one; MMIO is a mapped page without memory. Vector v enters a `hlt` of its own: `vector()`
tells from RIP which one, and `frame()` reads the exception frame from the guest's stack.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import Any, NamedTuple, Self

from kvmapi.abi import kvm
from kvmapi.abi.vcpu import kvm_regs, kvm_segment
from kvmapi.exits import Exit
from kvmapi.host import Host
from kvmapi.system import System
from kvmapi.vcpu import Vcpu
from kvmapi.vm import Vm

PAGE = kvm.PAGE_SIZE
MIB = 1 << 20
PML4, PDPT, PD_LOW, PD_ALIAS, PD_MMIO, GDT, IDT, TSS, STUBS = (0x1000 * n for n in range(1, 10))
CODE, STACK, DATA = 0x10000, 0x20000, 0x30000
ALIAS = 1 << 30
MMIO = 0xD0000000
HOLE = 0x3FE00000  # the last 2 MiB of the first GiB are not present
REAL_CODE, REAL_STUBS, REAL_DATA = 0x1000, 0x600, 0x3000
WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17))

WRITTEN: list[tuple[bytes, str, int]] = []
"""All snippets of the modules that were imported: bytes, assembly, bits."""


def code(text: str, assembly: str, bits: int = 64) -> bytes:
    """Bytes from hex; `assembly` says what they are."""
    data = bytes.fromhex(text)
    WRITTEN.append((data, assembly, bits))
    return data


class Frame(NamedTuple):
    """What the CPU pushed for an exception in 64-bit mode."""

    error: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def protect(address: int, size: int, prot: int) -> None:
    """mprotect(2)."""
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), prot) == 0


def expect_errno(result: int) -> int:
    """0 for success, else the positive errno of a raw ioctl result."""
    return -result if result < 0 else 0


class Machine:
    """A VM with one slot of memory at GPA 0; closes everything it opened."""

    def __init__(self, host: Host, type: int = 0, size: int = 2 * MIB, *, slot: bool = True) -> None:
        self.host = host
        self.system = System(host)
        self.vm: Vm = self.system.create_vm(type)
        self.memory = mmap.mmap(-1, size)
        self.hva = address_of(self.memory)
        self.vcpus: list[Vcpu] = []
        self.closing: list[Any] = []
        if slot:
            self.vm.set_user_memory_region(0, 0, size, self.hva)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thing in (*self.closing, *self.vcpus, self.vm, self.system):
            thing.close()
        self.memory.close()

    def add_vcpu(self) -> Vcpu:
        """One more vCPU with the CPUID that the host supports."""
        vcpu = self.vm.create_vcpu(len(self.vcpus))
        self.vcpus.append(vcpu)
        vcpu.set_cpuid2(self.system.supported_cpuid())
        return vcpu

    def put(self, gpa: int, data: bytes) -> None:
        """Store as the VMM does: through its own mapping."""
        self.memory[gpa : gpa + len(data)] = data

    def get(self, gpa: int, size: int) -> bytes:
        """Load as the VMM does."""
        return self.memory[gpa : gpa + size]

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU."""
        return self.vcpus[0]

    def run(self, number: int = 0) -> Exit:
        """KVM_RUN and the exit it came back with."""
        vcpu = self.vcpus[number]
        return vcpu.exit(vcpu.run())

    def regs(self, number: int = 0, **values: int) -> kvm_regs:
        """The registers, after changing those given by name."""
        registers = self.vcpus[number].get_regs()
        if values:
            for name, value in values.items():
                setattr(registers, name, value)
            self.vcpus[number].set_regs(registers)
        return registers


class RealGuest(Machine):
    """Real mode, flat at segment 0: code at 0x1000, stack below it, data at 0x3000; vectors enter `hlt`s."""

    def __init__(self, host: Host, text: bytes, type: int = 0) -> None:
        super().__init__(host, type)
        self.put(0, b"".join(struct.pack("<HH", REAL_STUBS + vector, 0) for vector in range(256)))
        self.put(REAL_STUBS, b"\xf4" * 256)
        self.put(REAL_CODE, text)
        vcpu = self.add_vcpu()
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        self.regs(rip=REAL_CODE, rsp=REAL_CODE, rflags=2)

    def vector(self) -> int:
        """The vector whose `hlt` was reached."""
        return int(self.regs().rip) - 1 - REAL_STUBS


class LongGuest(Machine):
    """64-bit mode, ring 0."""

    def __init__(
        self, host: Host, text: bytes, type: int = 0, size: int = 2 * MIB, *, c_mask: int = 0, vcpus: int = 1, slot: bool = True
    ) -> None:
        super().__init__(host, type, size, slot=slot)
        self.c_mask = c_mask
        self._tables()
        self.put(CODE, text)
        for _ in range(vcpus):
            self.start_long(self.add_vcpu())

    def _tables(self) -> None:
        c = self.c_mask
        self.put(PML4, struct.pack("<Q", PDPT | 3 | c))
        self.put(PDPT, struct.pack("<4Q", PD_LOW | 3 | c, PD_ALIAS | 3 | c, 0, PD_MMIO | 3 | c))
        self.put(PD_LOW, b"".join(struct.pack("<Q", n << 21 | 0x83 | c) for n in range(511)))
        self.put(PD_ALIAS, b"".join(struct.pack("<Q", n << 21 | 0x83) for n in range(512)))
        self.put(PD_MMIO, b"".join(struct.pack("<Q", 3 << 30 | n << 21 | 0x83) for n in range(512)))
        self.put(GDT, struct.pack("<5Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, TSS << 16 | 0x8B0000000067, 0))
        for vector in range(32):
            self.set_gate(vector, STUBS + 16 * vector)
            self.put(STUBS + 16 * vector, b"\xf4")

    def set_gate(self, vector: int, entry: int) -> None:
        """Let `vector` enter `entry` through an interrupt gate; 0 for a gate that is not present."""
        present = 0x8E00 if entry else 0x0E00
        gate = struct.pack("<HHHHII", entry & 0xFFFF, 8, present, entry >> 16 & 0xFFFF, entry >> 32, 0)
        self.put(IDT + 16 * vector, gate)

    def start_long(self, vcpu: Vcpu) -> None:
        """Registers of a vCPU that begins at CODE, each vCPU 2 KiB of stack below the last's."""
        sregs = vcpu.get_sregs()
        sregs.cs = _segment(8, 0xB, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(0x10, 3, long=0))
        sregs.tr = kvm_segment(base=TSS, limit=0x67, selector=0x18, type=0xB, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, 0x27
        sregs.idt.base, sregs.idt.limit = IDT, 32 * 16 - 1
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, PML4 | self.c_mask, 0x620, 0xD01
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=CODE, rsp=STACK - 0x800 * vcpu.id, rdi=vcpu.id, rflags=2))

    def again(self, **values: int) -> Exit:
        """Start at CODE once more, with these registers, and run."""
        self.regs(**{"rip": CODE, "rsp": STACK, "rflags": 2, **values})
        return self.run()

    def vector(self) -> int:
        """The vector whose `hlt` was reached."""
        return (int(self.regs().rip) - 1 - STUBS) // 16

    def frame(self) -> Frame:
        """The exception frame on the stack (readable where the VMM can read the stack)."""
        words = list(struct.unpack("<6Q", self.get(self.regs().rsp, 48)))
        error = words.pop(0) if self.vector() in WITH_ERROR else None
        return Frame(error, *words[:5])


def _segment(selector: int, kind: int, *, long: int) -> kvm_segment:
    return kvm_segment(base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, s=1, l=long, db=1 - long, g=1)
