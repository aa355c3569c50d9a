"""request_interrupt_window: KVM_RUN comes back when the guest can take an interrupt; if_flag and ready_for_interrupt_injection tell."""

from __future__ import annotations

from errno import EINTR
from typing import Any

import pytest

from kvmapi.exits import Hlt, Io, IrqWindowOpen
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, STACK, STUBS, LongGuest, RealGuest, code

IF = 0x200


def windows(guest: LongGuest | RealGuest) -> None:
    """Skip where no window is ever reported."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("paravirtual: request_interrupt_window does nothing")


IRET = code(
    "6a106800 00020068 02020000 6a086810 00010048 cf90ffc0 f4",
    "push 0x10; push 0x20000; push 0x202; push 8; push 0x10010; iretq; nop; inc eax; hlt",
)
OPENERS = [
    ("sti", code("ffc0fbff c0ffc0f4", "inc eax; sti; inc eax; inc eax; hlt"), 5, 2),
    ("popf", code("68020200 009dffc0 f4", "push 0x202; popfq; inc eax; hlt"), 6, 0),
    ("iret", IRET, 0x10, 0),
]


@pytest.mark.parametrize(("name", "text", "at", "counted"), OPENERS, ids=[row[0] for row in OPENERS])
def test_the_window_opens(any_host: Any, name: str, text: bytes, at: int, counted: int) -> None:
    """Behind POPF and IRET at once, behind STI after one more instruction."""
    with LongGuest(any_host, text) as guest:
        windows(guest)
        run = guest.vcpu.kvm_run
        run.request_interrupt_window = 1
        guest.regs(rax=0)
        assert guest.run() == IrqWindowOpen()
        assert (guest.regs().rip, guest.regs().rax) == (CODE + at, counted)
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
        assert guest.regs().rflags & IF
        assert guest.run() == IrqWindowOpen(), "and again, as long as it is asked for"
        run.request_interrupt_window = 0
        assert guest.run() == Hlt()


def test_a_window_that_is_open_already(any_host: Any) -> None:
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        windows(guest)
        guest.vcpu.kvm_run.request_interrupt_window = 1
        guest.regs(rflags=2 | IF)
        assert guest.run() == IrqWindowOpen()
        assert guest.regs().rip == CODE, "no instruction was executed"


def test_no_window_while_interrupts_are_off(any_host: Any) -> None:
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        run = guest.vcpu.kvm_run
        run.request_interrupt_window = 1
        assert guest.run() == Hlt()
        assert (run.if_flag, run.ready_for_interrupt_injection) == (0, 0)


def test_a_window_in_real_mode(any_host: Any) -> None:
    with RealGuest(any_host, code("90fb9090 f4", "nop; sti; nop; nop; hlt", 16)) as guest:
        windows(guest)
        guest.vcpu.kvm_run.request_interrupt_window = 1
        assert guest.run() == IrqWindowOpen()
        guest.vcpu.kvm_run.request_interrupt_window = 0
        guest.vcpu.interrupt(0x21)
        assert guest.run() == Hlt() and guest.vector() == 0x21


def test_inject_when_the_window_opens(any_host: Any) -> None:
    """What a VMM does: ask, inject, run. The handler's IRET goes back to the instruction that was interrupted."""
    with LongGuest(any_host, code("fb90ffc0 ffc0f4", "sti; nop; inc eax; inc eax; hlt")) as guest:
        windows(guest)
        guest.set_gate(0x1F, STUBS + 16 * 0x1F)
        guest.put(STUBS + 16 * 0x1F, code("ffc348cf", "inc ebx; iretq"))
        run = guest.vcpu.kvm_run
        run.request_interrupt_window = 1
        guest.regs(rax=0, rbx=0)
        assert guest.run() == IrqWindowOpen()
        guest.vcpu.interrupt(0x1F)
        run.request_interrupt_window = 0
        assert guest.run() == Hlt()
        assert (guest.regs().rax, guest.regs().rbx, guest.regs().rsp) == (2, 1, STACK)


def test_not_ready_while_an_interrupt_waits(any_host: Any) -> None:
    """immediate_exit leaves the interrupt undelivered, and KVM_RUN says that there is no room for another."""
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        run = guest.vcpu.kvm_run
        guest.regs(rflags=2 | IF)
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
        guest.vcpu.interrupt(0x1F)
        assert guest.vcpu.run() == EINTR
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 0)
        run.request_interrupt_window = 1
        guest.vcpu.request_exit(False)
        guest.set_gate(0x1F, STUBS + 16 * 0x1F)
        assert guest.run() == Hlt() and guest.vector() == 0x1F


def test_immediate_exit_comes_before_an_open_window(any_host: Any) -> None:
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        guest.vcpu.kvm_run.request_interrupt_window = 1
        guest.regs(rflags=2 | IF)
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR and guest.regs().rip == CODE


def test_the_flags_at_an_io_exit(any_host: Any) -> None:
    with LongGuest(any_host, code("e610fae6 10fbe610 f4", "out 0x10, al; cli; out 0x10, al; sti; out 0x10, al; hlt")) as guest:
        run = guest.vcpu.kvm_run
        guest.regs(rflags=2 | IF)
        seen = []
        while isinstance(guest.run(), Io):
            seen.append((run.if_flag, run.ready_for_interrupt_injection))
        if not feature(guest, "hardware virtualization"):
            seen[2] = (seen[2][0], 0)  # no shadow there
        assert seen == [(1, 1), (0, 0), (1, 0)], "the OUT behind STI stands in its shadow until it is completed"
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
