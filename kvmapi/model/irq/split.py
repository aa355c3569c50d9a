"""The interrupt bus of a VM with KVM_CAP_SPLIT_IRQCHIP: local APICs in the kernel, PICs, IOAPIC and PIT in user space.

Everything that reaches a local APIC is a message. The IOAPIC of user space sends them by KVM_SIGNAL_MSI, or through the
routes of GSIs; those below `reserved` are its pins. For a level-triggered one it must hear when the guest ends the interrupt
(KVM_EXIT_IOAPIC_EOI). Each local APIC keeps the vectors whose end is to be told, and finds them out anew (`scan`, before the
guest is entered) when the routes or the APICs' addresses have changed: those of the routes that mean it, and those which it
has waiting or in service from routes that do not mean it any more. The PICs' vector comes with KVM_INTERRUPT
(`LapicCore.inject`). Source: kvm_scan_ioapic_routes in arch/x86/kvm/irq.c, kvm_ioapic_send_eoi in lapic.c (7.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.irq import registers as r
from kvmapi.model.irq import routing
from kvmapi.model.irq.directory import matches
from kvmapi.model.irq.message_bus import MessageBus
from kvmapi.model.irq.target import Message

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore


class SplitBus(MessageBus):
    """Made by KVM_ENABLE_CAP. There are no routes until user space sets some."""

    split = True

    def __init__(self, reserved: int) -> None:
        super().__init__(routing.Routes({}))
        self._reserved = reserved
        self._pins: tuple[Message, ...] = ()  # what the level-triggered pins of user space's IOAPIC send
        self.suppression: bool | None = None  # KVM_X2APIC_{ENABLE,DISABLE}_SUPPRESS_EOI_BROADCAST; None: as it always was

    @property
    def offers_suppression(self) -> bool:
        """Do the APICs say that a guest can keep the ends of interrupts to itself? By default they say so, and it cannot."""
        return self.suppression is not False

    # ---- which ends are told
    def add(self, lapic: LapicCore) -> None:
        super().add(lapic)
        with self:
            self._scan_all()

    def addresses_changed(self) -> None:
        super().addresses_changed()
        self._scan_all()

    def set_routes(self, routes: routing.Routes) -> None:
        with self:
            self.routes = routes
            self.find_pins()

    def find_pins(self) -> None:
        """Routes, or how their addresses are read, have changed. Inside the lock."""
        found = []
        for route in self.routes.below(self._reserved):
            message = routing.msi_message(route.address, route.data, self.wide_ids) if route.type == kvm.KVM_IRQ_ROUTING_MSI else None
            if message is not None and message.level_triggered:
                found.append(message)
        self._pins = tuple(found)
        self._scan_all()

    def _scan_all(self) -> None:
        for lapic in self._lapics.values():
            if not lapic.scan_due:
                lapic.scan_due = True
                self.later(lapic.target.poke)

    def scan(self, lapic: LapicCore) -> None:
        lapic.scan_due = False
        if not lapic.on:
            return  # it keeps what it had
        lapic.told, lapic.stale = 0, -1
        for message in self._pins:
            if matches(lapic, message, None, self.broadcast_quirk):
                lapic.told |= 1 << message.vector
            elif lapic.holds(message.vector):
                lapic.told |= 1 << message.vector
                lapic.stale = max(lapic.stale, message.vector)

    def ended(self, lapic: LapicCore, vector: int, level_triggered: bool) -> None:
        """Whether it was level-triggered is not looked at: the vector decides."""
        if not lapic.told >> vector & 1:
            return
        if vector == lapic.stale:  # the last one from an old route: its end is nobody's concern any more
            lapic.scan_due = True
        if not (self.suppression and lapic.spiv & r.SPIV_DIRECTED):
            lapic.ended_vector = vector
        self.later(lapic.target.poke)
