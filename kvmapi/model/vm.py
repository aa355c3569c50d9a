"""A VM fd of the model: memory slots, attributes, guest_memfds, vCPUs, capabilities, and the way to its SEV context.

Every change of memory happens with the vCPUs paused and is seen by all of them before the ioctl returns. One change is
checked and made at a time (`_slots_mutex`, as the kernel's slots_lock). Checks stand in the kernel's order (7.3:
virt/kvm/kvm_main.c, arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.model import accepted
from kvmapi.model.attributes import PrivateSet
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.clock.vm import VmClock
from kvmapi.model.cpu.cpuid import MAX_PHYS_BITS
from kvmapi.model.cpu.policy import ExitPolicy
from kvmapi.model.dirty_log import DirtyLog, bitmap
from kvmapi.model.files import File
from kvmapi.model.guest_memfd import GuestMemfdFile, supported_flags
from kvmapi.model.irq.vm import VmInterrupts
from kvmapi.model.lock import EngineLock
from kvmapi.model.mem.physical import Physical
from kvmapi.model.mem.private import EncryptedPhysical, ProtectedPhysical
from kvmapi.model.memslots import Memslots, Request, Slot
from kvmapi.model.msr_filter import MsrFilter
from kvmapi.model.platform import MAX_VCPUS, SEV_TYPES, Platform, has_private_memory, has_protected_state
from kvmapi.model.sev import commands, regions, sharing
from kvmapi.model.sev.context import SevContext
from kvmapi.model.stats import OF_VM, Stats

if TYPE_CHECKING:
    from kvmapi.model.sev.stream import Piece
    from kvmapi.model.vcpu import VcpuFile

_REGION = struct.Struct("<IIQQQ")
_ATTRIBUTES = struct.Struct("<QQQQ")
_REGION2 = struct.Struct("<IIQQQQI4x112x")
_U64, _IN_PAGE = 1 << 64, PAGE - 1
_PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
_GFNS = 1 << MAX_PHYS_BITS - 12
_MAX_VCPU_IDS = MAX_VCPUS * 4
_MSR_REASONS = kvm.KVM_MSR_EXIT_REASON_INVAL | kvm.KVM_MSR_EXIT_REASON_UNKNOWN | kvm.KVM_MSR_EXIT_REASON_FILTER


class VmFile(File):
    """One VM. It lives while its fd, a vCPU or a guest_memfd of it is open."""

    kind = "kvm-vm"
    belongs_to_mm = True

    def __init__(self, platform: Platform, vm_type: int, caller: Caller) -> None:
        super().__init__()
        self.platform = platform
        self.type = vm_type
        self.memory = caller.memory
        self._knows_attributes = bool(platform.capability(caps.KVM_CAP_MEMORY_ATTRIBUTES, None))
        self._attributes = platform.capability(caps.KVM_CAP_MEMORY_ATTRIBUTES, vm_type)
        self.slots = Memslots(readonly_allowed=not has_protected_state(vm_type))
        self.private = PrivateSet()
        self.lock = EngineLock()
        self.vcpus: dict[int, File] = {}
        self.boot_cpu = 0  # the bootstrap processor's id
        self.exits = ExitPolicy()
        self.clock = VmClock(self.has_vcpus)
        self.physical = self._make_physical()
        self.memory.watch(self)
        self.stats = self.physical.stats = Stats(f"kvm-{os.getpid()}", OF_VM)
        self.dirty_log = DirtyLog(self.slots, self.physical.flush_range)
        self._slots_mutex = threading.Lock()
        self._vcpu_ids = 0  # ids of vCPUs end here, once that is set
        self.mutex = threading.Lock()  # the kernel's kvm->lock: vCPUs are made, and SEV commands done, one at a time
        self.sev = SevContext(self)
        self.interrupts = VmInterrupts(self.exits)
        self.handlers = {
            ioctls.KVM_CHECK_EXTENSION: self._check_extension,
            ioctls.KVM_CREATE_VCPU: self._create_vcpu,
            ioctls.KVM_SET_USER_MEMORY_REGION: self._set_region,
            ioctls.KVM_SET_USER_MEMORY_REGION2: self._set_region2,
            ioctls.KVM_GET_DIRTY_LOG: self._get_dirty_log,
            ioctls.KVM_CLEAR_DIRTY_LOG: self._clear_dirty_log,
            ioctls.KVM_SET_NR_MMU_PAGES: accepted.set_mmu_pages,
            ioctls.KVM_X86_SET_MSR_FILTER: self._set_msr_filter,
            ioctls.KVM_ENABLE_CAP: self._enable_cap,
            ioctls.KVM_CREATE_GUEST_MEMFD: self._create_guest_memfd,
            ioctls.KVM_SET_TSS_ADDR: accepted.set_tss_address,
            ioctls.KVM_SET_IDENTITY_MAP_ADDR: partial(accepted.set_identity_map, self.has_vcpus),
            ioctls.KVM_MEMORY_ENCRYPT_OP: partial(commands.operation, self.sev),
            ioctls.KVM_MEMORY_ENCRYPT_REG_REGION: partial(regions.register, self.sev),
            ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION: partial(regions.unregister, self.sev),
            ioctls.KVM_SET_MEMORY_ATTRIBUTES: self._set_attributes,
            ioctls.KVM_CREATE_IRQCHIP: self._create_irqchip,
            ioctls.KVM_SET_BOOT_CPU_ID: self._set_boot_cpu,
            **self.interrupts.handlers(),
            **self.clock.handlers(),
            ioctls.KVM_GET_STATS_FD: self._get_stats,
        }

    def _make_physical(self) -> Physical:
        if has_private_memory(self.type):
            return ProtectedPhysical(self.slots, self.memory, self.private)
        # A plain VM can become a SEV guest through the legacy KVM_SEV_INIT.
        if self.platform.has_sev and self.type in SEV_TYPES | {kvm.KVM_X86_DEFAULT_VM}:
            return EncryptedPhysical(self.slots, self.memory)
        return Physical(self.slots, self.memory)

    def destroy(self) -> None:
        self.interrupts.destroy()
        self.sev.destroy()
        self.physical.destroy()
        self.stats.destroy()
        for slot in self.slots.all():
            if slot.gmem is not None:
                slot.gmem.unbind(slot)
        self.memory.unwatch(self)

    # ---- for the other files of this VM
    @contextmanager
    def paused(self) -> Iterator[None]:
        """No vCPU of this VM runs inside the block."""
        lock = self._pause()
        try:
            yield
        finally:
            lock.release()

    def _pause(self) -> EngineLock:
        """Take the engine lock, which may have become another one while we waited for it (sharing.py)."""
        while True:
            lock = self.lock
            lock.acquire()
            if lock is self.lock:
                return lock
            lock.release()

    def launch_pieces(self, address: int, size: int) -> list[Piece]:
        """Where LAUNCH_UPDATE_DATA of the caller's [address, address+size) finds what it encrypts: there."""
        return [(self.memory, address, size)]

    def mappings_changed(self) -> None:
        """Backings changed while paused: vCPUs drop their translations."""
        self.physical.changed()

    def forget_window(self, owner: object) -> None:
        """A guest_memfd's memory goes away."""
        self.physical.drop_window(owner)

    # ---- capabilities
    def _check_extension(self, arg: int, caller: Caller) -> int:
        if arg == caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS:
            return self.interrupts.cycle_ns
        if arg == caps.KVM_CAP_X2APIC_API:
            return self.interrupts.x2apic_api
        return self.platform.capability(arg, self.type)

    def _enable_cap(self, arg: int, caller: Caller) -> int:
        cap, flags, first = struct.unpack("<IIQ88x", caller.memory.read(arg, 104))
        if cap == caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            with self._slots_mutex:
                self.dirty_log.enable(flags, first)
            return 0
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
        elif cap == caps.KVM_CAP_MAX_VCPU_ID:
            self._limit_vcpu_ids(first)
        elif cap == caps.KVM_CAP_SPLIT_IRQCHIP:
            with self.mutex:
                self.interrupts.split(first, self.has_vcpus())
        elif cap == caps.KVM_CAP_X2APIC_API:
            self.interrupts.enable_x2apic_api(first)
        elif cap == caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS:
            with self.mutex:
                self.interrupts.set_cycle(first, self.has_vcpus())
        elif cap == caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM:
            sharing.copy_from(self.sev, first, caller)
        elif cap == caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM:
            sharing.move_from(self.sev, first, caller)
        elif not self.exits.enable(cap, first):
            raise Errno(errno.EINVAL)
        return 0

    def _get_stats(self, arg: int, caller: Caller) -> int:
        with self.paused():
            file = self.stats.open()
        return caller.install(file)

    def _limit_vcpu_ids(self, limit: int) -> None:
        """KVM_CAP_MAX_VCPU_ID: once, and before the first vCPU."""
        with self.mutex:
            if limit > _MAX_VCPU_IDS or limit < self.boot_cpu or self._vcpu_ids not in (0, limit):
                raise Errno(errno.EINVAL)
            self._vcpu_ids = limit

    def _set_msr_filter(self, arg: int, caller: Caller) -> int:
        self.exits.msr_filter = MsrFilter.from_caller(arg, caller)
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
        with self._slots_mutex:
            old, new = self.slots.check(request)
            if old is None and new is None:
                return
            if new is not None:
                self._prepare(old, new, request, caller)
            with self.paused():
                self._replace(old, new)

    def _prepare(self, old: Slot | None, new: Slot, request: Request, caller: Caller) -> None:
        """The checks behind the overlap's, in order: EBADF or EINVAL for the guest_memfd, EINVAL beyond the physical
        address width, EEXIST for file pages that another slot has.
        """
        gmem = None
        if request.flags & kvm.KVM_MEM_GUEST_MEMFD:
            new.gmem_page = request.gmem_offset // PAGE
            gmem = self._guest_memfd(request, caller)
            gmem.check_range(self, new.gmem_page, new.pages)
        if (old is None or old.gfn != new.gfn) and new.gfn + new.pages > _GFNS:
            raise Errno(errno.EINVAL)
        if gmem is not None:
            gmem.check_unbound(new.gmem_page, new.pages)
            new.gmem = gmem
        if not new.flags & kvm.KVM_MEM_LOG_DIRTY_PAGES:
            new.dirty = None
        elif new.dirty is None:
            new.dirty = bitmap(new.pages, dirty=self.dirty_log.starts_dirty)

    def _guest_memfd(self, request: Request, caller: Caller) -> GuestMemfdFile:
        file = caller.file(request.gmem_fd)
        if not isinstance(file, GuestMemfdFile):
            raise Errno(errno.EINVAL)
        return file

    def _replace(self, old: Slot | None, new: Slot | None) -> None:
        """Make the change. A slot that is only added needs no flush: no TLB has an entry for where nothing was."""
        if old is not None:
            self.sev.before_slot_change()
            if old.gmem is not None:
                old.gmem.unbind(old)
        if new is not None:
            if new.gmem is not None:
                new.gmem.bind(new)
            self.slots.put(new)
            if old is not None:
                self.physical.flush_range(old.gfn, old.pages)
        elif old is not None:
            self.slots.drop(old.id)
            self.physical.slot_gone(old)

    # ---- the dirty log
    def _get_dirty_log(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, 16)
        with self._slots_mutex, self.paused():
            self.dirty_log.get(data, caller)
        return 0

    def _clear_dirty_log(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, 24)
        with self._slots_mutex, self.paused():
            self.dirty_log.clear(data, caller)
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
        if not self._knows_attributes:
            raise Errno(errno.ENOTTY)
        gpa, size, attributes, flags = _ATTRIBUTES.unpack(caller.memory.read(arg, 32))
        if flags or attributes & ~self._attributes or not size or gpa + size >= _U64 or (gpa | size) & _IN_PAGE:
            raise Errno(errno.EINVAL)
        gfn, pages, private = gpa // PAGE, size // PAGE, attributes & _PRIVATE != 0
        with self._slots_mutex:
            lock = self._pause()
            try:
                if self.private.set_page(gfn, private) if pages == 1 else self.private.set_range(gfn, pages, private):
                    self.physical.flush_range(gfn, pages)
            finally:
                lock.release()
        return 0

    # ---- vCPUs
    def _create_irqchip(self, arg: int, caller: Caller) -> int:
        with self.mutex:
            self.interrupts.create(bool(self.vcpus))
        return 0

    def _set_boot_cpu(self, arg: int, caller: Caller) -> int:
        """KVM_SET_BOOT_CPU_ID. The kernel's check lets the number behind the last id pass."""
        with self.mutex:
            if self.vcpus:
                raise Errno(errno.EBUSY)
            if arg > _MAX_VCPU_IDS or (self._vcpu_ids and arg > self._vcpu_ids):
                raise Errno(errno.EINVAL)
            self.boot_cpu = arg
        return 0

    def _create_vcpu(self, arg: int, caller: Caller) -> int:
        with self.mutex:
            if not 0 <= arg < _MAX_VCPU_IDS or len(self.vcpus) >= MAX_VCPUS:
                raise Errno(errno.EINVAL)
            self._vcpu_ids = self._vcpu_ids or _MAX_VCPU_IDS
            if arg >= self._vcpu_ids:
                raise Errno(errno.EINVAL)
            if arg in self.vcpus:
                raise Errno(errno.EEXIST)
            vcpu = self._make_vcpu(arg)
            self.interrupts.coalesced.add_vcpu(vcpu.page)
            fd = caller.install(vcpu)
            self.vcpus[arg] = vcpu
            return fd

    def has_vcpus(self) -> bool:
        """Was any vCPU made?"""
        return bool(self.vcpus)

    def _make_vcpu(self, index: int) -> VcpuFile:
        from kvmapi.model.vcpu import VcpuFile

        return VcpuFile(self, index)
