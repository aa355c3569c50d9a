"""Argument structs of the in-kernel interrupt controllers and timer, routing, irqfd, ioeventfd, coalesced MMIO."""

from __future__ import annotations

from ctypes import Structure, Union
from ctypes import c_int32 as s32
from ctypes import c_int64 as s64
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from kvmapi.abi.xen import kvm_irq_routing_xen_evtchn

KVM_IOAPIC_NUM_PINS = 24


class kvm_pic_state(Structure):
    """One of the two 8259s."""

    _fields_ = [
        ("last_irr", u8),
        ("irr", u8),
        ("imr", u8),
        ("isr", u8),
        ("priority_add", u8),
        ("irq_base", u8),
        ("read_reg_select", u8),
        ("poll", u8),
        ("special_mask", u8),
        ("init_state", u8),
        ("auto_eoi", u8),
        ("rotate_on_auto_eoi", u8),
        ("special_fully_nested_mode", u8),
        ("init4", u8),
        ("elcr", u8),
        ("elcr_mask", u8),
    ]


class kvm_ioapic_state(Structure):
    """The IOAPIC; a redirection entry is one 64-bit value (its bits are the hardware's)."""

    _fields_ = [
        ("base_address", u64),
        ("ioregsel", u32),
        ("id", u32),
        ("irr", u32),
        ("pad", u32),
        ("redirtbl", u64 * KVM_IOAPIC_NUM_PINS),
    ]


class _irqchip(Union):
    _fields_ = [("dummy", u8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    """KVM_{GET,SET}_IRQCHIP; `chip_id` is KVM_IRQCHIP_*."""

    _fields_ = [("chip_id", u32), ("pad", u32), ("chip", _irqchip)]


class kvm_pit_config(Structure):
    """KVM_CREATE_PIT2."""

    _fields_ = [("flags", u32), ("pad", u32 * 15)]


class kvm_pit_channel_state(Structure):
    """One of the three counters of an 8254; `count_load_time` in nanoseconds."""

    _fields_ = [
        ("count", u32),
        ("latched_count", u16),
        ("count_latched", u8),
        ("status_latched", u8),
        ("status", u8),
        ("read_state", u8),
        ("write_state", u8),
        ("write_latch", u8),
        ("rw_mode", u8),
        ("mode", u8),
        ("bcd", u8),
        ("gate", u8),
        ("count_load_time", s64),
    ]


class kvm_pit_state(Structure):
    """KVM_{GET,SET}_PIT."""

    _fields_ = [("channels", kvm_pit_channel_state * 3)]


class kvm_pit_state2(Structure):
    """KVM_{GET,SET}_PIT2."""

    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", u32), ("reserved", u32 * 9)]


class kvm_reinject_control(Structure):
    """KVM_REINJECT_CONTROL."""

    _fields_ = [("pit_reinject", u8), ("reserved", u8 * 31)]


class _irq_or_status(Union):
    _fields_ = [("irq", u32), ("status", s32)]


class kvm_irq_level(Structure):
    """KVM_IRQ_LINE(_STATUS)."""

    _anonymous_ = ("_u",)
    _fields_ = [("_u", _irq_or_status), ("level", u32)]


class kvm_msi(Structure):
    """KVM_SIGNAL_MSI."""

    _fields_ = [
        ("address_lo", u32),
        ("address_hi", u32),
        ("data", u32),
        ("flags", u32),
        ("devid", u32),
        ("pad", u8 * 12),
    ]


class kvm_irqfd(Structure):
    """KVM_IRQFD."""

    _fields_ = [("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16)]


class kvm_ioeventfd(Structure):
    """KVM_IOEVENTFD; `len` in bytes."""

    _fields_ = [
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", s32),
        ("flags", u32),
        ("pad", u8 * 36),
    ]


class kvm_irq_routing_irqchip(Structure):
    """Route to a pin of an in-kernel chip."""

    _fields_ = [("irqchip", u32), ("pin", u32)]


class kvm_irq_routing_msi(Structure):
    """Route to a message."""

    _fields_ = [("address_lo", u32), ("address_hi", u32), ("data", u32), ("devid", u32)]


class kvm_irq_routing_hv_sint(Structure):
    """Route to a Hyper-V synthetic interrupt source."""

    _fields_ = [("vcpu", u32), ("sint", u32)]


class _route(Union):
    _fields_ = [
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("xen_evtchn", kvm_irq_routing_xen_evtchn),
        ("pad", u32 * 8),
    ]


class kvm_irq_routing_entry(Structure):
    """One GSI's route."""

    # The union holds a 64-bit member on s390's adapter variant, hence its alignment.
    _fields_ = [("gsi", u32), ("type", u32), ("flags", u32), ("pad", u32), ("u", _route)]


class kvm_irq_routing(Structure):
    """Header of KVM_SET_GSI_ROUTING; `nr` kvm_irq_routing_entry follow."""

    _fields_ = [("nr", u32), ("flags", u32)]


class _pad_or_pio(Union):
    _fields_ = [("pad", u32), ("pio", u32)]


class kvm_coalesced_mmio_zone(Structure):
    """KVM_(UN)REGISTER_COALESCED_MMIO: [addr, addr+size), ports when `pio` is 1."""

    _anonymous_ = ("_u",)
    _fields_ = [("addr", u64), ("size", u32), ("_u", _pad_or_pio)]


class kvm_coalesced_mmio(Structure):
    """One write that KVM kept back."""

    _anonymous_ = ("_u",)
    _fields_ = [("phys_addr", u64), ("len", u32), ("_u", _pad_or_pio), ("data", u8 * 8)]


class kvm_coalesced_mmio_ring(Structure):
    """Header of the ring at page KVM_COALESCED_MMIO_PAGE_OFFSET of a vCPU mapping."""

    _fields_ = [("first", u32), ("last", u32)]
