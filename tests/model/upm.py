"""Test support: guests of an RFC dialect with one slot that has a private half.

`Upm` is a LongGuest whose `vm` is of `dialect`, with a test slot at GPA AT: `shared` is the mapping of its shared half,
`memfd` its private file. `load`, `store` and `say` run a piece of code and give its exit. On an SEV guest (`type` 2,
launched by `launch`) the identity map has the C-bit and ALIAS has it not.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any, Self

from kvmapi import dialects
from kvmapi.abi import caps, kvm
from kvmapi.abi import dialects as d
from kvmapi.exits import Exit, Hlt, MemoryFault
from kvmapi.launch import Launch, Measured
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import CODE, MIB, PAGE, LongGuest, address_of, code

AT = 0x400000
C_MASK = 1 << 51
MARK, CLR = d.KVM_MARK_GPA_RANGE_ENC_ACCESS, d.KVM_CLR_GPA_RANGE_ENC_ACCESS
ENCRYPTED = kvm.KVM_MAP_GPA_RANGE_ENCRYPTED
LOAD = code("488b03f4", "mov rax, [rbx]; hlt")
STORE = code("488903f4", "mov [rbx], rax; hlt")
CALL = code("0f01d9f4", "vmmcall; hlt")
PAT, PAT2 = 0x6666666666666666, 0x9999999999999999
PRIVATE = kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE


def host(dialect: str, **platform: Any) -> ModelHost:
    """A machine whose kernel speaks it."""
    return ModelHost(Platform(dialect=dialect, **platform))


class Upm(LongGuest):
    """See above. `pages` of the test slot; None leaves the slot to the test."""

    system: dialects.System
    vm: dialects.Vm

    def __init__(
        self, host: ModelHost, type: int = 0, *, pages: int | None = 2, vcpus: int = 1, private_low: bool = False, text: bytes = b""
    ) -> None:
        self.model = host
        self.dialect = host.platform.dialect.name
        super().__init__(host, LOAD + STORE + CALL + text, type, c_mask=C_MASK if type else 0, vcpus=0, slot=False)
        self.vm.close()
        self.system.close()
        self.system = dialects.System(host, self.dialect)
        self.vm = self.system.create_vm(type)
        self.low = self.file(2 * MIB) if private_low else None
        if type:
            self.platform = SevPlatform(host)
            self.closing.append(self.platform)
            self.launching = Launch(self.vm, self.platform).init2()
        if self.low is None:
            self.vm.set_user_memory_region(0, 0, 2 * MIB, self.hva)
        else:
            self.vm.set_private_region(0, 0, 2 * MIB, self.hva, self.low.fd)
        self.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 1 << kvm.KVM_HC_MAP_GPA_RANGE)
        for _ in range(vcpus):
            self.start_long(self.add_vcpu())
        self.pages = pages or 0
        if pages is not None:
            self.memfd = self.file(pages * PAGE)
            self.shared = self.mapping(pages)
            self.vm.set_private_region(10, AT, pages * PAGE, address_of(self.shared), self.memfd.fd)

    def __enter__(self) -> Self:
        return self

    def file(self, size: int = 0) -> dialects.PrivateMemfd:
        """A private file that the guest closes at its end."""
        memfd = dialects.PrivateMemfd.create(self.host, size)
        self.closing.append(memfd)
        return memfd

    def mapping(self, pages: int) -> mmap.mmap:
        """Shared memory."""
        memory = mmap.mmap(-1, pages * PAGE)
        self.closing.append(memory)
        return memory

    def launch(self, policy: int = 0, dh_cert: Any = None, session: Any = None) -> Measured:
        """The measured launch of the low memory; the guest runs."""
        started = self.launching.start(policy, dh_cert, session)
        started.update_data(self.hva, 2 * MIB)
        measured = started.measure()
        measured.finish()
        return measured

    # ---- what the guest does
    def load(self, va: int = AT, vcpu: int = 0) -> Exit:
        """Read 8 bytes."""
        return self.go(0, vcpu, rbx=va)

    def store(self, value: int, va: int = AT, vcpu: int = 0) -> Exit:
        """Write 8 bytes."""
        return self.go(len(LOAD), vcpu, rbx=va, rax=value)

    def say(self, gpa: int, pages: int, attributes: int, vcpu: int = 0) -> Exit:
        """MAP_GPA_RANGE."""
        return self.go(len(LOAD + STORE), vcpu, rax=12, rbx=gpa, rcx=pages, rdx=attributes)

    def go(self, at: int, vcpu: int, **registers: int) -> Exit:
        self.regs(vcpu, rip=CODE + at, **registers)
        return self.run(vcpu)

    def says(self, gpa: int, pages: int, attributes: int, vcpu: int = 0) -> int:
        """What a MAP_GPA_RANGE without exit came to."""
        assert self.say(gpa, pages, attributes, vcpu) == Hlt()
        return signed(self.regs(vcpu).rax)

    def value(self, va: int = AT, vcpu: int = 0) -> int:
        """What the guest reads, without asking anybody."""
        assert self.load(va, vcpu) == Hlt()
        return int(self.regs(vcpu).rax)

    # ---- what user space sees
    def fill(self, value: int) -> None:
        """All of the shared half, in words."""
        self.shared[:] = struct.pack("<Q", value) * (len(self.shared) // 8)

    def word(self, at: int = 0) -> int:
        """A word of the shared half."""
        return int.from_bytes(self.shared[at : at + 8], "little")

    def secret(self, at: int = 0, memfd: dialects.PrivateMemfd | None = None) -> int:
        """A word of the private half as it stands in memory, which only the model can tell."""
        file: Any = self.model.file((memfd or self.memfd).fd)
        return int.from_bytes(file.memory()[at : at + 8], "little")


def signed(value: int) -> int:
    """A register as a signed number."""
    return int(value) - (1 << 64) if value >> 63 else int(value)


def fault(private: bool, gpa: int = AT) -> Exit:
    return MemoryFault(PRIVATE if private else 0, gpa, PAGE, 0)


def make_private(guest: Upm, page: int = 0, pages: int = 1) -> None:
    """As user space does it in this dialect."""
    if guest.dialect == "upm-v6":
        guest.memfd.allocate(page * PAGE, pages * PAGE)
    else:
        guest.vm.register_private(AT + page * PAGE, pages * PAGE)


def make_shared(guest: Upm, page: int = 0, pages: int = 1) -> None:
    if guest.dialect == "upm-v7":
        guest.vm.unregister_private(AT + page * PAGE, pages * PAGE)
    guest.memfd.punch_hole(page * PAGE, pages * PAGE)
