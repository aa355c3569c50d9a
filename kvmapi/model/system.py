"""/dev/kvm of the model: system ioctls."""

from __future__ import annotations

import errno
import struct

from kvmapi.abi import ioctls, kvm, sev
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu.msrs import INDEX_LIST
from kvmapi.model.files import File
from kvmapi.model.platform import Platform
from kvmapi.model.runpage import SIZE
from kvmapi.model.vm import VmFile

_ENTRY = struct.Struct("<IIIIIII12x")  # kvm_cpuid_entry2
_MAX_CPUID_ENTRIES = 256


class KvmDevice(File):
    """One open of /dev/kvm."""

    kind = "kvm"

    def __init__(self, platform: Platform) -> None:
        super().__init__()
        self._platform = platform
        self.handlers = {
            ioctls.KVM_GET_API_VERSION: self._api_version,
            ioctls.KVM_CREATE_VM: self._create_vm,
            ioctls.KVM_CHECK_EXTENSION: self._check_extension,
            ioctls.KVM_GET_VCPU_MMAP_SIZE: self._mmap_size,
            ioctls.KVM_GET_SUPPORTED_CPUID: self._supported_cpuid,
            ioctls.KVM_GET_MSR_INDEX_LIST: self._msr_index_list,
            ioctls.KVM_HAS_DEVICE_ATTR: self._has_attribute,
            ioctls.KVM_GET_DEVICE_ATTR: self._get_attribute,
        }

    def unknown_errno(self) -> int:
        return errno.EINVAL  # /dev/kvm hands what it does not know to the architecture, whose default is EINVAL

    def _api_version(self, arg: int, caller: Caller) -> int:
        if arg:
            raise Errno(errno.EINVAL)
        return kvm.KVM_API_VERSION

    def _mmap_size(self, arg: int, caller: Caller) -> int:
        if arg:
            raise Errno(errno.EINVAL)
        return SIZE

    def _check_extension(self, arg: int, caller: Caller) -> int:
        return self._platform.capability(arg, None)

    def _create_vm(self, arg: int, caller: Caller) -> int:
        if not 0 <= arg < 32 or not self._platform.vm_types >> arg & 1:
            raise Errno(errno.EINVAL)
        return caller.install(VmFile(self._platform, arg, caller))

    def _supported_cpuid(self, arg: int, caller: Caller) -> int:
        room = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        rows = self._platform.supported_cpuid()
        if not room:
            raise Errno(errno.E2BIG)
        if min(room, _MAX_CPUID_ENTRIES) < len(rows):
            raise Errno(errno.E2BIG)
        table = b"".join(_ENTRY.pack(*row) for row in rows)
        caller.memory.write(arg, struct.pack("<II", len(rows), 0) + table)
        return 0

    def _msr_index_list(self, arg: int, caller: Caller) -> int:
        room = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        caller.memory.write(arg, struct.pack("<I", len(INDEX_LIST)))
        if room < len(INDEX_LIST):
            raise Errno(errno.E2BIG)
        caller.memory.write(arg + 4, struct.pack(f"<{len(INDEX_LIST)}I", *INDEX_LIST))
        return 0

    # ---- device attributes of /dev/kvm: what SEV can be asked for
    def _attribute(self, arg: int, caller: Caller) -> tuple[int, int]:
        """(value, address for it)."""
        _flags, group, attribute, address = struct.unpack("<IIQQ", caller.memory.read(arg, 24))
        if group != sev.KVM_X86_GRP_SEV or not self._platform.has_sev or attribute != sev.KVM_X86_SEV_VMSA_FEATURES:
            raise Errno(errno.ENXIO)
        return 0, address  # no VMSA feature is on offer without SEV-ES

    def _has_attribute(self, arg: int, caller: Caller) -> int:
        self._attribute(arg, caller)
        return 0

    def _get_attribute(self, arg: int, caller: Caller) -> int:
        value, address = self._attribute(arg, caller)
        caller.memory.write(address, struct.pack("<Q", value))
        return 0
