"""vm_types_test: KVM_CREATE_VM takes the types that KVM_CAP_VM_TYPES names, and no others."""

from __future__ import annotations

from errno import EINVAL

from kvmapi.abi import caps, ioctls
from kvmapi.system import System
from vmm.selftests.api import Subtest, check_result

TYPES = 64


def test_vm_types(system: System, subtest: Subtest) -> None:
    """Each of the 64 types the capability has a bit for: an fd where the bit is set, EINVAL where not."""
    offered = system.check_extension(caps.KVM_CAP_VM_TYPES) or 1  # an older kernel has the one type
    for type in range(TYPES):
        with subtest(f"type {type}"):
            result = system.ioctl_raw(ioctls.KVM_CREATE_VM, type)
            if offered >> type & 1:
                assert result >= 0, "a type on offer was refused"
                system.host.close(result)
            else:
                if result >= 0:
                    system.host.close(result)
                check_result(result, -EINVAL, f"KVM_CREATE_VM({type}), which is not on offer")
