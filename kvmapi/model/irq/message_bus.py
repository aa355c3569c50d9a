"""What connects the local APICs of one VM: who gets a message, GSI routes, and the lock over all its interrupt controllers.

One lock covers every local APIC of the VM, and the IOAPIC, the PICs and the PIT where the VM has those (bus.py; split.py is
a VM whose user space has them). It is entered with `with bus:`; what must happen to vCPUs (poke, NMI, INIT, startup) and
to eventfds is collected under it with `later` and done after it is released, so that no callback runs under the lock.
Names with an underscore in front, and those of the IOAPIC and of `Lapic.accept`, are for use inside it.

Who is meant by a destination is told in directory.py. What a sender is told follows arch/x86/kvm/irq.c: a message to
nobody counts 0, or -1 where each APIC had to be asked, as for a broadcast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.irq import routing
from kvmapi.model.irq.alarms import ALARMS
from kvmapi.model.irq.directory import BROADCAST, Directory, matches
from kvmapi.model.irq.target import FIXED, SELF, Message

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore

USER_SOURCE, RESAMPLE_SOURCE, PIT_SOURCE = 1, 2, 4  # who holds a line: bits of a set, as KVM's IRQ source ids


class MessageBus:
    """Local APICs, messages and routes; what is not a message is for the classes that are made of it."""

    split = False
    """Has user space the PICs and the IOAPIC?"""

    def __init__(self, routes: routing.Routes) -> None:
        self.lock = threading.Lock()
        self.routes = routes
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

    def set_routes(self, routes: routing.Routes) -> None:
        """KVM_SET_GSI_ROUTING."""
        with self:
            self.routes = routes

    def _msi(self, address: int, data: int) -> int:
        message = routing.msi_message(address, data, self.wide_ids)
        return -22 if message is None else self.deliver(message)

    def _line(self, gsi: int, level: bool, source: int) -> int:
        result = -1
        for route in self.routes.of(gsi):
            if route.type == kvm.KVM_IRQ_ROUTING_MSI:
                one = self._msi(route.address, route.data) if level else -1
            else:
                one = self._pin(route, level, source)
            if one >= 0:
                result = one + max(result, 0)
        return result

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

    # ---- what the chips beside the local APICs do, where there are any
    @property
    def pics_ask(self) -> bool:
        """Is the output of the PICs high?"""
        return False

    @property
    def offers_suppression(self) -> bool:
        """Do the APICs of x2APIC processors say that a guest can keep the ends of interrupts to itself?"""
        return False

    def acknowledge_pics(self) -> int | None:
        """The PICs' vector, for a processor that takes it."""
        return None

    def ended(self, lapic: LapicCore, vector: int, level_triggered: bool) -> None:
        """A local APIC ended an interrupt. Inside the lock."""

    def scan(self, lapic: LapicCore) -> None:
        """Which ends of interrupts are somebody's concern may have changed (`LapicCore.scan_due`). Inside the lock."""

    def _pin(self, route: routing.Route, level: bool, source: int) -> int:
        return -1


def _accept(lapic: LapicCore, message: Message) -> int:
    return lapic.accept(message.mode, message.vector, message.asserted, message.level_triggered)
