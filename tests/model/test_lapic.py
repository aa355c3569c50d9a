"""The local APIC and the bus between them, without a guest: registers, priorities, messages. Its timer is in test_lapic_timer.py."""

from __future__ import annotations

import threading

import pytest

from kvmapi.model.cpu.msrs import NoSuchMsr
from kvmapi.model.irq import registers as r
from kvmapi.model.irq.bus import InterruptBus
from kvmapi.model.irq.lapic import BOOTSTRAP, DEFAULT_BASE, ENABLE, X2APIC
from kvmapi.model.irq.target import FIXED, INIT, LOWEST, NMI, SMI, STARTUP, Message
from tests.model.lapics import LINT0_ENTRY, LVTT, MASKED, PERIODIC, Vcpu, buses, machine, new_bus, took

__all__ = ["buses"]  # used by its name


# ---- priorities
def test_the_highest_vector_first_and_nested() -> None:
    bus, (vcpu,) = machine(1)
    for vector in (0x31, 0x52, 0x58, 0x41):
        assert bus.msi(0xFEE00000, vector) == 1
    apic = vcpu.apic
    assert vcpu.poked.is_set() and apic.pending() == 0x58
    assert apic.acknowledge() == 0x58
    assert apic.pending() is None, "0x52 is of the class in service"
    assert bus.msi(0xFEE00000, 0x60) == 1 and apic.acknowledge() == 0x60
    assert apic.read(r.PPR, 4) == 0x60
    for following in (None, 0x52, 0x41, 0x31):
        apic.write(r.EOI, 4, 0)
        assert apic.acknowledge() == following
    apic.write(r.EOI, 4, 0)
    assert apic.read(r.PPR, 4) == 0 and apic.pending() is None


def test_the_task_priority_holds_interrupts_back() -> None:
    bus, (vcpu,) = machine(1)
    vcpu.apic.cr8 = 5
    assert vcpu.apic.tpr == 0x50
    bus.msi(0xFEE00000, 0x5F)
    assert vcpu.apic.pending() is None and not vcpu.poked.is_set()
    vcpu.apic.write(r.TPR, 4, 0x4F)
    assert vcpu.apic.pending() == 0x5F and vcpu.poked.is_set()
    assert vcpu.apic.cr8 == 4
    vcpu.apic.tpr = 0xFF
    assert vcpu.apic.acknowledge() is None


def test_vectors_below_16_wait_forever() -> None:
    bus, (vcpu,) = machine(1)
    assert bus.msi(0xFEE00000, 0xF) == 1
    assert vcpu.apic.pending() is None and vcpu.apic.read(r.IRR, 4) == 1 << 15


def test_off_in_software_takes_nothing_but_keeps_what_it_has() -> None:
    bus, (vcpu,) = machine(1)
    bus.msi(0xFEE00000, 0x40)
    vcpu.apic.write(r.SPIV, 4, 0xFF)
    assert bus.msi(0xFEE00000, 0x50) == 0
    assert vcpu.apic.acknowledge() == 0x40
    assert all(vcpu.apic.read(offset, 4) & MASKED for offset in r.LVT_INDEX)
    vcpu.apic.write(LVTT, 4, 0x30)
    assert vcpu.apic.read(LVTT, 4) == MASKED | 0x30, "entries stay masked while it is off"


# ---- destinations
def send(bus: InterruptBus, destination: int, vector: int = 0x40, **more: object) -> int:
    return bus.send(Message(vector, FIXED, destination)._replace(**more))


@pytest.mark.parametrize("x2", [False, True])
def test_physical_destinations(x2: bool) -> None:
    bus, vcpus = machine(4, x2)
    assert send(bus, 2) == 1 and took(vcpus) == {2}
    assert send(bus, 0xFF) == 4 and took(vcpus) == {0, 1, 2, 3}, "a device's broadcast"
    assert send(bus, 9) == 0 and took(vcpus) == set()
    assert send(bus, 0xFF, mode=LOWEST) == 4 and took(vcpus) == {0, 1, 2, 3}, "as KVM: a fixed broadcast"


def test_an_x2apic_broadcast() -> None:
    bus, vcpus = machine(3, x2=True)
    assert bus.send(Message(0x40, FIXED, 0xFF), vcpus[0].apic) == 0, "between x2APICs 0xFF is an id"
    assert bus.send(Message(0x40, FIXED, 0xFFFFFFFF), vcpus[0].apic) == 3
    bus.broadcast_quirk = False
    assert took(vcpus) == {0, 1, 2} and send(bus, 0xFF) == 0 and took(vcpus) == set()


@pytest.mark.parametrize(
    ("dfr", "ids", "destination", "reached"),
    [
        (0xFFFFFFFF, (1, 2, 4, 8), 0b0101, {0, 2}),
        (0xFFFFFFFF, (1, 2, 4, 8), 0b10000, set()),
        (0x0FFFFFFF, (0x11, 0x12, 0x21, 0x22), 0x13, {0, 1}),
        (0x0FFFFFFF, (0x11, 0x12, 0x21, 0x22), 0x22, {3}),
        (0x1FFFFFFF, (1, 1, 1, 1), 1, set()),
        (0xFFFFFFFF, (1, 2, 4, 8), 0xFF, {0, 1, 2, 3}),
    ],
    ids=["flat", "flat-none", "cluster-two", "cluster-one", "no-model", "broadcast"],
)
def test_logical_destinations(dfr: int, ids: tuple[int, ...], destination: int, reached: set[int]) -> None:
    bus, vcpus = machine(4)
    for vcpu, logical in zip(vcpus, ids):
        vcpu.apic.write(r.DFR, 4, dfr)
        vcpu.apic.write(r.LDR, 4, logical << 24)
    taken = send(bus, destination, logical=True)
    assert max(taken, 0) == len(reached) and took(vcpus) == reached


def test_logical_ids_of_x2apics() -> None:
    bus, vcpus = machine(20, x2=True)
    assert [vcpu.apic.read_msr(0x80D) for vcpu in (vcpus[3], vcpus[17])] == [1 << 3, 1 << 16 | 1 << 1]
    assert send(bus, 1 << 16 | 0b1010, logical=True) == 2 and took(vcpus) == {17, 19}


def test_one_of_several() -> None:
    bus, vcpus = machine(4)
    for vcpu in vcpus:
        vcpu.apic.write(r.LDR, 4, 1 << 24 + vcpu.id)
    for vector, reached in ((0x3F, 1), (0x40, 2), (0x41, 3)):
        assert send(bus, 0b1110, vector, logical=True, mode=LOWEST) == 1 and took(vcpus) == {reached}
        assert send(bus, 0b1110, vector, logical=True, hint=True) == 1 and took(vcpus) == {reached}
    vcpus[3].apic.write(r.SPIV, 4, 0xFF)
    assert send(bus, 0b1110, 0x41, logical=True, mode=LOWEST) == 0, "the place that the vector names, although nobody is there"
    vcpus[2].apic.write(r.LDR, 4, 1 << 25)
    assert send(bus, 0b1110, 0x41, logical=True, mode=LOWEST) == 1, "without a table, one of those that are enabled"


def test_logical_ids_count_for_those_that_are_enabled() -> None:
    bus, vcpus = machine(2)
    for vcpu in vcpus:
        vcpu.apic.write(r.LDR, 4, 1 << 24 + vcpu.id)
    vcpus[1].apic.write(r.SPIV, 4, 0xFF)
    assert send(bus, 0b11, logical=True, mode=NMI) == 1 and (vcpus[0].seen, vcpus[1].seen) == (["nmi"], [])
    assert send(bus, 1, mode=NMI) == 1 and vcpus[1].seen == ["nmi"], "the physical id always"


def test_two_apics_with_one_id() -> None:
    bus, vcpus = machine(3)
    vcpus[1].apic.write(r.ID, 4, 0)
    assert send(bus, 0) == 2 and took(vcpus) == {0, 1} and send(bus, 1) == -1, "each is asked"
    bus.wide_ids = True
    bus.addresses_changed()
    assert send(bus, 0) == 1 and took(vcpus) == {0}, "with 32-bit ids the first has it"


def test_an_xapic_id_that_was_changed() -> None:
    bus, vcpus = machine(2)
    vcpus[1].apic.write(r.ID, 4, 7 << 24)
    assert send(bus, 1) == 0 and send(bus, 7) == 1 and took(vcpus) == {1}


def test_ids_too_large_for_an_xapic() -> None:
    bus = new_bus()
    low, high = Vcpu(1, bus), Vcpu(257, bus)
    low.start(), high.start()
    assert send(bus, 257) == 1 and took([low, high]) == {257}
    assert send(bus, 1) == 2 and took([low, high]) == {1, 257}, "their 8-bit ids are the same"


@pytest.mark.parametrize("x2", [False, True])
@pytest.mark.parametrize(("shorthand", "reached"), [(1, {0}), (2, {0, 1, 2}), (3, {1, 2})], ids=["self", "all", "others"])
def test_shorthands(x2: bool, shorthand: int, reached: set[int]) -> None:
    _, vcpus = machine(3, x2)
    command = shorthand << 18 | r.ICR_ASSERT | 0x40
    vcpus[0].apic.write_msr(0x830, command) if x2 else vcpus[0].apic.write(r.ICR, 4, command)
    assert took(vcpus) == reached


def test_ipis_of_all_modes() -> None:
    _, vcpus = machine(2)
    sender = vcpus[0].apic
    sender.write(r.ICR2, 4, 1 << 24 | 0x1234)
    assert sender.read(r.ICR2, 4) == 1 << 24
    for mode in (NMI, INIT, STARTUP, SMI):
        sender.write(r.ICR, 4, mode << 8 | r.ICR_ASSERT | r.ICR_BUSY | 0x9A)
    assert sender.read(r.ICR, 4) == SMI << 8 | r.ICR_ASSERT | 0x9A, "never busy"
    sender.write(r.ICR, 4, INIT << 8 | r.ICR_LEVEL)
    assert vcpus[1].seen == ["nmi", "init", 0x9A], "and the INIT de-assert is none"


def test_callbacks_run_without_the_lock() -> None:
    """A poke that asks the APIC something, which takes the lock, must not deadlock."""
    bus, (vcpu,) = machine(1)
    asked = []
    vcpu.poke = lambda: asked.append(vcpu.apic.read(r.IRR + 0x20, 4))  # type: ignore[method-assign]
    thread = threading.Thread(target=bus.msi, args=(0xFEE00000, 0x41), daemon=True)
    thread.start()
    thread.join(10)
    assert asked == [2]


# ---- modes
def test_base_transitions() -> None:
    bus, (vcpu,) = machine(1)
    apic, base = vcpu.apic, DEFAULT_BASE | BOOTSTRAP
    assert apic.base == base | ENABLE
    assert not apic.set_base(base | X2APIC, host=True), "x2APIC needs the APIC on"
    assert not apic.set_base(base | ENABLE | 1, host=True) and not apic.set_base(1 << 52 | ENABLE, host=True)
    assert apic.set_base(base, host=False) and not apic.on
    assert not apic.set_base(base | ENABLE | X2APIC, host=False), "not from off"
    assert apic.set_base(base | ENABLE, host=False) and apic.set_base(base | ENABLE | X2APIC, host=False)
    assert not apic.set_base(base | ENABLE, host=False) and apic.x2, "not back to xAPIC"
    assert apic.set_base(base | ENABLE, host=True) and not apic.x2, "but user space may"
    assert send(bus, 0) == 1


def test_off_in_the_base() -> None:
    bus, (vcpu,) = machine(1)
    send(bus, 0)
    vcpu.apic.set_base(DEFAULT_BASE, host=False)
    assert vcpu.apic.pending() is None and send(bus, 0) == 0
    assert vcpu.apic.read(r.VERSION, 4) == 0xFFFFFFFF
    vcpu.apic.set_base(DEFAULT_BASE | ENABLE, host=False)
    assert vcpu.apic.pending() == 0x40


def test_x2apic_registers() -> None:
    _, vcpus = machine(20, x2=True)
    apic = vcpus[18].apic
    assert (apic.read_msr(0x802), apic.read_msr(0x803)) == (18, r.VERSION_VALUE)
    assert apic.read(r.ID, 4) == 0xFFFFFFFF, "the page is gone"
    apic.write_msr(0x830, 3 << 32 | r.ICR_ASSERT | 0x44)
    assert apic.read_msr(0x830) == 3 << 32 | r.ICR_ASSERT | 0x44 and took(vcpus) == {3}
    apic.write_msr(0x83F, 0x45)
    assert took(vcpus) == {18}
    apic.write_msr(0x808, 0x20)
    assert apic.cr8 == 2
    for number in (0x80E, 0x831, 0x80B, 0x83F, 0x840, 0x8FF):
        with pytest.raises(NoSuchMsr):
            apic.read_msr(number)
    refused = [(0x802, 0), (0x803, 0), (0x80D, 0), (0x80E, 0), (0x831, 0), (0x828, 1), (0x83F, 0x100), (0x808, 1 << 32), (0x830, 1 << 20)]
    for number, value in refused:
        with pytest.raises(NoSuchMsr):
            apic.write_msr(number, value)
    apic.write_msr(0x828, 0)


def test_msrs_in_xapic_mode() -> None:
    _, (vcpu,) = machine(1)
    with pytest.raises(NoSuchMsr):
        vcpu.apic.read_msr(0x802)
    with pytest.raises(NoSuchMsr):
        vcpu.apic.write_msr(0x80B, 0)


def test_narrow_and_crooked_accesses() -> None:
    _, (vcpu,) = machine(1)
    apic = vcpu.apic
    assert [apic.read(r.VERSION + at, 1) for at in range(4)] == [0x14, 0, 5, 0] and apic.read(r.VERSION + 2, 2) == 5
    assert apic.read(r.VERSION + 2, 4) == 0 and apic.read(r.VERSION, 8) == 0 and apic.read(r.VERSION + 4, 4) == 0
    assert apic.read(r.EOI, 4) == 0 and apic.read(0x400, 4) == 0 and apic.read(0xFFC, 4) == 0
    for offset, size in ((r.TPR, 1), (r.TPR, 2), (r.TPR, 8), (r.TPR + 4, 4), (0x480, 4)):
        apic.write(offset, size, 0x77)
        assert apic.tpr == 0
    apic.write(r.VERSION, 4, 0), apic.write(r.IRR, 4, 1)
    assert apic.read(r.VERSION, 4) == r.VERSION_VALUE and apic.read(r.IRR, 4) == 0


def test_bits_that_do_not_exist() -> None:
    _, (vcpu,) = machine(1)
    apic = vcpu.apic
    kept = {LVTT: 0x310FF, 0x330: 0x117FF, 0x340: 0x117FF, LINT0_ENTRY: 0x1F7FF, 0x360: 0x1F7FF, 0x370: 0x110FF}
    for offset, bits in kept.items():
        apic.write(offset, 4, 0xFFFFFFFF)
        assert apic.read(offset, 4) == bits, hex(offset)
    for offset, bits in ((r.SPIV, 0x3FF), (r.LDR, 0xFF000000), (r.DIVIDE, 0xB), (r.ICR2, 0xFF000000), (r.ESR, 0)):
        apic.write(offset, 4, 0xFFFFFFFF)
        assert apic.read(offset, 4) == bits, hex(offset)
    apic.write(r.DFR, 4, 0)
    assert apic.read(r.DFR, 4) == 0x0FFFFFFF


# ---- reset and state
def test_reset() -> None:
    bus, vcpus = machine(2)
    for vcpu in vcpus:
        bus.msi(0xFEE00000 | vcpu.id << 12, 0x40)
        vcpu.apic.write(r.TPR, 4, 0x10)
        vcpu.apic.reset(init=False)
        state = {offset: vcpu.apic.read(offset, 4) for offset in (*r.STATE,)}
        lint0 = 0x700 if vcpu.id == 0 else MASKED
        expected = dict.fromkeys(r.STATE, 0) | dict.fromkeys(r.LVT_INDEX, MASKED)
        expected |= {r.ID: vcpu.id << 24, r.VERSION: 0x50014, r.DFR: 0xFFFFFFFF, r.SPIV: 0xFF, LINT0_ENTRY: lint0}
        assert state == expected
        assert vcpu.apic.pending() is None


def test_init_keeps_the_mode() -> None:
    _, vcpus = machine(2, x2=True)
    vcpus[1].apic.reset(init=True)
    assert vcpus[1].apic.x2 and vcpus[1].apic.read_msr(0x802) == 1 and vcpus[1].apic.read_msr(0x80F) == 0xFF


def test_state_round_trip() -> None:
    bus, (vcpu,) = machine(1)
    bus.msi(0xFEE00000, 0x8041 | 0x8000)
    assert vcpu.apic.acknowledge() == 0x41
    bus.msi(0xFEE00000, 0x99)
    vcpu.apic.write(LVTT, 4, PERIODIC | 0x55)
    image = vcpu.apic.pack()
    other = Vcpu(0, new_bus())
    assert other.apic.unpack(image) and other.apic.pack() == image
    assert other.apic.pending() == 0x99 and other.apic.read(r.TMR + 0x20, 4) == 2 and other.apic.read(r.PPR, 4) == 0x40
    assert len(image) == 1024


def test_state_in_x2apic_mode() -> None:
    bus, vcpus = machine(3, x2=True)
    apic = vcpus[2].apic
    image = apic.pack()
    assert image[r.ID : r.ID + 4] == (2 << 24).to_bytes(4, "little")
    assert apic.unpack(bytes(r.PAGE)) and apic.read_msr(0x802) == 2 and apic.read_msr(0x80D) == 4, "the id cannot be changed"
    bus.wide_ids = True
    image = apic.pack()
    assert image[r.ID : r.ID + 4] == (2).to_bytes(4, "little") and apic.unpack(image)
    assert not apic.unpack(bytes(r.PAGE)), "another id"
