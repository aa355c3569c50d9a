"""The encryption ioctls on VMs that are not encrypted: what any host can answer, whether or not it has SEV.

A host has SEV where KVM_MEMORY_ENCRYPT_OP without argument says so. KVM on a processor that could never have it does
not even look at the fds of KVM_CAP_VM_COPY_ENC_CONTEXT_FROM and its like.
"""

from __future__ import annotations

import ctypes
from errno import EBADF, EFAULT, EINVAL, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm, sev
from kvmapi.abi.structs import kvm_enable_cap, kvm_enc_region
from tests.conformance.snippets import PAGE, Machine

BAD = 8  # nothing is mapped there
UNTOUCHED = 0x5A5A5A5A
OP, REGIONS = ioctls.KVM_MEMORY_ENCRYPT_OP, (ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION)
SHARING = (caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)


def has_sev(machine: Machine) -> bool:
    """Does this host's KVM do SEV?"""
    answer = machine.vm.ioctl_raw(OP, 0)
    assert answer in (0, -ENOTTY)
    types = machine.system.check_extension(caps.KVM_CAP_VM_TYPES)
    assert answer == 0 or not types & (1 << kvm.KVM_X86_SEV_VM | 1 << kvm.KVM_X86_SEV_ES_VM)
    return answer == 0


def op(machine: Machine, number: int) -> tuple[int, int]:
    """(errno, `error` afterwards) of a command without data."""
    command = sev.kvm_sev_cmd(id=number, error=UNTOUCHED, sev_fd=0xFFFFFFFF)
    return -machine.vm.ioctl_raw(OP, ctypes.addressof(command)), command.error


def test_memory_encrypt_op(any_host: Any) -> None:
    with Machine(any_host) as machine:
        sev_here = has_sev(machine)
        assert machine.vm.ioctl_raw(OP, BAD) == -(EFAULT if sev_here else ENOTTY)
        for number in range(24):
            if number in (sev.KVM_SEV_INIT, sev.KVM_SEV_ES_INIT):
                continue
            unknown = number in (10, 14, 19, 22, 23) or number == sev.KVM_SEV_RECEIVE_UPDATE_DATA
            assert op(machine, number) == (EINVAL if sev_here and unknown else ENOTTY, UNTOUCHED), number


def test_regions(any_host: Any) -> None:
    with Machine(any_host) as machine:
        region = kvm_enc_region(machine.hva, PAGE)
        for request in REGIONS:
            assert machine.vm.ioctl_raw(request, BAD) == -EFAULT, "before it is asked what the VM is"
            assert machine.vm.ioctl_raw(request, ctypes.addressof(region)) == -ENOTTY


@pytest.mark.parametrize("cap", SHARING)
def test_sharing(any_host: Any, cap: int) -> None:
    with Machine(any_host) as machine, Machine(any_host) as other:
        assert machine.system.check_extension(cap) == machine.vm.check_extension(cap) == 1

        def share(fd: int, flags: int = 0) -> int:
            argument = kvm_enable_cap(cap=cap, flags=flags, args=(fd, 0, 0, 0))
            return -machine.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument))

        assert share(machine.vm.fd) == share(other.vm.fd) == share(other.vm.fd, flags=1) == EINVAL
        assert share(other.vm.fd | 0xABCD << 32) == EINVAL, "32 bits of the number count"
        answers = {share(fd) for fd in (0xFFFFFFFF, machine.system.fd)}
        assert answers == {EBADF} or (answers == {EINVAL} and not has_sev(machine))
        assert all(vm.check_extension(caps.KVM_CAP_USER_MEMORY) == 1 for vm in (machine.vm, other.vm)), "nobody died"


def test_a_vcpu_has_no_encryption_commands(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.add_vcpu().ioctl_raw(OP, 0) == -ENOTTY
