"""What a KVM_RUN that ends with EINTR leaves behind: the reason it ended, and all that the guest has done.

Source: kvm_arch_vcpu_ioctl_run and vcpu_run in arch/x86/kvm/x86.c. With immediate_exit the guest is not entered, and the
reason of the last exit stays; a signal says KVM_EXIT_INTR.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from errno import EINTR
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Hlt, Io
from kvmapi.model.host import ModelHost
from kvmapi.model.signals import LOOK, WATCHER
from kvmapi.model.vcpu import VcpuFile
from tests.conformance.snippets import LongGuest, Machine, code
from tests.model.test_idle_vcpus import file_of

pytestmark = pytest.mark.model
HLT = code("f4", "hlt")
SPIN = code("ebfe", "0: jmp 0b")
TWICE = code("e6 10 e6 11 f4", "out 0x10, al; out 0x11, al; hlt")


class WithApic(LongGuest):
    """The VM has interrupt controllers, in which HLT stays in KVM_RUN."""

    def add_vcpu(self) -> Any:
        if not self.vcpus:
            self.vm.create_irqchip()
        return super().add_vcpu()


def vcpu_file(host: Any, guest: Machine) -> VcpuFile:
    return file_of(host, guest.vcpu.fd)


def test_immediate_exit_keeps_the_last_reason(model_host: Any) -> None:
    with LongGuest(model_host, TWICE) as guest:
        assert isinstance(guest.run(), Io)
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_IO
        assert guest.vcpu.run() == EINTR and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_IO
        guest.vcpu.request_exit(False)
        assert isinstance(guest.run(), Io) and guest.run() == Hlt()


def test_a_signal_before_the_guest_is_entered(model_host: Any) -> None:
    """The last exit is finished, and the signal has come by then."""
    with LongGuest(model_host, TWICE) as guest:
        assert isinstance(guest.run(), Io)
        file = vcpu_file(model_host, guest)
        finish = file.cpu.privileged.pending

        def interrupted() -> int | None:
            file.inside.interrupted = True
            return finish() if finish is not None else None

        file.cpu.privileged.pending = interrupted
        assert guest.vcpu.run() == EINTR and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_INTR
        assert isinstance(guest.run(), Io) and guest.run() == Hlt()


def test_a_signal_in_a_child_of_a_process_with_vcpus(model_host: Any) -> None:
    """Its own vCPUs are watched by a thread of its own."""
    with LongGuest(model_host, SPIN) as parent:
        assert parent.vcpu.id == 0
        child = os.fork()
        if not child:
            ended = 1
            try:
                signal.signal(signal.SIGALRM, lambda _number, _frame: None)
                with LongGuest(ModelHost(), SPIN) as guest:
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    ended = 0 if guest.vcpu.run() == EINTR else 2
            finally:
                os._exit(ended)
        end = time.monotonic() + 20
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.01)
        if not done[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert done == (child, 0), "KVM_RUN did not end" if not done[0] else "it ended otherwise"


def test_a_signal_while_others_have_the_engine(model_host: Any) -> None:
    with LongGuest(model_host, TWICE) as guest:
        guest.vcpu.kvm_run.exit_reason = kvm.KVM_EXIT_MMIO
        before = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        try:
            thread = threading.get_ident()
            vm = vcpu_file(model_host, guest).vm
            with_engine, done = threading.Event(), threading.Event()
            threading.Thread(target=lambda: hold(vm.paused, with_engine, done), daemon=True).start()
            assert with_engine.wait(10)
            threading.Thread(target=lambda: (time.sleep(0.1), signal.pthread_kill(thread, signal.SIGUSR1)), daemon=True).start()
            assert guest.vcpu.run() == EINTR and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_INTR
        finally:
            done.set()
            signal.signal(signal.SIGUSR1, before)


def hold(paused: Callable[[], Any], begun: threading.Event, end: threading.Event) -> None:
    with paused():
        begun.set()
        end.wait(20)


def test_hlt_is_not_undone(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """User space wants KVM_RUN to end at the moment when the guest executes HLT: it is halted, then and afterwards."""
    with WithApic(model_host, HLT) as guest:
        file = vcpu_file(model_host, guest)
        go = file.cpu.go

        def interrupted() -> int:
            result = go()
            guest.vcpu.request_exit()
            return result

        monkeypatch.setattr(file.cpu, "go", interrupted)
        assert guest.vcpu.run() == EINTR and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_INTR
        assert guest.vcpu.get_mp_state() == kvm.KVM_MP_STATE_HALTED


def test_nobody_watches_while_nobody_is_inside(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that looks for signals sleeps, also while a run loop runs the guest unwatched; who enters by ioctl wakes it."""
    woken: list[bool] = []
    wake = WATCHER.wake
    monkeypatch.setattr(WATCHER, "wake", lambda: (woken.append(True), wake()))
    with LongGuest(model_host, TWICE) as guest:
        until_asleep()
        run = model_host.runner(guest.vcpu.fd)
        assert run() == 0 and guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_IO
        assert WATCHER.asleep and not woken
        assert isinstance(guest.run(), Io) and woken == [True]
        until_asleep()
        assert guest.run() == Hlt() and woken == [True, True]


def until_asleep() -> None:
    end = time.monotonic() + 10
    while not WATCHER.asleep:
        assert time.monotonic() < end
        time.sleep(LOOK)
