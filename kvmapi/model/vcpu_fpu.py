"""The ioctls for one vCPU's x87 and SSE state: KVM_GET_FPU and SET_FPU, XSAVE, XSAVE2, XCRS.

KVM keeps this state as an XSAVE image whose header says which components are not initial. KVM_SET_FPU writes the legacy
area and not the header, so what it puts into a component that nobody has used yet is lost when the guest is entered.
Here the engine has the state; which components are in use is asked only when KVM_SET_FPU is called.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu import fpu

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_XCRS_SIZE = 8 + 16 * 16 + 128


class FpuState:
    """x87 and SSE of one vCPU."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._present = 0  # components that KVM_SET_XSAVE said were not initial
        self.stale = False  # KVM_SET_FPU wrote a component that is not in use

    def handlers(self) -> dict[int, Callable[[int, Caller], int]]:
        """Request number -> method."""
        return {
            ioctls.KVM_GET_FPU: self._get_fpu,
            ioctls.KVM_SET_FPU: self._set_fpu,
            ioctls.KVM_GET_XSAVE: self._get_xsave,
            ioctls.KVM_GET_XSAVE2: self._get_xsave,
            ioctls.KVM_SET_XSAVE: self._set_xsave,
            ioctls.KVM_GET_XCRS: self._get_xcrs,
            ioctls.KVM_SET_XCRS: self._set_xcrs,
        }

    def _get_fpu(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, fpu.to_kvm_fpu(fpu.save(self._cpu)))
        return 0

    def _set_fpu(self, arg: int, caller: Caller) -> int:
        before = fpu.save(self._cpu)
        data = caller.memory.read(arg, fpu.FPU_SIZE)
        self._present |= fpu.in_use(before)
        fpu.restore(self._cpu, fpu.from_kvm_fpu(data, before))
        self.stale = self._present != fpu.SUPPORTED
        return 0

    def drop_stale(self) -> None:
        """KVM_RUN after KVM_SET_FPU: a component that KVM's XSAVE header calls initial is loaded as such."""
        self.stale = False
        fpu.restore(self._cpu, fpu.initialise(fpu.save(self._cpu), self._present))

    def _get_xsave(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, fpu.to_xsave(fpu.save(self._cpu)))
        return 0

    def _set_xsave(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, fpu.XSAVE_SIZE)
        try:
            fpu.restore(self._cpu, fpu.from_xsave(data))
        except fpu.BadState:
            raise Errno(errno.EINVAL) from None
        self._present, self.stale = fpu.present(data), False
        return 0

    def _get_xcrs(self, arg: int, caller: Caller) -> int:
        value = struct.unpack_from("<Q", self._cpu.native.state, self._cpu.where.xcr0)[0]
        caller.memory.write(arg, struct.pack("<IIIIQ", 1, 0, 0, 0, value).ljust(_XCRS_SIZE, b"\0"))
        return 0

    def _set_xcrs(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, _XCRS_SIZE)
        count, flags = struct.unpack_from("<II", data)
        if count > 16 or flags:
            raise Errno(errno.EINVAL)
        for number in range(count):
            register, value = struct.unpack_from("<I4xQ", data, 8 + 16 * number)
            if register:
                continue  # only XCR0 exists; KVM passes over the others, and does not look behind it
            if value & ~fpu.SUPPORTED or not value & fpu.X87:
                raise Errno(errno.EINVAL)
            struct.pack_into("<Q", self._cpu.native.state, self._cpu.where.xcr0, value)
            break
        return 0
