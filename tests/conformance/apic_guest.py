"""A guest with in-kernel interrupt controllers, for the tests of them.

It is an interpreter of a table of steps at DATA (`ApicGuest.do`): store, load, WRMSR, RDMSR, wait for an interrupt in
HLT, let interrupts in, set CR8. An interrupt handler counts in R15 and leaves its vector in R14; #GP counts in R13.
HLT does not exit in such a VM; `alarm` interrupts KVM_RUN where a guest would sleep forever.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmapi.abi import irq, kvm
from kvmapi.exits import Io
from kvmapi.host import Host
from kvmapi.vcpu import Vcpu
from tests.conformance.rows import expect_errno, feature
from tests.conformance.snippets import CODE, DATA, IDT, STACK, STUBS, LongGuest, Machine, code
from tests.conftest import PATIENCE

INTERPRETER = code(
    "ad8b0e48 8d7e0448 83c60cff c8781d74 1fffc874 21ffc874 22ffc874 27ffc874 2affc874 2bfb90e6 11faebd4 e610ebd0 8b078901 ebca8b01"
    " abebc58b 078b5704 0f30ebbc 0f32ab89 17ebb5fb f4faebb0 488b0744 0f22c0eb a7",
    "apic_next: lodsd; mov ecx, [rsi]; lea rdi, [rsi+4]; add rsi, 12; dec eax; js apic_done; jz apic_store; dec eax; jz apic_load;"
    " dec eax; jz apic_wrmsr; dec eax; jz apic_rdmsr; dec eax; jz apic_wait; dec eax; jz apic_cr8;"
    " sti; nop; out 0x11, al; cli; jmp apic_next;"
    " apic_done: out 0x10, al; jmp apic_next; apic_store: mov eax, [rdi]; mov [rcx], eax; jmp apic_next;"
    " apic_load: mov eax, [rcx]; stosd; jmp apic_next; apic_wrmsr: mov eax, [rdi]; mov edx, [rdi+4]; wrmsr; jmp apic_next;"
    " apic_rdmsr: rdmsr; stosd; mov [rdi], edx; jmp apic_next; apic_wait: sti; hlt; cli; jmp apic_next;"
    " apic_cr8: mov rax, [rdi]; mov cr8, rax; jmp apic_next",
)
HANDLER = code("41b64141ffc748cf", "mov r14b, 0x41; inc r15d; iretq")
SKIP_AFTER_GP = code("41ffc548 83c40848 83042402 48cf", "inc r13d; add rsp, 8; add qword ptr [rsp], 2; iretq")
IN_REAL_MODE = code("b05ae610 f4", "mov al, 0x5a; out 0x10, al; hlt", 16)
DONE, STORE, LOAD, WRMSR, RDMSR, WAIT, CR8, OPEN = range(8)
APIC, IOAPIC, MSI = 0xFEE00000, 0xFEC00000, 0xFEE00000
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SPIV, ISR, TMR, IRR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200
ICR, ICR2, LVTT, LINT0, INITIAL, CURRENT, DIVIDE = 0x300, 0x310, 0x320, 0x350, 0x380, 0x390, 0x3E0
ON = (STORE, APIC + SPIV, 0x1FF)
END = (STORE, APIC + EOI, 0)
MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14
BASE_MSR, DEADLINE_MSR, TSC_MSR = 0x1B, 0x6E0, 0x10
Step = tuple[int, ...]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """No test sleeps forever: KVM_RUN comes back with EINTR."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 20 * PATIENCE, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def until(condition: Callable[[], object]) -> bool:
    """Does it become true? Interrupts from eventfds come from another thread."""
    end = time.monotonic() + 10 * PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


class IrqMachine(Machine):
    """A VM with interrupt controllers and no vCPU."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.vm.create_irqchip()


class ApicGuest(LongGuest):
    """vCPUs with local APICs at the interpreter, and a handler for every vector."""

    def __init__(self, host: Host, vcpus: int = 1) -> None:
        super().__init__(host, INTERPRETER, vcpus=vcpus)
        for vector in range(32, 256):
            self.set_gate(vector, STUBS + 16 * vector)
        for vector in range(256):
            self.put(STUBS + 16 * vector, HANDLER[:2] + bytes([vector]) + HANDLER[3:])
        self.put(STUBS + 16 * 13, SKIP_AFTER_GP)
        for vcpu in self.vcpus:
            sregs = vcpu.get_sregs()
            sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
            vcpu.set_sregs(sregs)

    def add_vcpu(self) -> Vcpu:
        if not self.vcpus:
            self.make_controllers()
        return super().add_vcpu()

    def make_controllers(self) -> None:
        """Before the first vCPU."""
        self.vm.create_irqchip()

    def do(self, *steps: Step) -> list[int]:
        """Run the steps; what the loads and RDMSRs found, in order."""
        rows = [(*step, 0, 0)[:3] for step in (*steps, (DONE,))]
        self.put(DATA, b"".join(struct.pack("<IIQ", *row) for row in rows))
        self.regs(rip=CODE, rsp=STACK, rflags=2, rsi=DATA)
        exit = self.run()
        while isinstance(exit, Io) and exit.port == 0x11:
            self.regs(rflags=self.regs().rflags)  # a paravirtual KVM looks for interrupts when registers were set
            exit = self.run()
        assert isinstance(exit, Io), exit
        values = struct.unpack(f"<{2 * len(rows)}Q", self.get(DATA, 16 * len(rows)))[1::2]
        return [value if row[0] == RDMSR else value & 0xFFFFFFFF for row, value in zip(rows, values) if row[0] in (LOAD, RDMSR)]

    def taken(self) -> tuple[int, int]:
        """(interrupts so far, vector of the last), and forget them."""
        regs = self.regs()
        found = (regs.r15, regs.r14)
        self.regs(r14=0, r15=0, r13=0)
        return found

    def lapic(self, number: int = 0) -> dict[int, int]:
        """The registers that are not 0."""
        words = struct.unpack("<256I", bytes(self.vcpus[number].get_lapic()))
        return {4 * at: word for at, word in enumerate(words) if word}

    def waiting(self, vector: int, number: int = 0) -> bool:
        """Is it in the IRR?"""
        return bool(self.lapic(number).get(IRR + 0x10 * (vector // 32), 0) >> vector % 32 & 1)

    def redirect(self, pin: int, entry: int) -> None:
        """Set an IOAPIC pin through KVM_SET_IRQCHIP."""
        chip = self.vm.get_irqchip(kvm.KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[pin] = entry
        self.vm.set_irqchip(chip)


def needs_service(guest: ApicGuest) -> None:
    """A paravirtual KVM ends an interrupt when it delivers it: nothing is ever in service."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("paravirtual: interrupts are not in service there")


def raw(machine: Machine, request: int, argument: Any) -> int:
    """The errno of a VM ioctl."""
    pointer = argument if isinstance(argument, int) else ctypes.addressof(argument)
    return expect_errno(machine.vm.ioctl_raw(request, pointer))


def entry(gsi: int, kind: int, first: int = 0, second: int = 0, third: int = 0, flags: int = 0) -> irq.kvm_irq_routing_entry:
    made = irq.kvm_irq_routing_entry(gsi=gsi, type=kind, flags=flags)
    made.u.pad[0], made.u.pad[1], made.u.pad[2] = first, second, third
    return made


CHIP, MESSAGE = kvm.KVM_IRQ_ROUTING_IRQCHIP, kvm.KVM_IRQ_ROUTING_MSI
