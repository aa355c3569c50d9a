"""The interrupt bus of one VM: who gets a message, and the lock over all its interrupt controllers.

One lock covers every local APIC and the IOAPIC of the VM. It is entered with `with bus:`; what must happen to vCPUs
(poke, NMI, INIT, startup) and to eventfds is collected under it with `later` and done after it is released, so that no
callback runs under the lock. Names with an underscore in front, and those of the IOAPIC and of `Lapic.accept`, are for
use inside it.

Who matches a destination, and what a sender is told about it, follows arch/x86/kvm/lapic.c and irq.c: a message to
nobody counts 0; -1 is left for a broadcast that reaches no APIC that is on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.irq import routing
from kvmapi.model.irq.alarms import ALARMS
from kvmapi.model.irq.ioapic import IoApic
from kvmapi.model.irq.target import ALL, FIXED, LOWEST, NO_SHORTHAND, SELF, Message

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore

BROADCAST, X2_BROADCAST = 0xFF, 0xFFFFFFFF
USER_SOURCE, RESAMPLE_SOURCE = 1, 2  # who holds a line: bits of a set, as KVM's IRQ source ids
_FLAT, _CLUSTER = 0xFFFFFFFF, 0x0FFFFFFF  # the destination format register


class InterruptBus:
    """Made by KVM_CREATE_IRQCHIP."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ioapic = IoApic(self.deliver, self._acked, self._resample)
        self.routes = routing.default()
        self.wide_ids = False  # KVM_X2APIC_API_USE_32BIT_IDS
        self.broadcast_quirk = True  # not KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        self.resamplers: dict[int, Callable[[], None]] = {}  # by GSI: notify its resample eventfds; set by Irqfds
        self._lapics: dict[int, LapicCore] = {}
        self._moved = False  # an xAPIC id differs from the low 8 bits that are one's own: no look-up by id
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
            self._moved |= lapic.target.id >= BROADCAST

    def ids_moved(self) -> None:
        """An xAPIC id was changed."""
        self._moved = True

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
        if level_triggered or self.resamplers:
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
                one = -1  # there is no PIC
            if one >= 0:
                result = one + max(result, 0)
        return result

    def _acked(self, pin: int) -> None:
        """The guest ended the interrupt of an IOAPIC pin: resampling irqfds let go of the line and tell their owners."""
        gsi = self.routes.gsi_of_pin(pin)
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

    def deliver(self, message: Message, source: LapicCore | None = None) -> int:
        broadcast = self._is_broadcast(message, source)
        if message.mode == LOWEST and message.shorthand == NO_SHORTHAND and not message.logical and message.destination == BROADCAST:
            message = message._replace(mode=FIXED)
        found = [lapic for lapic in self._candidates(message) if lapic.on and self._matches(lapic, message, source)]
        if message.lowest_priority and (message.logical or broadcast):
            enabled = [lapic for lapic in found if lapic.software_enabled]
            found = [enabled[message.vector % len(enabled)]] if enabled else []
        if not found:
            return -1 if broadcast else 0
        return sum(lapic.accept(message.mode, message.vector, message.asserted, message.level_triggered) for lapic in found)

    def _candidates(self, message: Message) -> Iterable[LapicCore]:
        if message.shorthand != NO_SHORTHAND or message.logical or self._moved or message.destination == BROADCAST:
            return self._lapics.values()
        if message.destination == X2_BROADCAST:
            return self._lapics.values()
        one = self._lapics.get(message.destination)
        return () if one is None else (one,)

    def _is_broadcast(self, message: Message, source: LapicCore | None) -> bool:
        if message.shorthand == SELF:
            return False
        if message.shorthand != NO_SHORTHAND or not self._lapics:
            return True
        if not self.broadcast_quirk:
            return message.destination in (BROADCAST, X2_BROADCAST)
        return message.destination == (X2_BROADCAST if source is not None and source.x2 else BROADCAST)

    def _matches(self, lapic: LapicCore, message: Message, source: LapicCore | None) -> bool:
        if message.shorthand != NO_SHORTHAND:
            return message.shorthand == ALL or (lapic is source) == (message.shorthand == SELF)
        destination = message.destination
        if self.broadcast_quirk and source is None and destination == BROADCAST and lapic.x2:
            destination = X2_BROADCAST  # an xAPIC broadcast from a device means everyone
        if destination == (X2_BROADCAST if lapic.x2 else BROADCAST):
            return True
        return _logical(lapic, destination) if message.logical else _physical(lapic, destination)


def _physical(lapic: LapicCore, destination: int) -> bool:
    if lapic.x2 or destination > 0xFF:  # an id too large for an xAPIC is reached all the same
        return destination == lapic.target.id
    return destination == lapic.id_register >> 24


def _logical(lapic: LapicCore, destination: int) -> bool:
    own = lapic.ldr
    if lapic.x2:
        return own >> 16 == destination >> 16 and own & destination & 0xFFFF != 0
    own >>= 24
    if lapic.dfr == _FLAT:
        return own & destination != 0
    return lapic.dfr == _CLUSTER and own >> 4 == destination >> 4 and own & destination & 0xF != 0
