"""Time of one VM: the frequency and the agreement of its vCPUs' time-stamp counters, and kvmclock.

kvmclock is nanoseconds since the VM was made, or since whatever KVM_SET_CLOCK said. It is computed from the machine's counter
from one reading on (`master`), which only KVM_SET_CLOCK replaces; so it is exact for all vCPUs whose counters agree, and
KVM says so (KVM_CLOCK_TSC_STABLE) while all of them do. Counters agree when they were set to the same time: KVM takes a write
of 0, or one within a second of what the others would read, as an attempt to synchronise (kvm_synchronize_tsc).

Order of checks: kvm_arch_vm_ioctl in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvmapi.abi import ioctls, kvm
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.clock import tsc
from kvmapi.model.clock.pvclock import NS, U64, Scale, scale

FRACTION = 32  # bits of a scaling ratio behind the point, as the processor's TSC ratio MSR has them
_MAX_RATIO = 0xFF  # whole part
CLOCK_FLAGS = kvm.KVM_CLOCK_TSC_STABLE | kvm.KVM_CLOCK_REALTIME | kvm.KVM_CLOCK_HOST_TSC
_DATA = struct.Struct("<QI4xQQ16x")  # kvm_clock_data: clock, flags, realtime, host_tsc


class Master(NamedTuple):
    """The reading that kvmclock counts from."""

    host_tsc: int
    clock: int  # kvmclock's nanoseconds then


class _Write(NamedTuple):
    """The last time somebody set a vCPU's counter."""

    ns: int
    value: int
    khz: int
    offset: int


def wanted_khz(arg: int) -> int:
    """KVM_SET_TSC_KHZ's argument in kHz, 0 being the machine's own; EINVAL beyond what can be scaled to."""
    asked = arg & 0xFFFFFFFF
    if asked >= max_khz():
        raise Errno(errno.EINVAL)
    return asked or tsc.khz()


def max_khz() -> int:
    """The fastest counter a guest can have."""
    return min(0x7FFFFFFF, tsc.khz() * _MAX_RATIO)


class VmClock:
    """`has_vcpus` tells whether any vCPU was made yet."""

    def __init__(self, has_vcpus: Callable[[], bool]) -> None:
        self._has_vcpus = has_vcpus
        self._lock = threading.Lock()
        self.khz = tsc.khz()  # of vCPUs to come
        self.scale: Scale = scale(tsc.khz())
        self.master = Master(tsc.read(), 0)
        self.updates = 1  # counts what vCPUs must tell their guests
        self.wall_clock = 0  # MSR_KVM_WALL_CLOCK
        self._last = _Write(0, 0, 0, 0)
        self._user_set = False
        self._generation = 0
        self._offset = 0  # that the current generation shares
        self._generations: dict[int, int] = {}  # by vCPU id; one whose fd was closed counts on, as in KVM

    def handlers(self) -> Mapping[int, Callable[[int, Caller], int]]:
        """By request number."""
        return {
            ioctls.KVM_GET_TSC_KHZ: lambda arg, caller: self.khz,
            ioctls.KVM_SET_TSC_KHZ: self._set_khz,
            ioctls.KVM_GET_CLOCK: self._get_clock,
            ioctls.KVM_SET_CLOCK: self._set_clock,
        }

    def _set_khz(self, arg: int, caller: Caller) -> int:
        khz = wanted_khz(arg)
        if self._has_vcpus():
            raise Errno(errno.EINVAL)
        self.khz = khz
        return 0

    # ---- counters
    def ratio(self, khz: int) -> int:
        """What the machine's counter is multiplied with (32 bits behind the point) to count at `khz`."""
        return 1 << FRACTION if khz == tsc.khz() else (khz << FRACTION) // tsc.khz()

    def synchronize(self, vcpu: int, khz: int, ratio: int, value: int, *, user: bool) -> int:
        """The offset of a vCPU whose counter is set to `value`: by KVM_SET_MSRS (`user`), or to 0 when it is made."""
        with self._lock:
            now, host = time.monotonic_ns(), tsc.read()
            offset = value - (host * ratio >> FRACTION) & U64
            synchronizing = value == 0
            if value and self._user_set:
                expected, second = self._last.value + (now - self._last.ns) * khz // 1_000_000, khz * 1000
                synchronizing = expected - second < value < expected + second
            matched = synchronizing and khz == self._last.khz
            if matched:
                offset = self._offset
            self._set(vcpu, _Write(now, value, khz, offset), matched, user)
            return offset

    def set_offset(self, vcpu: int, khz: int, ratio: int, offset: int) -> None:
        """User space gave a vCPU's counter this offset."""
        with self._lock:
            matched = self._last.khz == khz and self._last.offset == offset
            self._set(vcpu, _Write(time.monotonic_ns(), (tsc.read() * ratio >> FRACTION) + offset & U64, khz, offset), matched, True)

    def _set(self, vcpu: int, write: _Write, matched: bool, user: bool) -> None:
        self._user_set |= user
        self._last = write
        if not matched:
            self._generation += 1
            self._offset = write.offset
        self._generations[vcpu] = self._generation
        self.updates += 1

    @property
    def stable(self) -> bool:
        """Do the counters of all vCPUs agree? Not while there is none."""
        return bool(self._generations) and all(number == self._generation for number in self._generations.values())

    # ---- kvmclock
    def now(self, host_tsc: int | None = None) -> int:
        """kvmclock in nanoseconds, now or when the machine's counter read `host_tsc`."""
        master = self.master
        return master.clock + self.scale.ns((tsc.read() if host_tsc is None else host_tsc) - master.host_tsc) & U64

    def _get_clock(self, arg: int, caller: Caller) -> int:
        with self._lock:
            stable, host = self.stable, tsc.read()
            realtime, clock = time.time_ns(), self.now(host)
        caller.memory.write(arg, _DATA.pack(clock, CLOCK_FLAGS, realtime, host) if stable else _DATA.pack(clock, 0, 0, 0))
        return 0

    def _set_clock(self, arg: int, caller: Caller) -> int:
        clock, flags, realtime, _ = _DATA.unpack(caller.memory.read(arg, _DATA.size))
        if flags & ~CLOCK_FLAGS:
            raise Errno(errno.EINVAL)
        with self._lock:
            if flags & kvm.KVM_CLOCK_REALTIME:
                clock += max(time.time_ns() - realtime, 0)  # time passed since it was read; never backwards
            self.master = Master(tsc.read(), clock & U64)
            self.updates += 1
        return 0

    def epoch(self) -> tuple[int, int]:
        """The time of day when kvmclock was 0: seconds (32 bits) and nanoseconds."""
        seconds, ns = divmod((time.time_ns() - self.now()) & U64, NS)
        return seconds & 0xFFFFFFFF, ns
