"""KVM_GET_VCPU_EVENTS and SET_VCPU_EVENTS, KVM_INTERRUPT and KVM_NMI: what waits, what is delivered first, and through which gate."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from errno import EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.exits import Hlt
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, STACK, STUBS, LongGuest, RealGuest, code

HLT = code("f4", "hlt")
NOPS = code("9090f4", "nop; nop; hlt")
COUNT_AND_RETURN = code("ffc348cf", "inc ebx; iretq")
RF = 1 << 16
SHOWN = kvm.KVM_VCPUEVENT_VALID_NMI_PENDING | kvm.KVM_VCPUEVENT_VALID_SHADOW | kvm.KVM_VCPUEVENT_VALID_SMM
VECTOR = 0x41


def wide(guest: LongGuest) -> LongGuest:
    """Gates for all 256 vectors."""
    for vector in range(32, 256):
        guest.set_gate(vector, STUBS + 16 * vector)
        guest.put(STUBS + 16 * vector, b"\xf4")
    sregs = guest.vcpu.get_sregs()
    sregs.idt.limit = 0xFFF
    guest.vcpu.set_sregs(sregs)
    return guest


def set_events(guest: LongGuest, change: Callable[[v.kvm_vcpu_events], None]) -> int:
    events = guest.vcpu.get_vcpu_events()
    change(events)
    result: int = guest.vcpu.ioctl_raw(ioctls.KVM_SET_VCPU_EVENTS, ctypes.addressof(events))
    return result


def only_hardware(guest: LongGuest | RealGuest, what: str) -> None:
    if not feature(guest, "hardware virtualization"):
        pytest.skip(f"paravirtual: {what}")


# ---- the struct
def test_nothing_waits_at_first(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        events = guest.vcpu.get_vcpu_events()
        assert events.flags == SHOWN
        events.flags = 0
        assert not any(bytes(events))


REFUSED = [
    ("unknown flag", {"flags": SHOWN | 1 << 6}),
    ("last flag", {"flags": 1 << 31}),
    ("payload without the capability", {"flags": kvm.KVM_VCPUEVENT_VALID_PAYLOAD}),
    ("triple fault without the capability", {"flags": kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT}),
    ("exception 32", {"exception.injected": 1, "exception.nr": 32}),
    ("exception 255", {"exception.injected": 1, "exception.nr": 255}),
    ("NMI as an exception", {"exception.injected": 1, "exception.nr": 2}),
]
ACCEPTED = [
    ("no flags", {"flags": 0}),
    ("a number without an exception", {"exception.nr": 255}),
    ("pending needs the payload's flag", {"exception.pending": 1, "exception.nr": 77}),
    ("SIPI vector", {"flags": SHOWN | kvm.KVM_VCPUEVENT_VALID_SIPI_VECTOR, "sipi_vector": 0x99}),
    ("latched INIT without an APIC", {"smi.latched_init": 1}),
]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [(*row, EINVAL) for row in REFUSED] + [(*row, 0) for row in ACCEPTED],
    ids=[row[0] for row in REFUSED + ACCEPTED],
)
def test_set_events(any_host: Any, name: str, fields: dict[str, int], expected: int) -> None:
    def change(events: v.kvm_vcpu_events) -> None:
        for path, value in fields.items():
            owner, _, field = path.rpartition(".")
            setattr(getattr(events, owner) if owner else events, field, value)

    with LongGuest(any_host, HLT) as guest:
        assert set_events(guest, change) == -expected
        assert not guest.vcpu.get_vcpu_events().exception.injected
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 1, "and nothing is delivered"


# ---- exceptions
@pytest.mark.parametrize(("vector", "error"), [(13, 0x1234), (14, 6), (17, 0), (0, None), (6, None), (1, None)])
def test_an_injected_exception(any_host: Any, vector: int, error: int | None) -> None:
    def change(events: v.kvm_vcpu_events) -> None:
        events.exception.injected, events.exception.nr = 1, vector
        if error is not None:
            events.exception.has_error_code, events.exception.error_code = 1, error

    with LongGuest(any_host, NOPS) as guest:
        assert set_events(guest, change) == 0
        shown = guest.vcpu.get_vcpu_events().exception
        assert (shown.injected, shown.pending, shown.nr) == (1, 0, vector)
        assert (shown.has_error_code, shown.error_code) == (error is not None, error or 0)
        guest.regs(rax=1)  # registers may be set in between
        assert guest.run() == Hlt() and guest.vector() == vector
        frame = guest.frame()
        assert (frame.error, frame.rip, frame.rflags & ~RF, frame.rsp) == (error, CODE, 2, STACK)
        assert guest.vcpu.get_sregs().cr2 == 0, "an injected #PF leaves CR2 to user space"
        assert not guest.vcpu.get_vcpu_events().exception.injected


@pytest.mark.parametrize("vector", [3, 4])
def test_software_exceptions_are_not_shown(any_host: Any, vector: int) -> None:
    """#BP and #OF come from instructions that will be executed again: they are injected and not told."""

    def change(events: v.kvm_vcpu_events) -> None:
        events.exception.injected, events.exception.nr = 1, vector

    with LongGuest(any_host, NOPS) as guest:
        assert set_events(guest, change) == 0
        shown = guest.vcpu.get_vcpu_events().exception
        assert (shown.injected, shown.nr) == (0, vector)


def test_an_exception_goes_before_an_interrupt(any_host: Any) -> None:
    """Both injected: the exception is delivered and the interrupt is gone, for both are one slot of the processor's."""

    def change(events: v.kvm_vcpu_events) -> None:
        events.exception.injected, events.exception.nr = 1, 6
        events.interrupt.injected, events.interrupt.nr = 1, VECTOR

    with wide(LongGuest(any_host, NOPS)) as guest:
        only_hardware(guest, "the interrupt goes first")
        assert set_events(guest, change) == 0
        assert guest.run() == Hlt() and guest.vector() == 6
        assert not guest.vcpu.get_vcpu_events().interrupt.injected
        assert guest.again(rflags=0x202) == Hlt() and guest.regs().rip == CODE + 3


# ---- interrupts
@pytest.mark.parametrize("vector", [0x10, 0x20, VECTOR, 0xFF])
def test_interrupt(any_host: Any, vector: int) -> None:
    with wide(LongGuest(any_host, NOPS)) as guest:
        guest.regs(rflags=0x246)
        guest.vcpu.interrupt(vector)
        events = guest.vcpu.get_vcpu_events()
        assert (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) == (1, vector, 0)
        assert guest.vcpu.get_sregs().interrupt_bitmap[vector // 64] == 1 << vector % 64
        assert guest.run() == Hlt() and guest.vector() == vector
        rip, cs, rflags, rsp, ss = (int.from_bytes(guest.get(guest.regs().rsp + 8 * n, 8), "little") for n in range(5))
        assert (rip, cs, rflags, rsp, ss) == (CODE, 8, 0x246, STACK, 0x10), "no error code, no RF"
        assert not guest.regs().rflags & 0x200 and not guest.vcpu.get_vcpu_events().interrupt.injected


def test_interrupt_vectors_are_bytes(any_host: Any) -> None:
    with LongGuest(any_host, NOPS) as guest:
        for vector in (256, 1 << 16, (1 << 32) - 1):
            argument = v.kvm_interrupt(vector)
            assert guest.vcpu.ioctl_raw(ioctls.KVM_INTERRUPT, ctypes.addressof(argument)) == -EINVAL
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 3


def test_the_last_interrupt_counts(any_host: Any) -> None:
    with wide(LongGuest(any_host, NOPS)) as guest:
        guest.vcpu.interrupt(0x55)
        guest.vcpu.interrupt(VECTOR)
        assert guest.again(rflags=0x202) == Hlt() and guest.vector() == VECTOR


def test_interrupt_in_real_mode(any_host: Any) -> None:
    with RealGuest(any_host, code("9090f4", "nop; nop; hlt", 16)) as guest:
        guest.regs(rflags=0x202)
        guest.vcpu.interrupt(0x21)
        assert guest.run() == Hlt() and guest.vector() == 0x21
        assert guest.get(guest.regs().rsp, 6) == bytes.fromhex("0010 0000 0202") and not guest.regs().rflags & 0x200


def test_a_handler_returns_to_where_it_was(any_host: Any) -> None:
    with wide(LongGuest(any_host, NOPS)) as guest:
        guest.put(STUBS + 16 * VECTOR, COUNT_AND_RETURN)
        guest.regs(rflags=0x202, rbx=0)
        guest.vcpu.interrupt(VECTOR)
        assert guest.run() == Hlt()
        assert (guest.regs().rip, guest.regs().rbx, guest.regs().rflags & 0x200) == (CODE + 3, 1, 0x200)


def test_interrupt_of_a_halted_guest(any_host: Any) -> None:
    """User space keeps a guest halted; it goes on behind HLT when it is given an interrupt."""
    with wide(LongGuest(any_host, code("f4ffc1f4", "hlt; inc ecx; hlt"))) as guest:
        guest.put(STUBS + 16 * VECTOR, COUNT_AND_RETURN)
        assert guest.again(rflags=0x202, rbx=0, rcx=0) == Hlt()
        guest.vcpu.interrupt(VECTOR)
        assert guest.run() == Hlt()
        assert (guest.regs().rbx, guest.regs().rcx, guest.regs().rip) == (1, 1, CODE + 4)


# ---- NMI
def test_nmi(any_host: Any) -> None:
    with LongGuest(any_host, NOPS) as guest:
        guest.vcpu.nmi()
        events = guest.vcpu.get_vcpu_events()
        assert (events.nmi.injected, events.nmi.pending, events.nmi.masked) == (0, 1, 0)
        assert guest.run() == Hlt() and guest.vector() == 2, "whatever IF says"
        assert guest.frame()[1:] == (CODE, 8, 2, STACK, 0x10)
        events = guest.vcpu.get_vcpu_events()
        assert (events.nmi.injected, events.nmi.pending, events.nmi.masked) == (0, 0, 1)


def test_an_nmi_waits_for_the_iret_of_the_one_before(any_host: Any) -> None:
    with LongGuest(any_host, NOPS) as guest:
        only_hardware(guest, "IRET does not end an NMI")
        guest.put(STUBS + 32, code("ffc3f4ff c148cf", "inc ebx; hlt; inc ecx; iretq"))
        guest.regs(rbx=0, rcx=0)
        guest.vcpu.nmi()
        assert guest.run() == Hlt() and (guest.regs().rbx, guest.regs().rcx) == (1, 0)
        guest.vcpu.nmi()
        guest.vcpu.nmi()
        assert guest.vcpu.get_vcpu_events().nmi.pending == 1, "one is latched, the other is lost"
        assert guest.run() == Hlt() and (guest.regs().rbx, guest.regs().rcx) == (2, 1), "delivered after the first IRET, not before"
        assert guest.vcpu.get_vcpu_events().nmi.masked == 1
        assert guest.run() == Hlt() and (guest.regs().rbx, guest.regs().rcx, guest.regs().rip) == (2, 2, CODE + 3)
        assert guest.vcpu.get_vcpu_events().nmi.masked == 0


def test_two_nmis_at_once_are_both_delivered(any_host: Any) -> None:
    with LongGuest(any_host, NOPS) as guest:
        only_hardware(guest, "IRET does not end an NMI")
        guest.put(STUBS + 32, COUNT_AND_RETURN)
        guest.regs(rbx=0)
        for _ in range(3):
            guest.vcpu.nmi()
        assert guest.vcpu.get_vcpu_events().nmi.pending == 2, "a third is lost"
        assert guest.run() == Hlt() and (guest.regs().rbx, guest.regs().rip) == (2, CODE + 3)


def test_nmi_state_from_user_space(any_host: Any) -> None:
    def mask(events: v.kvm_vcpu_events) -> None:
        events.nmi.masked, events.nmi.pending = 1, 5

    def unmask(events: v.kvm_vcpu_events) -> None:
        events.nmi.masked, events.flags = 0, 0

    with LongGuest(any_host, NOPS) as guest:
        assert set_events(guest, mask) == 0
        events = guest.vcpu.get_vcpu_events()
        assert (events.nmi.masked, events.nmi.pending) == (1, 1)
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 3, "masked"
        assert set_events(guest, unmask) == 0
        assert guest.vcpu.get_vcpu_events().nmi.pending == 1, "without the flag, `pending` is not looked at"
        assert guest.again() == Hlt() and guest.vector() == 2


def test_an_nmi_being_injected(any_host: Any) -> None:
    """`injected` with `masked`: the state in the middle of a delivery, as another VMM may hand it over."""

    def change(events: v.kvm_vcpu_events) -> None:
        events.nmi.injected = events.nmi.masked = 1

    with LongGuest(any_host, NOPS) as guest:
        assert set_events(guest, change) == 0
        assert guest.vcpu.get_vcpu_events().nmi.injected == 1
        assert guest.run() == Hlt() and guest.vector() == 2
        assert (guest.vcpu.get_vcpu_events().nmi.injected, guest.vcpu.get_vcpu_events().nmi.masked) == (0, 1)


def test_an_interrupt_and_an_nmi(any_host: Any) -> None:
    """A queued interrupt counts as being delivered already, so the NMI follows it: at the first instruction of its handler."""
    with wide(LongGuest(any_host, NOPS)) as guest:
        only_hardware(guest, "IRET does not end an NMI")
        guest.put(STUBS + 32, COUNT_AND_RETURN)
        guest.regs(rflags=0x202, rbx=0)
        guest.vcpu.nmi()
        guest.vcpu.interrupt(VECTOR)
        assert guest.run() == Hlt() and guest.vector() == VECTOR and guest.regs().rbx == 1


# ---- the shadow of STI
def test_shadow_round_trip(any_host: Any) -> None:
    def change(on: int) -> Callable[[v.kvm_vcpu_events], None]:
        def inner(events: v.kvm_vcpu_events) -> None:
            events.interrupt.shadow = on

        return inner

    with LongGuest(any_host, NOPS) as guest:
        only_hardware(guest, "has no shadow that user space can set")
        for on in (kvm.KVM_X86_SHADOW_INT_STI, 0, kvm.KVM_X86_SHADOW_INT_MOV_SS):
            assert set_events(guest, change(on)) == 0
            shown = guest.vcpu.get_vcpu_events().interrupt.shadow
            assert shown == (3 if on else 0), "SVM has one bit for both"
        assert guest.run() == Hlt()
        assert guest.vcpu.get_vcpu_events().interrupt.shadow == 0, "one instruction long"


def test_sti_and_hlt(any_host: Any) -> None:
    """HLT right behind STI: it exits, and the guest is ready for an interrupt then."""
    with LongGuest(any_host, code("fbf4", "sti; hlt")) as guest:
        assert guest.run() == Hlt()
        run = guest.vcpu.kvm_run
        assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
        assert guest.vcpu.get_vcpu_events().interrupt.shadow == 0
