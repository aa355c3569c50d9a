"""KVM_CAP_SPLIT_IRQCHIP: the vectors of the PICs, which user space has, come with KVM_INTERRUPT, and its window says when.

Source: kvm_vcpu_ready_for_interrupt_injection in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import ctypes
import struct
from errno import EEXIST, EINTR, EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi.vcpu import kvm_interrupt
from kvmapi.exits import Exit, Io, IrqWindowOpen
from kvmapi.vcpu import Vcpu
from tests.conformance.apic_guest import (
    APIC,
    BASE_MSR,
    END,
    LINT0,
    MASKED,
    MSI,
    ON,
    OPEN,
    RDMSR,
    STORE,
    WAIT,
    alarm,
)
from tests.conformance.rows import expect_errno, feature
from tests.conformance.snippets import CODE, DATA, STACK
from tests.conformance.split_guest import SplitGuest

__all__ = ["alarm"]  # used by its name

EXTINT, IF = 0x700, 0x200


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
