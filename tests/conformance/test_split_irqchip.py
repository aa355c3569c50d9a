"""KVM_CAP_SPLIT_IRQCHIP: local APICs in the kernel; PICs, IOAPIC and PIT are user space's.

Checks of errno: kvm_vm_ioctl_enable_cap and kvm_arch_vm_ioctl in arch/x86/kvm/x86.c; ends of interrupts:
kvm_scan_ioapic_routes in irq.c; KVM_INTERRUPT and its window: kvm_vcpu_ready_for_interrupt_injection.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from errno import EAGAIN, EEXIST, EINTR, EINVAL, ENOENT, ENXIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, irq, kvm
from kvmapi.abi.structs import kvm_enable_cap
from kvmapi.abi.vcpu import kvm_interrupt
from kvmapi.exits import Exit, Io, IoapicEoi, IrqWindowOpen
from kvmapi.host import Host
from kvmapi.vcpu import Vcpu
from tests.conformance.apic_guest import (
    APIC,
    BASE_MSR,
    CHIP,
    END,
    EOI,
    ICR,
    IN_REAL_MODE,
    LDR,
    LINT0,
    LVTT,
    MASKED,
    MESSAGE,
    MSI,
    ON,
    OPEN,
    RDMSR,
    SPIV,
    STORE,
    VERSION,
    WAIT,
    WRMSR,
    ApicGuest,
    alarm,
    entry,
    needs_service,
    raw,
    until,
)
from tests.conformance.rows import OK, Row, expect_errno, feature, parametrize
from tests.conformance.snippets import CODE, DATA, STACK, Machine
from tests.conftest import PATIENCE

__all__ = ["alarm"]  # used by its name

PINS = 24
EXTINT, LEVEL_DATA, DIRECTED = 0x700, 0x8000, 1 << 12
IF = 0x200


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


# ---- asking for it
def _cap(args: int, cap: int = caps.KVM_CAP_SPLIT_IRQCHIP, flags: int = 0) -> Any:
    argument = kvm_enable_cap(cap=cap, flags=flags)
    argument.args[0] = args
    return lambda m: (m, ioctls.KVM_ENABLE_CAP, argument)


def _x2apic(flags: int) -> Any:
    return _cap(flags, caps.KVM_CAP_X2APIC_API)


def _whole(machine: Machine) -> None:
    machine.vm.create_irqchip()


def _vcpu(machine: Machine) -> None:
    machine.add_vcpu()


def _message(machine: Machine) -> None:
    split(machine)
    machine.vm.set_gsi_routing([entry(1, MESSAGE, MSI, 0, 0x61)])


_LINE = irq.kvm_irq_level
ROWS = [
    Row("none reserved", OK, _cap(0)),
    Row("all reserved", OK, _cap(4096)),
    Row("too many reserved", EINVAL, _cap(4097)),
    Row("too many, a second time", EINVAL, _cap(4097), split),
    Row("flags", EINVAL, _cap(24, flags=1)),
    Row("a second time", EEXIST, _cap(24), split),
    Row("behind the whole", EEXIST, _cap(24), _whole),
    Row("behind a vCPU", EEXIST, _cap(24), _vcpu),
    Row("the whole behind it", EEXIST, lambda m: (m, ioctls.KVM_CREATE_IRQCHIP, 0), split),
    Row("a PIT", ENOENT, lambda m: (m, ioctls.KVM_CREATE_PIT2, irq.kvm_pit_config()), split),
    Row("an old PIT", ENOENT, lambda m: (m, ioctls.KVM_CREATE_PIT, 0), split),
    Row("the PIT's state", ENXIO, lambda m: (m, ioctls.KVM_GET_PIT2, irq.kvm_pit_state2()), split),
    Row("reinjection", ENXIO, lambda m: (m, ioctls.KVM_REINJECT_CONTROL, irq.kvm_reinject_control()), split),
    Row("get a chip", ENXIO, lambda m: (m, ioctls.KVM_GET_IRQCHIP, irq.kvm_irqchip(chip_id=2)), split),
    Row("set a chip", ENXIO, lambda m: (m, ioctls.KVM_SET_IRQCHIP, irq.kvm_irqchip(chip_id=0)), split),
    Row("a line without routes", OK, lambda m: (m, ioctls.KVM_IRQ_LINE, _LINE(irq=5, level=1)), split),
    Row("a message's flags", EINVAL, lambda m: (m, ioctls.KVM_SIGNAL_MSI, irq.kvm_msi(MSI, flags=2)), split),
    Row("an empty table", OK, lambda m: (m, ioctls.KVM_SET_GSI_ROUTING, irq.kvm_irq_routing()), split),
    Row("a bus cycle", OK, _cap(8, caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS), split),
    Row("no suppression for the whole", EINVAL, _x2apic(4), _whole),
    Row("no suppression without controllers", EINVAL, _x2apic(4)),
    Row("both kinds of suppression", EINVAL, _x2apic(12), split),
]


@parametrize(ROWS)
def test_errors(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        if row.setup is not None:
            row.setup(machine)
        assert row.right(machine, -raw(*row.argument(machine)))


def test_the_capabilities(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_SPLIT_IRQCHIP) == 1
        whole = machine.vm.check_extension(caps.KVM_CAP_X2APIC_API)
        split(machine)
        own = machine.vm.check_extension(caps.KVM_CAP_X2APIC_API)
        assert (whole, own) == ((11, 15) if own > 3 else (3, 3)), "suppression came with 7.x"


def test_routes_are_messages_only(any_host: Any) -> None:
    with Machine(any_host) as machine:
        split(machine)
        for row, expected in ((entry(1, MESSAGE, MSI), OK), (entry(1, CHIP, 2, 1), EINVAL), (entry(1, CHIP, 0, 1), EINVAL)):
            table = (ctypes.c_char * (8 + ctypes.sizeof(row)))()
            struct.pack_into("<I", table, 0, 1)
            table[8:] = bytes(row)
            assert raw(machine, ioctls.KVM_SET_GSI_ROUTING, table) == expected


def test_eventfds(any_host: Any) -> None:
    """They raise messages; none can wait for the end of an interrupt."""
    with SplitGuest(any_host) as guest:
        guest.do(ON)
        guest.vm.set_gsi_routing([entry(7, MESSAGE, MSI, 0, 0x61)])
        event, told = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        try:
            resample = irq.kvm_irqfd(event, 7, kvm.KVM_IRQFD_FLAG_RESAMPLE, told)
            assert raw(guest, ioctls.KVM_IRQFD, resample) == EINVAL
            guest.vm.irqfd(event, 7)
            os.eventfd_write(event, 1)
            assert until(lambda: guest.waiting(0x61))
        finally:
            os.close(event)
            os.close(told)


def test_lines(any_host: Any) -> None:
    with SplitGuest(any_host) as guest:
        guest.do(ON)
        line = guest.vm.irq_line
        assert (line(0, 1), line(4, 1)) == (-1, -1), "there are no routes at first"
        guest.vm.set_gsi_routing([entry(4, MESSAGE, MSI, 0, 0x61), entry(5, MESSAGE, MSI | 5 << 12, 0, 0x62)])
        assert (line(4, 1), line(4, 0), line(5, 1)) == (1, -1, 0)
        assert guest.waiting(0x61)


# ---- the local APICs
def test_interrupts_come_and_halt_stays_inside(any_host: Any) -> None:
    with SplitGuest(any_host) as guest:
        guest.do(ON)
        assert guest.vm.signal_msi(MSI, 0x41) == 1
        guest.do((OPEN,), END)
        assert guest.taken() == (1, 0x41)
        guest.do((STORE, APIC + LVTT, 0x52), (STORE, APIC + 0x3E0, 0xB), (STORE, APIC + 0x380, 1_000_000), (WAIT,), END)
        assert guest.taken() == (1, 0x52) and guest.ends() == []


def test_no_chip_answers(any_host: Any) -> None:
    """IOAPIC, PICs and PIT are exits."""
    with SplitGuest(any_host) as guest:
        guest.put(DATA, struct.pack("<IIQ", STORE, 0xFEC00000, 1))
        guest.regs(rip=CODE, rsp=STACK, rflags=2, rsi=DATA)
        exit = guest.run()
        assert exit.REASON == kvm.KVM_EXIT_MMIO, exit


def test_the_other_processors_wait_to_be_started(any_host: Any) -> None:
    with SplitGuest(any_host, vcpus=2) as guest:
        guest.put(0x1F000, IN_REAL_MODE)
        guest.do(ON)
        other = guest.vcpus[1]
        assert [vcpu.get_mp_state() for vcpu in guest.vcpus] == [kvm.KVM_MP_STATE_RUNNABLE, kvm.KVM_MP_STATE_UNINITIALIZED]
        results: list[int] = []
        second = threading.Thread(target=lambda: results.append(expect_errno(other.ioctl_raw(ioctls.KVM_RUN, 0))), daemon=True)
        second.start()
        guest.do((STORE, APIC + 0x310, 1 << 24), (STORE, APIC + ICR, 1 << 14 | 0x500))
        second.join(20 * PATIENCE)
        assert results == [EAGAIN] and other.get_mp_state() == kvm.KVM_MP_STATE_INIT_RECEIVED
        guest.do((STORE, APIC + ICR, 1 << 14 | 0x61F))
        exit = other.exit(other.run())
        assert isinstance(exit, Io) and exit.data == b"\x5a"


@pytest.mark.parametrize(("flags", "offered"), [(0, True), (4, True), (8, False)])
def test_suppression_is_offered(any_host: Any, flags: int, offered: bool) -> None:
    with Machine(any_host) as machine:
        split(machine)
        if flags & ~machine.vm.check_extension(caps.KVM_CAP_X2APIC_API):
            pytest.skip("a kernel before these flags")
        machine.vm.enable_cap(caps.KVM_CAP_X2APIC_API, flags)
        vcpu = machine.vm.create_vcpu(0)
        machine.vcpus.append(vcpu)
        versions = [struct.unpack_from("<I", vcpu.get_lapic(), VERSION)[0]]
        vcpu.set_cpuid2(machine.system.supported_cpuid())
        versions.append(struct.unpack_from("<I", vcpu.get_lapic(), VERSION)[0])
        assert versions == [0x50014, 0x50014 | offered << 24], "by a processor with x2APIC"


# ---- ends of interrupts
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


# ---- the PICs' vectors
def flags_of(vcpu: Vcpu) -> tuple[int, int]:
    return vcpu.kvm_run.if_flag, vcpu.kvm_run.ready_for_interrupt_injection


def look(guest: SplitGuest) -> tuple[int, int]:
    """KVM_RUN that does nothing: what it says about interrupts."""
    guest.vcpu.request_exit()
    assert guest.vcpu.run() == EINTR
    guest.vcpu.request_exit(False)
    return flags_of(guest.vcpu)


def test_a_vector_from_user_space(any_host: Any) -> None:
    with SplitGuest(any_host, vcpus=2) as guest:
        vcpu = guest.vcpu
        guest.regs(rflags=2 | IF)
        assert look(guest) == (1, 1), "LINT0 of the first processor lets it through from the start"
        assert expect_errno(vcpu.ioctl_raw(ioctls.KVM_INTERRUPT, ctypes.addressof(kvm_interrupt(256)))) == EINVAL
        vcpu.interrupt(0x1F + 0x20)
        assert expect_errno(vcpu.ioctl_raw(ioctls.KVM_INTERRUPT, ctypes.addressof(kvm_interrupt(0x21)))) == EEXIST
        assert look(guest) == (1, 0), "there is room for one"
        assert vcpu.get_vcpu_events().interrupt.injected == 0 and not any(vcpu.get_sregs().interrupt_bitmap)
        guest.do((OPEN,))
        assert guest.taken() == (1, 0x3F)
        assert guest.lapic().get(0x110, 0) == 0, "it is not in service in the APIC"
        guest.regs(rflags=2)
        assert look(guest) == (0, 0)


def test_lint0_keeps_it_away(any_host: Any) -> None:
    with SplitGuest(any_host) as guest:
        guest.do(ON, (STORE, APIC + LINT0, MASKED | EXTINT))
        guest.regs(rflags=2 | IF)
        assert look(guest) == (1, 0)
        guest.vcpu.interrupt(0x41)
        guest.do((OPEN,))
        assert guest.taken() == (0, 0)
        assert guest.vm.signal_msi(MSI, 0x42) == 1
        guest.do((OPEN,), END)
        assert guest.taken() == (1, 0x42), "an APIC's interrupt passes it"
        guest.do((STORE, APIC + LINT0, EXTINT), (OPEN,))
        assert guest.taken() == (1, 0x41)


def test_it_comes_before_the_apics(any_host: Any) -> None:
    with SplitGuest(any_host) as guest:
        guest.do(ON)
        assert guest.vm.signal_msi(MSI, 0xF1) == 1
        guest.vcpu.interrupt(0x21)
        guest.do((OPEN,))
        both, first = (2, 0xF1), (1, 0x21)  # a paravirtual KVM gives one at a time
        assert guest.taken() == (both if feature(guest, "hardware virtualization") else first)


def _start(guest: SplitGuest, *steps: tuple[int, ...], rflags: int = 2) -> Exit:
    rows = [(*step, 0, 0)[:3] for step in (*steps, (0,))]
    guest.put(DATA, b"".join(struct.pack("<IIQ", *row) for row in rows))
    guest.regs(rip=CODE, rsp=STACK, rflags=rflags, rsi=DATA)
    return guest.run()


def test_the_window(any_host: Any) -> None:
    """It opens when the guest takes interrupts and LINT0 lets them through; not while a vector waits."""
    with SplitGuest(any_host) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: request_interrupt_window does nothing")
        run = guest.vcpu.kvm_run
        run.request_interrupt_window = 1
        assert _start(guest, (OPEN,)) == IrqWindowOpen()
        assert flags_of(guest.vcpu) == (1, 1)
        guest.vcpu.interrupt(0x41)
        exit = guest.run()
        assert guest.taken() == (1, 0x41)
        while isinstance(exit, IrqWindowOpen):
            run.request_interrupt_window = 0
            exit = guest.run()
        assert isinstance(exit, Io)
        run.request_interrupt_window = 1
        assert isinstance(_start(guest, ON, (STORE, APIC + LINT0, MASKED | EXTINT), (OPEN,)), Io), "masked: never"


def test_the_guest_opens_lint0(any_host: Any) -> None:
    """The window opens with it, at once."""
    with SplitGuest(any_host) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: request_interrupt_window does nothing")
        guest.do(ON, (STORE, APIC + LINT0, MASKED | EXTINT))
        guest.vcpu.kvm_run.request_interrupt_window = 1
        assert _start(guest, (STORE, APIC + LINT0, EXTINT), rflags=2 | IF) == IrqWindowOpen()
        assert guest.lapic()[LINT0] == EXTINT and flags_of(guest.vcpu) == (1, 1)


def test_a_window_in_halt(any_host: Any) -> None:
    """KVM_RUN comes back from HLT; the vCPU stays halted until there is an interrupt."""
    with SplitGuest(any_host) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: request_interrupt_window does nothing")
        guest.do(ON)
        guest.regs(rflags=2)
        run, vcpu = guest.vcpu.kvm_run, guest.vcpu
        run.request_interrupt_window = 1
        exit = _start(guest, (WAIT,))
        while exit == IrqWindowOpen() and vcpu.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE:
            exit = guest.run()  # behind STI, unless its shadow reaches to HLT
        assert exit == IrqWindowOpen() and vcpu.get_mp_state() == kvm.KVM_MP_STATE_HALTED
        assert flags_of(vcpu) == (1, 1)
        run.request_interrupt_window = 0
        vcpu.interrupt(0x41)
        assert isinstance(guest.run(), Io) and guest.taken() == (1, 0x41)


def test_the_task_priority_is_the_apics(any_host: Any) -> None:
    """kvm_run's cr8 is told, not asked."""
    with SplitGuest(any_host) as guest:
        guest.do((6, 0, 5))
        assert guest.vcpu.kvm_run.cr8 == 5 and guest.vcpu.kvm_run.apic_base == 0xFEE00900
        guest.vcpu.kvm_run.cr8 = 0
        assert guest.do(ON, (RDMSR, BASE_MSR)) == [0xFEE00900]
        assert guest.vcpu.kvm_run.cr8 == 5
