"""Accesses that the MMU refused: what each becomes.

A guest fault is delivered (exceptions.py), memory that is not there is MMIO (mmio.py), an access that contradicts the
memory attributes is a memory-fault exit. Some refusals are not the guest's: the engine translates ahead of RIP, asks
for descriptors in user code's name, and loads where a processor would ask for the right to store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import operands
from kvmapi.model.cpu.code import Retranslate
from kvmapi.model.cpu.paging import GP_VECTOR, PF_P, PF_U, PF_VECTOR, PF_W, Fault
from kvmapi.model.cpu.state import GDT, IDT, LDT, TR
from kvmapi.model.mem.physical import Refused
from kvmapi.model.runpage import IMMEDIATE_EXIT

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_SS = 12
_AHEAD = 1024  # more than the instructions of a block


class Refusals:
    """Deals with the refused accesses of one vCPU."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def _looked_ahead(self) -> bool:
        """Did the engine, translating a block, run into a page that RIP may never reach?"""
        cpu = self._cpu
        if not cpu.mmu.fetching or cpu.stepped:
            return False
        return cpu.mmu.refused_page != cpu.registers.linear_rip & -PAGE

    def _go_to_the_edge(self) -> int | None:
        """Execute what lies before the page that cannot be fetched, one by one: an instruction that reaches into it
        ends in the fault, and others are executed.
        """
        cpu = self._cpu
        page = cpu.registers.linear_rip & -PAGE
        for _ in range(_AHEAD):
            rip = cpu.registers.linear_rip
            if rip & -PAGE != page or cpu.kick[0] or cpu.page.memory[IMMEDIATE_EXIT]:
                break
            site = cpu.debug.sensitive()
            if site is not None:
                return cpu.privileged.execute(site)
            error = cpu.step()
            if error != uc.UC_ERR_OK or cpu.mmu.fault is not None or cpu.event >= 0:
                return cpu.after_step(error)
        return None

    def deal(self, why: Exception) -> int | None:
        """An access was refused, the instruction was not executed: KVM_RUN's result, or None to go on."""
        cpu = self._cpu
        if isinstance(why, Refused) and not cpu.mmu.fetching:
            return cpu.mmio.begin(why) if why.kind == "mmio" else self.result(why)
        if isinstance(why, Retranslate):
            if cpu.code.stale:
                cpu.code.flush_blocks()
            return None
        if self._looked_ahead():
            return self._go_to_the_edge()
        if isinstance(why, Fault):
            if why.vector == PF_VECTOR:
                why.address, bits = cpu.fault_address(), cpu.registers.code_bits
                if (
                    why.error is not None
                    and not why.error & PF_W
                    and not cpu.mmu.fetching
                    and operands.modifies_memory(cpu.code_here(), bits)
                ):
                    why.error |= PF_W  # a processor asks for the right to store before it loads
                if self._reads_descriptors(why):
                    return cpu.after_step(cpu.step(flush=False, system=True))
            elif why.vector == GP_VECTOR and not cpu.mmu.fetching and self._through_stack():
                why.vector = _SS
            return cpu.raise_in_guest(why.vector, why.error, why.address)
        if isinstance(why, Refused):
            if why.kind == "mmio":
                return cpu.mmio.begin(why)
            return self.result(why)
        if isinstance(why, MemoryError):
            return -12
        raise why

    def result(self, why: Refused) -> int | None:
        """The KVM_RUN result of an access that the backings refuse; None when the guest goes on in a handler."""
        cpu = self._cpu
        if why.kind == "fault":
            cpu.page.memory_fault(why.gpa, why.private)
        elif why.kind == "hva":
            cpu.page.head(kvm.KVM_EXIT_UNKNOWN)
        elif cpu.intercepts is not None:
            return cpu.intercepts.no_memory()
        else:
            return cpu.internal_error(f"guest memory at {why.gpa:#x} is needed and is not there")
        return -why.number

    def _reads_descriptors(self, fault: Fault) -> bool:
        """Is this user code whose instruction reads a descriptor or a TSS? The processor does that with the
        supervisor's rights, and the engine's TLB does not say who asks.
        """
        cpu = self._cpu
        if fault.error is None or fault.error & (PF_P | PF_U) != PF_P | PF_U or (cpu.stepped and cpu.stepper.system):
            return False
        tables = (cpu.registers.segment(number) for number in (GDT, LDT, TR, IDT))
        if not any(0 <= fault.address - table.base <= table.limit for table in tables):
            return False
        return operands.loads_descriptor(cpu.code_here(), cpu.registers.code_bits)

    def _through_stack(self) -> bool:
        """Was the refused address, which is not canonical, of the stack segment?"""
        cpu = self._cpu
        return cpu.registers.long_mode and operands.through_stack(cpu.code_here(), cpu.fault_address(), cpu.registers.gpr(4))
