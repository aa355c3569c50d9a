"""GSI routing: which pin or which message a global system interrupt is.

After KVM_CREATE_IRQCHIP GSI n is IOAPIC pin n and, below 16, line n of the PICs, of which the slave has the upper
eight. Checks stand in KVM's order (virt/kvm/irqchip.c, arch/x86/kvm/irq.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from kvmapi.abi import kvm
from kvmapi.model.irq.ioapic import PINS
from kvmapi.model.irq.target import Message

MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES
ENTRY = struct.Struct("<IIII4I16x")  # kvm_irq_routing_entry
_PIC_PINS = 8


class Route(NamedTuple):
    """One way of one GSI. `pin` and `chip` for KVM_IRQ_ROUTING_IRQCHIP, `address` and `data` for _MSI."""

    type: int
    chip: int = -1
    pin: int = -1
    address: int = 0
    data: int = 0


class Routes:
    """The table of a VM; replaced as a whole."""

    def __init__(self, by_gsi: dict[int, tuple[Route, ...]]) -> None:
        self._by_gsi = by_gsi
        self._gsi_of_pin = {(route.chip, route.pin): gsi for gsi, routes in by_gsi.items() for route in routes if route.chip >= 0}

    def of(self, gsi: int) -> tuple[Route, ...]:
        """Where a GSI goes."""
        return self._by_gsi.get(gsi, ())

    def below(self, end: int) -> Iterator[Route]:
        """Where the GSIs below `end` go."""
        return (route for gsi, routes in self._by_gsi.items() if gsi < end for route in routes)

    def gsi_of_pin(self, pin: int, chip: int = kvm.KVM_IRQCHIP_IOAPIC) -> int | None:
        """The GSI that a pin belongs to: the last one that names it."""
        return self._gsi_of_pin.get((chip, pin))


def default() -> Routes:
    """What KVM_CREATE_IRQCHIP sets up."""
    table: dict[int, tuple[Route, ...]] = {}
    for gsi in range(PINS):
        ioapic = Route(kvm.KVM_IRQ_ROUTING_IRQCHIP, kvm.KVM_IRQCHIP_IOAPIC, gsi)
        pic = Route(kvm.KVM_IRQ_ROUTING_IRQCHIP, gsi // _PIC_PINS, gsi % _PIC_PINS)
        table[gsi] = (ioapic, pic) if gsi < 2 * _PIC_PINS else (ioapic,)
    return Routes(table)


def from_entries(data: bytes, wide_ids: bool, *, chips: bool = True) -> Routes | None:
    """The table that user space gives as kvm_irq_routing_entry; None where KVM refuses it (EINVAL). `chips`: has the VM pins?"""
    table: dict[int, tuple[Route, ...]] = {}
    rows = list(ENTRY.iter_unpack(data))
    if any(row[0] >= MAX_ROUTES for row in rows):
        return None
    for gsi, kind, flags, _, *rest in rows:
        others = table.get(gsi, ())
        route = _route(kind, flags, rest, wide_ids)
        if route is None or (route.chip >= 0 and not chips):
            return None
        if any(kvm.KVM_IRQ_ROUTING_MSI in (route.type, other.type) or other.chip == route.chip for other in others):
            return None
        table[gsi] = (*others, route)
    return Routes(table)


def _route(kind: int, flags: int, rest: list[int], wide_ids: bool) -> Route | None:
    if kind == kvm.KVM_IRQ_ROUTING_MSI:
        low, high, data, _ = rest
        if flags & ~kvm.KVM_MSI_VALID_DEVID or (wide_ids and high & 0xFF):
            return None
        return Route(kind, address=high << 32 | low, data=data)
    if kind != kvm.KVM_IRQ_ROUTING_IRQCHIP or flags:
        return None
    chip, pin = rest[:2]
    if chip in (kvm.KVM_IRQCHIP_PIC_MASTER, kvm.KVM_IRQCHIP_PIC_SLAVE):
        return Route(kind, chip, pin) if pin < _PIC_PINS else None
    return Route(kind, chip, pin) if chip == kvm.KVM_IRQCHIP_IOAPIC and pin < PINS else None


def msi_message(address: int, data: int, wide_ids: bool) -> Message | None:
    """What a message-signalled interrupt says. The address above bits 19:12 is not looked at, as in KVM; with 32-bit
    ids, bits 63:40 are the upper part of the destination, and bits 39:32 must be clear (None).
    """
    destination = address >> 12 & 0xFF
    if wide_ids:
        if address >> 32 & 0xFF:
            return None
        destination |= address >> 32 & 0xFFFFFF00
    return Message(
        vector=data & 0xFF,
        mode=data >> 8 & 7,
        destination=destination,
        logical=bool(address & 4),
        level_triggered=bool(data & 0x8000),
        hint=bool(address & 8),
    )
