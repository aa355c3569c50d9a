"""Structs of KVM's Xen and Hyper-V emulation: attributes of a VM and of a vCPU, event channels, and their exits."""

from __future__ import annotations

from ctypes import Structure, Union
from ctypes import c_int32 as s32
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64


class kvm_hyperv_eventfd(Structure):
    """KVM_HYPERV_EVENTFD."""

    _fields_ = [("conn_id", u32), ("fd", s32), ("flags", u32), ("padding", u32 * 3)]


class kvm_xen_hvm_config(Structure):
    """KVM_XEN_HVM_CONFIG."""

    _fields_ = [
        ("flags", u32),
        ("msr", u32),
        ("blob_addr_32", u64),
        ("blob_addr_64", u64),
        ("blob_size_32", u8),
        ("blob_size_64", u8),
        ("pad2", u8 * 30),
    ]


class kvm_irq_routing_xen_evtchn(Structure):
    """KVM_XEN_HVM_EVTCHN_SEND, and a GSI route."""

    _fields_ = [("port", u32), ("vcpu", u32), ("priority", u32)]


class _shared_info(Union):
    _fields_ = [("gfn", u64), ("hva", u64)]


class _deliver_port(Structure):
    _fields_ = [("port", u32), ("vcpu", u32), ("priority", u32)]


class _deliver_eventfd(Structure):
    _fields_ = [("port", u32), ("fd", s32)]


class _deliver(Union):
    _fields_ = [("port", _deliver_port), ("eventfd", _deliver_eventfd), ("padding", u32 * 4)]


class _evtchn(Structure):
    _fields_ = [("send_port", u32), ("type", u32), ("flags", u32), ("deliver", _deliver)]


class _hvm_attr(Union):
    _fields_ = [
        ("long_mode", u8),
        ("vector", u8),
        ("runstate_update_flag", u8),
        ("shared_info", _shared_info),
        ("evtchn", _evtchn),
        ("xen_version", u32),
        ("pad", u64 * 8),
    ]


class kvm_xen_hvm_attr(Structure):
    """KVM_XEN_HVM_{GET,SET}_ATTR."""

    _fields_ = [("type", u16), ("pad", u16 * 3), ("u", _hvm_attr)]


class _runstate(Structure):
    _fields_ = [
        ("state", u64),
        ("state_entry_time", u64),
        ("time_running", u64),
        ("time_runnable", u64),
        ("time_blocked", u64),
        ("time_offline", u64),
    ]


class _xen_timer(Structure):
    _fields_ = [("port", u32), ("priority", u32), ("expires_ns", u64)]


class _vcpu_attr(Union):
    _fields_ = [
        ("gpa", u64),
        ("hva", u64),
        ("pad", u64 * 8),
        ("runstate", _runstate),
        ("vcpu_id", u32),
        ("timer", _xen_timer),
        ("vector", u8),
    ]


class kvm_xen_vcpu_attr(Structure):
    """KVM_XEN_VCPU_{GET,SET}_ATTR."""

    _fields_ = [("type", u16), ("pad", u16 * 3), ("u", _vcpu_attr)]


class _synic(Structure):
    _fields_ = [("msr", u32), ("pad2", u32), ("control", u64), ("evt_page", u64), ("msg_page", u64)]


class _hv_hcall(Structure):
    _fields_ = [("input", u64), ("result", u64), ("params", u64 * 2)]


class _syndbg(Structure):
    _fields_ = [
        ("msr", u32),
        ("pad2", u32),
        ("control", u64),
        ("status", u64),
        ("send_page", u64),
        ("recv_page", u64),
        ("pending_page", u64),
    ]


class _hyperv(Union):
    _fields_ = [("synic", _synic), ("hcall", _hv_hcall), ("syndbg", _syndbg)]


class kvm_hyperv_exit(Structure):
    """KVM_EXIT_HYPERV; `type` is KVM_EXIT_HYPERV_*."""

    _fields_ = [("type", u32), ("pad1", u32), ("u", _hyperv)]


class _xen_hcall(Structure):
    _fields_ = [("longmode", u32), ("cpl", u32), ("input", u64), ("result", u64), ("params", u64 * 6)]


class _xen(Union):
    _fields_ = [("hcall", _xen_hcall)]


class kvm_xen_exit(Structure):
    """KVM_EXIT_XEN; `type` is KVM_EXIT_XEN_HCALL."""

    _fields_ = [("type", u32), ("u", _xen)]
