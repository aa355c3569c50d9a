"""Local APICs without vCPUs, for the tests of the interrupt controllers: targets that write down what happens to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvmapi.model.irq import registers as r
from kvmapi.model.irq.bus import InterruptBus
from kvmapi.model.irq.lapic import X2APIC, Lapic

LVTT, LINT0_ENTRY = 0x320, 0x350
MASKED = 1 << 16
PERIODIC, DEADLINE = 1 << 17, 1 << 18

_buses: list[InterruptBus] = []


def new_bus() -> InterruptBus:
    _buses.append(InterruptBus())
    return _buses[-1]


@pytest.fixture(autouse=True)
def buses() -> Iterator[None]:
    """The buses of the test are taken down behind it."""
    yield
    while _buses:
        _buses.pop().destroy()


class Vcpu:
    """A target that writes down what happens to it."""

    def __init__(self, id: int, bus: InterruptBus, clock: Callable[[], int] | None = None) -> None:
        self.id = id
        self.seen: list[object] = []
        self.poked = threading.Event()
        self.lapic: Lapic | None = None
        self.apic = Lapic(self, bus, bootstrap=id == 0, **({} if clock is None else {"clock": clock}))
        self.lapic = self.apic

    def poke(self) -> None:
        self.poked.set()

    def nmi(self) -> None:
        self.seen.append("nmi")

    def init(self) -> None:
        self.seen.append("init")

    def sipi(self, vector: int) -> None:
        self.seen.append(vector)

    def start(self) -> Lapic:
        """Enable it in software."""
        self.apic.write(r.SPIV, 4, 0x1FF)
        return self.apic

    def start_x2(self) -> Lapic:
        assert self.apic.set_base(self.apic.base | X2APIC, host=False)
        self.apic.write_msr(0x80F, 0x1FF)
        return self.apic


class Clock:
    """A clock that is moved by hand."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


def machine(count: int, x2: bool = False) -> tuple[InterruptBus, list[Vcpu]]:
    bus = new_bus()
    vcpus = [Vcpu(number, bus) for number in range(count)]
    for vcpu in vcpus:
        vcpu.start_x2() if x2 else vcpu.start()
    return bus, vcpus


def took(vcpus: list[Vcpu]) -> set[int]:
    """Which vCPUs have an interrupt; they acknowledge and end it."""
    found = set()
    for vcpu in vcpus:
        if vcpu.apic.acknowledge() is not None:
            found.add(vcpu.id)
            vcpu.apic.write_msr(0x80B, 0) if vcpu.apic.x2 else vcpu.apic.write(r.EOI, 4, 0)
    return found
