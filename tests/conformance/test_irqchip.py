"""KVM_CREATE_IRQCHIP and the ioctls of the controllers: their checks, their state, lines, messages and routes.

Checks of errno: kvm_vm_ioctl and kvm_arch_vm_ioctl; what the controllers do: arch/x86/kvm/{lapic,ioapic,irq}.c.
"""

from __future__ import annotations

import ctypes
import struct
from errno import EEXIST, EFAULT, EINVAL, ENXIO, EPERM
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, irq, kvm
from kvmapi.abi.vcpu import kvm_debugregs, kvm_interrupt, kvm_lapic_state
from kvmapi.errors import KvmError
from tests.conformance.apic_guest import (
    BASE_MSR,
    CHIP,
    CURRENT,
    DFR,
    ID,
    INITIAL,
    IOAPIC,
    LDR,
    LEVEL,
    LINT0,
    LVTT,
    MASKED,
    MESSAGE,
    MSI,
    ON,
    PPR,
    REMOTE_IRR,
    SPIV,
    TMR,
    VERSION,
    ApicGuest,
    IrqMachine,
    alarm,
    entry,
    raw,
)
from tests.conformance.rows import OK, Row, expect_errno, parametrize
from tests.conformance.snippets import Machine

__all__ = ["alarm"]  # used by its name


# ---- making them
def test_once_and_before_the_first_vcpu(any_host: Any) -> None:
    with IrqMachine(any_host) as machine:
        assert raw(machine, ioctls.KVM_CREATE_IRQCHIP, 0) == EEXIST
        machine.add_vcpu()
        assert raw(machine, ioctls.KVM_CREATE_IRQCHIP, 0) == EEXIST
    with Machine(any_host) as machine:
        machine.add_vcpu()
        assert raw(machine, ioctls.KVM_CREATE_IRQCHIP, 0) == EINVAL


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("IRQCHIP", 1),
        ("IRQ_ROUTING", 4096),
        ("IRQ_INJECT_STATUS", 1),
        ("SIGNAL_MSI", 1),
        ("IRQFD", 1),
        ("IRQFD_RESAMPLE", 1),
        ("IOEVENTFD", 1),
        ("IOEVENTFD_NO_LENGTH", 1),
        ("IOEVENTFD_ANY_LENGTH", 1),
        ("TSC_DEADLINE_TIMER", 1),
        ("X2APIC_API", 3),
    ],
)
def test_capabilities(any_host: Any, name: str, least: int) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.check_extension(getattr(caps, f"KVM_CAP_{name}")) >= least


def _create(machine: Machine) -> None:
    machine.vm.create_irqchip()


ROWS = [
    Row("line without controllers", ENXIO, lambda m: (m, ioctls.KVM_IRQ_LINE, irq.kvm_irq_level(irq=5, level=1))),
    Row("line with a bad pointer", EFAULT, lambda m: (m, ioctls.KVM_IRQ_LINE, 8)),
    Row("line status without controllers", ENXIO, lambda m: (m, ioctls.KVM_IRQ_LINE_STATUS, irq.kvm_irq_level(irq=5, level=1))),
    Row("message without controllers", EINVAL, lambda m: (m, ioctls.KVM_SIGNAL_MSI, irq.kvm_msi(MSI))),
    Row("message with a bad pointer", EFAULT, lambda m: (m, ioctls.KVM_SIGNAL_MSI, 8)),
    Row("routing without controllers", EINVAL, lambda m: (m, ioctls.KVM_SET_GSI_ROUTING, irq.kvm_irq_routing())),
    Row("get a chip without controllers", ENXIO, lambda m: (m, ioctls.KVM_GET_IRQCHIP, irq.kvm_irqchip(chip_id=9))),
    Row("set a chip without controllers", ENXIO, lambda m: (m, ioctls.KVM_SET_IRQCHIP, irq.kvm_irqchip(chip_id=9))),
    Row("get a chip with a bad pointer", EFAULT, lambda m: (m, ioctls.KVM_GET_IRQCHIP, 8)),
    Row("get no such chip", EINVAL, lambda m: (m, ioctls.KVM_GET_IRQCHIP, irq.kvm_irqchip(chip_id=3)), _create),
    Row("set no such chip", EINVAL, lambda m: (m, ioctls.KVM_SET_IRQCHIP, irq.kvm_irqchip(chip_id=3)), _create),
    Row("message flags", EINVAL, lambda m: (m, ioctls.KVM_SIGNAL_MSI, irq.kvm_msi(MSI, flags=2)), _create),
    Row("message without a vCPU", EPERM, lambda m: (m, ioctls.KVM_SIGNAL_MSI, irq.kvm_msi(MSI)), _create),
    Row("routing flags", EINVAL, lambda m: (m, ioctls.KVM_SET_GSI_ROUTING, irq.kvm_irq_routing(flags=1)), _create),
    Row("too many routes", EINVAL, lambda m: (m, ioctls.KVM_SET_GSI_ROUTING, irq.kvm_irq_routing(nr=4097)), _create),
    Row("an empty table", OK, lambda m: (m, ioctls.KVM_SET_GSI_ROUTING, irq.kvm_irq_routing()), _create),
]


@parametrize(ROWS)
def test_errors(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        if row.setup is not None:
            row.setup(machine)
        assert raw(*row.argument(machine)) == row.expectation(machine)


TABLES: list[tuple[str, list[irq.kvm_irq_routing_entry], int]] = [
    ("an ioapic pin", [entry(100, CHIP, 2, 23)], OK),
    ("a pic pin beside it", [entry(5, CHIP, 2, 5), entry(5, CHIP, 0, 5)], OK),
    ("a pin of the second pic", [entry(9, CHIP, 1, 1)], OK),
    ("the last gsi", [entry(4095, MESSAGE, MSI)], OK),
    ("a device id", [entry(1, MESSAGE, MSI, flags=kvm.KVM_MSI_VALID_DEVID)], OK),
    ("a gsi too large", [entry(4096, MESSAGE, MSI)], EINVAL),
    ("no such chip", [entry(1, CHIP, 3, 0)], EINVAL),
    ("no such ioapic pin", [entry(1, CHIP, 2, 24)], EINVAL),
    ("no such pic pin", [entry(1, CHIP, 0, 8)], EINVAL),
    ("no such type", [entry(1, 3)], EINVAL),
    ("flags of a pin", [entry(1, CHIP, 2, 1, flags=1)], EINVAL),
    ("flags of a message", [entry(1, MESSAGE, MSI, flags=2)], EINVAL),
    ("one chip twice", [entry(1, CHIP, 2, 1), entry(1, CHIP, 2, 2)], EINVAL),
    ("two messages", [entry(1, MESSAGE, MSI), entry(1, MESSAGE, MSI)], EINVAL),
    ("a message and a pin", [entry(1, MESSAGE, MSI), entry(1, CHIP, 2, 1)], EINVAL),
    ("one pin for two gsis", [entry(1, CHIP, 2, 1), entry(2, CHIP, 2, 1)], OK),
]


@pytest.mark.parametrize(("table", "expected"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES])
def test_routing_tables(any_host: Any, table: list[irq.kvm_irq_routing_entry], expected: int) -> None:
    with IrqMachine(any_host) as machine:
        try:
            machine.vm.set_gsi_routing(table)
            result = OK
        except KvmError as error:
            result = error.errno
        assert result == expected


def test_a_refused_table_changes_nothing(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.vm.set_gsi_routing([entry(50, MESSAGE, MSI, 0, 0x61)])
        with pytest.raises(KvmError):
            guest.vm.set_gsi_routing([entry(51, MESSAGE, MSI, 0, 0x62), entry(4096, MESSAGE)])
        assert guest.vm.irq_line(50, 1) == 1 and guest.vm.irq_line(51, 1) == -1
        assert guest.vm.irq_line(20, 1) == -1, "the default routes are gone with the first table"


def test_vcpu_ioctls(any_host: Any) -> None:
    with Machine(any_host) as machine:
        vcpu = machine.add_vcpu()
        state = kvm_lapic_state()
        for request in (ioctls.KVM_GET_LAPIC, ioctls.KVM_SET_LAPIC):
            assert expect_errno(vcpu.ioctl_raw(request, ctypes.addressof(state))) == EINVAL
            assert expect_errno(vcpu.ioctl_raw(request, 8)) == EINVAL
    with IrqMachine(any_host) as machine:
        vcpu = machine.add_vcpu()
        for request in (ioctls.KVM_GET_LAPIC, ioctls.KVM_SET_LAPIC):
            assert expect_errno(vcpu.ioctl_raw(request, 8)) == EFAULT
        assert expect_errno(vcpu.ioctl_raw(ioctls.KVM_INTERRUPT, ctypes.addressof(kvm_interrupt(0x40)))) == ENXIO
        assert expect_errno(vcpu.ioctl_raw(ioctls.KVM_INTERRUPT, ctypes.addressof(kvm_interrupt(256)))) == EINVAL


# ---- state
FRESH = {VERSION: 0x50014, DFR: 0xFFFFFFFF, SPIV: 0xFF, **dict.fromkeys(range(LVTT, INITIAL, 0x10), MASKED)}


def test_a_fresh_local_apic(any_host: Any) -> None:
    with ApicGuest(any_host, vcpus=3) as guest:
        assert guest.lapic(0) == {**FRESH, LINT0: 0x700}
        assert guest.lapic(2) == {**FRESH, ID: 2 << 24}
        assert [vcpu.get_sregs().apic_base for vcpu in guest.vcpus] == [0xFEE00900, 0xFEE00800, 0xFEE00800]
        assert [vcpu.get_mp_state() for vcpu in guest.vcpus] == [kvm.KVM_MP_STATE_RUNNABLE, *(kvm.KVM_MP_STATE_UNINITIALIZED,) * 2]


def test_local_apic_state_is_kept_as_it_is(any_host: Any) -> None:
    """Bits that a guest could not write too; only the version, PPR and the current count are KVM's."""
    with ApicGuest(any_host) as guest:
        words = [0x1000 + at for at in range(256)]
        words[INITIAL // 4] = 0
        guest.vcpu.set_lapic(kvm_lapic_state.from_buffer_copy(struct.pack("<256I", *words)))
        got = list(struct.unpack("<256I", bytes(guest.vcpu.get_lapic())))
        assert got[VERSION // 4] == 0x50014 and got[CURRENT // 4] == 0
        for own in (VERSION, PPR, CURRENT):
            got[own // 4] = words[own // 4]
        assert got == words


def test_a_fresh_ioapic(any_host: Any) -> None:
    with IrqMachine(any_host) as machine:
        state = machine.vm.get_irqchip(kvm.KVM_IRQCHIP_IOAPIC).chip.ioapic
        assert (state.base_address, state.ioregsel, state.id, state.irr) == (IOAPIC, 0, 0, 0)
        assert list(state.redirtbl) == [MASKED] * 24


def test_ioapic_state_is_kept_as_it_is(any_host: Any) -> None:
    with IrqMachine(any_host) as machine:
        chip = machine.vm.get_irqchip(kvm.KVM_IRQCHIP_IOAPIC)
        state = chip.chip.ioapic
        state.ioregsel, state.id, state.irr = 0x12, 7, 1 << 20
        for pin in range(24):
            state.redirtbl[pin] = 0xAB5A5A5A_5A010000 | 0x40 + pin
        machine.vm.set_irqchip(chip)
        got = machine.vm.get_irqchip(kvm.KVM_IRQCHIP_IOAPIC).chip.ioapic
        assert bytes(got) == bytes(state)


# ---- lines and messages, without running
def test_line_status(any_host: Any) -> None:
    """Pins above 15, which no PIC shares."""
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        line = guest.vm.irq_line
        assert (line(20, 1), line(20, 1), line(20, 0)) == (-1, 0, 1), "masked, then merged"
        assert (line(200, 1), line(5000, 1), line(200, 0)) == (-1, -1, -1), "not routed"
        guest.redirect(20, 0x40)
        assert (line(20, 1), line(20, 1), line(20, 0), line(20, 1)) == (1, 0, 1, 1)
        guest.redirect(21, LEVEL | 0x41)
        assert (line(21, 1), line(21, 1), line(21, 0)) == (1, -1, 1)
        assert guest.vm.get_irqchip(2).chip.ioapic.redirtbl[21] == LEVEL | REMOTE_IRR | 0x41
        assert guest.waiting(0x40) and guest.waiting(0x41) and guest.lapic()[TMR + 0x20] == 2


MESSAGES = [
    ("fixed", 0xFEE00000, 0x41, 1),
    ("to the second", 0xFEE01000, 0x41, 1),
    ("to nobody", 0xFEE05000, 0x41, 0),
    ("to all", 0xFEEFF000, 0x41, 2),
    ("lowest priority to all", 0xFEEFF000, 0x141, 2),
    ("logical, to nobody", 0xFEE04004, 0x41, 0),
    ("logical", 0xFEE03004, 0x41, 2),
    ("logical, lowest priority", 0xFEE03004, 0x141, 1),
    ("logical, redirected", 0xFEE0300C, 0x41, 1),
    ("physical, redirected", 0xFEE0100C - 4, 0x41, 1),
    ("remote read", 0xFEE00000, 0x341, 1),
    ("NMI", 0xFEE00000, 0x400, 1),
    ("INIT", 0xFEE01000, 0x500, 1),
    ("startup", 0xFEE01000, 0x690, 1),
    ("external", 0xFEE00000, 0x741, 0),
    ("another address", 0x12300000, 0x41, 1),
]


@pytest.mark.parametrize(("address", "data", "taken"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES])
def test_messages(any_host: Any, address: int, data: int, taken: int) -> None:
    with ApicGuest(any_host, vcpus=2) as guest:
        for number, vcpu in enumerate(guest.vcpus):
            state = vcpu.get_lapic()
            struct.pack_into("<I", state, SPIV, 0x1FF)
            struct.pack_into("<I", state, LDR, 1 << 24 + number)
            vcpu.set_lapic(state)
        assert guest.vm.signal_msi(address, data) == taken


def test_messages_to_apics_that_are_off(any_host: Any) -> None:
    with ApicGuest(any_host, vcpus=2) as guest:
        assert guest.vm.signal_msi(MSI, 0x41) == 0 and guest.vm.signal_msi(MSI | 0xFF000, 0x41) == 0, "off in software"
        assert guest.vm.signal_msi(MSI, 0x400) == 1, "an NMI does not care"
        for vcpu in guest.vcpus:
            vcpu.set_msrs({BASE_MSR: 0xFEE00000})
        assert guest.vm.signal_msi(MSI, 0x41) == 0
        with pytest.raises(KvmError) as raised:
            guest.vm.signal_msi(MSI | 0xFF000, 0x41)
        assert raised.value.errno == EPERM


def test_init_clears_the_debug_registers(any_host: Any) -> None:
    """As everything but caching, x87 and SSE state (processor manuals: INIT)."""
    with ApicGuest(any_host, vcpus=2) as guest:
        other = guest.vcpus[1]
        for number, vcpu in enumerate(guest.vcpus):
            state = vcpu.get_lapic()
            struct.pack_into("<I", state, LDR, 1 << 24 + number)
            vcpu.set_lapic(state)  # before any register is written, KVM may not know the newest APIC
        other.set_mp_state(kvm.KVM_MP_STATE_RUNNABLE)
        registers = kvm_debugregs(dr6=0xFFFF0FF1, dr7=0x401)
        registers.db[:] = 0x1000, 0x2000, 0x3000, 0x4000
        other.set_debugregs(registers)
        assert guest.vm.signal_msi(0xFEE01000, 0x500) == 1
        assert other.get_mp_state() in (kvm.KVM_MP_STATE_INIT_RECEIVED, kvm.KVM_MP_STATE_UNINITIALIZED)
        found = other.get_debugregs()
        assert (list(found.db), found.dr6, found.dr7) == ([0] * 4, 0xFFFF0FF0, 0x400)
