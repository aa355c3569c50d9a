"""What must be chosen before there are vCPUs: the bootstrap processor, and the bus cycles of the local APICs."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.errors import KvmError
from tests.conformance.rows import feature
from tests.conformance.snippets import Machine, expect_errno

APIC_BASE, BOOTSTRAP = 0x1B, 1 << 8


def set_boot_cpu(machine: Machine, number: int) -> int:
    return expect_errno(machine.host.ioctl(machine.vm.fd, ioctls.KVM_SET_BOOT_CPU_ID, number))


@pytest.mark.parametrize("boot", [0, 1])
def test_the_bootstrap_processor(any_host: Any, boot: int) -> None:
    with Machine(any_host) as machine:
        machine.vm.create_irqchip()
        highest = machine.vm.check_extension(caps.KVM_CAP_MAX_VCPU_ID)
        assert set_boot_cpu(machine, highest + 1) == errno.EINVAL == set_boot_cpu(machine, 1 << 32)
        assert set_boot_cpu(machine, boot) == 0
        for _ in range(2):
            machine.add_vcpu()
        assert set_boot_cpu(machine, boot) == errno.EBUSY
        flags = [bool(vcpu.get_msrs([APIC_BASE])[APIC_BASE] & BOOTSTRAP) for vcpu in machine.vcpus]
        assert flags == [boot == 0, boot == 1]
        states = [vcpu.get_mp_state() for vcpu in machine.vcpus]
        expected = [kvm.KVM_MP_STATE_RUNNABLE, kvm.KVM_MP_STATE_UNINITIALIZED]
        assert states == (expected if boot == 0 else expected[::-1])


def test_bus_cycles(any_host: Any) -> None:
    cap = caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS
    with Machine(any_host) as machine:
        assert machine.system.check_extension(cap) == machine.vm.check_extension(cap) == 1
        for value, number in ((40, errno.ENXIO), (0, errno.EINVAL), (1 << 40, errno.EINVAL)):
            with pytest.raises(KvmError) as refused:
                machine.vm.enable_cap(cap, value)
            assert refused.value.errno == number
        machine.vm.create_irqchip()
        machine.vm.enable_cap(cap, 40)
        told = 40 if feature(machine, "hardware virtualization") else 1
        assert machine.vm.check_extension(cap) == told
        machine.add_vcpu()
        with pytest.raises(KvmError) as refused:
            machine.vm.enable_cap(cap, 1)
        assert refused.value.errno == errno.EINVAL and machine.vm.check_extension(cap) == told


def test_ids_end_behind_the_bootstrap_processors(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert set_boot_cpu(machine, 2) == 0
        with pytest.raises(KvmError) as refused:
            machine.vm.enable_cap(caps.KVM_CAP_MAX_VCPU_ID, 1)
        assert refused.value.errno == errno.EINVAL
        machine.vm.enable_cap(caps.KVM_CAP_MAX_VCPU_ID, 2)
