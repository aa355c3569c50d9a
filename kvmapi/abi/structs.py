"""Argument structs of ioctls on /dev/kvm and on a VM: memory, capabilities, devices, filters, clock.

Pointers to user memory are plain 64-bit integers: an address goes in, nothing keeps the buffer alive for you.
Interrupt controllers are in `irq`, Xen and Hyper-V in `xen`; both are re-exported here, because the ioctls that
take them are VM ioctls too. Trailing variable-length arrays are not part of a struct: a header is declared, and
its entries follow it in memory.
"""

from __future__ import annotations

from ctypes import Structure, Union
from ctypes import c_int16 as s16
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from kvmapi.abi.irq import (
    kvm_coalesced_mmio,
    kvm_coalesced_mmio_ring,
    kvm_coalesced_mmio_zone,
    kvm_ioapic_state,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_msi,
    kvm_pic_state,
    kvm_pit_channel_state,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
)
from kvmapi.abi.xen import (
    kvm_hyperv_eventfd,
    kvm_irq_routing_xen_evtchn,
    kvm_xen_hvm_attr,
    kvm_xen_hvm_config,
)

__all__ = [
    "kvm_assigned_irq",
    "kvm_assigned_msix_entry",
    "kvm_assigned_msix_nr",
    "kvm_assigned_pci_dev",
    "kvm_clear_dirty_log",
    "kvm_clock_data",
    "kvm_coalesced_mmio",
    "kvm_coalesced_mmio_ring",
    "kvm_coalesced_mmio_zone",
    "kvm_create_device",
    "kvm_create_guest_memfd",
    "kvm_device_attr",
    "kvm_dirty_gfn",
    "kvm_dirty_log",
    "kvm_enable_cap",
    "kvm_enc_region",
    "kvm_hyperv_eventfd",
    "kvm_ioapic_state",
    "kvm_ioeventfd",
    "kvm_irq_level",
    "kvm_irq_routing",
    "kvm_irq_routing_entry",
    "kvm_irq_routing_xen_evtchn",
    "kvm_irqchip",
    "kvm_irqfd",
    "kvm_memory_alias",
    "kvm_memory_attributes",
    "kvm_memory_region",
    "kvm_msi",
    "kvm_msr_filter",
    "kvm_msr_filter_range",
    "kvm_msr_list",
    "kvm_pic_state",
    "kvm_pit_channel_state",
    "kvm_pit_config",
    "kvm_pit_state",
    "kvm_pit_state2",
    "kvm_pmu_event_filter",
    "kvm_reinject_control",
    "kvm_stats_desc",
    "kvm_stats_header",
    "kvm_user_trace_setup",
    "kvm_userspace_memory_region",
    "kvm_userspace_memory_region2",
    "kvm_xen_hvm_attr",
    "kvm_xen_hvm_config",
]


# --- memory ------------------------------------------------------------------------------------------------------


class kvm_userspace_memory_region(Structure):
    """KVM_SET_USER_MEMORY_REGION: sizes and addresses in bytes, page aligned."""

    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    ]


class kvm_userspace_memory_region2(Structure):
    """KVM_SET_USER_MEMORY_REGION2: the same, with a guest_memfd for the private side."""

    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("guest_memfd_offset", u64),
        ("guest_memfd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    ]


class kvm_memory_region(Structure):
    """KVM_SET_MEMORY_REGION, withdrawn: the kernel no longer allocates guest memory itself."""

    _fields_ = [("slot", u32), ("flags", u32), ("guest_phys_addr", u64), ("memory_size", u64)]


class kvm_memory_alias(Structure):
    """KVM_SET_MEMORY_ALIAS, obsolete; newer headers no longer declare it."""

    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("target_phys_addr", u64),
    ]


class kvm_create_guest_memfd(Structure):
    """KVM_CREATE_GUEST_MEMFD: size in bytes, GUEST_MEMFD_FLAG_*."""

    _fields_ = [("size", u64), ("flags", u64), ("reserved", u64 * 6)]


class kvm_memory_attributes(Structure):
    """KVM_SET_MEMORY_ATTRIBUTES: the GPA range [address, address+size)."""

    _fields_ = [("address", u64), ("size", u64), ("attributes", u64), ("flags", u64)]


class kvm_enc_region(Structure):
    """KVM_MEMORY_ENCRYPT_(UN)REG_REGION: a host virtual range [addr, addr+size)."""

    _fields_ = [("addr", u64), ("size", u64)]


class _dirty_bitmap(Union):
    _fields_ = [("dirty_bitmap", u64), ("padding2", u64)]


class kvm_dirty_log(Structure):
    """KVM_GET_DIRTY_LOG: one bit per 4 KiB page of the slot, written at `dirty_bitmap`."""

    _anonymous_ = ("_u",)
    _fields_ = [("slot", u32), ("padding1", u32), ("_u", _dirty_bitmap)]


class kvm_clear_dirty_log(Structure):
    """KVM_CLEAR_DIRTY_LOG: pages [first_page, first_page+num_pages) of the slot."""

    _anonymous_ = ("_u",)
    _fields_ = [("slot", u32), ("num_pages", u32), ("first_page", u64), ("_u", _dirty_bitmap)]


class kvm_dirty_gfn(Structure):
    """One entry of a vCPU's dirty ring."""

    _fields_ = [("flags", u32), ("slot", u32), ("offset", u64)]


# --- capabilities, devices, filters -------------------------------------------------------------------------------


class kvm_enable_cap(Structure):
    """KVM_ENABLE_CAP."""

    _fields_ = [("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64)]


class kvm_device_attr(Structure):
    """KVM_{SET,GET,HAS}_DEVICE_ATTR: the value lies at `addr`."""

    _fields_ = [("flags", u32), ("group", u32), ("attr", u64), ("addr", u64)]


class kvm_create_device(Structure):
    """KVM_CREATE_DEVICE: `fd` comes back."""

    _fields_ = [("type", u32), ("fd", u32), ("flags", u32)]


class kvm_msr_list(Structure):
    """Header of KVM_GET_MSR_INDEX_LIST; u32 indices follow at offset 4."""

    _fields_ = [("nmsrs", u32)]


class kvm_msr_filter_range(Structure):
    """MSRs [base, base+nmsrs): a 1 bit in the bitmap at `bitmap` allows what `flags` says, a 0 bit denies it."""

    _fields_ = [("flags", u32), ("nmsrs", u32), ("base", u32), ("bitmap", u64)]


class kvm_msr_filter(Structure):
    """KVM_X86_SET_MSR_FILTER."""

    _fields_ = [("flags", u32), ("ranges", kvm_msr_filter_range * 16)]


class kvm_pmu_event_filter(Structure):
    """Header of KVM_SET_PMU_EVENT_FILTER; u64 events follow."""

    _fields_ = [
        ("action", u32),
        ("nevents", u32),
        ("fixed_counter_bitmap", u32),
        ("flags", u32),
        ("pad", u32 * 4),
    ]


class kvm_clock_data(Structure):
    """KVM_{GET,SET}_CLOCK: nanoseconds."""

    _fields_ = [
        ("clock", u64),
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    ]


class kvm_stats_header(Structure):
    """First bytes of the fd that KVM_GET_STATS_FD returns."""

    _fields_ = [
        ("flags", u32),
        ("name_size", u32),
        ("num_desc", u32),
        ("id_offset", u32),
        ("desc_offset", u32),
        ("data_offset", u32),
    ]


class kvm_stats_desc(Structure):
    """One statistic; its NUL-padded name (`name_size` bytes) follows."""

    _fields_ = [("flags", u32), ("exponent", s16), ("size", u16), ("offset", u32), ("bucket_size", u32)]


# --- device assignment (withdrawn from the kernel in 4.12) and tracing (withdrawn in 2.6.30) -------------------------


class kvm_user_trace_setup(Structure):
    """KVM_TRACE_ENABLE."""

    _fields_ = [("buf_size", u32), ("buf_nr", u32)]


class kvm_assigned_pci_dev(Structure):
    """KVM_ASSIGN_PCI_DEVICE."""

    _fields_ = [
        ("assigned_dev_id", u32),
        ("busnr", u32),
        ("devfn", u32),
        ("flags", u32),
        ("segnr", u32),
        ("reserved", u32 * 11),
    ]


class kvm_assigned_irq(Structure):
    """KVM_ASSIGN_DEV_IRQ."""

    _fields_ = [
        ("assigned_dev_id", u32),
        ("host_irq", u32),
        ("guest_irq", u32),
        ("flags", u32),
        ("reserved", u32 * 12),
    ]


class kvm_assigned_msix_nr(Structure):
    """KVM_ASSIGN_SET_MSIX_NR."""

    _fields_ = [("assigned_dev_id", u32), ("entry_nr", u16), ("padding", u16)]


class kvm_assigned_msix_entry(Structure):
    """KVM_ASSIGN_SET_MSIX_ENTRY."""

    _fields_ = [("assigned_dev_id", u32), ("gsi", u32), ("entry", u16), ("padding", u16 * 3)]
