"""The local APIC's timer: with a clock that is moved by hand, and with the real one and the thread that wakes vCPUs."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from kvmapi.model.irq import registers as r
from kvmapi.model.irq.lapic import MSR_TSC_DEADLINE
from tests.model.lapics import DEADLINE, LVTT, MASKED, PERIODIC, Clock, Vcpu, buses, new_bus

__all__ = ["buses"]  # used by its name


def timed() -> tuple[Clock, Vcpu]:
    clock = Clock()
    vcpu = Vcpu(0, new_bus(), clock)
    vcpu.start()
    vcpu.apic.write(r.DIVIDE, 4, 0xB)  # divide by 1
    return clock, vcpu


def due(vcpu: Vcpu) -> int | None:
    """What fires now."""
    vcpu.apic.expire()
    vector = vcpu.apic.acknowledge()
    vcpu.apic.write(r.EOI, 4, 0)
    return vector


def test_one_shot() -> None:
    clock, vcpu = timed()
    apic = vcpu.apic
    apic.write(LVTT, 4, 0x55)
    apic.write(r.INITIAL, 4, 1000)
    assert apic.deadline() == clock.now + 1000
    clock.now += 400
    assert apic.read(r.CURRENT, 4) == 600 and due(vcpu) is None
    clock.now += 600
    assert apic.read(r.CURRENT, 4) == 0 and due(vcpu) == 0x55
    assert apic.deadline() is None and due(vcpu) is None and apic.read(r.CURRENT, 4) == 0
    apic.write(r.INITIAL, 4, 1000)
    apic.write(r.INITIAL, 4, 0)
    assert apic.deadline() is None, "0 stops it"


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divisors(code: int, divisor: int) -> None:
    clock, vcpu = timed()
    vcpu.apic.write(r.DIVIDE, 4, code)
    vcpu.apic.write(LVTT, 4, 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1000)
    assert vcpu.apic.deadline() == clock.now + 1000 * divisor


def test_a_divisor_changed_on_the_way() -> None:
    clock, vcpu = timed()
    vcpu.apic.write(LVTT, 4, 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1000)
    clock.now += 500
    vcpu.apic.write(r.DIVIDE, 4, 0)
    assert vcpu.apic.deadline() == clock.now + 1000 and vcpu.apic.read(r.CURRENT, 4) == 500


def test_periodic() -> None:
    clock, vcpu = timed()
    start = clock.now
    vcpu.apic.write(LVTT, 4, PERIODIC | 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1_000_000)
    clock.now += 1_000_100
    assert due(vcpu) == 0x55 and due(vcpu) is None
    assert vcpu.apic.deadline() == start + 2_000_000, "no drift"
    clock.now += 5_000_000
    assert due(vcpu) == 0x55 and due(vcpu) is None, "those that were missed are one"
    assert vcpu.apic.deadline() == start + 7_000_000 and vcpu.apic.read(r.CURRENT, 4) == 1_000_000 - 100


def test_a_period_has_a_lower_limit() -> None:
    clock, vcpu = timed()
    vcpu.apic.write(LVTT, 4, PERIODIC | 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1)
    assert vcpu.apic.deadline() == clock.now + 200_000


def test_masked_expiry_is_kept() -> None:
    clock, vcpu = timed()
    vcpu.apic.write(LVTT, 4, MASKED | 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1000)
    clock.now += 1000
    assert vcpu.apic.deadline() is None and due(vcpu) is None
    vcpu.apic.write(LVTT, 4, 0x55)
    assert vcpu.apic.pending() == 0x55


def test_tsc_deadline() -> None:
    clock, vcpu = timed()
    apic = vcpu.apic
    apic.until = lambda value: max(value - (clock.now - 300_000), 0)
    apic.write(LVTT, 4, DEADLINE | 0x55)
    assert apic.read(LVTT, 4) == 0x55, "without the CPUID bit there is no such mode"
    apic.write_msr(MSR_TSC_DEADLINE, 800_000)
    assert apic.deadline() is None and apic.read_msr(MSR_TSC_DEADLINE) == 0
    apic.tsc_deadline_offered = True
    apic.write(LVTT, 4, DEADLINE | 0x55)
    apic.write_msr(MSR_TSC_DEADLINE, 800_000)
    assert apic.deadline() == 1_100_000 and apic.read_msr(MSR_TSC_DEADLINE) == 800_000
    apic.write(r.INITIAL, 4, 5)
    assert apic.read(r.INITIAL, 4) == 0 and apic.read(r.CURRENT, 4) == 0
    clock.now = 1_100_000
    assert due(vcpu) == 0x55 and apic.read_msr(MSR_TSC_DEADLINE) == 0
    apic.write_msr(MSR_TSC_DEADLINE, 1)
    assert apic.deadline() == clock.now, "the past is now"
    apic.write_msr(MSR_TSC_DEADLINE, 0)
    assert apic.deadline() is None
    apic.write_msr(MSR_TSC_DEADLINE, 10**9)
    apic.write(LVTT, 4, 0x55)
    assert apic.deadline() is None, "another mode stops it"


def test_timer_state_round_trip() -> None:
    clock, vcpu = timed()
    vcpu.apic.write(LVTT, 4, PERIODIC | 0x55)
    vcpu.apic.write(r.INITIAL, 4, 1_000_000)
    clock.now += 400_000
    image = vcpu.apic.pack()
    clock.now += 10_000_000
    assert vcpu.apic.unpack(image) and vcpu.apic.deadline() == clock.now + 600_000


def test_the_alarm_pokes() -> None:
    """The real clock: the thread wakes the vCPU, which finds its timer due."""
    bus = new_bus()
    vcpu = Vcpu(0, bus)
    vcpu.start()
    vcpu.apic.write(LVTT, 4, 0x55)
    for _ in range(3):
        vcpu.poked.clear()
        vcpu.apic.write(r.INITIAL, 4, 500_000)
        assert vcpu.poked.wait(10) and due(vcpu) == 0x55
    vcpu.apic.write(r.INITIAL, 4, 0xFFFFFFFF)
    bus.destroy()
    assert not [thread for thread in threading.enumerate() if thread.name == "sevmm-apic-timers" and not _ends(thread)]


def _ends(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_many_timers_from_many_threads() -> None:
    bus = new_bus()
    vcpus = [Vcpu(number, bus) for number in range(8)]
    fired = []

    def guest(vcpu: Vcpu) -> None:
        apic = vcpu.start()
        apic.write(LVTT, 4, 0x55)
        for _ in range(20):
            vcpu.poked.clear()
            apic.write(r.INITIAL, 4, 100_000)
            while vcpu.poked.wait(10) and apic.pending() is None:
                vcpu.poked.clear()
                apic.expire()
            fired.append(apic.acknowledge())
            apic.write(r.EOI, 4, 0)
            apic.write(r.ICR, 4, 3 << 18 | r.ICR_ASSERT | 0x20)  # and something for everyone else's lock
            apic.cr8 = 4
        apic.write(LVTT, 4, MASKED)

    threads = [threading.Thread(target=partial(guest, vcpu)) for vcpu in vcpus]
    for vcpu in vcpus:
        vcpu.apic.cr8 = 4
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    bus.destroy()
    assert fired == [0x55] * 160
