"""vCPUs that are made and never asked anything.

A processor costs 3 MiB and 6 ms, most of it the engine's. A VMM may make a thousand vCPUs to see whether it can, and start few:
so the processor, and with it everything that wants one, comes with the first ioctl on the vCPU, except for its statistics.
Interrupts reach a vCPU without one: they are kept in its local APIC and in kvm_run's kick flag (activity.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.model.cpu import fpu, sregs
from kvmapi.model.cpu.cpu import Cpu
from kvmapi.model.files import Handler

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile


class Unmade(dict[int, Handler]):
    """The handlers of a vCPU: `first` until another one is looked for, then those of `make`, too."""

    def __init__(self, make: Callable[[], dict[int, Handler]], first: dict[int, Handler]) -> None:
        super().__init__(first)
        self._make: Callable[[], dict[int, Handler]] | None = make
        self._making = threading.Lock()

    def get(self, request: int, default: object = None) -> Handler:
        if self._make is not None and request not in self:
            with self._making:
                if self._make is not None:
                    self.update(self._make())
                    self._make = None
        return super().get(request, default)  # type: ignore[arg-type]

    def __delitem__(self, request: int) -> None:
        self.get(request)
        super().__delitem__(request)


def made_cpu(vcpu: VcpuFile) -> Cpu:
    """The processor of a vCPU, in its reset state: made now, unless another thread has made it meanwhile."""
    with vcpu.making:
        there: Cpu | None = vcpu.__dict__.get("cpu")
        if there is not None:
            return there
        cpu = Cpu(vcpu.vm.physical, vcpu.page, vcpu.is_boot, vcpu.vm.exits)
        cpu.stats = vcpu.stats
        vcpu.clock.attach(cpu.msrs)
        cpu.lapic = cpu.msrs.lapic = vcpu.activity.lapic
        if cpu.lapic is not None:
            cpu.lapic.until = vcpu.clock.until
            cpu.code.watch_flags = True  # interrupts will wait for IF: scan for what sets it from the start
        sregs.reset(cpu)
        fpu.reset(cpu)
        vcpu.__dict__["cpu"] = cpu
        return cpu
