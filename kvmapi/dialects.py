"""KVM as it was in a patch series: `System`, `Vm` and `Vcpu` that speak an RFC dialect, and `PrivateMemfd`.

    >>> from kvmapi.model.host import ModelHost
    >>> from kvmapi.model.platform import Platform
    >>> host = ModelHost(Platform(dialect="upm-v6"))
    >>> with System(host, "upm-v6") as kvm, kvm.create_vm() as vm, PrivateMemfd.create(host, 8192) as memfd:
    ...     memfd.allocate(0, 4096)                       # the first page is private from now on
    ...     vm.set_private_region(0, gpa=0, size=8192, hva=0, fd=memfd.fd)

They are the objects of kvmapi.system, vm and vcpu with the dialect's numbers (kvmapi.abi.dialects) where those differ: whoever
handles a `MemoryFault` or gives a `Vm` slots need not know. Numbers of a dialect mean something else to a kernel that was not
built from it: open a System on a KernelHost only where you know which kernel that is.
"""

from __future__ import annotations

import os
import struct
from ctypes import c_uint64
from typing import Self

from kvmapi import system, vcpu, vm
from kvmapi.abi import dialects as d
from kvmapi.abi import ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.abi.run import EXIT_UNION_OFFSET, kvm_run
from kvmapi.errors import KvmError, ioctl_error
from kvmapi.exits import Exit, MemoryFault
from kvmapi.host import Host
from kvmapi.memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AllocatedFile
from kvmapi.rows import Argument, Ioctl

_REASON_AT = kvm_run.exit_reason.offset
_FAULT = struct.Struct("<QQQ")


class System(system.System):
    """/dev/kvm of a host that speaks `dialect`. ValueError for one that does not exist."""

    def __init__(self, host: Host, dialect: str = "mainline", path: str = "/dev/kvm") -> None:
        self.dialect = d.dialect(dialect)
        super().__init__(host, path)

    def create_vm(self, type: int = 0) -> Vm:
        """A VM of the given type (KVM_X86_*_VM), of which a dialect may have fewer than mainline."""
        mmap_size = self.vcpu_mmap_size()
        return Vm(self.host, self.ioctl(ioctls.KVM_CREATE_VM, type), type, mmap_size, self.dialect)


class Vm(vm.Vm):
    """A VM of a dialect. Methods that it does not have answer what its kernel answers, ENOTTY or EINVAL, in words."""

    def __init__(self, host: Host, fd: int, type: int, vcpu_mmap_size: int, dialect: d.Dialect) -> None:
        super().__init__(host, fd, type, vcpu_mmap_size)
        self.dialect = dialect
        self._rows = {
            call.number: Ioctl(call.name, call.number, "vm", call.struct, call.arg, None, f"{call.words} ({dialect.name})")
            for call in dialect.calls
        }

    def error(self, request: int, code: int, argument: Argument = None) -> KvmError:
        row = self._rows.get(request)
        return super().error(request, code, argument) if row is None else ioctl_error(row, code, argument)

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """A vCPU whose memory fault exits are read by the dialect's numbers."""
        return Vcpu(self.host, self.ioctl(ioctls.KVM_CREATE_VCPU, id), id, self._vcpu_mmap_size, self.dialect)

    # --- private slots (upm-v6, upm-v7, attr-2022, attr-v10)

    def set_private_region(self, slot: int, gpa: int, size: int, hva: int, fd: int, offset: int = 0, flags: int = 0) -> None:
        """Create a slot with a private half: pages [offset, offset+size) of an inaccessible memfd. KVM_MEM_PRIVATE is added."""
        region = s.kvm_userspace_memory_region(slot, flags | d.KVM_MEM_PRIVATE, gpa, size, hva)
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, d.kvm_userspace_memory_region_ext(region, offset, fd))

    # --- who decides that a page is private

    def register_private(self, gpa: int, size: int) -> None:
        """upm-v7: make GPAs private. Before the first KVM_RUN they take over what stands in the shared half."""
        self.ioctl(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, s.kvm_enc_region(gpa, size))

    def unregister_private(self, gpa: int, size: int) -> None:
        """upm-v7: make GPAs shared."""
        self.ioctl(ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION, s.kvm_enc_region(gpa, size))

    def set_memory_attr(self, gpa: int, size: int, flags: int) -> None:
        """attr-2022: KVM_MEMORY_ATTR_SHARED or KVM_MEMORY_ATTR_PRIVATE; completes what the guest asked for."""
        self.ioctl(d.KVM_SET_MEMORY_ATTR, d.kvm_memory_attr(gpa, size, flags))

    def supported_memory_attributes(self) -> int:
        """attr-v10, attr-v11: which KVM_MEMORY_ATTRIBUTE_* this VM's pages can have."""
        value = c_uint64()
        self.ioctl(d.KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES, value)
        return value.value

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """attr-v10 to mainline: make GPAs private (KVM_MEMORY_ATTRIBUTE_PRIVATE) or shared (0)."""
        self.set_attributes(gpa, size, attributes, flags)

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> tuple[int, int]:
        """The same; what is left to do as (gpa, size), which only attr-v10 changes: there size 0 says that all was done."""
        argument = s.kvm_memory_attributes(gpa, size, attributes, flags)
        numbers = [call.number for call in self.dialect.calls if call.name == "KVM_SET_MEMORY_ATTRIBUTES"]
        self.ioctl(numbers[0] if numbers else ioctls.KVM_SET_MEMORY_ATTRIBUTES, argument)
        return int(argument.address), int(argument.size)


class Vcpu(vcpu.Vcpu):
    """A vCPU of such a VM."""

    def __init__(self, host: Host, fd: int, id: int, mmap_size: int, dialect: d.Dialect) -> None:
        super().__init__(host, fd, id, mmap_size)
        self._fault = dialect.fault

    def exit(self, errno: int = 0) -> Exit:
        """The exit that is now in kvm_run. A memory fault's flag for private accesses is shown as mainline's."""
        reason, private, with_errno = self._fault
        if errno == with_errno and int.from_bytes(self.run_map[_REASON_AT : _REASON_AT + 4], "little") == reason:
            flags, gpa, size = _FAULT.unpack_from(self.run_map, EXIT_UNION_OFFSET)
            if private != kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE and flags & private:
                flags = flags & ~private | kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE
            return MemoryFault(flags, gpa, size, errno)
        return super().exit(errno)


class PrivateMemfd(AllocatedFile):
    """A memfd with MFD_INACCESSIBLE: user space gives it a size once, populates and punches it, and cannot see inside."""

    on = "guest_memfd"

    @classmethod
    def create(cls, host: Host, size: int = 0, name: str = "private") -> Self:
        """A new file; with `size` 0 the first allocation gives it one. Raises OSError (EINVAL: a kernel without the flag may
        refuse it, and mainline takes it for another one).
        """
        file = cls(host, host.memfd_create(name, os.MFD_CLOEXEC | d.MFD_INACCESSIBLE))
        try:
            if size:
                file.resize(size)
        except BaseException:
            file.close()
            raise
        return file

    def resize(self, size: int) -> None:
        """Give it its size, in whole pages. Raises KvmError: EPERM for a file that has one."""
        try:
            getattr(self.host, "ftruncate", os.ftruncate)(self.fd, size)
        except OSError as error:
            raise self.call_error("ftruncate", error, length=size) from error

    def allocate(self, offset: int, length: int) -> None:
        """Populate [offset, offset+length). In upm-v6 that makes the pages private."""
        self._fallocate(0, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free [offset, offset+length) with what it holds. In upm-v6 that makes the pages shared."""
        self._fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)
