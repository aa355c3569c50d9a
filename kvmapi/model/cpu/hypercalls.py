"""VMCALL and VMMCALL: KVM_HC_MAP_GPA_RANGE exits to user space where that was asked for, everything else is answered
here.

Source: Documentation/virt/kvm/x86/hypercalls.rst; kvm_emulate_hypercall in arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.state import RAX, RBX, RCX, RDX, RSI
from kvmapi.model.mem.physical import Refused
from kvmapi.model.runpage import UNION

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.policy import ExitPolicy

_HFLAGS, _CPL, _CS64 = layout.HFLAGS >> 2, layout.HF_CPL, layout.HF_CS64  # for the hot path
_MAP_GPA_RANGE, _EXIT_HYPERCALL, _LONG_MODE = kvm.KVM_HC_MAP_GPA_RANGE, kvm.KVM_EXIT_HYPERCALL, kvm.KVM_EXIT_HYPERCALL_LONG_MODE
_EXIT = struct.Struct("<9Q")  # nr, args[6], ret, flags
_RET = UNION + 56 >> 3  # the word of kvm_run in which user space leaves the result
_U64, _U32 = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF
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
        self._finish = self._answered
        self._done: Callable[[int], None] = self._result

    def execute(self, length: int) -> int | None:
        """The instruction itself: KVM_RUN's result, or None when the guest goes on."""
        words, modes = self._registers.u64, self._registers.u32[_HFLAGS]
        self._length = length
        if modes & _CPL:
            self._result(-errno.EPERM)
            return None
        arguments = words[RBX], words[RCX], words[RDX], words[RSI]
        if modes & _CS64:
            return self.ask(words[RAX], arguments, True, self._result)
        gpa, pages, attributes, fourth = (argument & _U32 for argument in arguments)
        return self.ask(words[RAX] & _U32, (gpa, pages, attributes, fourth), False, self._result)

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
        if number != _MAP_GPA_RANGE or not self._policy.hypercalls >> _MAP_GPA_RANGE & 1:
            yields = number == kvm.KVM_HC_SCHED_YIELD and self._cpu.msrs.has_pv_feature(kvm.KVM_FEATURE_PV_SCHED_YIELD)
            done(0 if yields or number == kvm.KVM_HC_VAPIC_POLL_IRQ else -_ENOSYS)  # whom it yields to is the host's business
            return None
        gpa, pages, attributes, _ = arguments
        return self._map_gpa_range(gpa, pages, attributes, long, done)

    def _map_gpa_range(self, gpa: int, pages: int, attributes: int, long: bool, done: Callable[[int], None]) -> int | None:
        if gpa % PAGE or not pages or gpa // PAGE + pages > _U64:
            done(-errno.EINVAL)
            return None
        return self._exit(gpa, pages, attributes, long, done)

    def _exit(self, gpa: int, pages: int, attributes: int, long: bool, done: Callable[[int], None]) -> int:
        """Let user space do it; what it leaves in `ret` is the result."""
        self._done, self._cpu.privileged.pending = done, self._finish
        _EXIT.pack_into(self._page.memory, UNION, _MAP_GPA_RANGE, gpa, pages, attributes, 0, 0, 0, 0, _LONG_MODE if long else 0)
        return self._page.head(_EXIT_HYPERCALL)

    def _answered(self) -> None:
        self._done(self._page.u64[_RET])

    def _result(self, value: int) -> None:
        registers = self._registers
        registers.u64[RAX] = value & (_U64 if registers.u32[_HFLAGS] & _CS64 else _U32)
        self._cpu.privileged.advance(self._length)
