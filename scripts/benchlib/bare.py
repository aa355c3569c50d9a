"""A VM of the model around a few bytes of machine code, through public objects only (System, Vm, Vcpu).

There is no run loop in between, so what is timed is KVM_RUN. The guest starts in 64-bit mode, ring 0, interrupts off.
All of its memory is mapped one to one in 4 KiB pages by four-level tables, because an engine with a small TLB is
measured:

    0x1000 PML4   0x2000 PDPT   0x3000 page directory   0x8000 code   0x10000.. page tables   1 MiB.. data

The types differ in what the data is:

    plain          memory of a slot
    sw-protected   the same with `private=True`: a guest_memfd, every page with the attribute PRIVATE
    sev            encrypted: every entry of the tables has the C-bit, and the first MiB was launched

What is below the data is never private on sw-protected: user space has no way to put an image there.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from kvmapi.abi.vcpu import kvm_regs, kvm_segment
    from kvmapi.vcpu import Vcpu

MIB = 1 << 20
PAGE = 4096
PML4, PDPT, DIRECTORY, CODE, TABLES = 0x1000, 0x2000, 0x3000, 0x8000, 0x10000
DATA = MIB
MAX_SIZE = 128 * MIB
"""The tables end at 0x10000 + 64 pages, below the data; they map 2 MiB a page."""

C_MASK = 1 << 51
TYPES = {"plain": 0, "sw-protected": 1, "sev": 2}
_ENTRY = 0x63  # present, writable, accessed, dirty: marking them is not what is measured


class GuestFailed(Exception):
    """A guest that is measured did not do what it is measured for."""


class BareGuest:
    """A VM with `size` bytes of memory (a multiple of 2 MiB) and vCPUs that start at `code`. A context manager."""

    def __init__(self, code: bytes, *, type: str = "plain", size: int = 4 * MIB, vcpus: int = 1, private: bool = False) -> None:
        if size % (2 * MIB) or not 2 * MIB <= size <= MAX_SIZE:
            raise ValueError(f"{size} bytes of memory: a multiple of 2 MiB up to {MAX_SIZE >> 20} MiB is wanted")
        self.code, self.type, self.size = code, type, size
        self.c_mask = C_MASK if type == "sev" else 0
        self.vcpus: list[Vcpu] = []
        self._stack = ExitStack()
        with self._stack:
            self._build(vcpus, private)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self, vcpus: int, private: bool) -> None:
        from kvmapi.launch import Launch
        from kvmapi.model.host import ModelHost
        from kvmapi.sev import SevPlatform
        from kvmapi.system import System

        host = ModelHost()
        self.memory = mmap.mmap(-1, self.size)
        self._stack.callback(self.memory.close)
        self.hva = ctypes.addressof(pin := ctypes.c_char.from_buffer(self.memory))
        del pin  # an exported buffer would keep the mapping from being closed
        self.system = self._stack.enter_context(System(host))
        self.vm = self._stack.enter_context(self.system.create_vm(TYPES[self.type]))
        launch = None
        if self.type == "sev":
            launch = Launch(self.vm, self._stack.enter_context(SevPlatform(host))).init2()
        self._slots(private)
        self._pages()
        cpuid = self.system.supported_cpuid()
        for index in range(vcpus):
            vcpu = self._stack.enter_context(self.vm.create_vcpu(index))
            self.vcpus.append(vcpu)
            vcpu.set_cpuid2(cpuid)
            self._long_mode(vcpu)
        if launch is not None:
            started = launch.start(0, None, None)
            started.update_data(self.hva, DATA)
            started.measure().finish()

    def _slots(self, private: bool) -> None:
        from kvmapi.abi import kvm

        if not private:
            self.vm.set_user_memory_region(0, 0, self.size, self.hva)
            return
        self.vm.set_user_memory_region(0, 0, DATA, self.hva)
        size = self.size - DATA
        file = self._stack.enter_context(self.vm.create_guest_memfd(size))
        self.vm.set_user_memory_region2(1, DATA, size, self.hva + DATA, guest_memfd=file.fd)
        self.vm.set_memory_attributes(DATA, size, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    def _pages(self) -> None:
        flags = _ENTRY | self.c_mask
        count = self.size // (2 * MIB)
        self.put(PML4, struct.pack("<Q", PDPT | flags))
        self.put(PDPT, struct.pack("<Q", DIRECTORY | flags))
        self.put(DIRECTORY, b"".join(struct.pack("<Q", TABLES + n * PAGE | flags) for n in range(count)))
        self.put(TABLES, b"".join(struct.pack("<Q", n * PAGE | flags) for n in range(count * 512)))
        self.put(CODE, self.code)

    def _long_mode(self, vcpu: Vcpu) -> None:
        sregs = vcpu.get_sregs()
        sregs.cs = _segment(8, 0xB, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(0x10, 3, long=0))
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, PML4, 0x620, 0xD01
        vcpu.set_sregs(sregs)
        self.rewind(vcpu)

    def rewind(self, vcpu: Vcpu) -> None:
        """The vCPU's next KVM_RUN begins at the code's first byte, with all other registers 0."""
        from kvmapi.abi.vcpu import kvm_regs

        vcpu.set_regs(kvm_regs(rip=CODE, rflags=2))

    def put(self, gpa: int, data: bytes) -> None:
        """Store through the VMM's own mapping (before a SEV launch, or where memory is not encrypted)."""
        self.memory[gpa : gpa + len(data)] = data

    def word(self, gpa: int) -> int:
        """The 8 bytes there, as the VMM sees them."""
        return int.from_bytes(self.memory[gpa : gpa + 8], "little")

    def run_to_halt(self, vcpu: Vcpu) -> kvm_regs:
        """One KVM_RUN that must end in HLT; the registers there. Raises GuestFailed."""
        from kvmapi.exits import Hlt

        exit = vcpu.exit(vcpu.run())
        if exit != Hlt():
            raise GuestFailed(f"{self.type}: {exit} instead of HLT, RIP {vcpu.get_regs().rip:#x}")
        return vcpu.get_regs()


def _segment(selector: int, kind: int, *, long: int) -> kvm_segment:
    from kvmapi.abi.vcpu import kvm_segment

    return kvm_segment(base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, s=1, l=long, db=1 - long, g=1)
