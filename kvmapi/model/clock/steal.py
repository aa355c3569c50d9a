"""Steal time: how long the thread that runs a vCPU waited for a processor, told to the guest (MSR_KVM_STEAL_TIME).

The kernel's number is the thread's run delay, which /proc/PID/task/TID/schedstat shows; a kernel without scheduler statistics
does not offer the MSR. The structure is brought up to date at every KVM_RUN. Source: record_steal_time in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import functools
import os
import struct

from kvmapi.model.caller import Caller
from kvmapi.model.clock import pvclock
from kvmapi.model.mem.physical import Physical

_RESERVED = 0x3E
_ADDRESS = ~0x3F
_LAYOUT = struct.Struct("<QIIB")  # struct kvm_steal_time: steal, version, flags, preempted; padding up to 64 bytes


@functools.cache
def offered() -> bool:
    """Does this kernel count what steal time is made of?"""
    return os.path.exists("/proc/self/schedstat")


def run_delay(thread: int) -> int:
    """Nanoseconds for which a thread (0: this one) was ready to run and had no processor; 0 where it is gone."""
    try:
        with open(f"/proc/{thread or 'thread-self'}/schedstat", "rb", buffering=0) as file:
            return int(file.read(128).split()[1])
    except (OSError, IndexError):
        return 0


class StealTime:
    """Steal time of one vCPU."""

    def __init__(self, physical: Physical) -> None:
        self._physical = physical
        self.msr = 0
        self._last = 0  # the run delay that the guest was told of

    def set(self, value: int) -> bool:
        """A write of the MSR; False for #GP."""
        if value & _RESERVED or not offered():
            return False
        self.msr = value
        return True

    def record(self, caller: Caller) -> None:
        """KVM_RUN begins: add what the calling thread waited for since the last time. The engine lock is held."""
        at = self.msr & _ADDRESS
        old = pvclock.read(self._physical, at, _LAYOUT.size)
        if old is None:
            return
        steal, version, flags, _ = _LAYOUT.unpack(old)
        delay = run_delay(caller.thread)
        steal, self._last = steal + delay - self._last & pvclock.U64, delay
        version = version + (version & 1) + 2 & 0xFFFFFFFF
        pvclock.write(self._physical, at, _LAYOUT.pack(steal, version, flags, 0))
