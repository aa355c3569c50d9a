"""Rows of a VM's fd.

Written as a table on purpose: name, struct, how the argument travels, capability, words. `E(struct, field)` stands
for a header whose `field` says how many `struct` follow.
"""

from __future__ import annotations

from ctypes import c_uint64 as u64
from typing import NamedTuple

from kvmapi.abi import ioctls
from kvmapi.abi import sev as c
from kvmapi.abi import structs as s
from kvmapi.rows import AnyStruct, ArgKind, EntryType, Ioctl


class E(NamedTuple):
    """Entries after a header."""

    entry: EntryType
    field: str


# fmt: off
_ROWS: tuple[tuple[str, AnyStruct | None, ArgKind | E, str | None, str], ...] = (
    ("CHECK_EXTENSION", None, "value", "CHECK_EXTENSION_VM",
     "ask for a capability of this VM (answers may differ from /dev/kvm's)"),
    ("CREATE_VCPU", None, "value", None, "make a vCPU with the given APIC id; returns its fd"),
    ("SET_USER_MEMORY_REGION", s.kvm_userspace_memory_region, "in", "USER_MEMORY",
     "create, move, re-flag or (size 0) delete a memory slot"),
    ("SET_USER_MEMORY_REGION2", s.kvm_userspace_memory_region2, "in", "USER_MEMORY2",
     "the same, with a guest_memfd for private memory"),
    ("SET_MEMORY_ATTRIBUTES", s.kvm_memory_attributes, "in", "MEMORY_ATTRIBUTES", "make a GPA range private or shared"),
    ("CREATE_GUEST_MEMFD", s.kvm_create_guest_memfd, "in", "GUEST_MEMFD",
     "make a file of private memory; returns its fd"),
    ("ENABLE_CAP", s.kvm_enable_cap, "in", "ENABLE_CAP_VM", "switch on a capability for this VM"),
    ("GET_DIRTY_LOG", s.kvm_dirty_log, "in", None, "fetch (and usually clear) a slot's dirty bitmap"),
    ("CLEAR_DIRTY_LOG", s.kvm_clear_dirty_log, "in", "MANUAL_DIRTY_LOG_PROTECT2",
     "clear part of a slot's dirty bitmap"),
    ("RESET_DIRTY_RINGS", None, "none", "DIRTY_LOG_RING", "give back the harvested entries of all dirty rings"),
    ("MEMORY_ENCRYPT_OP", c.kvm_sev_cmd, "inout", None, "run an SEV (or TDX) command on this VM"),
    ("MEMORY_ENCRYPT_REG_REGION", s.kvm_enc_region, "in", None,
     "pin a host virtual range that may hold encrypted pages"),
    ("MEMORY_ENCRYPT_UNREG_REGION", s.kvm_enc_region, "in", None, "unpin a range, exactly as it was registered"),
    ("X86_SET_MSR_FILTER", s.kvm_msr_filter, "in", "X86_MSR_FILTER", "choose which MSR accesses the kernel may handle"),
    ("SET_PMU_EVENT_FILTER", s.kvm_pmu_event_filter, E(u64, "nevents"), "PMU_EVENT_FILTER",
     "choose which PMU events the guest may count"),
    ("SET_TSS_ADDR", None, "value", "SET_TSS_ADDR", "say where three unused pages below 4 GiB are (Intel needs them)"),
    ("SET_IDENTITY_MAP_ADDR", u64, "in", "SET_IDENTITY_MAP_ADDR",
     "say where one unused page below 4 GiB is (Intel needs it)"),
    ("SET_NR_MMU_PAGES", None, "value", "MMU_SHADOW_CACHE_CONTROL", "limit the shadow MMU's pages"),
    ("GET_NR_MMU_PAGES", None, "none", "MMU_SHADOW_CACHE_CONTROL", "read that limit (deprecated)"),
    ("SET_BOOT_CPU_ID", None, "value", "SET_BOOT_CPU_ID", "choose the bootstrap processor, before any vCPU exists"),
    ("CREATE_IRQCHIP", None, "none", "IRQCHIP", "make the in-kernel PICs and IOAPIC, and local APICs for later vCPUs"),
    ("GET_IRQCHIP", s.kvm_irqchip, "inout", "IRQCHIP", "read the state of one interrupt controller"),
    ("SET_IRQCHIP", s.kvm_irqchip, "in", "IRQCHIP", "write the state of one interrupt controller"),
    ("IRQ_LINE", s.kvm_irq_level, "in", "IRQCHIP", "raise or lower an interrupt line"),
    ("IRQ_LINE_STATUS", s.kvm_irq_level, "inout", "IRQ_INJECT_STATUS", "the same, and say what became of it"),
    ("SET_GSI_ROUTING", s.kvm_irq_routing, E(s.kvm_irq_routing_entry, "nr"), "IRQ_ROUTING",
     "replace the interrupt routing table"),
    ("SIGNAL_MSI", s.kvm_msi, "in", "SIGNAL_MSI", "deliver a message-signalled interrupt"),
    ("IRQFD", s.kvm_irqfd, "in", "IRQFD", "let an eventfd raise an interrupt"),
    ("IOEVENTFD", s.kvm_ioeventfd, "in", "IOEVENTFD", "let a guest write signal an eventfd instead of exiting"),
    ("REGISTER_COALESCED_MMIO", s.kvm_coalesced_mmio_zone, "in", "COALESCED_MMIO",
     "collect writes to a range in a ring instead of exiting"),
    ("UNREGISTER_COALESCED_MMIO", s.kvm_coalesced_mmio_zone, "in", "COALESCED_MMIO", "stop collecting"),
    ("CREATE_PIT", None, "none", "PIT", "make the in-kernel timer (old form)"),
    ("CREATE_PIT2", s.kvm_pit_config, "in", "PIT2", "make the in-kernel timer"),
    ("GET_PIT", s.kvm_pit_state, "out", "PIT", "read the timer (old form)"),
    ("SET_PIT", s.kvm_pit_state, "in", "PIT", "write the timer (old form)"),
    ("GET_PIT2", s.kvm_pit_state2, "out", "PIT_STATE2", "read the timer"),
    ("SET_PIT2", s.kvm_pit_state2, "in", "PIT_STATE2", "write the timer"),
    ("REINJECT_CONTROL", s.kvm_reinject_control, "in", "REINJECT_CONTROL",
     "choose whether lost timer ticks are delivered later"),
    ("SET_CLOCK", s.kvm_clock_data, "in", "ADJUST_CLOCK", "set kvmclock"),
    ("GET_CLOCK", s.kvm_clock_data, "out", "ADJUST_CLOCK", "read kvmclock"),
    ("SET_TSC_KHZ", None, "value", "VM_TSC_CONTROL", "set the TSC frequency of vCPUs to come, in kHz"),
    ("GET_TSC_KHZ", None, "none", "VM_TSC_CONTROL", "read that frequency, in kHz"),
    ("CREATE_DEVICE", s.kvm_create_device, "inout", "DEVICE_CTRL", "make an in-kernel device; its fd comes back"),
    ("SET_DEVICE_ATTR", s.kvm_device_attr, "in", "VM_ATTRIBUTES", "write an attribute of the VM"),
    ("GET_DEVICE_ATTR", s.kvm_device_attr, "in", "VM_ATTRIBUTES", "read an attribute of the VM"),
    ("HAS_DEVICE_ATTR", s.kvm_device_attr, "in", "VM_ATTRIBUTES", "ask whether the VM has an attribute"),
    ("GET_STATS_FD", None, "none", "BINARY_STATS_FD", "open the VM's statistics; returns an fd"),
    ("HYPERV_EVENTFD", s.kvm_hyperv_eventfd, "in", "HYPERV_EVENTFD",
     "let a Hyper-V signal hypercall signal an eventfd"),
    ("XEN_HVM_CONFIG", s.kvm_xen_hvm_config, "in", "XEN_HVM", "switch on Xen hypercalls"),
    ("XEN_HVM_GET_ATTR", s.kvm_xen_hvm_attr, "inout", "XEN_HVM", "read a Xen attribute of the VM"),
    ("XEN_HVM_SET_ATTR", s.kvm_xen_hvm_attr, "in", "XEN_HVM", "write a Xen attribute of the VM"),
    ("XEN_HVM_EVTCHN_SEND", s.kvm_irq_routing_xen_evtchn, "in", "XEN_HVM", "raise a Xen event channel"),
    ("SET_MEMORY_REGION", s.kvm_memory_region, "in", None, "withdrawn: guest memory allocated by the kernel"),
    ("SET_MEMORY_ALIAS", s.kvm_memory_alias, "in", None, "withdrawn: two guest ranges of one memory"),
    ("ASSIGN_PCI_DEVICE", s.kvm_assigned_pci_dev, "in", None, "withdrawn: device assignment before VFIO"),
    ("ASSIGN_IRQ", s.kvm_assigned_irq, "in", None, "withdrawn: device assignment before VFIO"),
    ("ASSIGN_DEV_IRQ", s.kvm_assigned_irq, "in", "ASSIGN_DEV_IRQ", "withdrawn: device assignment before VFIO"),
    ("DEASSIGN_PCI_DEVICE", s.kvm_assigned_pci_dev, "in", None, "withdrawn: device assignment before VFIO"),
    ("ASSIGN_SET_MSIX_NR", s.kvm_assigned_msix_nr, "in", None, "withdrawn: device assignment before VFIO"),
    ("ASSIGN_SET_MSIX_ENTRY", s.kvm_assigned_msix_entry, "in", None, "withdrawn: device assignment before VFIO"),
    ("DEASSIGN_DEV_IRQ", s.kvm_assigned_irq, "in", None, "withdrawn: device assignment before VFIO"),
    ("ASSIGN_SET_INTX_MASK", s.kvm_assigned_pci_dev, "in", "PCI_2_3", "withdrawn: device assignment before VFIO"),
)
# fmt: on


def _row(name: str, struct: AnyStruct | None, arg: ArgKind | E, capability: str | None, words: str) -> Ioctl:
    kind: ArgKind = "header+entries" if isinstance(arg, E) else arg
    entry, count = arg if isinstance(arg, E) else (None, None)
    cap = None if capability is None else f"KVM_CAP_{capability}"
    return Ioctl(f"KVM_{name}", getattr(ioctls, f"KVM_{name}"), "vm", struct, kind, cap, words, entry, count)


VM: tuple[Ioctl, ...] = tuple(_row(*row) for row in _ROWS)
