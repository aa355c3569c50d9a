"""KVM_GET_LAPIC, KVM_SET_LAPIC and KVM_SET_VAPIC_ADDR: the vCPU side of the interrupt controllers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from kvmapi.abi import ioctls
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.irq import registers
from kvmapi.model.irq.lapic import Lapic


class HasLapic(Protocol):
    """A vCPU; `lapic` is None in a VM without KVM_CREATE_IRQCHIP."""

    @property
    def lapic(self) -> Lapic | None: ...


def handlers(vcpu: HasLapic) -> dict[int, Callable[[int, Caller], int]]:
    """Handlers by request number; to be called with the vCPU's mutex held."""

    def own() -> Lapic:
        if vcpu.lapic is None:
            raise Errno(errno.EINVAL)
        return vcpu.lapic

    def get_lapic(arg: int, caller: Caller) -> int:
        caller.memory.write(arg, own().pack())
        return 0

    def set_lapic(arg: int, caller: Caller) -> int:
        lapic = own()
        if not lapic.unpack(caller.memory.read(arg, registers.PAGE)):
            raise Errno(errno.EINVAL)
        return 0

    def set_vapic_address(arg: int, caller: Caller) -> int:
        """There is no virtual APIC page (KVM_CAP_VAPIC is 0); to say so is no error: VMMs do at every reset."""
        own()
        if any(caller.memory.read(arg, 8)):
            raise Errno(errno.EINVAL)
        return 0

    return {ioctls.KVM_GET_LAPIC: get_lapic, ioctls.KVM_SET_LAPIC: set_lapic, ioctls.KVM_SET_VAPIC_ADDR: set_vapic_address}
