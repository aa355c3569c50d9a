"""KVM_CAP_SPLIT_IRQCHIP: the end of a level-triggered interrupt is told to user space, whose IOAPIC sent it.

Source: kvm_scan_ioapic_routes in arch/x86/kvm/irq.c.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.abi import caps, irq, kvm
from kvmapi.exits import IoapicEoi
from tests.conformance.apic_guest import (
    APIC,
    BASE_MSR,
    END,
    EOI,
    LDR,
    MESSAGE,
    MSI,
    ON,
    OPEN,
    SPIV,
    STORE,
    WRMSR,
    alarm,
    entry,
    needs_service,
)
from tests.conformance.snippets import CODE, DATA, STACK, Machine
from tests.conformance.split_guest import SplitGuest

__all__ = ["alarm"]  # used by its name

LEVEL_DATA, DIRECTED = 0x8000, 1 << 12


def pin(gsi: int, vector: int, destination: int = 0, *, level: bool = True) -> irq.kvm_irq_routing_entry:
    return entry(gsi, MESSAGE, MSI | destination << 12, 0, vector | (LEVEL_DATA if level else 0))


def end_of(guest: SplitGuest, *vectors: int) -> list[int]:
    """The guest takes each as a message, and ends it; what user space was told."""
    for vector in vectors:
        assert guest.vm.signal_msi(MSI, vector) == 1
        guest.do((OPEN,), END)
    return guest.ends()


def test_ends_are_told(any_host: Any) -> None:
    """The vector decides, not how the interrupt came."""
    with SplitGuest(any_host) as guest:
        needs_service(guest)
        guest.do(ON)
        table = [pin(0, 0x41), pin(23, 0x42), pin(24, 0x43), pin(3, 0x44, level=False), pin(4, 0x45, 5)]
        guest.vm.set_gsi_routing(table)
        assert end_of(guest, 0x41, 0x42) == [0x41, 0x42]
        assert end_of(guest, 0x43) == [], "not one of the reserved"
        assert end_of(guest, 0x44) == [], "edge-triggered"
        assert end_of(guest, 0x45) == [], "for another processor"
        assert guest.vm.irq_line(0, 1) == 1
        guest.do((OPEN,), END, END)
        assert guest.ends() == [0x41], "an end without an interrupt is nobody's"
        guest.vm.set_gsi_routing([])
        assert end_of(guest, 0x41) == []


def test_an_end_is_told_at_once(any_host: Any) -> None:
    """The instruction behind it was not executed; in x2APIC mode the same."""
    with SplitGuest(any_host) as guest:
        needs_service(guest)
        guest.do(ON)
        guest.vm.set_gsi_routing([pin(1, 0x41)])
        guest.vm.signal_msi(MSI, 0x41)
        guest.do((OPEN,))
        for number in (0, 1):
            steps = [(STORE, APIC + EOI, 0), (STORE, 0xD0000000, 1)] if number == 0 else [(WRMSR, 0x80B, 0), (STORE, 0xD0000000, 1)]
            guest.put(DATA, b"".join(struct.pack("<IIQ", *step) for step in steps))
            guest.regs(rip=CODE, rsp=STACK, rflags=2, rsi=DATA)
            exit = Machine.run(guest)
            assert exit == IoapicEoi(0x41)
            assert Machine.run(guest).REASON == kvm.KVM_EXIT_MMIO
            guest.do((WRMSR, BASE_MSR, 0xFEE00D00), (WRMSR, 0x80F, 0x1FF))
            guest.vm.signal_msi(MSI, 0x41)
            guest.do((OPEN,))


def test_what_an_old_route_brought_is_told_once(any_host: Any) -> None:
    with SplitGuest(any_host, vcpus=2) as guest:
        needs_service(guest)
        guest.do(ON)
        guest.vm.set_gsi_routing([pin(1, 0x41)])
        assert guest.vm.irq_line(1, 1) == 1
        guest.do((OPEN,))
        guest.vm.set_gsi_routing([pin(1, 0x41, 1)])
        guest.do(END)
        assert guest.ends() == [0x41], "it was in service when its route went elsewhere"
        assert end_of(guest, 0x41) == []


def test_addresses_of_the_apics_count(any_host: Any) -> None:
    """A logical destination begins to mean a processor when the guest writes its logical id."""
    with SplitGuest(any_host) as guest:
        needs_service(guest)
        guest.do(ON)
        guest.vm.set_gsi_routing([entry(1, MESSAGE, MSI | 2 << 12 | 4, 0, LEVEL_DATA | 0x41)])
        guest.do()  # what waits when KVM looks at new routes is told in any case
        assert end_of(guest, 0x41) == []
        guest.do((STORE, APIC + LDR, 2 << 24))
        assert end_of(guest, 0x41) == [0x41]


@pytest.mark.parametrize(("flags", "told"), [(0, [0x41]), (4, []), (8, [0x41])])
def test_suppression(any_host: Any, flags: int, told: list[int]) -> None:
    """A guest that keeps the ends to itself: by default KVM offers that and tells them all the same."""
    with SplitGuest(any_host) as guest:
        needs_service(guest)
        if flags & ~guest.vm.check_extension(caps.KVM_CAP_X2APIC_API):
            pytest.skip("a kernel before these flags")
        guest.vm.enable_cap(caps.KVM_CAP_X2APIC_API, flags)
        guest.vcpu.set_cpuid2(guest.system.supported_cpuid())
        guest.do((STORE, APIC + SPIV, 0x1FF | DIRECTED))
        assert guest.lapic()[SPIV] == 0x1FF | (0 if flags == 8 else DIRECTED)
        guest.vm.set_gsi_routing([pin(1, 0x41)])
        assert end_of(guest, 0x41) == told
