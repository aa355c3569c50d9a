"""KVM_CAP_SYNC_REGS: registers in kvm_run itself. kvm_valid_regs asks for them at every exit, kvm_dirty_regs has them set at entry."""

from __future__ import annotations

from errno import EINTR, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.exits import Hlt, Io
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, STACK, LongGuest, code

REGS, SREGS, EVENTS = kvm.KVM_SYNC_X86_REGS, kvm.KVM_SYNC_X86_SREGS, kvm.KVM_SYNC_X86_EVENTS
ALL = REGS | SREGS | EVENTS
COUNT = code("48ffc0f4", "inc rax; hlt")


def raw_run(guest: LongGuest) -> int:
    result: int = guest.vcpu.ioctl_raw(ioctls.KVM_RUN)
    return result


def test_the_capability(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        assert guest.vm.check_extension(caps.KVM_CAP_SYNC_REGS) == ALL


@pytest.mark.parametrize("bit", [3, 31, 63])
@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_unknown_bits(any_host: Any, field: str, bit: int) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.regs.rax = 7
        run.kvm_dirty_regs = REGS
        setattr(run, field, getattr(run, field) | 1 << bit)
        before = bytes(guest.vcpu.get_regs())
        assert raw_run(guest) == -EINVAL
        assert bytes(guest.vcpu.get_regs()) == before, "checked before anything is taken over"
        run.kvm_valid_regs = run.kvm_dirty_regs = 0
        assert guest.run() == Hlt()


def test_valid_registers_are_what_the_ioctls_give(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = ALL
        guest.regs(rax=41)
        assert guest.run() == Hlt()
        assert run.s.regs.regs.rax == 42 and run.kvm_valid_regs == ALL
        assert bytes(run.s.regs.regs) == bytes(guest.vcpu.get_regs())
        assert bytes(run.s.regs.sregs) == bytes(guest.vcpu.get_sregs())
        assert bytes(run.s.regs.events) == bytes(guest.vcpu.get_vcpu_events())


def test_only_what_is_asked_for(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.regs.rax = run.s.regs.sregs.cr2 = 0x55
        run.kvm_valid_regs = SREGS
        assert guest.run() == Hlt()
        assert (run.s.regs.regs.rax, run.s.regs.sregs.cr2) == (0x55, 0)
        run.kvm_valid_regs = 0
        run.s.regs.sregs.cr2 = 0x66
        assert guest.again() == Hlt() and run.s.regs.sregs.cr2 == 0x66


def test_dirty_registers_are_taken(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = ALL
        assert guest.run() == Hlt()
        run.s.regs.regs.rax, run.s.regs.regs.rip = 99, CODE
        run.s.regs.sregs.cr2 = 0x1234
        run.kvm_dirty_regs = REGS | SREGS
        assert guest.run() == Hlt()
        assert (run.s.regs.regs.rax, run.s.regs.sregs.cr2, run.kvm_dirty_regs) == (100, 0x1234, 0)
        run.s.regs.regs.rax = 5  # not marked dirty: not looked at
        guest.regs(rip=CODE)
        assert guest.run() == Hlt() and guest.regs().rax == 101


def test_dirty_without_valid(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.regs = guest.vcpu.get_regs()
        run.s.regs.regs.rax = 7
        run.kvm_dirty_regs = REGS
        assert guest.run() == Hlt() and guest.regs().rax == 8
        assert run.s.regs.regs.rax == 7 and run.kvm_dirty_regs == 0


def test_dirty_system_registers_that_are_refused(any_host: Any) -> None:
    """General registers are taken before; what was refused stays marked."""
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.regs, run.s.regs.sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
        run.s.regs.regs.rax, run.s.regs.sregs.cr0 = 7, 0x80000000
        run.kvm_dirty_regs = REGS | SREGS
        assert raw_run(guest) == -EINVAL
        assert guest.regs().rax == 7 and run.kvm_dirty_regs == SREGS


def test_dirty_events(any_host: Any) -> None:
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.events = guest.vcpu.get_vcpu_events()
        run.s.regs.events.exception.injected, run.s.regs.events.exception.nr = 1, 32
        run.kvm_dirty_regs = EVENTS
        assert raw_run(guest) == -EINVAL and run.kvm_dirty_regs == EVENTS
        run.s.regs.events.exception.nr = 13
        run.s.regs.events.exception.has_error_code, run.s.regs.events.exception.error_code = 1, 0x77
        assert raw_run(guest) == 0 and run.kvm_dirty_regs == 0
        assert guest.vector() == 13 and guest.frame().error == 0x77 and guest.frame().rsp == STACK


def test_before_an_answer_is_completed(any_host: Any) -> None:
    """Dirty registers are taken first, then the data of the IN arrives in RAX."""
    with LongGuest(any_host, code("e410f4", "in al, 0x10; hlt")) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the answer comes first")
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = REGS
        exit = guest.run()
        assert isinstance(exit, Io)
        guest.vcpu.answer_io(exit, b"\x42")
        run.s.regs.regs.rax, run.s.regs.regs.rbx = 0x1100, 9
        run.kvm_dirty_regs = REGS
        assert guest.run() == Hlt()
        assert (guest.regs().rax, guest.regs().rbx) == (0x1142, 9)


def test_with_an_immediate_exit(any_host: Any) -> None:
    """KVM_RUN with immediate_exit is the way to set and get all of it without running."""
    with LongGuest(any_host, COUNT) as guest:
        run = guest.vcpu.kvm_run
        run.s.regs.regs = guest.vcpu.get_regs()
        run.s.regs.regs.rax = 7
        run.kvm_valid_regs, run.kvm_dirty_regs = ALL, REGS
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR
        assert (run.s.regs.regs.rax, run.s.regs.regs.rip, run.s.regs.sregs.cr3, run.kvm_dirty_regs) == (7, CODE, 0x1000, 0)
        guest.vcpu.request_exit(False)
        assert guest.run() == Hlt() and run.s.regs.regs.rax == 8
