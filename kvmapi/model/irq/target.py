"""Who takes interrupts, and what one interrupt message says.

`Target` is what the local APIC needs of a vCPU; `Message` is an interrupt on its way, from an ICR, an IOAPIC pin or an
MSI. Numbers: AMD64 APM volume 2, chapter 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from kvmapi.model.irq.lapic import Lapic

FIXED, LOWEST, SMI, REMOTE_READ, NMI, INIT, STARTUP, EXTINT = range(8)  # delivery modes
NO_SHORTHAND, SELF, ALL, OTHERS = range(4)


class Target(Protocol):
    """A vCPU. Its methods are called from any thread, without any lock of the interrupt controllers."""

    id: int  # the APIC id
    lapic: Lapic | None

    def poke(self) -> None:
        """Something may have become pending: leave the guest, or wake from HLT, and look."""

    def nmi(self) -> None:
        """An NMI arrived."""

    def init(self) -> None:
        """An INIT arrived."""

    def sipi(self, vector: int) -> None:
        """A startup IPI arrived."""


class Message(NamedTuple):
    """One interrupt message. `destination` is an APIC id, or a logical destination where `logical`."""

    vector: int
    mode: int
    destination: int
    logical: bool = False
    level_triggered: bool = False
    asserted: bool = True
    shorthand: int = NO_SHORTHAND
    hint: bool = False  # an MSI's redirection hint: any one of the destinations

    @property
    def lowest_priority(self) -> bool:
        """Is it for one of its destinations only?"""
        return self.mode == LOWEST or self.hint
