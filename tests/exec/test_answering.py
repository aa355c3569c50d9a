"""The threads that answer, and what they do to themselves."""

from __future__ import annotations

import ctypes
import threading

import pytest

from vmm.exec.memory import sigbus
from vmm.exec.tracing import cpuid

ARCH_PRCTL, ARCH_GET_CPUID = 158, 0x1011


def cpuid_works() -> bool:
    """Does it in this thread, without a fault?"""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_CPUID, 0) == 1


def test_a_thread_without_cpuid_gets_it_back_by_using_it() -> None:
    """Libraries execute it when they like: that must not end us."""
    if not cpuid_works():
        pytest.skip("this kernel cannot tell whether CPUID faults (arch_prctl)")
    seen: list[object] = []

    def main() -> None:
        seen.append(sigbus.without_cpuid())
        seen.append(cpuid_works())
        seen.append(cpuid.native(0, 0))
        seen.append(cpuid_works())

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    if not seen[0]:
        pytest.skip("this processor cannot make CPUID fault")
    assert seen == [True, False, cpuid.native(0, 0), True]
