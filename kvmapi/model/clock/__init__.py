"""Time in the model: the machine's time-stamp counter, each vCPU's, kvmclock, steal time."""

from kvmapi.abi import caps, kvm

CAPABILITIES = {
    caps.KVM_CAP_GET_TSC_KHZ: 1,
    caps.KVM_CAP_TSC_CONTROL: 1,
    caps.KVM_CAP_VM_TSC_CONTROL: 1,
    caps.KVM_CAP_VCPU_ATTRIBUTES: 1,
    caps.KVM_CAP_CLOCKSOURCE: 1,
    caps.KVM_CAP_NOP_IO_DELAY: 1,
    caps.KVM_CAP_ADJUST_CLOCK: kvm.KVM_CLOCK_TSC_STABLE | kvm.KVM_CLOCK_REALTIME | kvm.KVM_CLOCK_HOST_TSC,
    caps.KVM_CAP_KVMCLOCK_CTRL: 1,
}
"""What KVM_CHECK_EXTENSION answers about time."""
