"""VMCALL and VMMCALL: KVM_HC_MAP_GPA_RANGE exits to user space where that was asked for, everything else is answered
here.

Source: Documentation/virt/kvm/x86/hypercalls.rst; kvm_emulate_hypercall in arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.state import RAX, RBX, RCX, RDX, RSI
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.policy import ExitPolicy

_U64 = 0xFFFFFFFFFFFFFFFF
_ENOSYS = 1000  # KVM_ENOSYS
_VMMCALL = b"\x0f\x01\xd9"
_UD, _GP = 6, 13


class Hypercalls:
    """The hypercalls of one vCPU."""

    def __init__(self, cpu: Cpu, policy: ExitPolicy) -> None:
        self._cpu = cpu
        self._policy = policy
        self._registers = cpu.registers
        self._page = cpu.page
        self._length = 0

    def execute(self, length: int) -> int | None:
        """The instruction itself: KVM_RUN's result, or None when the guest goes on."""
        registers = self._registers
        long = registers.long_mode
        self._length = length
        if registers.cpl:
            self._result(-errno.EPERM)
            return None
        mask = _U64 if long else 0xFFFFFFFF
        number, gpa, pages, attributes, fourth = (registers.gpr(reg) & mask for reg in (RAX, RBX, RCX, RDX, RSI))
        return self.ask(number, (gpa, pages, attributes, fourth), long, self._result)

    def foreign(self) -> int | None:
        """VMCALL, which an AMD processor does not know. KVM writes VMMCALL over it, and the guest executes that; it is #UD
        where user space disabled that quirk, and in an encrypted guest, whose code KVM cannot read. Raises nothing: faults
        are delivered.
        """
        cpu = self._cpu
        if cpu.mmu.c_mask or not self._policy.has_quirk(kvm.KVM_X86_QUIRK_FIX_HYPERCALL_INSN):
            return cpu.raise_in_guest(_UD, None)
        if self._registers.cpl:  # before KVM's emulator looks what it is
            return cpu.raise_in_guest(_GP, 0)
        try:
            cpu.mmu.write(self._registers.linear_rip, _VMMCALL)
        except Fault as why:
            return cpu.raise_in_guest(why.vector, why.error, why.address)
        except Refused as why:
            return cpu.refusals.result(why)
        cpu.code.verify()
        return None

    def ask(self, number: int, arguments: tuple[int, int, int, int], long: bool, done: Callable[[int], None]) -> int | None:
        """A hypercall of supervisor code, wherever its numbers came from. None: it is answered, `done` was called with the
        result; else KVM_RUN's result, and `done` is called when user space comes back.
        """
        if number != kvm.KVM_HC_MAP_GPA_RANGE or not self._policy.hypercalls >> number & 1:
            yields = number == kvm.KVM_HC_SCHED_YIELD and self._cpu.msrs.has_pv_feature(kvm.KVM_FEATURE_PV_SCHED_YIELD)
            done(0 if yields or number == kvm.KVM_HC_VAPIC_POLL_IRQ else -_ENOSYS)  # whom it yields to is the host's business
            return None
        return self._map_gpa_range(*arguments[:3], long, done)

    def _map_gpa_range(self, gpa: int, pages: int, attributes: int, long: bool, done: Callable[[int], None]) -> int | None:
        if gpa % PAGE or not pages or (gpa // PAGE) + pages > _U64:
            done(-errno.EINVAL)
            return None
        return self._exit(gpa, pages, attributes, long, done)

    def _exit(self, gpa: int, pages: int, attributes: int, long: bool, done: Callable[[int], None]) -> int:
        """Let user space do it; what it leaves in `ret` is the result."""
        self._cpu.privileged.pending = lambda: done(self._page.read("<Q", 88))
        return self._page.payload(
            kvm.KVM_EXIT_HYPERCALL, "<Q6QQQ", kvm.KVM_HC_MAP_GPA_RANGE, gpa, pages, attributes, 0, 0, 0, 0,
            kvm.KVM_EXIT_HYPERCALL_LONG_MODE if long else 0,
        )  # fmt: skip

    def _result(self, value: int) -> None:
        self._registers.set_gpr(RAX, value & (_U64 if self._registers.long_mode else 0xFFFFFFFF))
        self._cpu.privileged.advance(self._length)
