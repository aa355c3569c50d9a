"""Time: the counter's offset, kvmclock as user space sets it and as a guest reads it, steal time, and KVM_SET_TSC_KHZ."""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.structs import kvm_clock_data, kvm_device_attr
from kvmapi.exits import Hlt
from kvmapi.model.clock import tsc
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, LongGuest, Machine, code, expect_errno

TSC, TSC_ADJUST, WALL_CLOCK, SYSTEM_TIME, STEAL_TIME, POLL_CONTROL = 0x10, 0x3B, 0x4B564D00, 0x4B564D01, 0x4B564D03, 0x4B564D05
NS = 1_000_000_000
READ = code("0f3148c1 e2204809 c24889d3 f4", "rdtsc; shl rdx, 32; or rdx, rax; mov rbx, rdx; hlt")
WRITE_MSR = code("0f30 f4 0f31 48c1e220 4809c2 4889d3 f4", "wrmsr; hlt; rdtsc; shl rdx, 32; or rdx, rax; mov rbx, rdx; hlt")
ALL_FLAGS = kvm.KVM_CLOCK_REALTIME | kvm.KVM_CLOCK_HOST_TSC | kvm.KVM_CLOCK_TSC_STABLE


def get_clock(machine: Machine) -> kvm_clock_data:
    data = kvm_clock_data()
    machine.vm.ioctl(ioctls.KVM_GET_CLOCK, ctypes.addressof(data))
    return data


def set_clock(machine: Machine, **fields: int) -> int:
    data = kvm_clock_data(**fields)
    return expect_errno(machine.host.ioctl(machine.vm.fd, ioctls.KVM_SET_CLOCK, ctypes.addressof(data)))


def attribute(
    machine: Machine, request: int, value: ctypes.c_uint64, group: int = kvm.KVM_VCPU_TSC_CTRL, attr: int = kvm.KVM_VCPU_TSC_OFFSET
) -> int:
    data = kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(value))
    return expect_errno(machine.host.ioctl(machine.vcpu.fd, request, ctypes.addressof(data)))


def test_the_clock_begins_with_the_vm_and_runs(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.add_vcpu()
        first = get_clock(machine)
        time.sleep(0.01)
        second = get_clock(machine)
        assert 0 < first.clock < 10 * NS and 10_000_000 <= second.clock - first.clock < 5 * NS
        if first.flags & kvm.KVM_CLOCK_HOST_TSC:
            assert first.flags == ALL_FLAGS and abs(first.realtime - time.time_ns()) < 10 * NS
            assert abs((second.host_tsc - first.host_tsc) * 1_000_000 // tsc.khz() - (second.clock - first.clock)) < 100_000


def test_setting_the_clock(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.add_vcpu()
        assert set_clock(machine, clock=180 * NS) == 0
        assert 180 * NS <= get_clock(machine).clock < 185 * NS
        assert set_clock(machine, clock=NS, flags=kvm.KVM_CLOCK_REALTIME, realtime=time.time_ns() - 60 * NS) == 0
        assert 61 * NS <= get_clock(machine).clock < 66 * NS
        assert set_clock(machine, clock=NS, flags=kvm.KVM_CLOCK_REALTIME, realtime=time.time_ns() + 60 * NS) == 0
        assert NS <= get_clock(machine).clock < 6 * NS, "time never runs backwards"
        assert set_clock(machine, clock=NS, flags=1) == errno.EINVAL
        assert set_clock(machine, clock=5 * NS, flags=ALL_FLAGS, realtime=time.time_ns()) == 0, "what GET gave"


def test_the_counters_offset(any_host: Any) -> None:
    with LongGuest(any_host, READ) as guest:
        value = ctypes.c_uint64()
        assert attribute(guest, ioctls.KVM_HAS_DEVICE_ATTR, value) == 0
        assert attribute(guest, ioctls.KVM_HAS_DEVICE_ATTR, value, attr=1) == errno.ENXIO
        assert attribute(guest, ioctls.KVM_HAS_DEVICE_ATTR, value, group=1) == errno.ENXIO
        for offset in (0, 1 << 50, (1 << 64) - (1 << 30)):
            value.value = offset
            assert attribute(guest, ioctls.KVM_SET_DEVICE_ATTR, value) == 0
            value.value = 1
            assert attribute(guest, ioctls.KVM_GET_DEVICE_ATTR, value) == 0
            if not feature(guest, "hardware virtualization"):
                continue  # paravirtual: the TSC is the machine's
            assert value.value == offset
            if feature(guest, "an exact CPU"):
                guest.regs(rip=CODE)
                before = tsc.read()
                assert guest.run() == Hlt()
                assert before <= (guest.regs().rbx - offset) % (1 << 64) <= tsc.read()


def test_who_moves_what(any_host: Any) -> None:
    """The guest's write of either MSR changes both; user space's only the one it names."""
    step = 1 << 50
    with LongGuest(any_host, WRITE_MSR) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the TSC is the machine's")
        if not feature(guest, "an exact CPU"):
            pytest.skip("the lab's counter reads 0")
        vcpu = guest.vcpu

        def now() -> tuple[int, int]:
            found = vcpu.get_msrs([TSC, TSC_ADJUST])
            return tuple((found[number] + step // 2) // step for number in (TSC, TSC_ADJUST))  # type: ignore[return-value]

        def write(number: int, value: int) -> None:
            guest.regs(rip=CODE, rcx=number, rax=value & 0xFFFFFFFF, rdx=value >> 32)
            assert guest.run() == Hlt()

        assert now() == (0, 0)
        write(TSC, step)
        assert now() == (1, 1)
        write(TSC_ADJUST, 2 * step)
        assert now() == (2, 2)
        vcpu.set_msrs({TSC: 10 * step})
        assert now() == (10, 2)
        vcpu.set_msrs({TSC_ADJUST: 77 * step})
        assert now() == (10, 77)
        write(TSC_ADJUST, 78 * step)
        assert now() == (11, 78)


def test_vcpus_agree(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.add_vcpu()
        time.sleep(0.02)
        machine.add_vcpu()
        first, second = (vcpu.get_msrs([TSC])[TSC] for vcpu in machine.vcpus)
        assert 0 <= second - first < tsc.khz() * 15, "a vCPU that was made later starts where the others are"
        if not get_clock(machine).flags:
            pytest.skip("this host's clock is not the counter")
        value = ctypes.c_uint64(12345)
        assert attribute(machine, ioctls.KVM_SET_DEVICE_ATTR, value) == 0
        assert get_clock(machine).flags == 0, "they do not agree any more"
        machine.vcpus.reverse()
        assert attribute(machine, ioctls.KVM_SET_DEVICE_ATTR, value) == 0
        assert get_clock(machine).flags == ALL_FLAGS


def test_frequencies(any_host: Any) -> None:
    with Machine(any_host) as machine:
        own = machine.vm.ioctl(ioctls.KVM_GET_TSC_KHZ)
        # A kernel in the lab counts an emulated counter against emulated timers when it boots: 0.2 % off now and then.
        assert abs(own - tsc.khz()) < own // (1000 if feature(machine, "an exact CPU") else 50)
        assert machine.add_vcpu().ioctl(ioctls.KVM_GET_TSC_KHZ) == own
        assert expect_errno(machine.host.ioctl(machine.vm.fd, ioctls.KVM_SET_TSC_KHZ, own)) == errno.EINVAL, "there are vCPUs"
        if not machine.system.check_extension(caps.KVM_CAP_TSC_CONTROL):
            return
        assert expect_errno(machine.host.ioctl(machine.vcpu.fd, ioctls.KVM_SET_TSC_KHZ, 0x7FFFFFFF)) == errno.EINVAL
        assert machine.vcpu.ioctl(ioctls.KVM_SET_TSC_KHZ, own * 2) == 0 and machine.vcpu.ioctl(ioctls.KVM_GET_TSC_KHZ) == own * 2
        before = machine.vcpu.get_msrs([TSC])[TSC]
        time.sleep(0.1)
        assert 190 < (machine.vcpu.get_msrs([TSC])[TSC] - before) / own < 1000
        assert machine.vcpu.ioctl(ioctls.KVM_SET_TSC_KHZ, 0) == 0 and machine.vcpu.ioctl(ioctls.KVM_GET_TSC_KHZ) == own


def pvclock(guest: Machine, counter: int, gpa: int = DATA) -> tuple[int, int, int]:
    """(version, nanoseconds, flags) as a guest computes them."""
    version, stamp, base, mul, shift, flags = struct.unpack("<I4xQQIbB2x", guest.get(gpa, 32))
    cycles = counter - stamp
    return version, base + ((cycles << shift if shift >= 0 else cycles >> -shift) * mul >> 32), flags


@pytest.mark.parametrize("number", [SYSTEM_TIME, 0x12])
def test_kvmclock(any_host: Any, number: int) -> None:
    with LongGuest(any_host, WRITE_MSR) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the guest's clock is another")
        if not feature(guest, "an exact CPU"):
            pytest.skip("the lab's counter reads 0")
        guest.regs(rcx=number, rax=DATA | 1, rdx=0)
        assert guest.run() == Hlt()
        version, _, flags = pvclock(guest, 0)
        assert version and not version & 1 and flags == 1, "stable"
        for clock in (0, 180 * NS):
            assert set_clock(guest, clock=clock) == 0
            guest.regs(rip=CODE + 3)
            before = get_clock(guest).clock
            assert guest.run() == Hlt()
            after = get_clock(guest).clock
            later, now, _ = pvclock(guest, guest.regs().rbx)
            assert clock <= before <= now <= after and later > version
        assert guest.vcpu.ioctl(ioctls.KVM_KVMCLOCK_CTRL) == 0
        guest.regs(rip=CODE + 3)
        assert guest.run() == Hlt() and pvclock(guest, 0)[2] == 3, "the guest was stopped"
        guest.vcpu.set_msrs({number: 0})
        assert expect_errno(guest.host.ioctl(guest.vcpu.fd, ioctls.KVM_KVMCLOCK_CTRL)) == errno.EINVAL
        kept = guest.get(DATA, 32)
        guest.regs(rip=CODE + 3)
        assert set_clock(guest, clock=5) == 0 and guest.run() == Hlt() and guest.get(DATA, 32) == kept, "switched off"


def test_wall_clock_and_wild_addresses(any_host: Any) -> None:
    with LongGuest(any_host, WRITE_MSR) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the guest's clock is another")
        guest.regs(rcx=WALL_CLOCK, rax=DATA, rdx=0)
        assert guest.run() == Hlt()
        version, seconds, ns = struct.unpack("<III", guest.get(DATA, 12))
        assert version == 2 and abs(seconds + ns / NS + get_clock(guest).clock / NS - time.time()) < 5
        for number, value in (
            (SYSTEM_TIME, DATA + 0xFF1),
            (SYSTEM_TIME, (1 << 60) + 1),
            (WALL_CLOCK, 1 << 62),
            (STEAL_TIME, (1 << 61) + 1),
        ):
            before = guest.get(DATA, 8192)
            guest.regs(rip=CODE, rcx=number, rax=value & 0xFFFFFFFF, rdx=value >> 32)
            assert guest.run() == Hlt() and guest.vcpu.get_msrs([number])[number] == value and guest.get(DATA, 8192) == before


def test_steal_time_and_poll_control(any_host: Any) -> None:
    with LongGuest(any_host, WRITE_MSR) as guest:
        if not guest.system.check_extension(caps.KVM_CAP_STEAL_TIME):
            pytest.skip("this kernel counts no run delay")
        vcpu = guest.vcpu
        vcpu.set_msrs({POLL_CONTROL: 0})
        assert vcpu.get_msrs([POLL_CONTROL]) == {POLL_CONTROL: 0}
        with pytest.raises(OSError):
            vcpu.set_msrs({POLL_CONTROL: 2})
        with pytest.raises(OSError):
            vcpu.set_msrs({STEAL_TIME: DATA | 0x20 | 1})
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: nothing is stolen there")
        guest.put(DATA, struct.pack("<QIIB", 1000, 7, 0, 1))
        vcpu.set_msrs({STEAL_TIME: DATA | 1})
        guest.regs(rip=CODE + 3)
        assert guest.run() == Hlt()
        steal, version, flags, preempted = struct.unpack("<QIIB", guest.get(DATA, 17))
        assert steal >= 1000 and flags == 0 and (preempted == 0 or any_host.name == "kernel")
        # A real kernel writes once more, two versions on, each time that something else had the processor meanwhile.
        assert version == 10 if any_host.name == "model" else version >= 10 and not version & 1
