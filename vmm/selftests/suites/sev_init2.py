"""sev_init2_tests: KVM_SEV_INIT2 takes the VM types, flags and VMSA features it should, and no others.

The kernel's test also has a column for SEV-SNP, a VM type this project does not have.
"""

from __future__ import annotations

from errno import EINVAL

from kvmapi.abi import caps
from kvmapi.abi import sev as s
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from vmm.selftests.api import Case, Subtest, check_result, runs_on, skip
from vmm.selftests.sev_vms import DEFAULT_VM, SEV_ES_VM, SEV_VM, op

SW_PROTECTED_VM = 1
LEAF_SEV, CPUID_SEV, CPUID_SEV_ES = 0x8000001F, 1 << 1, 1 << 3
FLAGS, FEATURES = 32, 64


def offered(system: System) -> int:
    """KVM_CAP_VM_TYPES; skips where there is no KVM_SEV_INIT2."""
    if not system.has_device_attr(s.KVM_X86_GRP_SEV, s.KVM_X86_SEV_VMSA_FEATURES):
        skip("this KVM has no attribute KVM_X86_SEV_VMSA_FEATURES, so no KVM_SEV_INIT2; use a kernel from 6.10 on, or --on model")
    return system.check_extension(caps.KVM_CAP_VM_TYPES)


def init2(system: System, platform: SevPlatform, type: int, expected: int, **init: int) -> None:
    """INIT2 on a new VM; `expected` is 0 or -EINVAL, and what works leaves no firmware error."""
    with system.create_vm(type) as vm:
        result, error = op(vm, s.KVM_SEV_INIT2, s.kvm_sev_init(**init), platform.fd)
        check_result(result, expected, f"KVM_SEV_INIT2 of VM type {type} with {init or 'nothing set'}")
        if not result:
            check_result(error, 0, "the firmware's status")


@runs_on("sev")
def test_vm_types(system: System, subtest: Subtest) -> None:
    """The SEV types are in CPUID and take INIT2; the others do not."""
    types = offered(system)
    eax = next((entry.eax for entry in system.supported_cpuid() if entry.function == LEAF_SEV), 0)
    with SevPlatform(system.host) as platform:
        for name, type, bit in (("sev", SEV_VM, CPUID_SEV), ("sev-es", SEV_ES_VM, CPUID_SEV_ES)):
            with subtest(name):
                if not types >> type & 1:
                    skip(f"this KVM does not offer VM type {name} (KVM_CAP_VM_TYPES = {types:#x})")
                assert eax & bit, f"VM type {name} is on offer, and CPUID 0x8000001F does not say so"
                init2(system, platform, type, 0)
        with subtest("plain"):
            init2(system, platform, DEFAULT_VM, -EINVAL)
        with subtest("sw-protected"):
            if not types >> SW_PROTECTED_VM & 1:
                skip(f"this KVM does not offer VM type sw-protected (KVM_CAP_VM_TYPES = {types:#x})")
            init2(system, platform, SW_PROTECTED_VM, -EINVAL)


@runs_on("sev", "sev-es")
def test_flags(system: System, case: Case, subtest: Subtest) -> None:
    """No flag exists."""
    offered(system)
    with SevPlatform(system.host) as platform:
        for bit in range(FLAGS):
            with subtest(f"flag bit {bit}"):
                init2(system, platform, case.vm_type, -EINVAL, flags=1 << bit)


@runs_on("sev", "sev-es")
def test_features(system: System, case: Case, subtest: Subtest) -> None:
    """VMSA features that KVM does not name are refused; DebugSwap, the one that needs no other, is taken where KVM names it."""
    offered(system)
    supported = system.device_attr(s.KVM_X86_GRP_SEV, s.KVM_X86_SEV_VMSA_FEATURES) if case.vm_type == SEV_ES_VM else 0
    with SevPlatform(system.host) as platform:
        for bit in range(FEATURES):
            feature = 1 << bit
            with subtest(f"feature bit {bit}"):
                if not supported & feature:
                    init2(system, platform, case.vm_type, -EINVAL, vmsa_features=feature)
                elif feature == s.SVM_SEV_FEAT_DEBUG_SWAP:
                    init2(system, platform, case.vm_type, 0, vmsa_features=feature)


@runs_on("sev-es", rungs=("model",))
def test_debug_swap() -> None:
    """A processor that swaps debug registers offers the feature, and INIT2 takes it."""
    from kvmapi.model.host import ModelHost
    from kvmapi.model.platform import Platform

    with System(ModelHost(Platform(debug_swap=True))) as system, SevPlatform(system.host) as platform:
        assert system.device_attr(s.KVM_X86_GRP_SEV, s.KVM_X86_SEV_VMSA_FEATURES) & s.SVM_SEV_FEAT_DEBUG_SWAP
        init2(system, platform, SEV_ES_VM, 0, vmsa_features=s.SVM_SEV_FEAT_DEBUG_SWAP)
        init2(system, platform, SEV_VM, -EINVAL, vmsa_features=s.SVM_SEV_FEAT_DEBUG_SWAP)
