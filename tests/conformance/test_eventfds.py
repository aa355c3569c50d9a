"""ioeventfds and irqfds: a guest's write that signals an eventfd, and an eventfd that interrupts the guest (virt/kvm/eventfd.c)."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Iterator
from errno import EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT
from typing import Any

import pytest

from kvmapi.abi import ioctls, irq, kvm
from kvmapi.exits import Hlt, Io
from kvmapi.exits import Mmio as MmioExit
from tests.conformance.apic_guest import (
    CHIP,
    END,
    LEVEL,
    MESSAGE,
    MSI,
    ON,
    OPEN,
    WAIT,
    ApicGuest,
    IrqMachine,
    alarm,
    entry,
    needs_service,
    until,
)
from tests.conformance.rows import OK, Row, expect_errno, parametrize
from tests.conformance.snippets import DATA, MMIO, LongGuest, Machine, code

MATCH, PIO, DEASSIGN = kvm.KVM_IOEVENTFD_FLAG_DATAMATCH, kvm.KVM_IOEVENTFD_FLAG_PIO, kvm.KVM_IOEVENTFD_FLAG_DEASSIGN
CCW = 1 << 3
PORT = 0x20
THREE_OUTS = code(
    "b005e620 b006e620 66b80601 66e720f4", "mov al, 5; out 0x20, al; mov al, 6; out 0x20, al; mov ax, 0x106; out 0x20, ax; hlt"
)
OUTS = code("ba200000 00f36ef4", "mov edx, 0x20; rep outsb; hlt")
STORES = code(
    "b9000100 d0b80500 00008901 b8060000 00890166 89014889 018b01f4",
    "mov ecx, 0xd0000100; mov eax, 5; mov [rcx], eax; mov eax, 6; mov [rcx], eax; mov [rcx], ax; mov [rcx], rax; mov eax, [rcx]; hlt",
)
__all__ = ["alarm"]  # used by its name


@pytest.fixture
def events() -> Iterator[list[int]]:
    """Three eventfds."""
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    yield made
    for fd in made:
        os.close(fd)


def count(fd: int) -> int:
    """Take what an eventfd has counted."""
    return os.eventfd_read(fd) if select.select([fd], [], [], 0)[0] else 0


def ioeventfd(machine: Machine, fd: int, address: int, length: int, flags: int = 0, match: int = 0) -> int:
    """The errno of KVM_IOEVENTFD."""
    argument = irq.kvm_ioeventfd(match, address, length, fd, flags)
    return expect_errno(machine.vm.ioctl_raw(ioctls.KVM_IOEVENTFD, ctypes.addressof(argument)))


def irqfd(machine: Machine, fd: int, gsi: int, flags: int = 0, resample: int = 0) -> int:
    """The errno of KVM_IRQFD."""
    argument = irq.kvm_irqfd(fd & 0xFFFFFFFF, gsi, flags, resample & 0xFFFFFFFF)
    return expect_errno(machine.vm.ioctl_raw(ioctls.KVM_IRQFD, ctypes.addressof(argument)))


# ---- ioeventfds: what is refused
IO_ROWS = [
    ("length 3", EINVAL, (MMIO, 3, 0, 0)),
    ("length 16", EINVAL, (MMIO, 16, 0, 0)),
    ("a wrap", EINVAL, (2**64 - 1, 2, 0, 0)),
    ("up to the top", EINVAL, (2**64 - 2, 2, 0, 0)),
    ("below the top", OK, (2**64 - 3, 2, 0, 0)),
    ("unknown flag", EINVAL, (MMIO, 4, 1 << 5, 0)),
    ("a flag without a name", OK, (MMIO, 4, 1 << 4, 0)),
    ("no length with a value", EINVAL, (MMIO, 0, MATCH, 1)),
    ("no length", OK, (MMIO, 0, 0, 0)),
    ("a port without length", OK, (PORT, 0, PIO, 0)),
    ("a port of 8 bytes", OK, (PORT, 8, PIO, 0)),
    ("s390's bus", OK, (PORT, 8, CCW, 0)),
    ("over memory", OK, (0x1000, 4, 0, 0)),
]


@pytest.mark.parametrize(("expected", "call"), [row[1:] for row in IO_ROWS], ids=[row[0] for row in IO_ROWS])
def test_what_an_ioeventfd_may_be(any_host: Any, events: list[int], expected: int, call: tuple[int, int, int, int]) -> None:
    address, length, flags, match = call
    with Machine(any_host) as machine:
        assert ioeventfd(machine, events[0], address, length, flags, match) == expected
        if expected == OK:
            assert ioeventfd(machine, events[0], address, length, flags | DEASSIGN, match) == OK
            assert ioeventfd(machine, events[0], address, length, flags | DEASSIGN, match) == ENOENT


def test_fds_that_are_refused(any_host: Any) -> None:
    with Machine(any_host) as machine, open("/dev/null", "rb") as null:
        for flags in (0, DEASSIGN, PIO):
            assert ioeventfd(machine, -1, MMIO, 4, flags) == EBADF
            assert ioeventfd(machine, 9999, MMIO, 4, flags) == EBADF
            assert ioeventfd(machine, null.fileno(), MMIO, 4, flags) == EINVAL
            assert ioeventfd(machine, machine.vm.fd, MMIO, 4, flags) == EINVAL
        assert ioeventfd(machine, -1, MMIO, 3) == EINVAL, "the shape first"
        assert ioeventfd(machine, -1, MMIO, 3, DEASSIGN | 1 << 9) == EBADF, "which is not looked at to take one off"
        assert expect_errno(machine.vm.ioctl_raw(ioctls.KVM_IOEVENTFD, 8)) == EFAULT


COLLISIONS = [
    ("the same", (4, 0, 0), EEXIST),
    ("another length", (2, 0, 0), OK),
    ("any length", (0, 0, 0), EEXIST),
    ("a value beside any", (4, MATCH, 7), EEXIST),
    ("a port", (4, PIO, 0), OK),
]


@pytest.mark.parametrize(("second", "expected"), [row[1:] for row in COLLISIONS], ids=[row[0] for row in COLLISIONS])
def test_collisions(any_host: Any, events: list[int], second: tuple[int, int, int], expected: int) -> None:
    with Machine(any_host) as machine:
        assert ioeventfd(machine, events[0], MMIO, 4) == OK
        assert ioeventfd(machine, events[1], MMIO, *second) == expected
        assert ioeventfd(machine, events[1], MMIO + 1, *second) == OK


def test_two_values_at_one_address(any_host: Any, events: list[int]) -> None:
    with Machine(any_host) as machine:
        assert ioeventfd(machine, events[0], MMIO, 4, MATCH, 1) == OK
        assert ioeventfd(machine, events[0], MMIO, 4, MATCH, 1) == EEXIST
        assert ioeventfd(machine, events[0], MMIO, 4, MATCH, 2) == OK
        for wrong in ((events[1], 4, MATCH, 1), (events[0], 4, 0, 1), (events[0], 2, MATCH, 1), (events[0], 4, MATCH, 3)):
            fd, length, flags, match = wrong
            assert ioeventfd(machine, fd, MMIO, length, flags | DEASSIGN, match) == ENOENT
        again = os.dup(events[0])
        assert ioeventfd(machine, again, MMIO, 4, MATCH | DEASSIGN, 1) == OK, "another fd of the same eventfd"
        os.close(again)
        assert ioeventfd(machine, events[0], MMIO, 4, MATCH, 1) == OK


# ---- ioeventfds: what they do
def exits(guest: LongGuest) -> list[bytes]:
    """The data of the OUT and MMIO write exits until HLT."""
    found = []
    while not isinstance(exit := guest.run(), Hlt):
        assert isinstance(exit, Io | MmioExit), exit
        if isinstance(exit, MmioExit) and not exit.is_write:
            guest.vcpu.answer_mmio(exit, bytes(exit.length))
            found.append(b"read")
        else:
            found.append(bytes(exit.data))
    return found


OUT_CASES = [
    ("any byte", (1, 0, 0), 2, [b"\x06\x01"]),
    ("one byte", (1, MATCH, 6), 1, [b"\x05", b"\x06\x01"]),
    ("a word", (2, MATCH, 0x106), 1, [b"\x05", b"\x06"]),
    ("a value too large", (1, MATCH, 0x106), 0, [b"\x05", b"\x06", b"\x06\x01"]),
    ("anything", (0, 0, 0), 3, []),
    ("4 bytes", (4, 0, 0), 0, [b"\x05", b"\x06", b"\x06\x01"]),
]


@pytest.mark.parametrize(("shape", "signals", "left"), [row[1:] for row in OUT_CASES], ids=[row[0] for row in OUT_CASES])
def test_port_writes(any_host: Any, events: list[int], shape: tuple[int, int, int], signals: int, left: list[bytes]) -> None:
    length, flags, match = shape
    with LongGuest(any_host, THREE_OUTS) as guest:
        guest.vm.ioeventfd(events[0], PORT, length, flags | PIO, match)
        assert exits(guest) == left and count(events[0]) == signals
        guest.vm.ioeventfd(events[0], PORT, length, flags | PIO | DEASSIGN, match)
        guest.regs(rip=guest.regs().rip - 16)
        assert len(exits(guest)) == 3 and count(events[0]) == 0


def test_string_output(any_host: Any, events: list[int]) -> None:
    with LongGuest(any_host, OUTS) as guest:
        guest.put(DATA, b"abcabc")
        guest.vm.ioeventfd(events[0], PORT, 1, PIO | MATCH, ord("b"))
        guest.vm.ioeventfd(events[1], PORT, 1, PIO | MATCH, ord("a"))
        guest.regs(rsi=DATA, rcx=6)
        assert exits(guest) == [b"c", b"c"] and (count(events[0]), count(events[1])) == (2, 2)
        assert (guest.regs().rsi, guest.regs().rcx) == (DATA + 6, 0)


FIVE, SIX = b"\x05\0\0\0", b"\x06\0\0\0"
STORE_CASES = [
    ("4 bytes", (4, 0, 0), 2, [SIX[:2], SIX + bytes(4), b"read"]),
    ("a value", (4, MATCH, 6), 1, [FIVE, SIX[:2], SIX + bytes(4), b"read"]),
    ("8 bytes", (8, MATCH, 6), 1, [FIVE, SIX, SIX[:2], b"read"]),
    ("anything", (0, 0, 0), 4, [b"read"]),
]


@pytest.mark.parametrize(("shape", "signals", "left"), [row[1:] for row in STORE_CASES], ids=[row[0] for row in STORE_CASES])
def test_stores(any_host: Any, events: list[int], shape: tuple[int, int, int], signals: int, left: list[bytes]) -> None:
    length, flags, match = shape
    with LongGuest(any_host, STORES) as guest:
        guest.vm.ioeventfd(events[0], MMIO + 0x100, length, flags, match)
        guest.vm.ioeventfd(events[1], MMIO + 0x104, 4)
        assert exits(guest) == left and (count(events[0]), count(events[1])) == (signals, 0)


# ---- irqfds: what is refused
IRQ_ROWS = [
    Row("unknown flag", EINVAL, lambda e: (e, 5, 4, 0)),
    Row("no such gsi", OK, lambda e: (e, 5000, 0, 0)),
    Row("no fd", EBADF, lambda e: (-1, 5, 0, 0)),
    Row("another file", EINVAL, lambda e: (0, 5, 0, 0)),
    Row("no resample fd", EBADF, lambda e: (e, 5, 2, -1)),
    Row("another file to resample", EINVAL, lambda e: (e, 5, 2, 0)),
    Row("deassign what is not there", OK, lambda e: (e, 5, 1, 0)),
    Row("deassign no fd", EBADF, lambda e: (-1, 5, 1, 0)),
    Row("deassign another file", EINVAL, lambda e: (0, 5, 1, 0)),
]


@parametrize(IRQ_ROWS)
def test_what_an_irqfd_may_be(any_host: Any, events: list[int], row: Row) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    with IrqMachine(any_host) as machine:
        fd, gsi, flags, resample = row.argument(events[0])  # type: ignore[arg-type]
        assert irqfd(machine, fd or null, gsi, flags, resample or null) == row.expected
    os.close(null)


def test_irqfds_need_controllers(any_host: Any, events: list[int]) -> None:
    with Machine(any_host) as machine:
        assert irqfd(machine, events[0], 5) == EINVAL and irqfd(machine, -1, 5) == EINVAL
        assert irqfd(machine, events[0], 5, 1) == OK and irqfd(machine, -1, 5, 1) == EBADF
        assert expect_errno(machine.vm.ioctl_raw(ioctls.KVM_IRQFD, 8)) == EFAULT


def test_one_irqfd_for_one_eventfd(any_host: Any, events: list[int]) -> None:
    with IrqMachine(any_host) as machine:
        assert (irqfd(machine, events[0], 20), irqfd(machine, events[0], 20), irqfd(machine, events[0], 21)) == (OK, EBUSY, EBUSY)
        assert irqfd(machine, events[0], 21, 1) == OK and irqfd(machine, events[0], 21) == EBUSY, "not this one"
        again = os.dup(events[0])
        assert irqfd(machine, again, 20, 1) == OK and irqfd(machine, events[0], 21) == OK
        os.close(again)
        assert irqfd(machine, events[1], 21) == OK, "two eventfds for one GSI"


def test_one_irqfd_for_one_eventfd_in_all_vms(any_host: Any, events: list[int]) -> None:
    with IrqMachine(any_host) as machine, IrqMachine(any_host) as other:
        assert (irqfd(machine, events[0], 20), irqfd(other, events[0], 20)) == (OK, EBUSY)
        assert irqfd(machine, events[0], 20, 1) == OK and irqfd(other, events[0], 20) == OK


# ---- irqfds: what they do
def test_a_pin(any_host: Any, events: list[int]) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.redirect(20, 0x40)
        guest.vm.irqfd(events[0], 20)
        assert not guest.waiting(0x40)
        for _ in range(3):
            os.eventfd_write(events[0], 1)
            assert until(lambda: guest.waiting(0x40))
            guest.do((OPEN,), END)
            assert guest.taken() == (1, 0x40)
        assert until(lambda: not select.select([events[0]], [], [], 0)[0]), "the counter is emptied"


def test_a_message(any_host: Any, events: list[int]) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.vm.irqfd(events[0], 50)
        guest.vm.set_gsi_routing([entry(50, MESSAGE, MSI, 0, 0x41), entry(20, CHIP, 2, 20)])
        os.eventfd_write(events[0], 1)
        guest.do((WAIT,), END)
        assert guest.taken() == (1, 0x41)
        guest.vm.set_gsi_routing([entry(50, MESSAGE, MSI, 0, 0x42)])
        os.eventfd_write(events[0], 1)
        guest.do((WAIT,), END)
        assert guest.taken() == (1, 0x42), "the route of now"


def test_an_event_from_before(any_host: Any, events: list[int]) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.redirect(20, 0x40)
        os.eventfd_write(events[0], 1)
        guest.vm.irqfd(events[0], 20)
        assert until(lambda: guest.waiting(0x40))


def test_no_event_after_deassign(any_host: Any, events: list[int]) -> None:
    """A second irqfd, written later, shows that there was time for the first."""
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.redirect(20, 0x40)
        guest.redirect(21, 0x41)
        guest.vm.irqfd(events[0], 20)
        guest.vm.irqfd(events[1], 21)
        guest.vm.irqfd(events[0], 20, kvm.KVM_IRQFD_FLAG_DEASSIGN)
        os.eventfd_write(events[0], 1)
        os.eventfd_write(events[1], 1)
        assert until(lambda: guest.waiting(0x41)) and not guest.waiting(0x40)
        assert count(events[0]) == 1, "nobody takes it"


def test_resampling(any_host: Any, events: list[int]) -> None:
    """The line is high until the end of the interrupt; then the owner is told, and may raise it again."""
    with ApicGuest(any_host) as guest:
        needs_service(guest)
        raise_it, ended = events[:2]
        guest.do(ON)
        guest.redirect(21, LEVEL | 0x46)
        guest.vm.irqfd(raise_it, 21, kvm.KVM_IRQFD_FLAG_RESAMPLE, ended)
        for _ in range(2):
            os.eventfd_write(raise_it, 1)
            assert until(lambda: guest.waiting(0x46))
            guest.do((OPEN,))
            assert guest.taken() == (1, 0x46) and count(ended) == 0
            guest.do(END, (OPEN,))
            assert guest.taken() == (0, 0) and until(lambda: count(ended) == 1)
            assert guest.vm.get_irqchip(2).chip.ioapic.redirtbl[21] == LEVEL | 0x46


def test_nothing_is_left(any_host: Any, no_leaks: None) -> None:
    """fds of the VM's own go with it, whatever is still assigned."""
    event, other = os.eventfd(0), os.eventfd(0)
    with IrqMachine(any_host) as machine:
        machine.vm.irqfd(event, 20)
        machine.vm.irqfd(other, 21, kvm.KVM_IRQFD_FLAG_RESAMPLE, event)
        machine.vm.ioeventfd(event, MMIO, 4)
        machine.vm.ioeventfd(event, PORT, 1, PIO)
    os.close(event), os.close(other)
