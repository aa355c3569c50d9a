"""Facts of the KVM behind a Host: each is one question at the seam and its answer, asked of the system fd or of a scratch VM.

1. Open /dev/kvm and ask for its version: without that, everything else is unknown.
2. Ask capabilities; they say what a kernel claims.
3. On a scratch VM of type 0, call what has no side effect: KVM_SET_MEMORY_ATTRIBUTES that sets nothing, KVM_MEMORY_ENCRYPT_OP with NULL.
   ENOTTY from those is the truth where a capability lies.
4. Where a capability says that a hypercall exits, run one (`vmm.probe`): on a paravirtual KVM it spins instead.

Nothing here looks at a version. The calls go through `Host.ioctl` with plain numbers, so that a few lines in a test can play a kernel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls, structs
from kvmapi.remedies import Remedy
from vmm.facts import NO, OK, UNKNOWN, Fact, errno_words

if TYPE_CHECKING:
    from kvmapi.host import Host

VM_TYPES = ("plain", "sw-protected", "sev", "sev-es", "snp", "tdx")
"""Names of the bits of KVM_CAP_VM_TYPES (KVM_X86_*_VM)."""

TYPE_REMEDIES: dict[str, str] = {
    "sw-protected": Remedy.SW_PROTECTED,
    "sev": Remedy.SEV,
    "sev-es": Remedy.SEV_ES,
}

_HC_MAP_GPA_RANGE = 1 << 12
_GRP_SEV = 1  # KVM_X86_GRP_SEV; attribute 0 is KVM_X86_SEV_VMSA_FEATURES


@dataclass
class Scratch:
    """An open /dev/kvm and, if it could be made, a VM of type 0 on it."""

    host: Host
    kvm: int
    vm: int
    """fd, or -errno of KVM_CREATE_VM(0)."""

    def capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION on the VM where there is one, as that is the narrower answer; -errno becomes 0."""
        return max(0, self.host.ioctl(self.vm if self.vm >= 0 else self.kvm, ioctls.KVM_CHECK_EXTENSION, number))

    def system_capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION on /dev/kvm."""
        return max(0, self.host.ioctl(self.kvm, ioctls.KVM_CHECK_EXTENSION, number))

    def close(self) -> None:
        """Close both fds."""
        if self.vm >= 0:
            self.host.close(self.vm)
        self.host.close(self.kvm)


def vm_types(mask: int) -> list[str]:
    """Names of the VM types in an answer to KVM_CAP_VM_TYPES; 0 (the capability is unknown) means type plain alone.

    >>> vm_types(0x7)
    ['plain', 'sw-protected', 'sev']
    """
    names = [name for bit, name in enumerate(VM_TYPES) if mask >> bit & 1]
    unnamed = mask >> len(VM_TYPES)
    return names + [f"unnamed bits {unnamed << len(VM_TYPES):#x}"] * bool(unnamed) if mask else ["plain"]


def gather(open_host: Callable[[], Host], probe_guests: bool = True) -> list[Fact]:
    """All facts of this file. A host that does not open gives one fact "kvm" that says so."""
    try:
        host = open_host()
        kvm = host.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ImportError) as error:
        words = errno_words(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return [Fact("kvm", "KVM answers", NO, f"open /dev/kvm: {words}", "see /dev/kvm above; or --on model")]
    version = host.ioctl(kvm, ioctls.KVM_GET_API_VERSION, 0)
    if version != 12:
        host.close(kvm)
        answer = errno_words(-version) if version < 0 else str(version)
        return [Fact("kvm", "KVM answers", NO, f"KVM_GET_API_VERSION = {answer}, not 12: this is not Linux's KVM", "--on model")]
    scratch = Scratch(host, kvm, host.ioctl(kvm, ioctls.KVM_CREATE_VM, 0))
    try:
        return _ask(scratch, probe_guests)
    finally:
        scratch.close()


def _ask(scratch: Scratch, probe_guests: bool) -> list[Fact]:
    encrypt = encrypt_op(scratch)
    return [
        Fact("kvm", "KVM answers", OK, "KVM_GET_API_VERSION = 12"),
        create_vm(scratch),
        *types(scratch),
        hypercall_exits(scratch, probe_guests),
        guest_memfd(scratch),
        memory_attributes(scratch),
        memory_fault_exits(scratch),
        msr_exits(scratch),
        encrypt,
        sev_init2(scratch),
        enc_context_caps(scratch, encrypt),
    ]


def create_vm(scratch: Scratch) -> Fact:
    """A VM of type 0."""
    title = "plain VM"
    if scratch.vm < 0:
        return Fact("create-vm", title, NO, f"KVM_CREATE_VM(0): {errno_words(-scratch.vm)}", f"see the kernel log; {Remedy.MEMORY}")
    return Fact("create-vm", title, OK, "KVM_CREATE_VM(0) gives an fd")


def types(scratch: Scratch) -> list[Fact]:
    """The bitmap of VM types in words, and one fact for each type that a guest can be run in."""
    mask = scratch.system_capability(caps.KVM_CAP_VM_TYPES)
    evidence = f"KVM_CAP_VM_TYPES = {mask:#x}: {', '.join(vm_types(mask))}"
    if mask in (0, 1):
        evidence += " only (the capability is unknown here)" if not mask else " only"
    facts = [Fact("vm-types", "VM types", OK, evidence)]
    for name, remedy in TYPE_REMEDIES.items():
        offered = bool(mask >> VM_TYPES.index(name) & 1)
        facts.append(Fact(f"type-{name}", f"VM type {name}", OK if offered else NO, evidence, "" if offered else remedy))
    return facts


def hypercall_exits(scratch: Scratch, probe_guests: bool) -> Fact:
    """KVM_CAP_EXIT_HYPERCALL, and whether a hypercall really exits."""
    title = "hypercall exits"
    mask = scratch.capability(caps.KVM_CAP_EXIT_HYPERCALL)
    evidence = f"KVM_CAP_EXIT_HYPERCALL = {mask:#x}"
    if not mask & _HC_MAP_GPA_RANGE:
        return Fact("hypercall-exits", title, NO, f"{evidence}: no bit 12 (MAP_GPA_RANGE)", Remedy.NEWER_KERNEL)
    if not probe_guests:
        return Fact("hypercall-exits", title, UNKNOWN, f"{evidence}; not tried with a guest")
    from vmm import probe

    if probe.hypercall_exits(scratch.host, cache=False):
        return Fact("hypercall-exits", title, OK, f"{evidence}, and a guest's vmmcall arrives as KVM_EXIT_HYPERCALL")
    lost = f"answers capability {mask:#x} but a guest's vmmcall never arrives as an exit: on a paravirtual KVM it spins inside KVM_RUN"
    return Fact("hypercall-exits", title, NO, lost, "a KVM with SVM or VMX below it; meanwhile use --on model")


def guest_memfd(scratch: Scratch) -> Fact:
    """KVM_CAP_GUEST_MEMFD and the flags that KVM_CREATE_GUEST_MEMFD takes."""
    title = "guest_memfd"
    on_vm = scratch.capability(caps.KVM_CAP_GUEST_MEMFD)
    system = scratch.system_capability(caps.KVM_CAP_GUEST_MEMFD)
    flags = scratch.system_capability(caps.KVM_CAP_GUEST_MEMFD_FLAGS)
    names = [name for bit, name in ((0, "MMAP"), (1, "INIT_SHARED")) if flags >> bit & 1]
    evidence = f"KVM_CAP_GUEST_MEMFD = {on_vm} on a plain VM, {system} on /dev/kvm; flags {flags:#x} ({', '.join(names) or 'none'})"
    if on_vm or system:
        return Fact("guest-memfd", title, OK, evidence)
    return Fact("guest-memfd", title, NO, evidence, Remedy.NEWER_KERNEL)


def memory_attributes(scratch: Scratch) -> Fact:
    """KVM_SET_MEMORY_ATTRIBUTES, called so that it changes nothing."""
    title = "memory attributes"
    mask = scratch.system_capability(caps.KVM_CAP_MEMORY_ATTRIBUTES)
    evidence = f"KVM_CAP_MEMORY_ATTRIBUTES = {mask:#x}"
    remedy = Remedy.ATTRIBUTES
    if scratch.vm >= 0:
        nothing = structs.kvm_memory_attributes(address=0, size=4096, attributes=0, flags=0)
        answer = scratch.host.ioctl(scratch.vm, ioctls.KVM_SET_MEMORY_ATTRIBUTES, ctypes.addressof(nothing))
        evidence += f"; KVM_SET_MEMORY_ATTRIBUTES(shared): {_answer(answer)}"
        if answer < 0:
            return Fact("memory-attributes", title, NO, evidence, remedy)
    return Fact("memory-attributes", title, OK if mask else NO, evidence, "" if mask else remedy)


def memory_fault_exits(scratch: Scratch) -> Fact:
    """KVM_EXIT_MEMORY_FAULT: how a missing private page is reported."""
    value = scratch.capability(caps.KVM_CAP_MEMORY_FAULT_INFO)
    evidence = f"KVM_CAP_MEMORY_FAULT_INFO = {value}"
    return Fact("memory-fault-exits", "memory fault exits", OK if value else NO, evidence, "" if value else Remedy.NEWER_KERNEL)


def msr_exits(scratch: Scratch) -> Fact:
    """KVM_CAP_X86_USER_SPACE_MSR."""
    value = scratch.capability(caps.KVM_CAP_X86_USER_SPACE_MSR)
    evidence = f"KVM_CAP_X86_USER_SPACE_MSR = {value:#x}"
    return Fact("msr-exits", "MSR exits", OK if value else NO, evidence, "" if value else Remedy.NEWER_KERNEL)


def encrypt_op(scratch: Scratch) -> Fact:
    """KVM_MEMORY_ENCRYPT_OP with NULL: 0 where SEV is enabled, ENOTTY where it is not (EFAULT from older kernels that have it)."""
    title = "SEV commands"
    if scratch.vm < 0:
        return Fact("encrypt-op", title, UNKNOWN, "no VM to ask")
    answer = scratch.host.ioctl(scratch.vm, ioctls.KVM_MEMORY_ENCRYPT_OP, 0)
    evidence = f"KVM_MEMORY_ENCRYPT_OP(NULL): {_answer(answer)}"
    if answer in (0, -14):
        return Fact("encrypt-op", title, OK, evidence)
    return Fact("encrypt-op", title, NO, evidence, Remedy.SEV)


def sev_init2(scratch: Scratch) -> Fact:
    """Whether KVM_SEV_INIT2 exists: its features are a device attribute of /dev/kvm."""
    value = ctypes.c_uint64()
    attribute = structs.kvm_device_attr(flags=0, group=_GRP_SEV, attr=0, addr=ctypes.addressof(value))
    answer = scratch.host.ioctl(scratch.kvm, ioctls.KVM_HAS_DEVICE_ATTR, ctypes.addressof(attribute))
    evidence = f"KVM_HAS_DEVICE_ATTR(KVM_X86_GRP_SEV, VMSA_FEATURES): {_answer(answer)}"
    if answer == 0:
        return Fact("sev-init2", "KVM_SEV_INIT2", OK, evidence)
    return Fact("sev-init2", "KVM_SEV_INIT2", NO, evidence, f"a kernel with KVM_SEV_INIT2 on {Remedy.SEV}")


def enc_context_caps(scratch: Scratch, encrypt: Fact) -> Fact:
    """The two capabilities that say 1 on some hosts without SEV."""
    title = "intra-host migration"
    copy = scratch.capability(caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM)
    move = scratch.capability(caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)
    evidence = f"KVM_CAP_VM_COPY_ENC_CONTEXT_FROM = {copy}, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM = {move}"
    if encrypt.ok:
        return Fact("enc-context", title, OK if move else NO, evidence, "" if move else Remedy.NEWER_KERNEL)
    if copy or move:
        evidence += "; no evidence of SEV: these answer 1 here although SEV commands are refused"
    return Fact("enc-context", title, NO, evidence, Remedy.SEV)


def _answer(result: int) -> str:
    return errno_words(-result) if result < 0 else str(result)
