"""`System`: /dev/kvm. It answers what the host can do and makes VMs."""

from __future__ import annotations

import ctypes
import os
from errno import E2BIG, EINVAL, ENOTTY, ENXIO
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls
from kvmapi.abi.structs import kvm_device_attr, kvm_msr_list
from kvmapi.abi.vcpu import kvm_cpuid2, kvm_cpuid_entry2
from kvmapi.buffers import HeaderAndEntries
from kvmapi.descriptor import Descriptor
from kvmapi.errors import open_error
from kvmapi.host import Host

if TYPE_CHECKING:
    from kvmapi.vm import Vm

_CPUID_ROOM = 128


class System(Descriptor):
    """/dev/kvm of a host. Raises `HostError`, with a remedy, if it cannot be opened.

    >>> with System(host) as kvm:                     # doctest: +SKIP
    ...     vm = kvm.create_vm()
    """

    on = "system"

    def __init__(self, host: Host, path: str = "/dev/kvm") -> None:
        try:
            fd = host.open(path, os.O_RDWR)
        except OSError as error:
            raise open_error(path, error.errno or 0) from error
        super().__init__(host, fd)
        self._mmap_size = 0

    def api_version(self) -> int:
        """12 on every kernel since 2.6.22."""
        return self.ioctl(ioctls.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 is no. A VM may answer otherwise: see `Vm.check_extension`."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def create_vm(self, type: int = 0) -> Vm:
        """A VM of the given type (KVM_X86_*_VM)."""
        from kvmapi.vm import Vm

        mmap_size = self.vcpu_mmap_size()  # before the VM: what fails here must not leave its fd behind
        return Vm(self.host, self.ioctl(ioctls.KVM_CREATE_VM, type), type, mmap_size)

    def vcpu_mmap_size(self) -> int:
        """Bytes to map from a vCPU's fd."""
        if not self._mmap_size:
            self._mmap_size = self.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)
        return self._mmap_size

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """What CPUID can say to a guest here: a list to change and give to `Vcpu.set_cpuid2`."""
        room = _CPUID_ROOM
        while True:
            argument = HeaderAndEntries(kvm_cpuid2, kvm_cpuid_entry2, room)
            argument.header.nent = room
            result = self.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(argument.header))
            if result >= 0:
                return [_copy(argument.entries[i]) for i in range(min(argument.header.nent, room))]
            if result != -E2BIG or room > 1 << 16:
                raise self.error(ioctls.KVM_GET_SUPPORTED_CPUID, -result, argument.header)
            room *= 2

    def msr_index_list(self) -> list[int]:
        """Indices of the MSRs that make up a vCPU's state."""
        return self._index_list(ioctls.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """Indices of the MSRs that describe the CPU."""
        return self._index_list(ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _index_list(self, request: int) -> list[int]:
        count = 0
        while True:  # the first call, with no room, says how many there are
            argument = HeaderAndEntries(kvm_msr_list, ctypes.c_uint32, count)
            argument.header.nmsrs = count
            result = self.ioctl_raw(request, ctypes.addressof(argument.header))
            if result >= 0:
                return list(argument.entries[: argument.header.nmsrs])
            if result != -E2BIG or argument.header.nmsrs <= count:
                raise self.error(request, -result, argument.header)
            count = argument.header.nmsrs

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Whether KVM itself has an attribute, e.g. (KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES)."""
        argument = kvm_device_attr(group=group, attr=attr)
        result = self.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(argument))
        if result < 0 and -result not in (ENXIO, ENOTTY, EINVAL):
            raise self.error(ioctls.KVM_HAS_DEVICE_ATTR, -result, argument)
        return result >= 0

    def device_attr(self, group: int, attr: int) -> int:
        """The 64-bit value of an attribute of KVM itself."""
        value = ctypes.c_uint64()
        self.ioctl(ioctls.KVM_GET_DEVICE_ATTR, kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(value)))
        return value.value


def _copy(entry: kvm_cpuid_entry2) -> kvm_cpuid_entry2:
    return kvm_cpuid_entry2.from_buffer_copy(entry)
