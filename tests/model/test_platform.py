"""What the modelled machine offers: VM types by the ASIDs that are there for them, CPUID, and what a VM type takes away."""

from __future__ import annotations

import ctypes
from errno import EINVAL, ENXIO

import pytest

from kvmapi.abi import caps, ioctls, kvm, sev
from kvmapi.abi.structs import kvm_device_attr
from kvmapi.errors import KvmError
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.system import System
from tests.conformance.snippets import MIB, PAGE, Machine

pytestmark = pytest.mark.model
SEV_LEAF = 0x8000001F
SEV_BIT, ES_BIT, C_BIT = 1 << 1, 1 << 3, 51
DEBUG_SWAP = 1 << 5

MACHINES = [
    ("as delivered", {}, 0b1111, (SEV_BIT | ES_BIT, 15, 5)),
    ("nothing for SEV-ES", {"min_sev_asid": 1}, 0b0111, (SEV_BIT, 15, 1)),
    ("all for SEV-ES", {"min_sev_asid": 16}, 0b1011, (SEV_BIT | ES_BIT, 15, 16)),
    ("one each", {"asids": 2, "min_sev_asid": 2}, 0b1111, (SEV_BIT | ES_BIT, 2, 2)),
    ("sev_es=0", {"es": False}, 0b0111, (SEV_BIT, 15, 5)),
    ("sev_es=0 and no ASID for SEV", {"es": False, "min_sev_asid": 16}, 0b0011, (SEV_BIT, 15, 16)),
    ("no SEV", {"sev": False}, 0b0011, (0, 0, 0)),
]


@pytest.mark.parametrize(("options", "types", "leaf"), [row[1:] for row in MACHINES], ids=[row[0] for row in MACHINES])
def test_types_and_cpuid(options: dict[str, int], types: int, leaf: tuple[int, int, int]) -> None:
    with System(ModelHost(Platform(**options))) as system:  # type: ignore[arg-type]
        assert system.check_extension(caps.KVM_CAP_VM_TYPES) == types
        entry = next(entry for entry in system.supported_cpuid() if entry.function == SEV_LEAF)
        assert (entry.eax, entry.ecx, entry.edx) == leaf and entry.ebx == (C_BIT if leaf[0] else 0)
        for number in range(6):
            if types >> number & 1:
                system.create_vm(number).close()
            else:
                with pytest.raises(KvmError) as failure:
                    system.create_vm(number)
                assert failure.value.errno == EINVAL


@pytest.mark.parametrize(("asids", "least"), [(15, 0), (15, 17), (2, 5), (0, 5)])
def test_a_split_that_no_machine_has(asids: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"min_sev_asid {least} does not split ASIDs 1..{asids}: say 1"):
        Platform(asids=asids, min_sev_asid=least)
    assert not Platform(sev=False, asids=asids, min_sev_asid=least).has_sev_es


# ---- device attributes
@pytest.mark.parametrize(
    ("options", "features"), [({}, 0), ({"debug_swap": True}, DEBUG_SWAP), ({"debug_swap": True, "es": False}, 0), ({"sev": False}, 0)]
)
def test_vmsa_features(options: dict[str, bool], features: int) -> None:
    with System(ModelHost(Platform(**options))) as system:  # type: ignore[arg-type]
        assert system.device_attr(sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_VMSA_FEATURES) == features
        for without in (sev.KVM_X86_SNP_POLICY_BITS, sev.KVM_X86_SEV_SNP_REQ_CERTS):
            assert system.device_attr(sev.KVM_X86_GRP_SEV, without) == 0


@pytest.mark.parametrize(("group", "attribute"), [(1, 3), (1, 1 << 40), (2, 0), (0, 1)])
def test_unknown_attributes(group: int, attribute: int) -> None:
    with System(ModelHost()) as system:
        asked = kvm_device_attr(group=group, attr=attribute)
        for request in (ioctls.KVM_HAS_DEVICE_ATTR, ioctls.KVM_GET_DEVICE_ATTR):
            assert system.ioctl_raw(request, ctypes.addressof(asked)) == -ENXIO


@pytest.mark.parametrize(("offered", "type", "expected"), [(True, 3, 0), (False, 3, EINVAL), (True, 2, EINVAL)])
def test_debug_swap_in_init2(offered: bool, type: int, expected: int) -> None:
    with Machine(ModelHost(Platform(debug_swap=offered)), type) as machine:
        try:
            machine.vm.sev_op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=DEBUG_SWAP))
            found = 0
        except KvmError as failure:
            found = failure.errno
        assert found == expected


# ---- what protected state takes away
@pytest.mark.parametrize(("type", "readonly"), [(0, 1), (1, 1), (2, 1), (3, 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_readonly_slots(type: int, readonly: int, version: int) -> None:
    with Machine(ModelHost(), type, slot=False) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_READONLY_MEM) == readonly
        assert machine.system.check_extension(caps.KVM_CAP_READONLY_MEM) == 1
        add = machine.vm.set_user_memory_region if version == 1 else machine.vm.set_user_memory_region2
        if readonly:
            add(0, 0, MIB, machine.hva, kvm.KVM_MEM_READONLY)
            return
        with pytest.raises(KvmError) as failure:
            add(0, 0, MIB, machine.hva, kvm.KVM_MEM_READONLY)
        assert failure.value.errno == EINVAL
        add(0, 0, MIB, machine.hva, kvm.KVM_MEM_LOG_DIRTY_PAGES)
        with pytest.raises(KvmError) as failure:
            add(0, 0, MIB, machine.hva, kvm.KVM_MEM_READONLY)
        assert failure.value.errno == EINVAL


@pytest.mark.parametrize(("type", "fields"), [(0, 7), (1, 7), (2, 7), (3, 0)])
def test_registers_in_kvm_run(type: int, fields: int) -> None:
    with Machine(ModelHost(), type) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_SYNC_REGS) == fields
        assert machine.system.check_extension(caps.KVM_CAP_SYNC_REGS) == 7


def test_contexts_can_be_shared_says_every_kvm() -> None:
    for host in (ModelHost(), ModelHost(Platform(sev=False))):
        with Machine(host) as machine:
            for cap in (caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM):
                assert machine.system.check_extension(cap) == machine.vm.check_extension(cap) == 1


@pytest.mark.parametrize("type", [2, 3])
def test_private_memory_is_not_theirs(type: int) -> None:
    with Machine(ModelHost(), type) as machine:
        assert machine.vm.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) == 0
        with pytest.raises(KvmError) as failure:
            machine.vm.set_memory_attributes(0, PAGE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert failure.value.errno == EINVAL


@pytest.mark.parametrize("type", [2, 3])
def test_a_vm_that_was_never_initialised_does_not_run(type: int) -> None:
    with Machine(ModelHost(), type) as machine:
        vcpu = machine.add_vcpu()
        assert vcpu.get_regs().rip == 0xFFF0  # its registers are nobody's secret yet
        with pytest.raises(KvmError) as failure:
            vcpu.run()
        assert failure.value.errno == EINVAL
        with pytest.raises(KvmError) as failure:  # and now it is too late: a vCPU exists
            machine.vm.sev_op(sev.KVM_SEV_INIT2, sev.kvm_sev_init())
        assert failure.value.errno == EINVAL
