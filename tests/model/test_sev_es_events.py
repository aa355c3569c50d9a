"""Interrupts, NMIs and other processors of an SEV-ES guest."""

from __future__ import annotations

import threading
import time
from errno import EAGAIN
from typing import Any

import pytest

from kvmapi.abi import ghcb as abi
from kvmapi.abi import ioctls, kvm
from kvmapi.exits import Hlt, Intr, IrqWindowOpen
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import CODE, code
from tests.model.es_code import CELL, GHCB_AT, Caller, EsCode

pytestmark = pytest.mark.model
STORE_RAX = code("49be0010064000000000 498906 49895608 f4", "movabs r14, 0x40061000; mov [r14], rax; mov [r14+8], rdx; hlt")


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


# ---- HLT, interrupts, NMIs
SPIN = code("fb ebfe", "sti; 0: jmp 0b")


def test_an_interrupt_reaches_the_guest(host: ModelHost) -> None:
    class Handler(EsCode):
        def before_launch(self) -> None:
            self.set_gate(0x1F, CODE + 0x100)
            self.put(CODE + 0x100, code("48c7c077000000", "mov rax, 0x77") + STORE_RAX)

    with Handler(host, SPIN, registers={"rflags": 0x202}) as guest:
        run = guest.vcpu.kvm_run
        run.immediate_exit = 1
        assert guest.run() == Intr() and run.if_flag == 0, "the guest's flags are not KVM's before it ran"
        run.immediate_exit = 0
        run.request_interrupt_window = 1
        assert guest.run() == IrqWindowOpen() and (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)
        run.request_interrupt_window = 0
        guest.vcpu.interrupt(0x1F)
        assert guest.run() == Hlt() and guest.words(CELL)[0] == 0x77 and run.if_flag == 0


def test_an_nmi_handler_ends_when_the_guest_says_so(host: ModelHost) -> None:
    """IRET is not intercepted: a second NMI waits for NMI complete, whatever the guest returned from."""

    class Handler(Caller):
        def before_launch(self) -> None:
            self.set_gate(2, CODE + 0x100)
            self.put(CODE + 0x100, code("49bd0000074000000000 49ff4500 48cf", "movabs r13, 0x40070000; inc qword ptr [r13]; iretq"))

    with Handler(host) as guest:
        guest.vcpu.nmi()
        assert guest.call(2) == Hlt() and guest.words(0x70000) == (1,)
        guest.vcpu.nmi()
        assert guest.call(2) == Hlt() and guest.words(0x70000) == (1,), "still masked"
        assert guest.vcpu.get_vcpu_events().nmi.masked == 1
        guest.fill(abi.SVM_VMGEXIT_NMI_COMPLETE)
        assert guest.call() == Hlt() and guest.answer() == (0, 0) and guest.words(0x70000) == (2,)


def test_each_vcpu_has_its_own(host: ModelHost) -> None:
    """GHCB, MSR and registers."""
    text = code("f6c101 7501 f4 0fa2", "test cl, 1; jnz 0f; hlt; 0: cpuid")
    with EsCode(host, text, vcpus=2, registers={"rcx": 0}) as guest:
        first, second = guest.file(0).ghcb, guest.file(1).ghcb
        assert first is not None and second is not None and first is not second
        first.msr = 0x1000
        assert second.msr & 0xFFF == 1 and guest.run(1) == Hlt() and guest.run(0) == Hlt()
        assert guest.report().vector == 0


# ---- other processors, with the APICs in the kernel
class Sleeper(Caller):
    """Its second vCPU waits for a startup IPI, then does what the first does."""

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._second)
        thread.start()
        return thread

    def _second(self) -> None:
        while self.vcpus[1].ioctl_raw(ioctls.KVM_RUN) == -EAGAIN:
            pass  # it was started, and is to be run now

    def until(self, condition: Any) -> None:
        for _ in range(2000):
            if condition():
                return
            time.sleep(0.002)
        raise AssertionError("it did not happen")

    def stop(self, thread: threading.Thread) -> None:
        self.vcpus[1].kvm_run.immediate_exit = 1
        thread.join(10)
        assert not thread.is_alive()
        self.vcpus[1].kvm_run.immediate_exit = 0


@pytest.mark.parametrize("way", ["page", "msr"])
def test_startup_ipis(host: ModelHost, way: str) -> None:
    """The first runs the VMSA as it was launched; a later one ends the hold, and says so."""
    with Sleeper(host, vcpus=2, irqchip=True) as guest:
        activity = guest.file(1).activity
        guest.fill(abi.SVM_VMGEXIT_AP_HLT_LOOP)
        guest.put(CELL, (GHCB_AT if way == "page" else 6).to_bytes(8, "little"))
        thread = guest.start()
        activity.init()
        activity.sipi(0x9A)
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_AP_RESET_HOLD)
        assert guest.answer() == (0, 0)
        activity.init()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_INIT_RECEIVED)
        activity.sipi(0x9A)
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_HALTED)
        guest.stop(thread)
        if way == "page":
            assert guest.answer() == (0, 1)
        else:
            assert guest.msr() == 1 << 12 | 7


def test_another_event_ends_the_hold_with_nothing(host: ModelHost) -> None:
    with Sleeper(host, vcpus=2, irqchip=True) as guest:
        activity = guest.file(1).activity
        guest.fill(abi.SVM_VMGEXIT_AP_HLT_LOOP)
        guest.put(CELL, GHCB_AT.to_bytes(8, "little"))
        guest.vcpus[1].set_mp_state(kvm.KVM_MP_STATE_RUNNABLE)
        thread = guest.start()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_AP_RESET_HOLD)
        guest.stop(thread)
        assert guest.vcpus[1].get_mp_state() == kvm.KVM_MP_STATE_AP_RESET_HOLD
        assert guest.valid() == {"sw_exit_info_1", "sw_exit_info_2"}, "it was not entered again: the registers are still to come"
        thread = guest.start()
        activity.nmi()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_HALTED)
        guest.stop(thread)
        assert guest.answer() == (0, 0) and guest.report().vector == 2 and "rax" in guest.valid()


def test_the_first_startup_ipi_ends_no_hold(host: ModelHost) -> None:
    """A processor that user space made runnable has not had its first."""
    with Sleeper(host, vcpus=2, irqchip=True) as guest:
        activity = guest.file(1).activity
        guest.put(CELL, (6).to_bytes(8, "little"))
        guest.vcpus[1].set_mp_state(kvm.KVM_MP_STATE_RUNNABLE)
        thread = guest.start()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_AP_RESET_HOLD)
        activity.init()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_INIT_RECEIVED)
        activity.sipi(0x9A)
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_HALTED)
        guest.stop(thread)
        assert guest.msr() == 7


def test_a_startup_ipi_for_a_processor_that_runs_says_nothing(host: ModelHost) -> None:
    with Sleeper(host, vcpus=2, irqchip=True) as guest:
        activity, unit = guest.file(1).activity, guest.file(1).ghcb
        assert unit is not None
        guest.put(CELL, (6).to_bytes(8, "little"))
        thread = guest.start()
        activity.init()
        activity.sipi(0x9A)
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_AP_RESET_HOLD)
        activity.nmi()
        guest.until(lambda: activity.state == kvm.KVM_MP_STATE_HALTED)
        guest.stop(thread)
        activity.init()
        assert guest.vcpus[1].get_mp_state() == kvm.KVM_MP_STATE_INIT_RECEIVED
        activity.sipi(0x9A)
        assert guest.vcpus[1].get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE and unit.msr == 7


def test_the_state_can_be_set(host: ModelHost) -> None:
    with EsCode(host, code("f4", "hlt"), irqchip=True) as guest:
        guest.vcpu.set_mp_state(kvm.KVM_MP_STATE_AP_RESET_HOLD)
        assert guest.vcpu.get_mp_state() == kvm.KVM_MP_STATE_AP_RESET_HOLD
