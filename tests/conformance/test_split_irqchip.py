"""KVM_CAP_SPLIT_IRQCHIP: local APICs in the kernel; PICs, IOAPIC and PIT are user space's.

Checks of errno: kvm_vm_ioctl_enable_cap and kvm_arch_vm_ioctl in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from errno import EAGAIN, EEXIST, EINVAL, ENOENT, ENXIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, irq, kvm
from kvmapi.abi.structs import kvm_enable_cap
from kvmapi.exits import Io
from tests.conformance.apic_guest import (
    APIC,
    CHIP,
    END,
    ICR,
    IN_REAL_MODE,
    LVTT,
    MESSAGE,
    MSI,
    ON,
    OPEN,
    STORE,
    VERSION,
    WAIT,
    alarm,
    entry,
    raw,
    until,
)
from tests.conformance.rows import OK, Row, expect_errno, parametrize
from tests.conformance.snippets import CODE, DATA, STACK, Machine
from tests.conformance.split_guest import SplitGuest, split
from tests.conftest import PATIENCE

__all__ = ["alarm"]  # used by its name

LEVEL_DATA, DIRECTED = 0x8000, 1 << 12


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
