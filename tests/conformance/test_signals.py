"""A signal for the vCPU's thread ends KVM_RUN with EINTR, on every host.

The guest spins, so that only the signal can end the run. Each test sends it from another thread, to the thread that is inside
KVM_RUN; the handler must have run when KVM_RUN is back, unless the thread blocks the signal.
"""

from __future__ import annotations

import ctypes
import errno
import signal
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from tests.conformance.snippets import LongGuest, code

SPIN = code("eb fe", "1: jmp 1b")
LIMIT = 5.0


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """SIGUSR1 has a handler that notes its calls."""
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR1, before)


def _soon(thread: int, number: int, after: float = 0.05) -> None:
    def send() -> None:
        time.sleep(after)
        signal.pthread_kill(thread, number)

    threading.Thread(target=send, daemon=True).start()


def test_a_signal_interrupts(any_host: Any, handled: list[int]) -> None:
    with LongGuest(any_host, SPIN) as guest:
        for count in (1, 2):
            began = time.monotonic()
            _soon(threading.get_ident(), signal.SIGUSR1)
            assert guest.vcpu.run() == errno.EINTR
            assert time.monotonic() - began < LIMIT
            assert guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_INTR
            assert handled == [signal.SIGUSR1] * count


def test_registers_survive_the_interruption(any_host: Any, handled: list[int]) -> None:
    with LongGuest(any_host, code("48 ff c0 eb fb", "1: inc rax; jmp 1b")) as guest:
        _soon(threading.get_ident(), signal.SIGUSR1)
        assert guest.vcpu.run() == errno.EINTR
        first = guest.vcpu.get_regs().rax
        _soon(threading.get_ident(), signal.SIGUSR1)
        assert guest.vcpu.run() == errno.EINTR
        assert guest.vcpu.get_regs().rax > first > 0


def test_the_signal_mask_decides(any_host: Any, handled: list[int]) -> None:
    """KVM_SET_SIGNAL_MASK lets through a signal that the thread blocks; it stays pending for the thread."""
    mask = ((1 << 64) - 1) & ~(1 << signal.SIGUSR1 - 1)
    buffer = bytearray(struct.pack("<IQ", 8, mask))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with LongGuest(any_host, SPIN) as guest:
            assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SIGNAL_MASK, ctypes.addressof(ctypes.c_char.from_buffer(buffer))) == 0
            _soon(threading.get_ident(), signal.SIGUSR1)
            assert guest.vcpu.run() == errno.EINTR
            assert handled == []
            assert signal.SIGUSR1 in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert handled == [signal.SIGUSR1]


def test_a_mask_of_another_size_is_refused(any_host: Any) -> None:
    with LongGuest(any_host, SPIN) as guest:
        buffer = bytearray(struct.pack("<IQ", 16, 0))
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_SIGNAL_MASK, ctypes.addressof(ctypes.c_char.from_buffer(buffer))) == -errno.EINVAL
