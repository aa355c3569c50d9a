"""VMCALL and VMMCALL: KVM_HC_MAP_GPA_RANGE exits to user space where that was asked for, everything else is answered
here.

Source: Documentation/virt/kvm/x86/hypercalls.rst; kvm_emulate_hypercall in arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.privileged import ExitPolicy

RAX, RCX, RDX, RBX = range(4)
_U64 = 0xFFFFFFFFFFFFFFFF
_ENOSYS = 1000  # KVM_ENOSYS


class Hypercalls:
    """The hypercalls of one vCPU."""

    def __init__(self, cpu: Cpu, policy: ExitPolicy) -> None:
        self._cpu = cpu
        self._policy = policy
        self._registers = cpu.registers
        self._page = cpu.page
        self._length = 0

    def execute(self, length: int) -> int | None:
        """VMCALL or VMMCALL: KVM_HC_MAP_GPA_RANGE exits when enabled; everything else is answered here."""
        registers = self._registers
        long = registers.long_mode
        mask = _U64 if long else 0xFFFFFFFF
        number, gpa, pages, attributes = (registers.gpr(reg) & mask for reg in (RAX, RBX, RCX, RDX))
        if registers.cpl:
            self._result(-errno.EPERM, length)
            return None
        if number != kvm.KVM_HC_MAP_GPA_RANGE or not self._policy.hypercalls >> number & 1:
            self._result(0 if number == kvm.KVM_HC_VAPIC_POLL_IRQ else -_ENOSYS, length)
            return None
        if gpa % PAGE or not pages or (gpa // PAGE) + pages > _U64:
            self._result(-errno.EINVAL, length)
            return None
        self._length = length
        self._cpu.privileged.pending = self._done
        return self._page.payload(
            kvm.KVM_EXIT_HYPERCALL, "<Q6QQQ", number, gpa, pages, attributes, 0, 0, 0, 0, kvm.KVM_EXIT_HYPERCALL_LONG_MODE if long else 0
        )

    def _done(self) -> None:
        self._result(self._page.read("<Q", 88), self._length)

    def _result(self, value: int, length: int) -> None:
        self._registers.set_gpr(RAX, value & (_U64 if self._registers.long_mode else 0xFFFFFFFF))
        self._cpu.privileged.advance(length)
