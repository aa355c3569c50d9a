"""The interrupt bus of a VM that has all its interrupt controllers in the kernel: beside the local APICs an IOAPIC, two PICs
and, once it is asked for, a PIT. Lock and messages are message_bus.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.irq import pic, pit, routing
from kvmapi.model.irq.ioapic import IoApic
from kvmapi.model.irq.message_bus import PIT_SOURCE, RESAMPLE_SOURCE, MessageBus

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore

Device = pic.Pics | pit.Pit


class InterruptBus(MessageBus):
    """Made by KVM_CREATE_IRQCHIP."""

    def __init__(self) -> None:
        super().__init__(routing.default())
        self.ioapic = IoApic(self.deliver, self._acked, self._resample)
        self.pics = pic.Pics(self._pics_changed, lambda line: self._acked(line & 7, line >> 3))
        self.pit: pit.Pit | None = None
        # Whose an access of a port is: the device, and where its ports end.
        self.ports: dict[int, tuple[Device, int]] = {port: (self.pics, (port | 1) + 1) for port in pic.PORTS}

    def destroy(self) -> None:
        super().destroy()
        with self.lock:
            if self.pit is not None:
                self.pit.destroy()

    # ---- the IOAPIC
    def eoi(self, vector: int, level_triggered: bool = True) -> None:
        """A local APIC ended an interrupt."""
        with self:
            self._ended(vector, level_triggered)

    def ended(self, lapic: LapicCore, vector: int, level_triggered: bool) -> None:
        self._ended(vector, level_triggered)

    def _ended(self, vector: int, level_triggered: bool) -> None:
        if level_triggered or self.resamplers or self.pit is not None:
            self.ioapic.eoi(vector, level_triggered)

    def _pin(self, route: routing.Route, level: bool, source: int) -> int:
        if route.chip == kvm.KVM_IRQCHIP_IOAPIC:
            return self.ioapic.line(route.pin, level, source)
        return self.pics.line(route.pin + 8 * route.chip, level, source)

    def _acked(self, pin: int, chip: int = kvm.KVM_IRQCHIP_IOAPIC) -> None:
        """The guest ended the interrupt of a pin: resampling irqfds let go of the line and tell their owners."""
        gsi = self.routes.gsi_of_pin(pin, chip)
        if gsi == 0 and self.pit is not None:
            self.pit.acked()
        notify = None if gsi is None else self.resamplers.get(gsi)
        if gsi is not None and notify is not None:
            self._line(gsi, False, RESAMPLE_SOURCE)
            self.later(notify)

    def _resample(self, pin: int) -> bool:
        """Ask the owners of a level that may be over, without an interrupt; False where nobody can be asked."""
        gsi = self.routes.gsi_of_pin(pin)
        notify = None if gsi is None else self.resamplers.get(gsi)
        if notify is not None:
            self.later(notify)
        return notify is not None

    # ---- PICs and PIT
    @property
    def pics_ask(self) -> bool:
        return self.pics.output

    def acknowledge_pics(self) -> int:
        return self.pics.acknowledge()

    def _pics_changed(self) -> None:
        for lapic in self._lapics.values():
            lapic.settle()

    def create_pit(self, *, speaker: bool) -> None:
        """KVM_CREATE_PIT2; `speaker`: with the port of its gate."""
        with self:
            self.pit = pit.Pit(self._tick, self._locked, time.monotonic_ns)
            self.ports.update(dict.fromkeys(pit.PORTS, (self.pit, pit.PORTS[-1] + 1)))
            if speaker:
                self.ports[pit.SPEAKER] = (self.pit, pit.SPEAKER + 4)

    def _locked(self, action: Callable[[], None]) -> None:
        with self:
            if not self._closed:
                action()

    def _tick(self) -> None:
        """The PIT's output rises, and falls. Where LINT0 is an NMI, it is one as well: the guest's watchdog."""
        self._line(0, True, PIT_SOURCE)
        self._line(0, False, PIT_SOURCE)
        for lapic in self._lapics.values():
            if lapic.lint0_is_nmi:
                self.later(lapic.target.nmi)

    def port_read(self, port: int, size: int) -> bytes | None:
        """IN by a guest; None: no device of ours."""
        found = self.ports.get(port)
        if found is None or port + size > found[1]:
            return None
        with self:
            return found[0].read(port, size)

    def port_write(self, port: int, data: bytes) -> bool:
        """OUT by a guest; False: no device of ours."""
        found = self.ports.get(port)
        if found is None or port + len(data) > found[1]:
            return False
        with self:
            found[0].write(port, data)
        return True
