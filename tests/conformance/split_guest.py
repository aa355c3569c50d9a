"""Guests with split interrupt controllers: what the tests of KVM_CAP_SPLIT_IRQCHIP share."""

from __future__ import annotations

from kvmapi.abi import caps
from kvmapi.exits import Exit, IoapicEoi
from kvmapi.host import Host
from tests.conformance.apic_guest import ApicGuest
from tests.conformance.snippets import Machine

PINS = 24


def split(machine: Machine, pins: int = PINS) -> None:
    machine.vm.enable_cap(caps.KVM_CAP_SPLIT_IRQCHIP, pins)


class SplitGuest(ApicGuest):
    """`ended`: the vectors of the KVM_EXIT_IOAPIC_EOI that `run` has passed over."""

    def __init__(self, host: Host, vcpus: int = 1) -> None:
        self.ended: list[int] = []
        super().__init__(host, vcpus)

    def make_controllers(self) -> None:
        split(self)

    def run(self, number: int = 0) -> Exit:
        exit = super().run(number)
        while isinstance(exit, IoapicEoi):
            self.ended.append(exit.vector)
            exit = super().run(number)
        return exit

    def ends(self) -> list[int]:
        """What was told so far, and forget it."""
        found, self.ended = self.ended, []
        return found
