"""Local APICs and the IOAPIC as a guest sees them: the pages, x2APIC's MSRs, delivery, the timer, starting a second vCPU.

What they do: arch/x86/kvm/lapic.c and ioapic.c.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import threading
import time
from errno import EAGAIN, EINTR, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.errors import KvmError
from kvmapi.exits import Io
from tests.conformance.apic_guest import (
    APIC,
    BASE_MSR,
    CR8,
    CURRENT,
    DEADLINE_MSR,
    DFR,
    DIVIDE,
    END,
    ICR,
    ICR2,
    ID,
    IN_REAL_MODE,
    INITIAL,
    IOAPIC,
    IRR,
    ISR,
    LDR,
    LEVEL,
    LINT0,
    LOAD,
    LVTT,
    MASKED,
    MSI,
    ON,
    OPEN,
    PPR,
    RDMSR,
    SPIV,
    STORE,
    TPR,
    TSC_MSR,
    VERSION,
    WAIT,
    WRMSR,
    ApicGuest,
    Step,
    alarm,
    needs_service,
)
from tests.conformance.rows import OK, expect_errno, feature
from tests.conformance.snippets import CODE, DATA, Machine
from tests.conftest import PATIENCE

__all__ = ["alarm"]  # used by its name


# ---- a guest
def test_registers_through_the_page(any_host: Any) -> None:
    kept = {LVTT: 0x710FF, 0x330: 0x117FF, 0x340: 0x117FF, LINT0: 0x1F7FF, 0x360: 0x1F7FF, 0x370: 0x110FF, LDR: 0xFF000000, DIVIDE: 0xB}
    with ApicGuest(any_host) as guest:
        (version,) = guest.do((LOAD, APIC + VERSION))
        assert version == 0x50014
        guest.do(*((STORE, APIC + at, 0xFFFFFFFF) for at in (SPIV, *kept, DFR)))
        lapic = guest.lapic()
        assert {at: lapic.get(at, 0) for at in kept} == kept and (lapic[SPIV], lapic[DFR]) == (0x3FF, 0xFFFFFFFF)
        assert guest.do((STORE, APIC + VERSION, 0), (STORE, APIC + IRR, 1), (LOAD, APIC + VERSION), (LOAD, APIC + IRR)) == [0x50014, 0]
        guest.do((STORE, APIC + SPIV, 0xFF))
        assert all(guest.lapic()[at] & MASKED for at in range(LVTT, INITIAL, 0x10))


def test_ioapic_registers_through_the_page(any_host: Any) -> None:
    def window(register: int, value: int) -> list[Step]:
        return [(STORE, IOAPIC, register), (STORE, IOAPIC + 0x10, value)]

    with ApicGuest(any_host) as guest:
        guest.do(*window(0, 0xFFFFFFFF), *window(1, 0), *window(0x10 + 46, 0xFFFFFFFF), *window(0x11 + 46, 0xAB123456))
        state = guest.vm.get_irqchip(2).chip.ioapic
        assert (state.id, state.redirtbl[23], state.ioregsel) == (0xF, 0xAB123456_FFFFAFFF, 0x3F)
        got = [guest.do((STORE, IOAPIC, at), (LOAD, IOAPIC + 0x10), (LOAD, IOAPIC)) for at in (0, 1, 2, 0x3E, 0x3F)]
        assert [values[0] for values in got] == [0x0F000000, 0x00170011, 0x0F000000, 0xFFFFAFFF, 0xAB123456]
        assert [values[1] for values in got] == [0, 1, 2, 0x3E, 0x3F]
        assert guest.do((LOAD, IOAPIC + 0x20)) == [0]


def test_a_message_is_delivered(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        needs_service(guest)
        guest.do(ON)
        assert guest.vm.signal_msi(MSI, 0x55) == 1 and guest.waiting(0x55)
        assert guest.do((OPEN,), (LOAD, APIC + ISR + 0x20), (LOAD, APIC + PPR), END, (LOAD, APIC + ISR + 0x20)) == [1 << 21, 0x50, 0]
        assert guest.taken() == (1, 0x55) and not guest.waiting(0x55)


def test_a_message_ends_hlt(any_host: Any) -> None:
    """HLT stays in the kernel until there is something to deliver."""
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        timer = threading.Timer(0.05, guest.vm.signal_msi, (MSI, 0x56))
        timer.start()
        guest.do((WAIT,), END)
        timer.join()
        assert guest.taken() == (1, 0x56)


def test_a_signal_ends_hlt(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON)
        guest.put(DATA, struct.pack("<IIQ", WAIT, 0, 0))
        guest.regs(rip=CODE, rflags=2, rsi=DATA)
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        me = threading.get_ident()
        timer = threading.Timer(0.05, lambda: signal.pthread_kill(me, signal.SIGUSR1))
        timer.start()
        assert guest.vcpu.run() == EINTR
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_priorities(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        needs_service(guest)
        guest.do(ON, (CR8, 0, 6))
        for vector in (0x31, 0x52, 0x58, 0x61):
            assert guest.vm.signal_msi(MSI, vector) == 1
        guest.do((OPEN,))
        assert guest.taken() == (0, 0), "the task priority holds back its class too"
        assert guest.do((CR8, 0, 5), (OPEN,), (LOAD, APIC + TPR)) == [0x50] and guest.taken() == (1, 0x61)
        guest.do((CR8, 0, 0), (OPEN,))
        assert guest.taken() == (0, 0), "nothing is above what is in service"
        for vector in (0x58, 0x52, 0x31):
            guest.do(END, (OPEN,))
            assert guest.taken() == (1, vector)


def test_an_ipi_to_oneself(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        command = 1 << 18 | 1 << 14 | 0x44
        assert guest.do(ON, (STORE, APIC + ICR, command | 1 << 12), (LOAD, APIC + ICR), (OPEN,), END) == [command], "never busy"
        assert guest.taken() == (1, 0x44)


def test_an_edge_and_a_level(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        needs_service(guest)
        guest.redirect(20, 0x45)
        guest.redirect(21, LEVEL | 0x46)
        guest.do(ON)
        assert guest.vm.irq_line(20, 1) == 1
        guest.do((OPEN,), END, (OPEN,))
        assert guest.taken() == (1, 0x45)
        assert guest.vm.irq_line(21, 1) == 1
        guest.do((OPEN,), END, (OPEN,))
        assert guest.taken() == (2, 0x46), "still high: again"
        guest.vm.irq_line(21, 0)
        guest.do(END, (OPEN,))
        assert guest.taken() == (0, 0) and guest.vm.get_irqchip(2).chip.ioapic.redirtbl[21] == LEVEL | 0x46


# ---- the timer
def test_one_shot(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        start = time.monotonic()
        guest.do(ON, (STORE, APIC + DIVIDE, 0xB), (STORE, APIC + LVTT, 0x50), (STORE, APIC + INITIAL, 50_000_000), (WAIT,), END)
        assert guest.taken() == (1, 0x50) and time.monotonic() - start >= 0.05, "the timer counts nanoseconds"
        assert guest.do((LOAD, APIC + CURRENT), (OPEN,)) == [0] and guest.taken() == (0, 0)


def test_periodic(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        setup: list[Step] = [ON, (STORE, APIC + DIVIDE, 0), (STORE, APIC + LVTT, 1 << 17 | 0x51), (STORE, APIC + INITIAL, 5_000_000)]
        start = time.monotonic()
        guest.do(*setup, *((WAIT,), END) * 5)
        count, vector = guest.taken()  # a slow machine may see one more before it stops the timer
        assert count >= 5 and vector == 0x51 and time.monotonic() - start >= 0.05
        guest.do((STORE, APIC + INITIAL, 0))


def test_the_current_count(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        first, second = guest.do(ON, (STORE, APIC + INITIAL, 0xFFFFFFFF), (LOAD, APIC + CURRENT), (LOAD, APIC + CURRENT))
        assert 0xFFFFFFFF > first >= second > 0xC0000000
        state = guest.vcpu.get_lapic()
        assert 0 < struct.unpack_from("<I", state, CURRENT)[0] <= second


def test_tsc_deadline(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        guest.do(ON, (STORE, APIC + LVTT, 2 << 17 | 0x52))
        later = guest.vcpu.get_msrs([TSC_MSR])[TSC_MSR] + guest.vcpu.ioctl(ioctls.KVM_GET_TSC_KHZ) * 100 * PATIENCE
        assert guest.do((WRMSR, DEADLINE_MSR, later), (RDMSR, DEADLINE_MSR)) == [later]
        assert guest.do((WAIT,), (RDMSR, DEADLINE_MSR), END) == [0]
        assert guest.taken() == (1, 0x52)
        if feature(guest, "an exact CPU"):  # the lab's TSC reads as 0
            assert guest.vcpu.get_msrs([TSC_MSR])[TSC_MSR] >= later


# ---- x2APIC
def x2_on(guest: ApicGuest) -> None:
    guest.do((WRMSR, BASE_MSR, 0xFEE00D00), (WRMSR, 0x80F, 0x1FF))


def test_x2apic(any_host: Any) -> None:
    with ApicGuest(any_host) as guest:
        x2_on(guest)
        assert guest.do((RDMSR, 0x802), (RDMSR, 0x803), (RDMSR, 0x80D), (RDMSR, 0x80F)) == [0, 0x50014, 1, 0x1FF]
        assert guest.do((LOAD, APIC + VERSION), (STORE, APIC + TPR, 0xFF), (RDMSR, 0x808)) == [0xFFFFFFFF, 0]
        guest.do((WRMSR, 0x83F, 0x47), (OPEN,), (WRMSR, 0x80B, 0))
        assert guest.taken() == (1, 0x47)
        assert guest.do((WRMSR, 0x830, 1 << 14 | 0x48), (RDMSR, 0x830), (OPEN,), (WRMSR, 0x80B, 0)) == [1 << 14 | 0x48]
        assert guest.taken() == (1, 0x48)


REFUSED = {
    "id": (WRMSR, 0x802, 0),
    "version": (WRMSR, 0x803, 0x50014),
    "logical id": (WRMSR, 0x80D, 1),
    "format, read": (RDMSR, 0x80E),
    "upper command, read": (RDMSR, 0x831),
    "upper command": (WRMSR, 0x831, 0),
    "end, read": (RDMSR, 0x80B),
    "error": (WRMSR, 0x828, 1),
    "self": (WRMSR, 0x83F, 0x100),
    "upper bits": (WRMSR, 0x808, 1 << 32),
    "reserved bits of the command": (WRMSR, 0x830, 1 << 20),
    "none": (RDMSR, 0x8FF),
    "back to xAPIC": (WRMSR, BASE_MSR, 0xFEE00900),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_x2apic_mode(any_host: Any, name: str) -> None:
    with ApicGuest(any_host) as guest:
        x2_on(guest)
        guest.regs(r13=0)
        guest.do(REFUSED[name])
        assert guest.regs().r13 == 1, "#GP"


def test_modes(any_host: Any) -> None:
    """Off to x2APIC is refused; MSRs of an xAPIC are refused; off and on again keeps what waits."""
    with ApicGuest(any_host) as guest:
        guest.regs(r13=0)
        guest.do(ON, (RDMSR, 0x802), (WRMSR, BASE_MSR, 0xFEE00100), (WRMSR, BASE_MSR, 0xFEE00D00))
        assert guest.regs().r13 == 2 and guest.vcpu.get_sregs().apic_base == 0xFEE00100
        assert guest.do((LOAD, APIC + VERSION)) == [0xFFFFFFFF]
        guest.do((WRMSR, BASE_MSR, 0xFEE00900))
        assert guest.do((LOAD, APIC + VERSION)) == [0x50014] and guest.regs().r13 == 2


@pytest.mark.parametrize("wide", [0, 1])
def test_state_in_x2apic_mode(any_host: Any, wide: int) -> None:
    with ApicGuest(any_host, vcpus=3) as guest:
        if wide:
            guest.vm.enable_cap(caps.KVM_CAP_X2APIC_API, kvm.KVM_X2APIC_API_USE_32BIT_IDS)
        vcpu = guest.vcpus[2]
        vcpu.set_msrs({BASE_MSR: 0xFEE00C00})
        lapic = guest.lapic(2)
        assert (lapic[ID], lapic[LDR]) == (2 if wide else 2 << 24, 4)
        state = vcpu.get_lapic()
        struct.pack_into("<I", state, ID, 1)
        result = expect_errno(vcpu.ioctl_raw(ioctls.KVM_SET_LAPIC, ctypes.addressof(state)))
        assert result == (EINVAL if wide else OK) and guest.lapic(2)[ID] == (2 if wide else 2 << 24)


def test_x2apic_api_flags(any_host: Any) -> None:
    with Machine(any_host) as machine:
        with pytest.raises(KvmError) as raised:
            machine.vm.enable_cap(caps.KVM_CAP_X2APIC_API, 1 << 10)
        assert raised.value.errno == EINVAL


# ---- several vCPUs
def test_a_second_vcpu_is_started(any_host: Any) -> None:
    """INIT and a startup IPI: it begins in real mode at the vector's page. KVM_RUN of a vCPU that was never started waits for
    the INIT and then returns EAGAIN; the next one waits for the startup IPI.
    """
    with ApicGuest(any_host, vcpus=2) as guest:
        guest.put(0x1F000, IN_REAL_MODE)
        guest.do(ON)  # KVM looks for its vCPUs anew when an APIC was written to
        vcpu = guest.vcpus[1]

        def command(low: int, after: int) -> list[int]:
            """Run the second vCPU while the first sends it an IPI."""
            results: list[int] = []
            second = threading.Thread(target=lambda: results.append(expect_errno(vcpu.ioctl_raw(ioctls.KVM_RUN, 0))), daemon=True)
            second.start()
            guest.do((STORE, APIC + ICR2, 1 << 24), (STORE, APIC + ICR, 1 << 14 | low))
            second.join(20 * PATIENCE)
            assert not second.is_alive() and vcpu.get_mp_state() == after
            return results

        assert command(0x500, kvm.KVM_MP_STATE_INIT_RECEIVED) == [EAGAIN]
        assert command(0x600 | 0x1F, kvm.KVM_MP_STATE_RUNNABLE) == [0]
        exit = vcpu.exit()
        assert isinstance(exit, Io) and (exit.port, exit.data) == (0x10, b"\x5a")
        sregs = guest.vcpus[1].get_sregs()
        assert (sregs.cs.selector, sregs.cs.base) == (0x1F00, 0x1F000)
