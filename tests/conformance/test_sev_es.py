"""VM type 3, SEV-ES, as far as no firmware is needed; and the registers of a new vCPU, from which its VMSA is made.

Hosts without the type answer what they answer to any type that they lack.
"""

from __future__ import annotations

import ctypes
from errno import EINVAL, ENXIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm, sev
from kvmapi.abi.structs import kvm_device_attr
from kvmapi.errors import KvmError
from kvmapi.system import System
from kvmapi.vmsa import RDX_RESET, build_vmsa, difference, reset_registers, sregs_as_read
from tests.conformance.rows import feature
from tests.conformance.snippets import MIB, Machine, expect_errno

SEV_ES = 3
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


def es_machine(host: Any) -> Machine:
    """A VM of type 3, or a skip."""
    with Machine(host) as machine:
        if not feature(machine, "SEV-ES"):
            pytest.skip(f"{host.name}: no VM type SEV-ES; get it: an AMD host with ASIDs for SEV-ES")
    return Machine(host, SEV_ES, slot=False)


def test_the_type_is_there_where_it_is_offered(any_host: Any) -> None:
    with System(any_host) as system:
        offered = system.check_extension(caps.KVM_CAP_VM_TYPES) >> SEV_ES & 1
        if offered:
            system.create_vm(SEV_ES).close()
            return
        with pytest.raises(KvmError) as failure:
            system.create_vm(SEV_ES)
        assert failure.value.errno == EINVAL


def test_no_read_only_memory(any_host: Any) -> None:
    """A store to a read-only slot is emulated, and the guest's instructions and registers are out of KVM's reach."""
    with es_machine(any_host) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_READONLY_MEM) == 0
        with pytest.raises(KvmError) as failure:
            machine.vm.set_user_memory_region(0, 0, MIB, machine.hva, kvm.KVM_MEM_READONLY)
        assert failure.value.errno == EINVAL
        machine.vm.set_user_memory_region(0, 0, MIB, machine.hva)


def test_no_registers_in_kvm_run(any_host: Any) -> None:
    with es_machine(any_host) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_SYNC_REGS) == 0


def test_init2_comes_first(any_host: Any) -> None:
    with es_machine(any_host) as machine:
        machine.add_vcpu()
        with pytest.raises(KvmError) as failure:
            machine.vcpu.run()
        assert failure.value.errno == EINVAL


@pytest.mark.parametrize(("group", "attribute"), [(1, 3), (1, 1 << 63), (2, 0)])
def test_attributes_that_no_kernel_has(any_host: Any, group: int, attribute: int) -> None:
    with System(any_host) as system:
        asked = kvm_device_attr(group=group, attr=attribute)
        assert expect_errno(system.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(asked))) == ENXIO


def test_vmsa_features_are_a_few(any_host: Any) -> None:
    with es_machine(any_host) as machine:
        known = 1 << 5 | 1 << 9  # DEBUG_SWAP, SECURE_TSC
        assert machine.system.device_attr(sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_VMSA_FEATURES) & ~known == 0


@pytest.mark.parametrize("number", [0, 1], ids=["bsp", "ap"])
def test_registers_of_a_new_vcpu(any_host: Any, number: int) -> None:
    """What an owner predicts the VMSA of an untouched vCPU from is what KVM_GET_REGS and KVM_GET_SREGS show."""
    with Machine(any_host) as machine:
        vcpus = [machine.vm.create_vcpu(at) for at in range(2)]
        machine.vcpus += vcpus
        regs, sregs = reset_registers()
        shown, expected = vcpus[number].get_sregs(), sregs_as_read(sregs)
        assert bytes(vcpus[number].get_regs()) == bytes(regs) and regs.rdx == RDX_RESET
        for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
            assert getattr(shown, name) == getattr(expected, name), name
        for name in ("gdt", "idt"):
            assert bytes(getattr(shown, name)) == bytes(getattr(expected, name)), name
        if not feature(machine, "hardware virtualization"):
            pytest.skip("a paravirtual KVM has segment types of its own after reset, see docs/fidelity.md")
        for name in SEGMENTS:
            assert bytes(getattr(shown, name)) == bytes(getattr(expected, name)), name


def test_reading_and_setting_again_leaves_the_marks_that_are_predicted(any_host: Any) -> None:
    """KVM_GET_SREGS shows what KVM_SET_SREGS then makes true; a second round changes nothing."""
    with Machine(any_host) as machine:
        if not feature(machine, "hardware virtualization"):
            pytest.skip("a paravirtual KVM shows what was set, see docs/fidelity.md")
        vcpu = machine.add_vcpu()
        first = vcpu.get_sregs()
        vcpu.set_sregs(first)
        again = vcpu.get_sregs()
        assert bytes(again) == bytes(first) == bytes(sregs_as_read(again))
        regs = vcpu.get_regs()
        assert difference(build_vmsa(regs, first), build_vmsa(regs, sregs_as_read(reset_registers()[1]))) is None
