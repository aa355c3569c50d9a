"""`Vm`: a virtual machine's fd. Memory slots, capabilities, attributes, SEV commands."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from errno import EIO
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls, irq, kvm
from kvmapi.abi import structs as s
from kvmapi.abi.psp import SEV_RET_NO_FW_CALL, SEV_RET_SUCCESS
from kvmapi.abi.sev import COMMAND_NAMES, kvm_sev_cmd
from kvmapi.buffers import HeaderAndEntries
from kvmapi.descriptor import Descriptor
from kvmapi.errors import KvmError, command_error
from kvmapi.host import Host
from kvmapi.memfd import GuestMemfd
from kvmapi.rows import decode_struct
from kvmapi.table import named

if TYPE_CHECKING:
    from kvmapi.vcpu import Vcpu

_SET_ATTRIBUTES = ioctls.KVM_SET_MEMORY_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class MsrRange:
    """MSRs [base, base+nmsrs) of a filter: a 1 bit in `bitmap` allows the accesses in `flags`, a 0 bit denies them."""

    base: int
    nmsrs: int
    bitmap: bytes
    flags: int = kvm.KVM_MSR_FILTER_READ | kvm.KVM_MSR_FILTER_WRITE


class Vm(Descriptor):
    """A VM of `type` (KVM_X86_*_VM). Addresses and sizes are in bytes; ranges are [gpa, gpa+size)."""

    on = "vm"

    def __init__(self, host: Host, fd: int, type: int, vcpu_mmap_size: int) -> None:
        super().__init__(host, fd)
        self.type = type
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, cap: int) -> int:
        """What this VM answers, which may differ from /dev/kvm: KVM_CAP_MEMORY_ATTRIBUTES is per VM type."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four arguments."""
        argument = s.kvm_enable_cap(cap=cap, flags=flags)
        for i, arg in enumerate(args):
            argument.args[i] = arg
        return self.ioctl(ioctls.KVM_ENABLE_CAP, argument)

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """A vCPU with this (APIC) id, its kvm_run mapped."""
        from kvmapi.vcpu import Vcpu

        return Vcpu(self.host, self.ioctl(ioctls.KVM_CREATE_VCPU, id), id, self._vcpu_mmap_size)

    # --- memory

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Create, move, re-flag or (size 0) delete a slot backed by the host virtual range [hva, hva+size)."""
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, s.kvm_userspace_memory_region(slot, flags, gpa, size, hva))

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        guest_memfd: int = -1,
        guest_memfd_offset: int = 0,
    ) -> None:
        """The same, with private memory from a guest_memfd; the flag GUEST_MEMFD is added when an fd is given."""
        if guest_memfd >= 0:
            flags |= kvm.KVM_MEM_GUEST_MEMFD
        self.ioctl(
            ioctls.KVM_SET_USER_MEMORY_REGION2,
            s.kvm_userspace_memory_region2(slot, flags, gpa, size, hva, guest_memfd_offset, guest_memfd if guest_memfd >= 0 else 0),
        )

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """A file of private memory for this VM (GUEST_MEMFD_FLAG_*)."""
        fd = self.ioctl(ioctls.KVM_CREATE_GUEST_MEMFD, s.kvm_create_guest_memfd(size=size, flags=flags))
        return GuestMemfd(self.host, fd, size, flags)

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """Make a GPA range private (KVM_MEMORY_ATTRIBUTE_PRIVATE) or shared (0); no slot is needed."""
        argument = s.kvm_memory_attributes(gpa, size, attributes, flags)
        result = self.host.ioctl(self.fd, _SET_ATTRIBUTES, ctypes.addressof(argument))  # `ioctl` in place: conversions pay for it
        if result < 0:
            raise self.error(_SET_ATTRIBUTES, -result, argument)

    def get_dirty_log(self, slot: int, pages: int) -> bytes:
        """The slot's dirty bitmap, one bit per 4 KiB page, and clear it (unless MANUAL_PROTECT is on)."""
        bitmap = (ctypes.c_uint64 * ((pages + 63) // 64))()
        argument = s.kvm_dirty_log(slot=slot)
        argument.dirty_bitmap = ctypes.addressof(bitmap)
        self.ioctl(ioctls.KVM_GET_DIRTY_LOG, argument)
        return bytes(bitmap)

    # --- MSRs

    def set_msr_filter(self, ranges: Iterable[MsrRange], default_deny: bool = False) -> None:
        """Replace the MSR filter; MSRs in no range follow the default. Denied accesses exit to user space if
        KVM_CAP_X86_USER_SPACE_MSR says so, and raise #GP otherwise. An empty filter switches filtering off.
        """
        argument = s.kvm_msr_filter(flags=kvm.KVM_MSR_FILTER_DEFAULT_DENY if default_deny else 0)
        bitmaps = []  # the kernel reads them during the call
        for i, r in enumerate(ranges):
            if i == kvm.KVM_MSR_FILTER_MAX_RANGES:
                raise ValueError(f"an MSR filter has at most {kvm.KVM_MSR_FILTER_MAX_RANGES} ranges")
            if len(r.bitmap) * 8 < r.nmsrs:
                raise ValueError(f"bitmap of {len(r.bitmap)} bytes is too short for {r.nmsrs} MSRs")
            # The kernel copies whole longs.
            bitmap = (ctypes.c_uint64 * ((r.nmsrs + 63) // 64)).from_buffer_copy(r.bitmap.ljust((r.nmsrs + 63) // 64 * 8, b"\0"))
            bitmaps.append(bitmap)
            argument.ranges[i] = s.kvm_msr_filter_range(r.flags, r.nmsrs, r.base, ctypes.addressof(bitmap))
        self.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, argument)

    # --- interrupts

    def create_irqchip(self) -> None:
        """Make the in-kernel interrupt controllers; each vCPU made afterwards has a local APIC."""
        self.ioctl(ioctls.KVM_CREATE_IRQCHIP)

    def get_irqchip(self, chip_id: int) -> irq.kvm_irqchip:
        """The state of a chip, KVM_IRQCHIP_*."""
        chip = irq.kvm_irqchip(chip_id=chip_id)
        self.ioctl(ioctls.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: irq.kvm_irqchip) -> None:
        """Write it."""
        self.ioctl(ioctls.KVM_SET_IRQCHIP, chip)

    def irq_line(self, gsi: int, level: int) -> int:
        """Raise (1) or lower (0) a GSI. Below 0: ignored (masked, or not routed); 0: merged with an interrupt that
        waits; above 0: how many CPUs took it.
        """
        argument = irq.kvm_irq_level(irq=gsi, level=level)
        self.ioctl(ioctls.KVM_IRQ_LINE_STATUS, argument)
        return int(argument.status)

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver a message-signalled interrupt; how many APICs took it. Raises `KvmError` with EPERM where it is for
        all of them and none is on.
        """
        return self.ioctl(ioctls.KVM_SIGNAL_MSI, irq.kvm_msi(address & 0xFFFFFFFF, address >> 32, data))

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """Let writes to an eventfd raise a GSI (KVM_IRQFD_FLAG_*). With RESAMPLE the line stays high until the guest
        ends the interrupt, which then signals `resamplefd`.
        """
        self.ioctl(ioctls.KVM_IRQFD, irq.kvm_irqfd(fd, gsi, flags, resamplefd))

    def ioeventfd(self, fd: int, address: int, length: int, flags: int = 0, datamatch: int = 0) -> None:
        """Let a guest's write of `length` bytes (0: any) to an MMIO address or a port signal an eventfd instead of
        exiting (KVM_IOEVENTFD_FLAG_*).
        """
        self.ioctl(ioctls.KVM_IOEVENTFD, irq.kvm_ioeventfd(datamatch, address, length, fd, flags))

    def set_gsi_routing(self, entries: Sequence[irq.kvm_irq_routing_entry]) -> None:
        """Replace the routing table."""
        argument = HeaderAndEntries(irq.kvm_irq_routing, irq.kvm_irq_routing_entry, len(entries))
        argument.header.nr = len(entries)
        for at, entry in zip(argument.entries, entries):
            ctypes.pointer(at)[0] = entry
        self.ioctl(ioctls.KVM_SET_GSI_ROUTING, argument.header)

    # --- SEV

    def sev_op(self, id: int, data: ctypes.Structure | None = None, sev_fd: int = 0) -> None:
        """Run a KVM_SEV_* command; `data` is written back in place, also when the command fails.

        Raises `KvmError` with the command's name in `ioctl`, and the firmware's status in `fw_error` if the firmware
        was reached. `error` starts as NO_FW_CALL because KVM does not clear it.
        """
        command = kvm_sev_cmd(id=id, data=0 if data is None else ctypes.addressof(data), error=SEV_RET_NO_FW_CALL, sev_fd=sev_fd)
        result = self.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(command))
        if result < 0:
            raise self._sev_error(id, -result, data, command.error)

    def _sev_error(self, id: int, code: int, data: ctypes.Structure | None, status: int) -> KvmError:
        reached = code == EIO and status not in (SEV_RET_NO_FW_CALL, SEV_RET_SUCCESS)
        return command_error(
            named("KVM_MEMORY_ENCRYPT_OP", "vm"),
            COMMAND_NAMES.get(id, f"KVM_SEV command {id}"),
            code,
            {} if data is None else decode_struct(data),
            status if reached else None,
        )

    def register_enc_region(self, hva: int, size: int) -> None:
        """Pin [hva, hva+size): its pages may hold ciphertext and must not move. Counts against RLIMIT_MEMLOCK."""
        self.ioctl(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, s.kvm_enc_region(hva, size))

    def unregister_enc_region(self, hva: int, size: int) -> None:
        """Unpin a range, exactly as it was registered."""
        self.ioctl(ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION, s.kvm_enc_region(hva, size))
