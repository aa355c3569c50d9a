"""/dev/kvm of the model: system ioctls."""

from __future__ import annotations

import errno
import struct

from kvmapi.abi import ioctls, kvm, sev
from kvmapi.abi.dialects import MAINLINE
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu import fpu, mce
from kvmapi.model.cpu.machine_msrs import FEATURES
from kvmapi.model.cpu.msrs import INDEX_LIST
from kvmapi.model.files import File
from kvmapi.model.platform import Platform
from kvmapi.model.runpage import SIZE
from kvmapi.model.vm import VmFile

_ENTRY = struct.Struct("<IIIIIII12x")  # kvm_cpuid_entry2
_MAX_CPUID_ENTRIES = 256
_MSR_ENTRY = struct.Struct("<IIQ")
_MAX_MSRS = 256
_SEV_ATTRIBUTES = frozenset((sev.KVM_X86_SEV_VMSA_FEATURES, sev.KVM_X86_SNP_POLICY_BITS, sev.KVM_X86_SEV_SNP_REQ_CERTS))
_XCOMP_GUEST_SUPP = 0  # attribute of group 0: the XCR0 bits a guest may have


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
            ioctls.KVM_GET_MSR_INDEX_LIST: lambda arg, caller: _index_list(arg, caller, INDEX_LIST),
            ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST: lambda arg, caller: _index_list(arg, caller, tuple(FEATURES)),
            ioctls.KVM_GET_MSRS: self._feature_msrs,
            ioctls.KVM_X86_GET_MCE_CAP_SUPPORTED: self._machine_checks,
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
        return caller.install(self._make_vm(arg, caller))

    def _make_vm(self, vm_type: int, caller: Caller) -> VmFile:
        if self._platform.dialect is MAINLINE:
            return VmFile(self._platform, vm_type, caller)
        from kvmapi.model.dialects.vm import DialectVm

        return DialectVm(self._platform, vm_type, caller)

    def _supported_cpuid(self, arg: int, caller: Caller) -> int:
        room = struct.unpack("<I4x", caller.memory.read(arg, 8))[0]
        rows = self._platform.supported_cpuid()
        if min(room, _MAX_CPUID_ENTRIES) < len(rows):  # nent stays as it was
            raise Errno(errno.E2BIG)
        caller.memory.write(arg + 8, b"".join(_ENTRY.pack(*row) for row in rows))
        caller.memory.write(arg, struct.pack("<I", len(rows)))
        return 0

    def _feature_msrs(self, arg: int, caller: Caller) -> int:
        """KVM_GET_MSRS on /dev/kvm: how many entries were filled in before the first MSR that is unknown. What is no
        feature but in the index list reads as 0, as KVM gives it for the sake of old user space.
        """
        count = struct.unpack("<I4x", caller.memory.read(arg, 8))[0]
        if count >= _MAX_MSRS:
            raise Errno(errno.E2BIG)
        data = caller.memory.read(arg + 8, count * _MSR_ENTRY.size) if count else b""
        rows = list(_MSR_ENTRY.iter_unpack(data))
        known = next((at for at, row in enumerate(rows) if row[0] not in FEATURES and row[0] not in INDEX_LIST), count)
        filled = [(number, pad, FEATURES.get(number, 0)) for number, pad, _ in rows[: known + 1]]  # the one that stops it reads 0
        if filled:
            caller.memory.write(arg + 8, b"".join(_MSR_ENTRY.pack(*row) for row in filled))
        return known

    def _machine_checks(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, struct.pack("<Q", mce.SUPPORTED_CAP))
        return 0

    # ---- device attributes of /dev/kvm: what SEV and XSAVE can be asked for
    def _attribute(self, arg: int, caller: Caller) -> tuple[int, int]:
        """(value, address for it). ENXIO for an unknown one; flags are not looked at."""
        group, attribute, address = struct.unpack("<4xIQQ", caller.memory.read(arg, 24))
        if group == 0 and attribute == _XCOMP_GUEST_SUPP:
            return fpu.SUPPORTED, address
        if group != sev.KVM_X86_GRP_SEV or attribute not in _SEV_ATTRIBUTES:
            raise Errno(errno.ENXIO)
        # kvm_amd answers whatever it supports. SNP's policy bits and certificate requests: there is no SNP.
        return self._platform.vmsa_features if attribute == sev.KVM_X86_SEV_VMSA_FEATURES else 0, address

    def _has_attribute(self, arg: int, caller: Caller) -> int:
        self._attribute(arg, caller)
        return 0

    def _get_attribute(self, arg: int, caller: Caller) -> int:
        value, address = self._attribute(arg, caller)
        caller.memory.write(address, struct.pack("<Q", value))
        return 0


def _index_list(arg: int, caller: Caller, numbers: tuple[int, ...]) -> int:
    """A kvm_msr_list: the count is written back even where the room is too small (E2BIG)."""
    room = struct.unpack("<I", caller.memory.read(arg, 4))[0]
    caller.memory.write(arg, struct.pack("<I", len(numbers)))
    if room < len(numbers):
        raise Errno(errno.E2BIG)
    caller.memory.write(arg + 4, struct.pack(f"<{len(numbers)}I", *numbers))
    return 0
