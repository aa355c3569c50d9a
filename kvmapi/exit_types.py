"""What KVM_RUN can come back with: one frozen dataclass per exit reason, x86 first.

An exit is a copy: nothing in it points into kvm_run, so it stays true when the guest runs on. `exit.name` is the
kernel's name without KVM_EXIT_, `exit.reason` its number. Field names are the kernel's, except `length` for `len`.
Use `match`:

    match vcpu.exit(vcpu.run()):
        case Io(port=0x3F8, is_out=True, data=data): ...
        case Hypercall(nr=12, args=(gpa, pages, attributes, *_)): ...
        case Unknown() as exit: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmapi.abi import kvm
from kvmapi.words import errno_words


class Exit:
    """Base of all exits."""

    __slots__ = ()
    REASON: ClassVar[int] = -1

    @property
    def reason(self) -> int:
        """The number in kvm_run.exit_reason."""
        return self.REASON

    @property
    def name(self) -> str:
        """The kernel's name of the reason, without KVM_EXIT_."""
        return kvm.exit_name(self.REASON)


# --- x86 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnknownHardware(Exit):
    """The processor left the guest for a reason that KVM itself does not know."""

    REASON = kvm.KVM_EXIT_UNKNOWN
    hardware_exit_reason: int


@dataclass(frozen=True, slots=True)
class ExceptionExit(Exit):
    """An exception; not used by today's kernels."""

    REASON = kvm.KVM_EXIT_EXCEPTION
    exception: int
    error_code: int


@dataclass(frozen=True, slots=True)
class Io(Exit):
    """Port I/O: `count` items of `size` bytes. `data` is what was written, and empty for IN."""

    REASON = kvm.KVM_EXIT_IO
    port: int
    size: int
    count: int
    is_out: bool
    data: bytes
    data_offset: int


@dataclass(frozen=True, slots=True)
class Hypercall(Exit):
    """A hypercall that KVM_CAP_EXIT_HYPERCALL sends to user space; `args` are six."""

    REASON = kvm.KVM_EXIT_HYPERCALL
    nr: int
    args: tuple[int, ...]
    ret: int
    flags: int

    @property
    def long_mode(self) -> bool:
        """The guest was in 64-bit mode."""
        return bool(self.flags & kvm.KVM_EXIT_HYPERCALL_LONG_MODE)


@dataclass(frozen=True, slots=True)
class Debug(Exit):
    """A breakpoint or single step that KVM_SET_GUEST_DEBUG asked for."""

    REASON = kvm.KVM_EXIT_DEBUG
    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class Hlt(Exit):
    """The guest halted, and there is no in-kernel APIC to wait with."""

    REASON = kvm.KVM_EXIT_HLT


@dataclass(frozen=True, slots=True)
class Mmio(Exit):
    """Access of `length` (1..8) bytes to a GPA without memory. `data` is what was written, and empty for a read."""

    REASON = kvm.KVM_EXIT_MMIO
    phys_addr: int
    length: int
    is_write: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class IrqWindowOpen(Exit):
    """The guest can take an interrupt now."""

    REASON = kvm.KVM_EXIT_IRQ_WINDOW_OPEN


@dataclass(frozen=True, slots=True)
class Shutdown(Exit):
    """Triple fault; on SEV-ES also a VMSA that cannot run any more."""

    REASON = kvm.KVM_EXIT_SHUTDOWN


@dataclass(frozen=True, slots=True)
class FailEntry(Exit):
    """The processor refused to enter the guest."""

    REASON = kvm.KVM_EXIT_FAIL_ENTRY
    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Intr(Exit):
    """A signal arrived, or immediate_exit was set: KVM_RUN returned EINTR."""

    REASON = kvm.KVM_EXIT_INTR


@dataclass(frozen=True, slots=True)
class SetTpr(Exit):
    """The guest lowered its task priority."""

    REASON = kvm.KVM_EXIT_SET_TPR


@dataclass(frozen=True, slots=True)
class TprAccess(Exit):
    """The guest touched its task priority (KVM_TPR_ACCESS_REPORTING)."""

    REASON = kvm.KVM_EXIT_TPR_ACCESS
    rip: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Nmi(Exit):
    """A non-maskable interrupt of the host arrived."""

    REASON = kvm.KVM_EXIT_NMI


@dataclass(frozen=True, slots=True)
class InternalError(Exit):
    """KVM could not go on. `insn_bytes` is the instruction, if emulation failed and KVM has its bytes."""

    REASON = kvm.KVM_EXIT_INTERNAL_ERROR
    suberror: int
    data: tuple[int, ...]
    insn_bytes: bytes = b""

    @property
    def suberror_name(self) -> str:
        """What failed, in the kernel's word."""
        names = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}
        return names.get(self.suberror, f"suberror {self.suberror}")


@dataclass(frozen=True, slots=True)
class SystemEvent(Exit):
    """The guest asks for something of the whole VM; for SEV_TERM, data[0] is the GHCB MSR's value."""

    REASON = kvm.KVM_EXIT_SYSTEM_EVENT
    type: int
    data: tuple[int, ...]

    @property
    def type_name(self) -> str:
        """SHUTDOWN, RESET, SEV_TERM, ..."""
        return kvm.SYSTEM_EVENT_NAMES.get(self.type, f"event {self.type}")


@dataclass(frozen=True, slots=True)
class IoapicEoi(Exit):
    """End of interrupt for a user-space IOAPIC."""

    REASON = kvm.KVM_EXIT_IOAPIC_EOI
    vector: int


@dataclass(frozen=True, slots=True)
class Hyperv(Exit):
    """Hyper-V: `type` 1 SynIC, 2 hypercall, 3 debugger; `values` are the variant's fields in order."""

    REASON = kvm.KVM_EXIT_HYPERV
    type: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rdmsr(Exit):
    """RDMSR for user space; `msr_reason` is KVM_MSR_EXIT_REASON_*."""

    REASON = kvm.KVM_EXIT_X86_RDMSR
    index: int
    msr_reason: int


@dataclass(frozen=True, slots=True)
class Wrmsr(Exit):
    """WRMSR for user space."""

    REASON = kvm.KVM_EXIT_X86_WRMSR
    index: int
    data: int
    msr_reason: int


@dataclass(frozen=True, slots=True)
class DirtyRingFull(Exit):
    """The dirty ring must be harvested."""

    REASON = kvm.KVM_EXIT_DIRTY_RING_FULL


@dataclass(frozen=True, slots=True)
class ApResetHold(Exit):
    """An SEV-ES vCPU waits for SIPI, and there is no in-kernel APIC to wait with."""

    REASON = kvm.KVM_EXIT_AP_RESET_HOLD


@dataclass(frozen=True, slots=True)
class BusLock(Exit):
    """The guest took a bus lock."""

    REASON = kvm.KVM_EXIT_X86_BUS_LOCK


@dataclass(frozen=True, slots=True)
class Xen(Exit):
    """A Xen hypercall."""

    REASON = kvm.KVM_EXIT_XEN
    type: int
    longmode: int
    cpl: int
    input: int
    params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Notify(Exit):
    """The guest ran too long without an event window."""

    REASON = kvm.KVM_EXIT_NOTIFY
    flags: int


@dataclass(frozen=True, slots=True)
class MemoryFault(Exit):
    """A private access that has no private memory behind it, or the other way round: [gpa, gpa+size) in bytes.

    `errno` is what came with it: EFAULT or EHWPOISON on mainline.
    """

    REASON = kvm.KVM_EXIT_MEMORY_FAULT
    flags: int
    gpa: int
    size: int
    errno: int

    @property
    def private(self) -> bool:
        """The guest's access was to private memory."""
        return bool(self.flags & kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE)


@dataclass(frozen=True, slots=True)
class Tdx(Exit):
    """A TDVMCALL; `data` are the variant's 64-bit words after `ret`."""

    REASON = kvm.KVM_EXIT_TDX
    flags: int
    nr: int
    ret: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SnpReqCerts(Exit):
    """An SNP guest wants certificates for its report."""

    REASON = kvm.KVM_EXIT_SNP_REQ_CERTS
    gpa: int
    npages: int


# --- neither ours nor the kernel's ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunFailed(Exit):
    """KVM_RUN failed with `errno` and kvm_run says nothing about it: its exit reason is from an earlier run."""

    errno: int

    @property
    def name(self) -> str:
        """RUN_FAILED, which is no name of the kernel's."""
        return "RUN_FAILED"

    def __str__(self) -> str:
        return f"KVM_RUN failed: {errno_words(self.errno)}"


@dataclass(frozen=True, slots=True)
class Unknown(Exit):
    """A reason newer than this program: its number and the union's 256 bytes."""

    number: int
    raw: bytes

    @property
    def reason(self) -> int:
        """The number in kvm_run.exit_reason."""
        return self.number

    @property
    def name(self) -> str:
        """UNKNOWN_ and the number."""
        return kvm.exit_name(self.number)
