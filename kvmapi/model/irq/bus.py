"""The interrupt bus of one VM: who gets a message, and the lock over all its interrupt controllers.

One lock covers every local APIC, the IOAPIC, the PICs and the PIT of the VM. It is entered with `with bus:`; what must happen to vCPUs
(poke, NMI, INIT, startup) and to eventfds is collected under it with `later` and done after it is released, so that no
callback runs under the lock. Names with an underscore in front, and those of the IOAPIC and of `Lapic.accept`, are for
use inside it.

Who is meant by a destination is told in directory.py. What a sender is told follows arch/x86/kvm/irq.c: a message to
nobody counts 0, or -1 where each APIC had to be asked, as for a broadcast.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.irq import pic, pit, routing
from kvmapi.model.irq.alarms import ALARMS
from kvmapi.model.irq.directory import BROADCAST, Directory, matches
from kvmapi.model.irq.ioapic import IoApic
from kvmapi.model.irq.target import FIXED, SELF, Message

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore

USER_SOURCE, RESAMPLE_SOURCE, PIT_SOURCE = 1, 2, 4  # who holds a line: bits of a set, as KVM's IRQ source ids
Device = pic.Pics | pit.Pit


class InterruptBus:
    """Made by KVM_CREATE_IRQCHIP."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ioapic = IoApic(self.deliver, self._acked, self._resample)
        self.pics = pic.Pics(self._pics_changed, lambda line: self._acked(line & 7, line >> 3))
        self.pit: pit.Pit | None = None
        # Whose an access of a port is: the device, and where its ports end.
        self.ports: dict[int, tuple[Device, int]] = {port: (self.pics, (port | 1) + 1) for port in pic.PORTS}
        self.routes = routing.default()
        self.cycle_ns = 1  # of the local APICs' timers: KVM_CAP_X86_APIC_BUS_CYCLES_NS
        self.wide_ids = False  # KVM_X2APIC_API_USE_32BIT_IDS
        self.broadcast_quirk = True  # not KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        self.resamplers: dict[int, Callable[[], None]] = {}  # by GSI: notify its resample eventfds; set by Irqfds
        self._lapics: dict[int, LapicCore] = {}
        self._directory: Directory | None = None
        self._after: list[Callable[[], None]] = []
        self._closed = False
        ALARMS.open()

    def destroy(self) -> None:
        """The VM goes away."""
        with self.lock:
            closed, self._closed = self._closed, True
            for lapic in self._lapics.values():
                ALARMS.set(lapic, None)
            self._lapics = {}
            self.resamplers = {}
            if self.pit is not None:
                self.pit.destroy()
        if not closed:
            ALARMS.close()

    # ---- the lock
    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        after, self._after = self._after, []
        self.lock.release()
        for action in after:
            action()

    def later(self, action: Callable[[], None]) -> None:
        """Do it when the lock has been released."""
        self._after.append(action)

    # ---- targets
    def add(self, lapic: LapicCore) -> None:
        """A vCPU was made."""
        with self:
            self._lapics[lapic.target.id] = lapic
            self._directory = None

    def addresses_changed(self) -> None:
        """What decides who is meant was changed: mode, ids, enabled or not."""
        self._directory = None

    # ---- sending
    def send(self, message: Message, source: LapicCore | None = None) -> int:
        """Deliver a message; how many APICs took it, or -1."""
        with self:
            return self.deliver(message, source)

    def msi(self, address: int, data: int) -> int:
        """A message-signalled interrupt, as a write of `data` to `address` (64 bits): KVM_SIGNAL_MSI's result. -EINVAL
        for an address that 32-bit ids do not allow.
        """
        with self:
            return self._msi(address, data)

    def line(self, gsi: int, level: bool, source: int = USER_SOURCE) -> int:
        """Raise or lower a GSI: KVM_IRQ_LINE_STATUS's status. Below 0: ignored (masked, or not routed), 0: merged with
        one that waits, above 0: how many APICs took it.
        """
        with self:
            return self._line(gsi, level, source)

    def eoi(self, vector: int, level_triggered: bool = True) -> None:
        """A local APIC ended an interrupt."""
        with self:
            self.ended(vector, level_triggered)

    def ended(self, vector: int, level_triggered: bool) -> None:
        """The same, inside the lock."""
        if level_triggered or self.resamplers or self.pit is not None:
            self.ioapic.eoi(vector, level_triggered)

    def _msi(self, address: int, data: int) -> int:
        message = routing.msi_message(address, data, self.wide_ids)
        return -22 if message is None else self.deliver(message)

    def _line(self, gsi: int, level: bool, source: int) -> int:
        result = -1
        for route in self.routes.of(gsi):
            if route.type == kvm.KVM_IRQ_ROUTING_MSI:
                one = self._msi(route.address, route.data) if level else -1
            elif route.chip == kvm.KVM_IRQCHIP_IOAPIC:
                one = self.ioapic.line(route.pin, level, source)
            else:
                one = self.pics.line(route.pin + 8 * route.chip, level, source)
            if one >= 0:
                result = one + max(result, 0)
        return result

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

    def deliver(self, message: Message, source: LapicCore | None = None) -> int:
        """`send`, inside the lock."""
        if message.shorthand == SELF and source is not None:
            return _accept(source, message)
        if self._directory is None:
            self._directory = Directory(self._lapics.values(), self.wide_ids)
        directory, found = self._directory, None
        if not message.shorthand and not directory.is_broadcast(message, source, self.broadcast_quirk):
            found = directory.find(message)
        if found is not None:
            return sum(_accept(lapic, message) for lapic in found)
        if message.lowest_priority and not message.logical and message.destination == BROADCAST:
            message = message._replace(mode=FIXED)
        asked = [lapic for lapic in self._lapics.values() if lapic.on and matches(lapic, message, source, self.broadcast_quirk)]
        if message.lowest_priority:
            enabled = [lapic for lapic in asked if lapic.software_enabled]
            asked = [enabled[message.vector % len(enabled)]] if enabled else []
        return sum(_accept(lapic, message) for lapic in asked) if asked else -1


def _accept(lapic: LapicCore, message: Message) -> int:
    return lapic.accept(message.mode, message.vector, message.asserted, message.level_triggered)
