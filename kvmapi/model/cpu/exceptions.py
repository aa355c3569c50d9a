"""Exceptions of one vCPU: those that the engine raises, those that the model finds, and their way into the guest.

The engine stops at an exception and never delivers it. Some of what it calls an invalid opcode is none: VMCALL, and
the few instructions that its processor lacks. What the guest cannot take ends KVM_RUN: a triple fault is
KVM_EXIT_SHUTDOWN, what KVM would have to emulate and cannot is KVM_EXIT_INTERNAL_ERROR with the instruction's bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu import inject
from kvmapi.model.cpu.debug import BP_VECTOR, DB_VECTOR
from kvmapi.model.cpu.paging import CR4_SMAP, GP_VECTOR, PF_VECTOR, Fault
from kvmapi.model.cpu.state import RFLAGS_AC
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_UD = 6
_EXIT_NPF, _NPF_USER = 0x400, 1 << 32 | 1 << 2  # the exit that KVM reports a failed delivery with, and its first information
_CLAC, _STAC, _RDPMC = b"\x0f\x01\xca", b"\x0f\x01\xcb", b"\x0f\x33"
_VMCALL = b"\x0f\x01\xc1"


class Exceptions:
    """Each method returns KVM_RUN's result, or None when the guest goes on."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def reported(self) -> int | None:
        """The engine raised `cpu.event`: KVM_RUN's result, or None to go on in a handler."""
        cpu = self._cpu
        vector = cpu.event
        software = bool(cpu.registers.u32[(cpu.where.error_code >> 2) + 1])
        error = cpu.registers.forget_exception()
        if vector == _UD and not software:
            return self.invalid_opcode()
        if vector == BP_VECTOR and cpu.debug.catches_int3:
            return cpu.debug.int3()
        if vector == DB_VECTOR and cpu.debug.catches_db:
            return cpu.debug.trapped()
        if cpu.intercepts is not None and not software:
            exit_code = cpu.intercepts.exception(vector)
            if exit_code is not None:
                return cpu.intercepts.raise_vc(exit_code)
        return self.raise_in_guest(vector, error & 0xFFFF, software=software)

    def invalid_opcode(self) -> int | None:
        """The engine does not know the instruction at RIP; some of them the model does."""
        cpu = self._cpu
        registers, is_int = cpu.registers, cpu.where.error_code + 4
        if registers.u32[is_int >> 2]:  # INT 6
            registers.rip, registers.u32[is_int >> 2] = registers.u64[is_int + 4 >> 3], 0
            return self.raise_in_guest(_UD, None, software=True)
        code = cpu.code.bytes_at(registers.linear_rip, 4)
        if cpu.intercepts is not None:
            try:
                result = cpu.intercepts.invalid_opcode(code)
            except Fault as why:
                return self.raise_in_guest(why.vector, why.error)
            return result
        if code[:3] in (_CLAC, _STAC) and cpu.cpuid.cr4_valid & CR4_SMAP and not registers.cpl:
            registers.set_flags(cpu.native.flags() & ~RFLAGS_AC | (RFLAGS_AC if code[:3] == _STAC else 0))
            cpu.privileged.advance(3)
            return None
        if code[:2] == _RDPMC:  # there are no counters
            return self.raise_in_guest(GP_VECTOR, 0)
        prefix = 1 if code[:1] in (b"\xf3", b"\xf2", b"\x66") else 0
        if code[prefix : prefix + 3] == _VMCALL:
            return cpu.hypercalls.foreign()
        return self.raise_in_guest(_UD, None)

    def raise_in_guest(
        self, vector: int, error: int | None, address: int = 0, *, software: bool = False, external: bool = False
    ) -> int | None:
        """Deliver an exception, or with `external` an interrupt or NMI; None to go on, or the result of KVM_RUN when
        the guest cannot take it.
        """
        cpu = self._cpu
        if vector == PF_VECTOR:
            cpu.registers.set_cr(2, address)
        try:
            flags = cpu.native.flags() | cpu.debug.delivered(vector)
            if external:
                inject.deliver_external(cpu.registers, cpu.mmu, flags, vector)
            else:
                inject.deliver(cpu.registers, cpu.mmu, flags, vector, error, software=software)
        except inject.TripleFault:
            return cpu.page.head(kvm.KVM_EXIT_SHUTDOWN)
        except Refused as why:
            if why.kind == "mmio" and cpu.intercepts is not None:  # it would be #VC, which cannot be delivered any better
                return cpu.page.head(kvm.KVM_EXIT_SHUTDOWN)
            if why.kind == "mmio":
                cpu.reason = f"vector {vector} cannot be delivered: a table or stack lies outside memory at {why.gpa:#x}"
                return cpu.page.internal_error(kvm.KVM_INTERNAL_ERROR_DELIVERY_EV, why.gpa, _EXIT_NPF, _NPF_USER, why.gpa, 0)
            return cpu.refusals.result(why)
        except inject.UnsupportedDelivery as why:
            return self.internal_error(f"the model has no {why}", delivering=True)
        cpu.code.verify()  # the frame may have been stored where code is
        return None

    def internal_error(self, reason: str, *, delivering: bool = False) -> int | None:
        """KVM_EXIT_INTERNAL_ERROR/EMULATION with the instruction bytes, as KVM reports what it cannot emulate. User code gets
        #UD instead, unless user space asked to see it (KVM_CAP_EXIT_ON_EMULATION_FAILURE); but not where it is an event
        that cannot be delivered.
        """
        cpu = self._cpu
        cpu.reason = reason
        if cpu.registers.cpl and not (delivering or cpu.policy.exit_on_emulation_failure or cpu.intercepts):
            return self.raise_in_guest(_UD, None)
        try:  # of an SEV-ES guest KVM has neither RIP nor code
            code = b"" if cpu.intercepts is not None else cpu.mmu.read(cpu.registers.linear_rip, 15)
        except (Fault, Refused):
            code = b""
        words = [int.from_bytes(code[at : at + 8].ljust(8, b"\0"), "little") for at in (0, 8)]
        size_and_first = len(code) | (words[0] & 0xFFFFFFFFFFFFFF) << 8
        rest = words[0] >> 56 | words[1] << 8
        return cpu.page.internal_error(kvm.KVM_INTERNAL_ERROR_EMULATION, 1, size_and_first, rest & 0xFFFFFFFFFFFFFFFF)
