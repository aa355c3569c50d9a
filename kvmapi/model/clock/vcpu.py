"""Time of one vCPU: its time-stamp counter, and the MSRs by which a guest asks KVM for time.

The counter is the machine's, multiplied by a ratio and moved by an offset. IA32_TSC_ADJUST counts what the guest itself moved it by:
a guest's write of either changes both, user space's write changes only the one it names.

The guest's pvclock structure, its steal time and its wall clock lie in the VMM's memory. They are written when the guest
asks and at the next entry after something changed, with the engine lock held. Sources: kvm_guest_time_update, record_steal_time
and kvm_arch_tsc_set_attr in arch/x86/kvm/x86.c, kvm_set_msr_common in msrs.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls, kvm
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.clock import pvclock, tsc
from kvmapi.model.clock.pvclock import U64
from kvmapi.model.clock.steal import StealTime
from kvmapi.model.clock.vm import FRACTION, VmClock, wanted_khz
from kvmapi.model.cpu.msrs import TSC, TSC_ADJUST, NoSuchMsr

if TYPE_CHECKING:
    from kvmapi.model.cpu.msrs import Msrs
    from kvmapi.model.mem.physical import Physical

WALL_CLOCK, SYSTEM_TIME = 0x11, 0x12
WALL_CLOCK_NEW, SYSTEM_TIME_NEW, STEAL_TIME, POLL_CONTROL = 0x4B564D00, 0x4B564D01, 0x4B564D03, 0x4B564D05
_FEATURES = {WALL_CLOCK: 0, SYSTEM_TIME: 0, WALL_CLOCK_NEW: 3, SYSTEM_TIME_NEW: 3, STEAL_TIME: 5, POLL_CONTROL: 12}  # CPUID 0x40000001
_ENABLED = 1
_ATTRIBUTE = struct.Struct("<IIQQ")  # kvm_device_attr: flags, group, attr, addr
_ONE = 1 << FRACTION


class VcpuClock:
    """`vm` is the VM's clock; `caller` the last that called KVM_RUN."""

    def __init__(self, physical: Physical, vm: VmClock, index: int) -> None:
        self._physical = physical
        self._vm = vm
        self._id = index
        self.khz = vm.khz
        self._ratio = vm.ratio(vm.khz)
        self._offset = vm.synchronize(index, self.khz, self._ratio, 0, user=False)
        self._adjust = 0
        self._system_time = 0
        self._stopped = False  # KVM_KVMCLOCK_CTRL: tell the guest's watchdog
        self._told = 0  # of the VM's updates, the last the guest was told of
        self._poll_control = 1
        self._wall_clock_due = False
        self.active = False  # was a paravirtual clock ever asked for? Until then nothing is to be done at an entry
        self.steal = StealTime(physical)
        self.caller: Caller | None = None
        self._msrs: Msrs | None = None

    def attach(self, msrs: Msrs) -> None:
        """The vCPU has its processor: these MSRs of it are here."""
        self._msrs = msrs
        msrs.tsc = self.now
        msrs.units.update(dict.fromkeys((TSC, TSC_ADJUST, *_FEATURES), self))

    def handlers(self) -> Mapping[int, Callable[[int, Caller], int]]:
        """By request number; to be called with the vCPU's mutex held."""
        return {
            ioctls.KVM_GET_TSC_KHZ: lambda arg, caller: self.khz,
            ioctls.KVM_SET_TSC_KHZ: self._set_khz,
            ioctls.KVM_KVMCLOCK_CTRL: self._guest_stopped,
            ioctls.KVM_HAS_DEVICE_ATTR: self._has_attribute,
            ioctls.KVM_GET_DEVICE_ATTR: self._get_attribute,
            ioctls.KVM_SET_DEVICE_ATTR: self._set_attribute,
        }

    # ---- the counter
    def now(self) -> int:
        """The guest's counter."""
        ratio = self._ratio
        host = tsc.read()
        return (host if ratio == _ONE else host * ratio >> FRACTION) + self._offset & U64

    def until(self, value: int) -> int:
        """Nanoseconds until the counter reads `value`; 0 where it is past that."""
        return max(value - self.now(), 0) * 1_000_000 // self.khz

    def _set_khz(self, arg: int, caller: Caller) -> int:
        self.khz = wanted_khz(arg)
        self._ratio = self._vm.ratio(self.khz)
        self._told = 0
        return 0

    def _attribute(self, arg: int, caller: Caller) -> int:
        """The attribute's address: the only one is the counter's offset. ENXIO for others."""
        _, group, attribute, address = _ATTRIBUTE.unpack(caller.memory.read(arg, _ATTRIBUTE.size))
        if group != kvm.KVM_VCPU_TSC_CTRL or attribute != kvm.KVM_VCPU_TSC_OFFSET:
            raise Errno(errno.ENXIO)
        return int(address)

    def _has_attribute(self, arg: int, caller: Caller) -> int:
        self._attribute(arg, caller)
        return 0

    def _get_attribute(self, arg: int, caller: Caller) -> int:
        caller.memory.write(self._attribute(arg, caller), struct.pack("<Q", self._offset))
        return 0

    def _set_attribute(self, arg: int, caller: Caller) -> int:
        offset = struct.unpack("<Q", caller.memory.read(self._attribute(arg, caller), 8))[0]
        self._vm.set_offset(self._id, self.khz, self._ratio, offset)
        self._offset = offset
        return 0

    def _guest_stopped(self, arg: int, caller: Caller) -> int:
        if self._pvclock() is None:
            raise Errno(errno.EINVAL)
        self._stopped, self._told = True, 0
        return 0

    # ---- MSRs
    def read(self, number: int) -> int:
        """RDMSR and KVM_GET_MSRS."""
        if number == TSC:
            return self.now()
        if number == TSC_ADJUST:
            return self._adjust
        self._check(number)
        if number in (SYSTEM_TIME, SYSTEM_TIME_NEW):
            return self._system_time
        if number in (WALL_CLOCK, WALL_CLOCK_NEW):
            return self._vm.wall_clock
        return self.steal.msr if number == STEAL_TIME else self._poll_control

    def write(self, number: int, value: int, *, host: bool) -> None:
        """WRMSR and KVM_SET_MSRS. NoSuchMsr (known) for a value that is refused."""
        if number == TSC:
            self._write_tsc(value, host)
        elif number == TSC_ADJUST:
            self._write_adjust(value, host)
        else:
            self._check(number)
            self._write_paravirtual(number, value, host)

    def _check(self, number: int) -> None:
        """A paravirtual MSR is there whatever CPUID says, unless KVM_CAP_ENFORCE_PV_FEATURE_CPUID was asked for."""
        if self._msrs is not None and not self._msrs.has_pv_feature(_FEATURES[number]):
            raise NoSuchMsr(number)

    def _write_tsc(self, value: int, host: bool) -> None:
        if host:
            self._offset = self._vm.synchronize(self._id, self.khz, self._ratio, value, user=True)
        else:
            self._adjust = self._adjust + self._move(value - self.now()) & U64

    def _write_adjust(self, value: int, host: bool) -> None:
        if self._msrs is None or not self._msrs.offered.tsc_adjust:
            return
        if not host:
            self._move(value - self._adjust)
        self._adjust = value

    def _move(self, cycles: int) -> int:
        self._offset = self._offset + cycles & U64
        self._told = 0
        return cycles

    def _write_paravirtual(self, number: int, value: int, host: bool) -> None:
        self.active = True
        if number == STEAL_TIME:
            if not self.steal.set(value):
                raise NoSuchMsr(number, known=True)
        elif number == POLL_CONTROL:
            if value >> 1:
                raise NoSuchMsr(number, known=True)
            self._poll_control = value
        elif number in (SYSTEM_TIME, SYSTEM_TIME_NEW):
            self._system_time, self._told = value, 0
        else:
            self._vm.wall_clock = value
            self._wall_clock_due = bool(value)
        if not host:  # the guest reads it with its next instruction
            self.before_entry()

    # ---- what the guest finds in its memory
    def before_entry(self) -> None:
        """Bring the guest's memory up to date. The engine lock is held."""
        if self._system_time & _ENABLED and (self._told != self._vm.updates or not self._vm.stable):
            self._told = self._vm.updates
            self._tell_time()
        if self._wall_clock_due:
            self._wall_clock_due = False
            self._tell_wall_clock(self._vm.wall_clock)
        if self.steal.msr & _ENABLED and self.caller is not None:
            self.steal.record(self.caller)

    def _pvclock(self) -> int | None:
        """Where the pvclock structure is; None while there is none, or none that lies in one page."""
        at = self._system_time & ~_ENABLED
        return at if self._system_time & _ENABLED and at % PAGE + pvclock.TIME_INFO.size <= PAGE else None

    def _tell_time(self) -> None:
        at, physical = self._pvclock(), self._physical
        old = pvclock.read(physical, at, pvclock.TIME_INFO.size) if at is not None else None
        if at is None or old is None:
            return
        stable = self._vm.stable
        host = self._vm.master.host_tsc if stable else tsc.read()
        mine = (host * self._ratio >> FRACTION) + self._offset & U64
        version, *_, flags = pvclock.TIME_INFO.unpack(old)
        flags = flags & pvclock.GUEST_STOPPED | (pvclock.GUEST_STOPPED if self._stopped else 0) | (pvclock.TSC_STABLE if stable else 0)
        self._stopped = False
        # No vCPU runs that could see it half done: one store, with the version that the second half would leave.
        version = ((version + 1 | 1) + 1) & 0xFFFFFFFF
        pvclock.write(physical, at, pvclock.TIME_INFO.pack(version, mine, self._vm.now(host), *pvclock.scale(self.khz), flags))

    def _tell_wall_clock(self, at: int) -> None:
        old = pvclock.read(self._physical, at, 4)
        if old is None:
            return
        version = int.from_bytes(old, "little")
        version = version + (version & 1) + 2 & 0xFFFFFFFF
        pvclock.write(self._physical, at, pvclock.WALL_CLOCK.pack(version, *self._vm.epoch()))
