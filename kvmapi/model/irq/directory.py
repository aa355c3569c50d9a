"""Which local APICs a destination means: tables by physical and logical id, as KVM keeps them, and the rules one by one.

The tables are what KVM looks into first (its "optimized map"), and they decide more than speed: a logical destination
reaches only APICs that are enabled in software, and of several that an interrupt may choose from it takes the one at
the place that its vector names, even if nobody is there. Where ids are ambiguous (two APICs with one id; logical ids of
different formats, or that share bits) there is no table, and each APIC is asked. Source: arch/x86/kvm/lapic.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmapi.model.irq.target import ALL, SELF, Message

if TYPE_CHECKING:
    from kvmapi.model.irq.core import LapicCore

BROADCAST, X2_BROADCAST = 0xFF, 0xFFFFFFFF
_FLAT, _CLUSTER = 0xFFFFFFFF, 0x0FFFFFFF  # the destination format register
NOBODY, X2, FLAT, CLUSTER, MIXED = range(5)  # formats of logical ids


class Directory:
    """The tables for one state of the APICs. `physical` is None where ids collide; `format` is MIXED where logical ids
    do.
    """

    def __init__(self, lapics: Iterable[LapicCore], wide_ids: bool) -> None:
        self.physical: dict[int, LapicCore] | None = {}
        self.format = NOBODY
        self._logical: dict[int, LapicCore] = {}  # by cluster * 16 + bit
        self._highest = BROADCAST
        any_ = False
        for lapic in lapics:
            any_ = True
            if lapic.on:
                self._highest = max(self._highest, lapic.target.id)
                self._enter(lapic, wide_ids)
                self._enter_logical(lapic)
        if not any_:
            self.physical = None

    def _enter(self, lapic: LapicCore, wide_ids: bool) -> None:
        table = self.physical
        if table is None:
            return
        if wide_ids:  # large ids reach an xAPIC too, and do not collide with small ones
            if lapic.x2 or lapic.target.id > BROADCAST:
                table[lapic.target.id] = lapic
            if not lapic.x2:
                table.setdefault(lapic.id_register >> 24, lapic)
            return
        number = lapic.target.id if lapic.x2 else lapic.id_register >> 24
        if number in table:
            self.physical = None
        else:
            table[number] = lapic

    def _enter_logical(self, lapic: LapicCore) -> None:
        if self.format == MIXED or not lapic.software_enabled or not lapic.ldr:
            return
        wanted = X2 if lapic.x2 else FLAT if lapic.dfr == _FLAT else CLUSTER
        if self.format not in (NOBODY, wanted):
            self.format = MIXED
            return
        self.format = wanted
        if wanted == X2:
            return  # logical ids follow from the physical ones
        cluster, bits = self._places(lapic.ldr >> 24)
        if not bits:
            return
        place = cluster * 16 + bits.bit_length() - 1
        if bits & bits - 1 or place in self._logical:
            self.format = MIXED
        else:
            self._logical[place] = lapic

    def _places(self, destination: int) -> tuple[int, int]:
        """(cluster, bits) of a logical destination."""
        if self.format == X2:
            cluster = destination >> 16
            room = self._highest - cluster * 16 + 1
            return cluster, destination & (1 << max(0, min(room, 16))) - 1
        if self.format == FLAT:
            return 0, destination & 0xFF
        return (destination >> 4 & 0xF, destination & 0xF) if self.format == CLUSTER else (0, 0)

    def is_broadcast(self, message: Message, source: LapicCore | None, quirk: bool) -> bool:
        """Does the destination mean everyone? `quirk`: without KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK."""
        if quirk:
            return message.destination == (X2_BROADCAST if source is not None and source.x2 else BROADCAST)
        return message.destination == X2_BROADCAST or (message.destination == BROADCAST and self.format != X2)

    def find(self, message: Message) -> list[LapicCore] | None:
        """Who takes a message that is no broadcast and has no shorthand; None where each must be asked."""
        if self.physical is None or (message.logical and self.format == MIXED):
            return None
        if not message.logical:
            one = self.physical.get(message.destination)
            return [] if one is None else [one]
        cluster, bits = self._places(message.destination)
        places = [bit for bit in range(16) if bits >> bit & 1]
        if message.lowest_priority and places:
            places = [places[message.vector % len(places)]]
        table = self.physical if self.format == X2 else self._logical
        return [table[cluster * 16 + bit] for bit in places if cluster * 16 + bit in table]


def matches(lapic: LapicCore, message: Message, source: LapicCore | None, quirk: bool) -> bool:
    """Is this APIC meant, asked by itself?"""
    if message.shorthand:
        return message.shorthand == ALL or (lapic is source) == (message.shorthand == SELF)
    destination = message.destination
    if quirk and source is None and destination == BROADCAST and lapic.x2:
        destination = X2_BROADCAST  # an xAPIC broadcast from a device means everyone
    if destination == (X2_BROADCAST if lapic.x2 else BROADCAST):
        return True
    return _logical(lapic, destination) if message.logical else _physical(lapic, destination)


def _physical(lapic: LapicCore, destination: int) -> bool:
    if lapic.x2 or destination > BROADCAST:  # an id too large for an xAPIC is reached all the same
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
