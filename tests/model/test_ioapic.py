"""The IOAPIC, GSI routing and MSIs, without a guest."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from kvmapi.abi import kvm
from kvmapi.model.irq import registers as r
from kvmapi.model.irq import routing
from kvmapi.model.irq.bus import RESAMPLE_SOURCE, InterruptBus
from kvmapi.model.irq.ioapic import BASE
from kvmapi.model.irq.kernel_bus import KernelBus
from kvmapi.model.irq.lapic import ENABLE, X2APIC, Lapic

MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14


class Vcpu:
    """A target that is only ever asked for its local APIC."""

    def __init__(self, id: int, bus: InterruptBus) -> None:
        self.id = id
        self.nmis = 0
        self.lapic: Lapic | None = None
        self.apic = self.lapic = Lapic(self, bus, bootstrap=not id)
        self.apic.write(r.SPIV, 4, 0x1FF)

    def poke(self) -> None: ...

    def nmi(self) -> None:
        self.nmis += 1

    def init(self) -> None: ...

    def sipi(self, vector: int) -> None: ...

    def take(self) -> int | None:
        """Acknowledge."""
        return self.apic.acknowledge()

    def end(self) -> None:
        """EOI."""
        self.apic.write(r.EOI, 4, 0)


class Board:
    """A bus with two vCPUs, and the IOAPIC's registers as a guest writes them."""

    def __init__(self) -> None:
        self.bus = InterruptBus()
        self.vcpus = [Vcpu(0, self.bus), Vcpu(1, self.bus)]
        self.io = KernelBus()
        self.io.interrupts = self.bus
        for pic in (self.bus.pics.master, self.bus.pics.slave):
            pic.imr = 0xFF  # the PICs have tests of their own

    def set(self, register: int, value: int) -> None:
        assert self.io.write("mmio", BASE, struct.pack("<I", register))
        assert self.io.write("mmio", BASE + 0x10, struct.pack("<I", value))

    def get(self, register: int) -> int:
        assert self.io.write("mmio", BASE, struct.pack("<I", register))
        data = self.io.read("mmio", BASE + 0x10, 4)
        assert data is not None
        return int.from_bytes(data, "little")

    def route(self, pin: int, entry: int) -> None:
        self.set(0x11 + 2 * pin, entry >> 32)
        self.set(0x10 + 2 * pin, entry & 0xFFFFFFFF)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.io.destroy()
    made.bus.destroy()


def test_registers(board: Board) -> None:
    assert (board.get(0), board.get(1), board.get(2)) == (0, 0x00170011, 0)
    board.set(0, 0xFF123456), board.set(1, 0)
    assert (board.get(0), board.get(1), board.get(2)) == (0x0F000000, 0x00170011, 0x0F000000)
    assert (board.get(0x10), board.get(0x11)) == (MASKED, 0)
    board.route(23, 0xAB000000_FFFFFFFF)
    assert (board.get(0x3E), board.get(0x3F)) == (0xFFFFAFFF, 0xAB000000), "two bits are not the guest's"
    assert board.get(0x40) == board.get(0x41) == 0xFFFFFFFF and board.get(5) == 0xFFFFFFFF
    board.set(0x41, 1)
    assert board.io.read("mmio", BASE + 0x20, 4) == bytes(4) and board.io.read("mmio", BASE, 8) == struct.pack("<Q", 0x41)
    assert board.io.write("mmio", BASE, b"\x01") and board.io.read("mmio", BASE + 0x10, 2) == b"\x11\0"
    assert board.io.read("mmio", BASE + 0x100, 4) is None and not board.io.write("mmio", BASE - 4, bytes(4))
    assert board.io.read("pio", BASE, 4) is None


def test_an_edge(board: Board) -> None:
    board.route(5, 1 << 56 | 0x44)
    assert board.bus.line(5, True) == 1 and board.vcpus[1].take() == 0x44 and board.vcpus[0].take() is None
    board.vcpus[1].end()
    assert board.bus.line(5, True) == 0, "no new edge"
    assert board.bus.line(5, False) == 1
    assert board.bus.line(5, True) == 1 and board.vcpus[1].take() == 0x44


def test_an_edge_at_a_masked_pin_is_lost(board: Board) -> None:
    assert board.bus.line(6, True) == -1 and board.bus.line(6, True) == 0
    board.route(6, 0x45)
    assert board.vcpus[0].take() is None


def test_a_level_until_it_falls(board: Board) -> None:
    vcpu = board.vcpus[0]
    board.route(7, LEVEL | 0x46)
    assert board.bus.line(7, True) == 1 and board.get(0x1E) == LEVEL | REMOTE_IRR | 0x46
    assert vcpu.take() == 0x46 and vcpu.apic.read(r.TMR + 0x20, 4) == 1 << 6
    assert board.bus.line(7, True) == -1, "it waits for the end of the first"
    vcpu.end()
    assert vcpu.take() == 0x46, "still high: again"
    assert board.bus.line(7, False) == 1
    vcpu.end()
    assert vcpu.take() is None and board.get(0x1E) == LEVEL | 0x46


def test_unmasking_a_high_level(board: Board) -> None:
    board.route(8, MASKED | LEVEL | 0x47)
    assert board.bus.line(8, True) == -1
    board.route(8, LEVEL | 0x47)
    assert board.vcpus[0].take() == 0x47
    board.route(8, MASKED | 0x47)
    assert not board.get(0x20) & REMOTE_IRR, "made an edge: forgotten"


def test_two_holders_of_one_line(board: Board) -> None:
    board.route(9, LEVEL | 0x48)
    board.bus.line(9, True), board.bus.line(9, True, RESAMPLE_SOURCE)
    board.bus.line(9, False)
    vcpu = board.vcpus[0]
    assert vcpu.take() == 0x48
    vcpu.end()
    assert vcpu.take() == 0x48, "the other holds it"
    board.bus.line(9, False, RESAMPLE_SOURCE)
    vcpu.end()
    assert vcpu.take() is None


def test_resampling(board: Board) -> None:
    """The end of the interrupt lets go of the line and tells the owner; one who still asserts gets another."""
    told: list[int] = []
    board.route(10, LEVEL | 0x49)
    board.bus.resamplers[10] = lambda: told.append(1)
    board.bus.line(10, True, RESAMPLE_SOURCE)
    assert board.vcpus[0].take() == 0x49 and not told
    board.vcpus[0].end()
    assert told == [1] and board.vcpus[0].take() is None and board.get(0x24) == LEVEL | 0x49


def test_nmi_and_lowest_priority(board: Board) -> None:
    board.route(11, 4 << 8 | 1 << 56)
    assert board.bus.line(11, True) == 1 and board.vcpus[1].nmis == 1
    for vcpu in board.vcpus:
        vcpu.apic.write(r.LDR, 4, 1 << 24 + vcpu.id)
    board.route(12, 3 << 56 | 1 << 11 | 1 << 8 | 0x50)
    assert board.bus.line(12, True) == 1 and sum(vcpu.take() == 0x50 for vcpu in board.vcpus) == 1


def test_state_round_trip(board: Board) -> None:
    board.route(3, LEVEL | 0x51)
    board.route(4, 0x52)
    board.bus.line(3, True), board.bus.line(4, True), board.bus.line(13, True)
    state = board.bus.ioapic.pack()
    base, select, number, irr, pad, *entries = struct.unpack("<QIIII24Q", state)
    assert (base, number, pad, irr) == (BASE, 0, 0, 1 << 3 | 1 << 13), "a delivered edge is not shown"
    assert select == 0x18 and entries[3] == LEVEL | REMOTE_IRR | 0x51
    other = Board()
    with other.bus:
        other.bus.ioapic.unpack(state)
        assert other.bus.ioapic.pack() == state
    assert other.vcpus[0].take() is None, "remote IRR: it was delivered before"
    with other.bus:
        other.bus.ioapic.unpack(struct.pack("<QIIII24Q", base, 0, 0, 1 << 3, 0, *(LEVEL | 0x51,) * 24))
    assert other.vcpus[0].take() == 0x51, "pins that are high are raised"
    other.bus.destroy()


def test_a_base_elsewhere(board: Board) -> None:
    """KVM_SET_IRQCHIP can move it to where nothing is wired."""
    with board.bus:
        board.bus.ioapic.unpack(struct.pack("<QIIII24Q", 0xFED00000, 0, 0, 0, 0, *(MASKED,) * 24))
    assert board.io.read("mmio", BASE, 4) is None and board.io.read("mmio", 0xFED00000, 4) is None


# ---- routing
def entry(gsi: int, kind: int, first: int = 0, second: int = 0, third: int = 0, flags: int = 0) -> bytes:
    return routing.ENTRY.pack(gsi, kind, flags, 0, first, second, third, 0)


CHIP, MSI = kvm.KVM_IRQ_ROUTING_IRQCHIP, kvm.KVM_IRQ_ROUTING_MSI


def test_routes(board: Board) -> None:
    table = routing.from_entries(entry(40, MSI, 0xFEE01000, 0, 0x61) + entry(41, CHIP, 2, 5) + entry(41, CHIP, 0, 5), False)
    assert table is not None
    with board.bus:
        board.bus.routes = table
    board.route(5, 0x62)
    assert board.bus.line(40, True) == 1 and board.vcpus[1].take() == 0x61
    assert board.bus.line(40, False) == -1
    assert board.bus.line(41, True) == 1 and board.vcpus[0].take() == 0x62
    assert board.bus.line(5, True) == -1, "the table replaces all"
    assert table.gsi_of_pin(5) == 41 and table.gsi_of_pin(6) is None


REFUSED = {
    "gsi": entry(4096, MSI),
    "type": entry(1, 3),
    "hyper-v": entry(1, kvm.KVM_IRQ_ROUTING_HV_SINT),
    "chip": entry(1, CHIP, 3, 0),
    "ioapic pin": entry(1, CHIP, 2, 24),
    "pic pin": entry(1, CHIP, 0, 8),
    "flags of a pin": entry(1, CHIP, 2, 0, flags=1),
    "flags of a message": entry(1, MSI, flags=2),
    "one chip twice": entry(1, CHIP, 2, 1) + entry(1, CHIP, 2, 2),
    "two messages": entry(1, MSI) * 2,
    "a pin and a message": entry(1, CHIP, 2, 1) + entry(1, MSI),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(name: str) -> None:
    assert routing.from_entries(REFUSED[name], False) is None


def test_empty_and_large_tables() -> None:
    empty = routing.from_entries(b"", False)
    assert empty is not None and empty.of(0) == ()
    full = routing.from_entries(b"".join(entry(gsi, MSI, 0xFEE00000, 0, gsi & 0xFF) for gsi in range(4096)), False)
    assert full is not None and full.of(4095)[0].data == 0xFF


# ---- MSIs
def test_msi_messages(board: Board) -> None:
    bus, vcpus = board.bus, board.vcpus
    assert bus.msi(0xFEE01000, 0x70) == 1 and vcpus[1].take() == 0x70
    assert bus.msi(0xFEE01000, 0x8071) == 1 and vcpus[1].apic.read(r.TMR + 0x30, 4) == 1 << 0x11
    assert bus.msi(0xFEE01000, 0x400) == 1 and vcpus[1].nmis == 1
    assert bus.msi(0xFEE05000, 0x70) == 0
    assert bus.msi(0xFEEFF000, 0x70) == 2


def test_msis_with_wide_ids(board: Board) -> None:
    bus = board.bus
    far = Vcpu(300, bus)
    far.apic.set_base(far.apic.base | ENABLE | X2APIC, host=True)
    far.apic.write_msr(0x80F, 0x1FF)
    assert bus.msi(1 << 40 | 0xFEE2C000, 0x72) == 0, "the upper half does not count"
    bus.wide_ids = True
    assert bus.msi(1 << 40 | 0xFEE2C000, 0x72) == 1 and far.take() == 0x72
    assert bus.msi(1 << 32 | 0xFEE2C000, 0x72) == -22
    assert routing.from_entries(entry(1, MSI, 0xFEE00000, 1), True) is None


def test_nobody_at_all() -> None:
    bus = InterruptBus()
    assert bus.msi(0xFEE00000, 0x70) == -1 and bus.line(20, True) == -1
    bus.destroy()
