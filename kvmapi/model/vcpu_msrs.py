"""The ioctls for one vCPU's MSRs: lists of them, one as a register (KVM_CAP_ONE_REG), and machine checks, which are
banks of MSRs.

User space may ask for every MSR that KVM_GET_MSR_INDEX_LIST names, whatever the guest's CPUID has: what the guest lacks
reads as 0 and can be set to 0. Source: kvm_do_msr_access, do_set_msr and kvm_get_set_one_reg in arch/x86/kvm/msrs.c (7.3).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu.machine_msrs import FEATURES, UCODE_REV
from kvmapi.model.cpu.mce import Injected
from kvmapi.model.cpu.msrs import INDEX_LIST, NoSuchMsr

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_ENTRY = struct.Struct("<IIQ")
_MAX_MSRS = 256
_ERROR = struct.Struct("<4QB31x")  # kvm_x86_mce
_MC_VECTOR = 18
_CR4_MCE = 1 << 6
_REG_X86_MSR_U64 = 0x2030 << 48 | 2 << 32  # KVM_X86_REG_MSR(0)
_FIXED_ONCE_RUN = FEATURES.keys() - {UCODE_REV}

Method = Callable[[int, Caller], int]


class MsrState:
    """The MSR ioctls of one vCPU."""

    def __init__(self, vcpu: VcpuFile) -> None:
        self._vcpu = vcpu
        self._cpu = vcpu.cpu

    def handlers(self) -> dict[int, Method]:
        """Request number -> method; the caller adds the locking."""
        return {
            ioctls.KVM_GET_MSRS: self._get_msrs,
            ioctls.KVM_SET_MSRS: self._set_msrs,
            ioctls.KVM_GET_ONE_REG: self._get_one,
            ioctls.KVM_SET_ONE_REG: self._set_one,
            ioctls.KVM_GET_REG_LIST: self._list,
            ioctls.KVM_X86_SETUP_MCE: self._setup_checks,
            ioctls.KVM_X86_SET_MCE: self._inject,
        }

    # ---- one MSR
    def _get(self, number: int) -> int:
        """Raises NoSuchMsr."""
        protected = self._vcpu.protected
        if protected is not None and protected.hides(number):
            return 0
        try:
            return self._cpu.msrs.read(number, host=True)
        except NoSuchMsr as why:
            if why.known or number not in INDEX_LIST:
                raise
            return 0

    def _set(self, number: int, value: int) -> None:
        """Raises NoSuchMsr."""
        protected = self._vcpu.protected
        if protected is not None and protected.drops(number, value):
            return
        if self._vcpu.entered and number in _FIXED_ONCE_RUN and self._get(number) != value:
            raise NoSuchMsr(number, known=True)  # the model of a vCPU that ran cannot be changed
        try:
            self._cpu.msrs.write(number, value, host=True)
        except NoSuchMsr as why:
            if why.known or value or number not in INDEX_LIST:
                raise

    # ---- lists
    def _entries(self, arg: int, caller: Caller) -> list[tuple[int, int, int]]:
        count = struct.unpack("<I4x", caller.memory.read(arg, 8))[0]
        if count >= _MAX_MSRS:
            raise Errno(errno.E2BIG)
        data = caller.memory.read(arg + 8, count * _ENTRY.size) if count else b""
        return list(_ENTRY.iter_unpack(data))

    def _get_msrs(self, arg: int, caller: Caller) -> int:
        told, done = b"", 0
        for number, reserved, _ in self._entries(arg, caller):
            try:
                told += _ENTRY.pack(number, reserved, self._get(number))
            except NoSuchMsr:
                told += _ENTRY.pack(number, reserved, 0)  # the one that stops it reads 0
                break
            done += 1
        if told:
            caller.memory.write(arg + 8, told)
        return done

    def _set_msrs(self, arg: int, caller: Caller) -> int:
        done = 0
        for number, _, value in self._entries(arg, caller):
            try:
                self._set(number, value)
            except NoSuchMsr:
                break
            done += 1
        return done

    # ---- KVM_CAP_ONE_REG
    def _one(self, arg: int, caller: Caller) -> tuple[int, int]:
        """(MSR, address of its value). KVM's own registers are those of shadow stacks, which no guest has here."""
        register, address = struct.unpack("<QQ", caller.memory.read(arg, 16))
        if register >> 32 << 32 != _REG_X86_MSR_U64:
            raise Errno(errno.EINVAL)
        return register & 0xFFFFFFFF, address

    def _get_one(self, arg: int, caller: Caller) -> int:
        number, address = self._one(arg, caller)
        try:
            value = self._get(number)
        except NoSuchMsr:
            raise Errno(errno.EINVAL) from None
        caller.memory.write(address, struct.pack("<Q", value))
        return 0

    def _set_one(self, arg: int, caller: Caller) -> int:
        number, address = self._one(arg, caller)
        value = int.from_bytes(caller.memory.read(address, 8), "little")
        try:
            self._set(number, value)
        except NoSuchMsr:
            raise Errno(errno.EINVAL) from None
        return 0

    def _list(self, arg: int, caller: Caller) -> int:
        """KVM_GET_REG_LIST: what is in no other list, which is nothing."""
        caller.memory.read(arg, 8)
        caller.memory.write(arg, bytes(8))
        return 0

    # ---- machine checks
    def _setup_checks(self, arg: int, caller: Caller) -> int:
        self._cpu.msrs.machine.checks.setup(int.from_bytes(caller.memory.read(arg, 8), "little"))
        return 0

    def _inject(self, arg: int, caller: Caller) -> int:
        cpu, error = self._cpu, Injected(*_ERROR.unpack(caller.memory.read(arg, _ERROR.size)))
        becomes = cpu.msrs.machine.checks.inject(error, bool(cpu.registers.cr(4) & _CR4_MCE))
        if becomes == "exception":
            cpu.events.queue_exception(_MC_VECTOR)
        elif becomes == "shutdown":
            cpu.events.shut_down()
        return 0
