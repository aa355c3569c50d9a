"""A VM whose kernel speaks an RFC dialect: what its ioctls take, and whose memory they change.

It is VmFile with other numbers. Slots may have a private half (kvm_userspace_memory_region_ext), bound and released
with `CHANGES` held (memfd.py); the ioctls that decide about pages are the dialect's own (kvmapi.abi.dialects); mainline's for
the same purpose do not exist. Every VM may have private slots, plain ones too, as the series' test configuration allows.
"""

from __future__ import annotations

import errno
import struct
from functools import partial

from kvmapi.abi import dialects as d
from kvmapi.abi import ioctls, kvm
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.dialects.hypercalls import DialectHypercalls
from kvmapi.model.dialects.launch import pieces, populate_from_shared
from kvmapi.model.dialects.memfd import CHANGES, Binding, PrivateMemfd
from kvmapi.model.dialects.physical import EncryptedPrivateSlots, PrivateSlots, ProtectedWithErrno
from kvmapi.model.dialects.rule import Rule
from kvmapi.model.files import Handler
from kvmapi.model.mem.physical import Physical
from kvmapi.model.memslots import Request, Slot
from kvmapi.model.platform import Platform, has_private_memory
from kvmapi.model.sev.stream import Piece
from kvmapi.model.vcpu import VcpuFile
from kvmapi.model.vm import VmFile

_U64 = 1 << 64
_EXT = struct.Struct("<IIQQQQI4x112x")
_RANGE = struct.Struct("<QQ")
_ATTR = struct.Struct("<QQQ")
_ATTRIBUTES = struct.Struct("<QQQQ")
_VERSION_EXT = 3  # of a Request: kvm_userspace_memory_region_ext
_ATTR_FLAGS = (d.KVM_MEMORY_ATTR_SHARED, d.KVM_MEMORY_ATTR_PRIVATE)


class DialectVm(VmFile):
    """One VM. `rule`, where slots may have private halves, says which of the two an access gets."""

    rule: Rule

    def __init__(self, platform: Platform, vm_type: int, caller: Caller) -> None:
        self.dialect = platform.dialect
        self._memfds = self.dialect.files == "memfd"
        super().__init__(platform, vm_type, caller)
        self._knows_attributes = True
        self._attributes = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if self._memfds or has_private_memory(vm_type) else 0
        self._replace_handlers()

    def _replace_handlers(self) -> None:
        gone = {ioctls.KVM_SET_MEMORY_ATTRIBUTES}
        if self._memfds:
            gone |= {ioctls.KVM_SET_USER_MEMORY_REGION2, ioctls.KVM_CREATE_GUEST_MEMFD}
        for number in gone:
            del self.handlers[number]
        known: dict[int, Handler] = {
            d.KVM_SET_MEMORY_ATTR: self._set_attr,
            d.KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES: self._get_supported,
            d.KVM_SET_MEMORY_ATTRIBUTES_V10: self._set_attributes_v10,
            d.KVM_SET_MEMORY_ATTRIBUTES_V11: self._set_attributes,
            ioctls.KVM_MEMORY_ENCRYPT_REG_REGION: partial(self._declare, True),
            ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION: partial(self._declare, False),
        }
        self.handlers.update({call.number: known[call.number] for call in self.dialect.calls})

    def _make_physical(self) -> Physical:
        number = self.dialect.fault[2]
        if not self._memfds:
            if not has_private_memory(self.type):
                return super()._make_physical()
            return ProtectedWithErrno(self.slots, self.memory, self.private, number)
        made = EncryptedPrivateSlots if self.platform.has_sev else PrivateSlots
        self.rule = Rule(self, self.dialect, self.private)
        physical = made(self.slots, self.memory)
        physical.vm, physical.rule = self, self.rule
        return physical

    def _make_vcpu(self, index: int) -> VcpuFile:
        vcpu = super()._make_vcpu(index)
        del vcpu.handlers[ioctls.KVM_PRE_FAULT_MEMORY]
        vcpu.page.fault = self.dialect.fault[:2]
        if self._memfds:
            self.rule.add_vcpu(id(vcpu.cpu.kick))
            vcpu.cpu.hypercalls = DialectHypercalls(vcpu.cpu, self.exits, self.rule)
        return vcpu

    def _enable_cap(self, arg: int, caller: Caller) -> int:
        cap, flags = struct.unpack("<II", caller.memory.read(arg, 104)[:8])
        if cap != d.KVM_CAP_UNMAPPED_PRIVATE_MEM or not self.dialect.capabilities.get(cap):
            return super()._enable_cap(arg, caller)
        if flags:
            raise Errno(errno.EINVAL)
        with self.paused():
            self.rule.unmapped = True
            self.physical.flush()
        return 0

    # ---- slots
    def _set_region(self, arg: int, caller: Caller) -> int:
        """The flags are read first and say how long the struct is."""
        with CHANGES:
            flags = struct.unpack("<I", caller.memory.read(arg + 4, 4))[0]
            if not self._memfds or not flags & d.KVM_MEM_PRIVATE:
                return super()._set_region(arg, caller)
            slot, again, gpa, size, hva, offset, fd = _EXT.unpack(caller.memory.read(arg, _EXT.size))
            if not again & d.KVM_MEM_PRIVATE or (size and self.slots.get(slot) is not None):
                raise Errno(errno.EINVAL)
            if size and (offset % PAGE or offset > _U64 - 1 - size):
                raise Errno(errno.EINVAL)
            self._change_slot(Request(slot, again & ~d.KVM_MEM_PRIVATE, gpa, size, hva, fd, offset, _VERSION_EXT), caller)
        return 0

    def _prepare(self, old: Slot | None, new: Slot, request: Request, caller: Caller) -> None:
        super()._prepare(old, new, request, caller)
        if request.version == _VERSION_EXT:
            new.flags |= d.KVM_MEM_PRIVATE
            new.gmem, new.gmem_page = Binding(self, _memfd(request.gmem_fd, caller)), request.gmem_offset // PAGE

    def _replace(self, old: Slot | None, new: Slot | None) -> None:
        super()._replace(old, new)
        if new is not None and isinstance(new.gmem, Binding):
            self.rule.slot_made(new)

    def launch_pieces(self, address: int, size: int) -> list[Piece]:
        if not self._memfds:
            return super().launch_pieces(address, size)
        with CHANGES:
            return pieces(self, address, size)

    # ---- what decides about pages
    def _declare(self, private: bool, arg: int, caller: Caller) -> int:
        """KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION of GPAs. Before any vCPU has run, what is made private takes over what
        stands in the shared half: EINVAL where there is no private slot, and the range is private all the same.
        """
        gpa, size = _RANGE.unpack(caller.memory.read(arg, _RANGE.size))
        _check_range(gpa, size)
        self._declare_range(gpa, size, private)
        if private and not any(vcpu.entered for vcpu in self.vcpus.values() if isinstance(vcpu, VcpuFile)):
            with CHANGES, self.paused():
                populate_from_shared(self, gpa // PAGE, size // PAGE)
        return 0

    def _set_attr(self, arg: int, caller: Caller) -> int:
        """KVM_SET_MEMORY_ATTR: what the guest asked for is completed, or decided otherwise. EINVAL unless one flag is set."""
        gpa, size, flags = _ATTR.unpack(caller.memory.read(arg, _ATTR.size))
        _check_range(gpa, size)
        if flags not in _ATTR_FLAGS:
            raise Errno(errno.EINVAL)
        self._declare_range(gpa, size, flags == d.KVM_MEMORY_ATTR_PRIVATE)
        return 0

    def _declare_range(self, gpa: int, size: int, private: bool) -> None:
        with self._slots_mutex, self.paused():
            if self.private.set_range(gpa // PAGE, size // PAGE, private):
                self.physical.flush_range(gpa // PAGE, size // PAGE)
            if self.rule.may_be_pending:
                self.rule.settle(gpa // PAGE, size // PAGE)

    def _get_supported(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, self._attributes.to_bytes(8, "little"))
        return 0

    def _set_attributes_v10(self, arg: int, caller: Caller) -> int:
        """As mainline, and then tells what is left: nothing, from the end of the range on."""
        self._set_attributes(arg, caller)
        gpa, size, attributes, flags = _ATTRIBUTES.unpack(caller.memory.read(arg, _ATTRIBUTES.size))
        caller.memory.write(arg, _ATTRIBUTES.pack(gpa + size, 0, attributes, flags))
        return 0


def _check_range(gpa: int, size: int) -> None:
    """EINVAL: nothing, a wrap, or not whole pages."""
    if not size or gpa + size >= _U64 or gpa % PAGE or size % PAGE:
        raise Errno(errno.EINVAL)


def _memfd(fd: int, caller: Caller) -> PrivateMemfd:
    """EINVAL for everything but an inaccessible memfd, nothing open included."""
    try:
        file = caller.file(fd)
    except Errno:
        file = None
    if not isinstance(file, PrivateMemfd):
        raise Errno(errno.EINVAL)
    return file
