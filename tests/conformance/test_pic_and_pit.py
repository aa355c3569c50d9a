"""The PICs and the PIT: their ioctls, their ports as a guest uses them, and interrupts through LINT0."""

from __future__ import annotations

import ctypes
import errno
import signal
import threading
import time
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi.irq import kvm_irqchip, kvm_pit_config, kvm_pit_state2
from kvmapi.exits import Io
from tests.conformance.apic_guest import LINT0, MASKED, ApicGuest, alarm
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, STUBS, Machine, code, expect_errno
from tests.conftest import PATIENCE

__all__ = ["alarm"]

MASTER, SLAVE = kvm.KVM_IRQCHIP_PIC_MASTER, kvm.KVM_IRQCHIP_PIC_SLAVE
INITIALIZE = code(
    "b011 e620 b040 e621 b004 e621 b001 e621 b011 e6a0 b048 e6a1 b002 e6a1 b001 e6a1",
    "mov al, 0x11; out 0x20, al; mov al, 0x40; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al;"
    "mov al, 0x11; out 0xA0, al; mov al, 0x48; out 0xA1, al; mov al, 2; out 0xA1, al; mov al, 1; out 0xA1, al",
)
UNMASK = code("30c0 e621 e6a1", "xor al, al; out 0x21, al; out 0xA1, al")
WAIT = code("fb 4539c7 72fb fa e610", "sti; pic_wait: cmp r15d, r8d; jb pic_wait; cli; out 0x10, al")
HANDLER = code(
    "41b64141 ffc750b0 2041f6c6 087402e6 a0e62058 48cf",
    "mov r14b, 0x41; inc r15d; push rax; mov al, 0x20; test r14b, 8; jz ack_master; out 0xA0, al; ack_master: out 0x20, al; pop rax; iretq",
)
PERIODIC = code("b034e643 88c8e640 88e8e640", "mov al, 0x34; out 0x43, al; mov al, cl; out 0x40, al; mov al, ch; out 0x40, al")
READ_BACK = code(
    "b0e2e643 e44088c3 b000e643 e44088c1 e44088c5 e461 e610",
    "mov al, 0xE2; out 0x43, al; in al, 0x40; mov bl, al; mov al, 0; out 0x43, al; in al, 0x40; mov cl, al;"
    "in al, 0x40; mov ch, al; in al, 0x61; out 0x10, al",
)


def pic(machine: Machine, chip: int) -> Any:
    data = kvm_irqchip(chip_id=chip)
    machine.vm.ioctl(ioctls.KVM_GET_IRQCHIP, ctypes.addressof(data))
    return data.chip.pic


def call(machine: Machine, request: int, data: Any) -> int:
    return expect_errno(machine.host.ioctl(machine.vm.fd, request, ctypes.addressof(data)))


def test_state_of_the_pics(any_host: Any) -> None:
    with Machine(any_host) as machine:
        data = kvm_irqchip(chip_id=MASTER)
        assert call(machine, ioctls.KVM_GET_IRQCHIP, data) == errno.ENXIO
        machine.vm.create_irqchip()
        assert (pic(machine, MASTER).elcr_mask, pic(machine, SLAVE).elcr_mask) == (0xF8, 0xDE)
        for number, name in enumerate(("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "elcr", "special_mask", "auto_eoi")):
            setattr(data.chip.pic, name, number + 1)
        data.chip.pic.imr = 0
        data.chip.pic.elcr_mask, data.chip_id = 0xF8, SLAVE
        assert call(machine, ioctls.KVM_SET_IRQCHIP, data) == 0
        assert bytes(pic(machine, SLAVE)) == bytes(data.chip.pic) and pic(machine, MASTER).irr == 4, "the slave asks the master"
        data.chip_id = 3
        assert call(machine, ioctls.KVM_GET_IRQCHIP, data) == errno.EINVAL == call(machine, ioctls.KVM_SET_IRQCHIP, data)


def test_lines_and_masks(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.vm.create_irqchip()
        machine.vm.irq_line(3, True)
        machine.vm.irq_line(9, True)
        assert (pic(machine, MASTER).irr, pic(machine, SLAVE).irr) == (1 << 3 | 1 << 2, 1 << 1)
        machine.vm.irq_line(3, False)
        machine.vm.irq_line(9, False)
        assert (pic(machine, MASTER).irr, pic(machine, SLAVE).irr) == (1 << 3 | 1 << 2, 1 << 1), "edges stay"
        data = kvm_irqchip(chip_id=MASTER)
        data.chip.pic.elcr = data.chip.pic.elcr_mask = 0xF8
        assert call(machine, ioctls.KVM_SET_IRQCHIP, data) == 0
        machine.vm.irq_line(5, True)
        assert pic(machine, MASTER).irr & 1 << 5
        machine.vm.irq_line(5, False)
        assert not pic(machine, MASTER).irr & 1 << 5, "a level falls"


def test_the_pit_and_its_state(any_host: Any) -> None:
    with Machine(any_host) as machine:
        config, state = kvm_pit_config(), kvm_pit_state2()
        assert call(machine, ioctls.KVM_CREATE_PIT2, config) == errno.ENOENT
        assert call(machine, ioctls.KVM_GET_PIT2, state) == errno.ENXIO
        machine.vm.create_irqchip()
        assert call(machine, ioctls.KVM_CREATE_PIT2, config) == 0
        assert call(machine, ioctls.KVM_CREATE_PIT2, config) == errno.EEXIST
        assert expect_errno(machine.host.ioctl(machine.vm.fd, ioctls.KVM_CREATE_PIT, 0)) == errno.EEXIST
        assert call(machine, ioctls.KVM_GET_PIT2, state) == 0
        assert [(counter.count, counter.mode, counter.gate) for counter in state.channels] == [(0x10000, 255, 1)] * 2 + [(0x10000, 255, 0)]
        state.channels[0].mode, state.channels[0].count, state.channels[2].count, state.flags = 2, 5000, 0, 1
        assert call(machine, ioctls.KVM_SET_PIT2, state) == 0
        assert call(machine, ioctls.KVM_GET_PIT2, state) == 0
        assert (state.channels[0].count, state.channels[2].count, state.flags) == (5000, 0x10000, 1)


class PicGuest(ApicGuest):
    """Interrupts come through LINT0; each handler ends its own at the PICs, and WAIT waits for R8 of them."""

    def __init__(self, host: Any, text: bytes) -> None:
        super().__init__(host)
        if not feature(self, "hardware virtualization"):
            self.__exit__()
            pytest.skip("paravirtual: interrupts come when registers were set")
        for vector in range(0x40, 0x50):
            self.put(STUBS + 16 * 256 + 32 * (vector - 0x40), HANDLER[:2] + bytes([vector]) + HANDLER[3:])
            self.set_gate(vector, STUBS + 16 * 256 + 32 * (vector - 0x40))
        self.put(CODE, INITIALIZE + UNMASK + text)


@pytest.mark.parametrize("gsi", [1, 9])
def test_an_interrupt_through_lint0(any_host: Any, gsi: int) -> None:
    with PicGuest(any_host, WAIT) as guest:
        guest.vm.irq_line(gsi, True)
        assert isinstance(guest.again(r8=0), Io), "initialization forgets edges"
        guest.vm.irq_line(gsi, False)
        guest.vm.irq_line(gsi, True)
        guest.regs(r8=1, rip=CODE + len(INITIALIZE + UNMASK))
        found = guest.run()
        assert isinstance(found, Io) and guest.taken() == (1, 0x40 + gsi)
        assert (pic(guest, MASTER).isr, pic(guest, SLAVE).isr, pic(guest, MASTER).irr) == (0, 0, 0)


def test_lint0_masked(any_host: Any) -> None:
    with PicGuest(any_host, WAIT) as guest:
        assert isinstance(guest.again(r8=0), Io)
        state = guest.vcpu.get_lapic()
        words = (ctypes.c_uint32 * 256).from_buffer(state)
        words[LINT0 // 4] |= MASKED
        guest.vcpu.set_lapic(state)
        guest.vm.irq_line(1, True)
        # For this thread: one for the process may be taken by another that does not block it.
        timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGALRM))
        timer.start()
        guest.regs(r8=1, rip=CODE + len(INITIALIZE + UNMASK))
        assert guest.vcpu.run() == errno.EINTR and guest.taken()[0] == 0 and pic(guest, MASTER).irr == 1 << 1


def test_ticks(any_host: Any) -> None:
    """Counter 0 in mode 2: none is lost, and they come at its rate."""
    with PicGuest(any_host, PERIODIC + WAIT) as guest:
        assert call(guest, ioctls.KVM_CREATE_PIT2, kvm_pit_config()) == 0
        before = time.monotonic()
        assert isinstance(guest.again(r8=20, rcx=11932), Io) and guest.taken()[1] == 0x40
        assert 0.19 < time.monotonic() - before < 2 * PATIENCE


def test_counting(any_host: Any) -> None:
    with PicGuest(any_host, PERIODIC + READ_BACK) as guest:
        assert call(guest, ioctls.KVM_CREATE_PIT2, kvm_pit_config(flags=kvm.KVM_PIT_SPEAKER_DUMMY)) == 0
        before = time.monotonic()
        found = guest.again(rcx=0xFFFF)
        assert isinstance(found, Io) and found.port == 0x10
        regs = guest.regs()
        assert regs.rbx & 0x7F == 0x34, "both bytes, mode 2"
        elapsed = time.monotonic() - before
        assert elapsed > 0.05 or 0 < 0xFFFF - (regs.rcx & 0xFFFF) <= elapsed * 1193182 + 1
        assert regs.rax & 0xCF == 0, "the speaker is off"


def test_no_pit_no_ports(any_host: Any) -> None:
    with PicGuest(any_host, READ_BACK) as guest:
        found = guest.again()
        assert isinstance(found, Io) and found.port == 0x43
