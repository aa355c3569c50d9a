"""A SplitBus and its local APICs without vCPUs, and what the model alone promises about KVM_INTERRUPT."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvmapi.abi import caps, kvm
from kvmapi.model.irq import registers as r
from kvmapi.model.irq import routing
from kvmapi.model.irq.core import EXTERNAL
from kvmapi.model.irq.routing import Route, Routes
from kvmapi.model.irq.split import SplitBus
from kvmapi.model.irq.target import EXTINT
from tests.conformance.snippets import LongGuest, code
from tests.model.lapics import LINT0_ENTRY, MASKED, Vcpu

LEVEL = 0x8000
IF = 0x200


@pytest.fixture
def bus() -> Iterator[SplitBus]:
    made = SplitBus(24)
    yield made
    made.destroy()


def route(vector: int, destination: int = 0) -> tuple[Route, ...]:
    return (Route(kvm.KVM_IRQ_ROUTING_MSI, address=0xFEE00000 | destination << 12, data=vector | LEVEL),)


def woken(vcpu: Vcpu) -> bool:
    """Was it poked since it was asked last?"""
    found = vcpu.poked.is_set()
    vcpu.poked.clear()
    return found


def settle(*vcpus: Vcpu) -> None:
    """What the vCPUs' threads do before they enter their guests."""
    for vcpu in vcpus:
        if vcpu.apic.scan_due:
            vcpu.apic.scan()
        vcpu.poked.clear()


def end(vcpu: Vcpu, vector: int) -> int | None:
    """It takes the vector and ends it: what user space is to be told."""
    vcpu.apic.accept(0, vector)
    while vcpu.apic.acknowledge() != vector:
        pass
    vcpu.apic.write(r.EOI, 4, 0)
    found, vcpu.apic.ended_vector = vcpu.apic.ended_vector, None
    return found


def test_everyone_looks_again_when_routes_or_addresses_change(bus: SplitBus) -> None:
    one, two = (Vcpu(number, bus) for number in range(2))
    one.start(), two.start()
    settle(one, two)
    assert not woken(one) and not woken(two)
    bus.set_routes(Routes({3: route(0x41, 1)}))
    assert woken(one) and woken(two)
    assert end(two, 0x41) is None, "the old answer stands until the guest is entered"
    settle(one, two)
    assert end(one, 0x41) is None and end(two, 0x41) == 0x41
    assert woken(two), "to leave the guest"
    two.apic.write(r.ID, 4, 7 << 24)
    assert woken(one)
    settle(one, two)
    assert end(two, 0x41) is None


def test_an_apic_that_is_off_keeps_its_answer(bus: SplitBus) -> None:
    vcpu = Vcpu(0, bus)
    vcpu.start()
    bus.set_routes(Routes({3: route(0x41)}))
    settle(vcpu)
    assert vcpu.apic.set_base(0xFEE00100, host=True)
    bus.set_routes(Routes({}))
    settle(vcpu)
    assert vcpu.apic.told == 1 << 0x41 and not vcpu.apic.scan_due


def test_the_highest_of_an_old_route_ends_the_looking(bus: SplitBus) -> None:
    """Until its end, the others that waited are told too; then nothing is."""
    vcpu = Vcpu(0, bus)
    vcpu.start()
    for vector in (0x41, 0x51):
        vcpu.apic.accept(0, vector)
    bus.set_routes(Routes({1: route(0x41, 5), 2: route(0x51, 5)}))
    settle(vcpu)
    assert (vcpu.apic.told, vcpu.apic.stale) == (1 << 0x41 | 1 << 0x51, 0x51)
    assert vcpu.apic.acknowledge() == 0x51
    vcpu.apic.write(r.EOI, 4, 0)
    assert vcpu.apic.ended_vector == 0x51 and vcpu.apic.scan_due
    settle(vcpu)
    assert (vcpu.apic.told, vcpu.apic.stale) == (1 << 0x41, 0x41)


def test_routes_above_the_reserved_and_pins_are_nobodys(bus: SplitBus) -> None:
    vcpu = Vcpu(0, bus)
    vcpu.start()
    bus.set_routes(Routes({24: route(0x41), 23: route(0x42)}))
    settle(vcpu)
    assert vcpu.apic.told == 1 << 0x42
    pin = routing.ENTRY.pack(1, kvm.KVM_IRQ_ROUTING_IRQCHIP, 0, 0, kvm.KVM_IRQCHIP_IOAPIC, 1, 0, 0)
    assert routing.from_entries(pin, False) is not None and routing.from_entries(pin, False, chips=False) is None


def test_a_vector_waits_for_lint0(bus: SplitBus) -> None:
    """The thread is woken when LINT0 opens: a window may wait for that."""
    boot, other = (Vcpu(number, bus) for number in range(2))
    settle(boot, other)
    assert boot.apic.has_room and not other.apic.has_room
    assert boot.apic.inject(0x21) and not boot.apic.inject(0x22)
    assert (boot.apic.pending(), boot.apic.has_room) == (EXTERNAL, False)
    assert boot.apic.acknowledge() == 0x21 and boot.apic.pending() is None and boot.apic.has_room
    assert other.apic.inject(0x23) and other.apic.pending() is None
    other.start()
    settle(boot, other)
    other.apic.write(LINT0_ENTRY, 4, EXTINT << 8)
    assert other.apic.pending() == EXTERNAL and woken(other)
    other.apic.write(LINT0_ENTRY, 4, EXTINT << 8 | MASKED)
    assert other.apic.pending() is None and woken(other)


def test_threads(bus: SplitBus) -> None:
    """Routes, addresses and interrupts from several threads while the vCPUs' own end theirs."""
    vcpus = [Vcpu(number, bus) for number in range(3)]
    for vcpu in vcpus:
        vcpu.start()
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Any) -> None:
        chance = random.Random(work.__name__)
        try:
            while not stop.is_set():
                work(chance)
        except BaseException as failure:
            failures.append(failure)

    def routes(chance: random.Random) -> None:
        bus.set_routes(Routes({gsi: route(0x40 + gsi, chance.randrange(4)) for gsi in range(chance.randrange(30))}))

    def messages(chance: random.Random) -> None:
        bus.line(chance.randrange(30), True)

    def addresses(chance: random.Random) -> None:
        chance.choice(vcpus).apic.write(r.LDR, 4, chance.randrange(4) << 24)

    def ends(chance: random.Random) -> None:
        for vcpu in vcpus:
            settle(vcpu)
            taken = vcpu.apic.acknowledge()
            if taken is not None:
                vcpu.apic.write(r.EOI, 4, 0)
                assert vcpu.apic.ended_vector in (None, taken)
                vcpu.apic.ended_vector = None

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (routes, messages, addresses, ends)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not failures and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("split", [False, True])
def test_an_injected_vector_ends_readiness_at_once(model_host: Any, split: bool) -> None:
    """KVM_RUN may return EINTR to a program under `sevmm exec` without the model: kvm_run must not say "ready" twice."""

    class Guest(LongGuest):
        def add_vcpu(self) -> Any:
            if split:
                self.vm.enable_cap(caps.KVM_CAP_SPLIT_IRQCHIP, 24)
            return super().add_vcpu()

    with Guest(model_host, code("90f4", "nop; hlt")) as guest:
        run = guest.vcpu.kvm_run
        guest.regs(rflags=2 | IF)
        guest.vcpu.request_exit()
        guest.vcpu.run()
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
        guest.vcpu.interrupt(0x41)
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 0)
