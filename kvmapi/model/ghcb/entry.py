"""What a guest finds in its registers when it starts from its VMSA, where that differs from what user space had set."""

from __future__ import annotations

import struct

from kvmapi.abi import kvm
from kvmapi.model.cpu import fpu
from kvmapi.model.cpu.cpu import Cpu

_CR0_NW, _CR0_CD, _CR4_MCE = 1 << 29, 1 << 30, 1 << 6


def from_vmsa(cpu: Cpu, vm_type: int) -> None:
    """The vCPU's VMSA was launched: CR0 without CD and NW, CR4 with MCE, no CR2 and no DR0-DR3; and of the legacy type, whose
    VMSA has no such state, x87 and SSE registers that are all zero, MXCSR and the control word too.
    """
    registers = cpu.registers
    registers.set_cr(0, registers.cr(0) & ~(_CR0_NW | _CR0_CD))
    registers.set_cr(4, registers.cr(4) | _CR4_MCE)
    registers.set_cr(2, 0)
    struct.pack_into("<4Q", cpu.native.state, cpu.where.debug, 0, 0, 0, 0)
    if vm_type == kvm.KVM_X86_DEFAULT_VM:
        fpu.restore(cpu, bytes(fpu.FXSAVE_SIZE))
    registers.settle()
    cpu.mmu.reset()
