"""A VM fd of the model: memory slots, attributes, guest_memfds, vCPUs, capabilities, and the way to its SEV context.

Every change of memory happens with the vCPUs paused and is seen by all of them before the ioctl returns.
"""

from __future__ import annotations

import errno
import struct
from contextlib import AbstractContextManager

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.model.attributes import PrivateSet
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.cpu.cpuid import MAX_PHYS_BITS
from kvmapi.model.cpu.privileged import ExitPolicy
from kvmapi.model.files import File
from kvmapi.model.guest_memfd import GuestMemfdFile, supported_flags
from kvmapi.model.lock import EngineLock
from kvmapi.model.mem.physical import EncryptedPhysical, Physical, ProtectedPhysical
from kvmapi.model.memslots import Memslots, Request, Slot
from kvmapi.model.platform import MAX_VCPUS, SEV_TYPES, Platform, has_private_memory
from kvmapi.model.sev.commands import SevContext

_REGION = struct.Struct("<IIQQQ")
_REGION2 = struct.Struct("<IIQQQQI4x112x")
_U64 = 1 << 64
_GFNS = 1 << MAX_PHYS_BITS - 12
_MSR_REASONS = kvm.KVM_MSR_EXIT_REASON_INVAL | kvm.KVM_MSR_EXIT_REASON_UNKNOWN | kvm.KVM_MSR_EXIT_REASON_FILTER


class VmFile(File):
    """One VM. It lives while its fd, a vCPU or a guest_memfd of it is open."""

    kind = "kvm-vm"

    def __init__(self, platform: Platform, vm_type: int, caller: Caller) -> None:
        super().__init__()
        self.platform = platform
        self.type = vm_type
        self.memory = caller.memory
        self.slots = Memslots(readonly_allowed=True)
        self.private = PrivateSet()
        self.lock = EngineLock()
        self.vcpus: dict[int, File] = {}
        self.exits = ExitPolicy()
        self.physical = self._make_physical()
        self.sev = SevContext(self)
        self.handlers = {
            ioctls.KVM_CHECK_EXTENSION: self._check_extension,
            ioctls.KVM_CREATE_VCPU: self._create_vcpu,
            ioctls.KVM_SET_USER_MEMORY_REGION: self._set_region,
            ioctls.KVM_SET_USER_MEMORY_REGION2: self._set_region2,
            ioctls.KVM_GET_DIRTY_LOG: self._get_dirty_log,
            ioctls.KVM_ENABLE_CAP: self._enable_cap,
            ioctls.KVM_CREATE_GUEST_MEMFD: self._create_guest_memfd,
            ioctls.KVM_SET_TSS_ADDR: self._accept_address,
            ioctls.KVM_SET_IDENTITY_MAP_ADDR: self._accept_identity_map,
            ioctls.KVM_MEMORY_ENCRYPT_OP: self.sev.operation,
            ioctls.KVM_MEMORY_ENCRYPT_REG_REGION: self.sev.register_region,
            ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION: self.sev.unregister_region,
            ioctls.KVM_SET_MEMORY_ATTRIBUTES: self._set_attributes,
        }

    def _make_physical(self) -> Physical:
        if has_private_memory(self.type):
            return ProtectedPhysical(self.slots, self.memory, self.private)
        # A plain VM can become a SEV guest through the legacy KVM_SEV_INIT.
        if self.platform.has_sev and self.type in SEV_TYPES | {kvm.KVM_X86_DEFAULT_VM}:
            return EncryptedPhysical(self.slots, self.memory)
        return Physical(self.slots, self.memory)

    def destroy(self) -> None:
        self.sev.destroy()
        self.physical.destroy()
        for slot in self.slots.all():
            if slot.gmem is not None:
                slot.gmem.unbind(slot)

    # ---- for the other files of this VM
    def paused(self) -> AbstractContextManager[None]:
        """No vCPU of this VM runs inside the block."""
        return self.lock.paused()

    def mappings_changed(self) -> None:
        """Backings changed while paused: vCPUs drop their translations."""
        self.physical.changed()

    def forget_window(self, owner: object) -> None:
        """A guest_memfd's memory goes away."""
        self.physical.drop_window(owner)

    # ---- capabilities
    def _check_extension(self, arg: int, caller: Caller) -> int:
        return self.platform.capability(arg, self.type)

    def _enable_cap(self, arg: int, caller: Caller) -> int:
        cap, flags, first = struct.unpack("<IIQ88x", caller.memory.read(arg, 104))
        if flags:
            raise Errno(errno.EINVAL)
        if cap == caps.KVM_CAP_EXIT_HYPERCALL:
            if first & ~(1 << kvm.KVM_HC_MAP_GPA_RANGE):
                raise Errno(errno.EINVAL)
            self.exits.hypercalls = first
        elif cap == caps.KVM_CAP_X86_USER_SPACE_MSR:
            if first & ~_MSR_REASONS:
                raise Errno(errno.EINVAL)
            self.exits.msr_reasons = first
        else:
            raise Errno(errno.EINVAL)
        return 0

    def _accept_address(self, arg: int, caller: Caller) -> int:
        """KVM_SET_TSS_ADDR: an Intel real-mode crutch; nothing to do here, but its range check is part of the
        interface.
        """
        if arg > 0xFFFFFFFF - 3 * PAGE:
            raise Errno(errno.EINVAL)
        return 0

    def _accept_identity_map(self, arg: int, caller: Caller) -> int:
        caller.memory.read(arg, 8)
        if self.vcpus:
            raise Errno(errno.EINVAL)
        return 0

    # ---- memory slots
    def _set_region(self, arg: int, caller: Caller) -> int:
        self._change_slot(Request(*_REGION.unpack(caller.memory.read(arg, _REGION.size))), caller)
        return 0

    def _set_region2(self, arg: int, caller: Caller) -> int:
        slot, flags, gpa, size, hva, offset, fd = _REGION2.unpack(caller.memory.read(arg, _REGION2.size))
        self._change_slot(Request(slot, flags, gpa, size, hva, fd, offset, version=2), caller)
        return 0

    def _change_slot(self, request: Request, caller: Caller) -> None:
        old, new = self.slots.check(request)
        if old is None and new is None:
            return
        gmem = None
        if new is not None and request.flags & kvm.KVM_MEM_GUEST_MEMFD:
            gmem = self._guest_memfd(request, caller)
            gmem.check_binding(self, request.gmem_offset // PAGE, new.pages)
        if new is not None and (old is None or old.gfn != new.gfn) and new.gfn + new.pages > _GFNS:
            raise Errno(errno.EINVAL)  # kvm_arch_prepare_memory_region: beyond the physical address width
        with self.paused():
            self._replace(old, new, gmem, request.gmem_offset // PAGE)

    def _guest_memfd(self, request: Request, caller: Caller) -> GuestMemfdFile:
        file = caller.file(request.gmem_fd)
        if not isinstance(file, GuestMemfdFile) or request.gmem_offset % PAGE:
            raise Errno(errno.EINVAL)
        return file

    def _replace(self, old: Slot | None, new: Slot | None, gmem: GuestMemfdFile | None, page: int) -> None:
        if old is not None and old.gmem is not None:
            old.gmem.unbind(old)
        if new is None:
            if old is not None:
                self.slots.drop(old.id)
        else:
            if gmem is not None:
                new.gmem, new.gmem_page = gmem, page
                gmem.bind(new)
            self.slots.put(new)
        if old is not None:
            self.sev.before_slot_change()
            self.physical.drop_window(old)
        else:
            self.physical.changed()

    def _get_dirty_log(self, arg: int, caller: Caller) -> int:
        slot_id, _, address = struct.unpack("<IIQ", caller.memory.read(arg, 16))
        if slot_id >> 16 or slot_id & 0xFFFF >= kvm.KVM_USER_MEM_SLOTS:
            raise Errno(errno.EINVAL)
        slot = self.slots.get(slot_id)
        if slot is None or slot.dirty is None:
            raise Errno(errno.ENOENT)
        with self.paused():
            bits = bytes(slot.dirty)
            if any(bits):
                slot.dirty[:] = bytes(len(bits))
                self.mappings_changed()  # stores must be noticed again
        caller.memory.write(address, bits)
        return 0

    # ---- private memory
    def _create_guest_memfd(self, arg: int, caller: Caller) -> int:
        size, flags = struct.unpack("<QQ48x", caller.memory.read(arg, 64))
        if flags & ~supported_flags(has_private_memory(self.type)):
            raise Errno(errno.EINVAL)
        if not 0 < size < 1 << 63 or size % PAGE:
            raise Errno(errno.EINVAL)
        return caller.install(GuestMemfdFile(self, size, flags))

    def _set_attributes(self, arg: int, caller: Caller) -> int:
        if not self.platform.capability(caps.KVM_CAP_MEMORY_ATTRIBUTES, None):
            raise Errno(errno.ENOTTY)
        gpa, size, attributes, flags = struct.unpack("<QQQQ", caller.memory.read(arg, 32))
        supported = self.platform.capability(caps.KVM_CAP_MEMORY_ATTRIBUTES, self.type)
        if flags or attributes & ~supported or not size or gpa + size >= _U64 or gpa % PAGE or size % PAGE:
            raise Errno(errno.EINVAL)
        with self.paused():
            if self.private.set_range(gpa // PAGE, size // PAGE, bool(attributes & kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)):
                self.physical.flush_range(gpa // PAGE, size // PAGE)
        return 0

    # ---- vCPUs
    def _create_vcpu(self, arg: int, caller: Caller) -> int:
        if not 0 <= arg < MAX_VCPUS * 4:
            raise Errno(errno.EINVAL)
        if len(self.vcpus) >= MAX_VCPUS:
            raise Errno(errno.EINVAL)
        if arg in self.vcpus:
            raise Errno(errno.EEXIST)
        from kvmapi.model.vcpu import VcpuFile

        vcpu = VcpuFile(self, arg)
        self.vcpus[arg] = vcpu
        return caller.install(vcpu)
