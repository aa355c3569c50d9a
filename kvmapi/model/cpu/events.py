"""What waits to be delivered to a vCPU: exceptions, interrupts and NMIs from user space, and the interrupt window.

Without an in-kernel APIC an interrupt comes from KVM_INTERRUPT or KVM_SET_VCPU_EVENTS and is delivered at the next
entry, whatever IF says: the VMM injects only when KVM told it that the guest takes interrupts
(`ready_for_interrupt_injection`, or KVM_EXIT_IRQ_WINDOW_OPEN after `request_interrupt_window`). With one, what the local
APIC has pending is delivered when the guest takes interrupts; KVM_INTERRUPT's vector, where it is allowed at all
(KVM_CAP_SPLIT_IRQCHIP), is among that, and the window is open only while LINT0 lets such a vector through.

Two things must be noticed while the guest runs: IF becoming 1 when an interrupt or a window waits for it, and IRET
ending an NMI handler. From the first such wish on, the instructions that can do that (STI, POPF, IRET) are scanned
for as well (`CodeCache.watch_flags`). They stop the engine only while a wish stands (stubs.py); each is then executed
alone and looked at afterwards. Source: struct kvm_vcpu_events; kvm_vcpu_ioctl_x86_set_vcpu_events in
arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.scan import Site
from kvmapi.model.stats import IRQ_INJECTIONS, NMI_INJECTIONS

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

SIZE = 64
_LAYOUT = struct.Struct("<4BI4B4BII4BB26xBQ")
_IF = 1 << 9
_NMI, _MAX_EXCEPTION = 2, 31
_SHADOW = kvm.KVM_X86_SHADOW_INT_STI | kvm.KVM_X86_SHADOW_INT_MOV_SS  # kvm_amd cannot tell them apart
_SOFT_OPCODES = {3: b"\xcc", 4: b"\xce"}
_SOFT = frozenset(_SOFT_OPCODES)  # KVM_GET_VCPU_EVENTS does not report these: the guest raises them again
_VALID = (
    kvm.KVM_VCPUEVENT_VALID_NMI_PENDING
    | kvm.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | kvm.KVM_VCPUEVENT_VALID_SHADOW
    | kvm.KVM_VCPUEVENT_VALID_SMM
    | kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
)


class Events:
    """The events of one vCPU."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self.exception: tuple[int, int | None] | None = None  # (vector, error code)
        self._queued = False  # the exception is KVM's own and new, not one whose delivery had begun
        self.interrupt: int | None = None
        self._soft = False
        self.nmi_pending = 0
        self.nmi_masked = False
        self.nmi_injected = False  # in delivery already: a mask does not hold it back
        self._shutdown = False  # a triple fault that KVM or user space asked for
        self.window_wanted = False
        self.iret_unmasks = True  # IRET ends an NMI handler; an SEV-ES guest says by itself when it is over

    # ---- from user space
    def pack(self) -> bytes:
        """struct kvm_vcpu_events."""
        vector, error = self.exception or (0, None)
        exception = (self.exception is not None and vector not in _SOFT, vector, error is not None, 0, error or 0)
        interrupt = (self.interrupt is not None and not self._soft, self.interrupt or 0, 0, self._shadow())
        flags = kvm.KVM_VCPUEVENT_VALID_NMI_PENDING | kvm.KVM_VCPUEVENT_VALID_SHADOW | kvm.KVM_VCPUEVENT_VALID_SMM
        knows = self._cpu.policy.triple_fault_event
        flags |= kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT if knows else 0
        nmi = (self.nmi_injected, self.nmi_pending, self.nmi_masked, 0)
        return _LAYOUT.pack(*exception, *interrupt, *nmi, 0, flags, 0, 0, 0, 0, knows and self._shutdown, 0, 0)

    def unpack(self, data: bytes) -> bool:
        """Take struct kvm_vcpu_events; False (nothing changed) when KVM refuses it."""
        fields = _LAYOUT.unpack(data)
        injected, vector, has_error, _, error = fields[:5]  # "pending" counts with KVM_CAP_EXCEPTION_PAYLOAD only
        interrupt_injected, interrupt, soft, shadow = fields[5:9]
        nmi_injected, nmi_pending, nmi_masked, _, _, flags = fields[9:15]
        smm = fields[15:19]
        if flags & ~_VALID or (flags & kvm.KVM_VCPUEVENT_VALID_SMM and any(smm[:3])):  # the fourth needs an APIC
            return False
        if injected and (vector > _MAX_EXCEPTION or vector == _NMI):
            return False
        if flags & kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
            if not self._cpu.policy.triple_fault_event:
                return False
            self._shutdown = bool(fields[19])
        self.exception, self._queued = (vector, error if has_error else None) if injected else None, False
        self.interrupt = interrupt if interrupt_injected else None
        self._soft = bool(soft)
        if flags & kvm.KVM_VCPUEVENT_VALID_SHADOW:
            self._set_shadow(bool(shadow))
        self.nmi_injected, self.nmi_masked = bool(nmi_injected), bool(nmi_masked)
        self.nmi_pending = min(nmi_pending if flags & kvm.KVM_VCPUEVENT_VALID_NMI_PENDING else self.nmi_pending, self._nmi_limit())
        self._cpu.attention = True
        return True

    def queue_exception(self, vector: int) -> None:
        """KVM_SET_GUEST_DEBUG's injection, or a machine check: deliver at the next entry, unless registers are set before."""
        self.exception, self._queued = (vector, None), True
        self._cpu.attention = True

    def shut_down(self) -> None:
        """A triple fault: the next entry ends KVM_RUN with KVM_EXIT_SHUTDOWN."""
        self._shutdown = self._cpu.attention = True

    def forget_pending(self) -> None:
        """Registers were set: an exception that was queued is gone, one in delivery is not."""
        if self._queued:
            self.exception, self._queued = None, False

    def queue_interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: deliver at the next entry."""
        self.interrupt, self._soft = vector, False
        self._cpu.attention = True

    def queue_nmi(self) -> None:
        """KVM_NMI: at most one in delivery and one waiting, as the CPU latches them."""
        self.nmi_pending = min(self.nmi_pending + 1, self._nmi_limit())
        self._cpu.attention = True

    def _nmi_limit(self) -> int:
        return 1 if self.nmi_masked or self.nmi_injected else 2

    # ---- the guest's readiness
    def _shadow(self) -> int:
        return _SHADOW if self._cpu.registers.u32[layout.HFLAGS >> 2] & layout.HF_KEEP else 0

    def _set_shadow(self, on: bool) -> None:
        flags = self._cpu.registers.u32[layout.HFLAGS >> 2] & ~layout.HF_KEEP
        self._cpu.registers.u32[layout.HFLAGS >> 2] = flags | (layout.HF_KEEP if on else 0)

    def _in_shadow(self) -> bool:
        return bool(self._cpu.registers.u64[layout.EFLAGS >> 3] & _IF and self._shadow())

    def leave_shadow(self) -> None:
        """An instruction was executed: the shadow of the one before is over."""
        if self._shadow():
            self._set_shadow(False)

    def takes_interrupts(self) -> bool:
        """IF is set, no instruction's shadow, nothing waiting."""
        open_ = self._cpu.registers.u64[layout.EFLAGS >> 3] & _IF and not self._shadow()
        return bool(open_) and self.interrupt is None and self.exception is None and not self.nmi_injected

    @property
    def window_open(self) -> bool:
        """Does user space wait for a window, and is it open?"""
        return self.window_wanted and self._has_room() and self.takes_interrupts()

    def _has_room(self) -> bool:
        lapic = self._cpu.lapic
        return lapic is None or lapic.has_room

    def flag_allows_interrupts(self) -> bool:
        """Is RFLAGS.IF set?"""
        return bool(self._cpu.registers.u64[layout.EFLAGS >> 3] & _IF)

    def has_something_to_deliver(self) -> bool:
        """Does an exception, an NMI or an injected interrupt wait that the guest would take now?"""
        begun = self.exception is not None or self.interrupt is not None or self.nmi_injected
        return begun or bool(self.nmi_pending and not self.nmi_masked)

    def reset(self) -> None:
        """INIT: nothing waits any more."""
        self.exception, self.interrupt, self._queued, self._soft = None, None, False, False
        self.nmi_pending, self.nmi_masked, self.nmi_injected = 0, False, False
        self._set_shadow(False)

    # ---- before the guest is entered
    def before_entry(self) -> int | None:
        """Deliver what is due; KVM_RUN's result if that, or an open window, ends the run."""
        cpu = self._cpu
        if self._shutdown:
            self._shutdown = False
            return cpu.page.head(kvm.KVM_EXIT_SHUTDOWN)
        lapic = cpu.lapic
        if lapic is not None and lapic.ended_vector is not None:
            vector, lapic.ended_vector = lapic.ended_vector, None
            return cpu.page.payload(kvm.KVM_EXIT_IOAPIC_EOI, "<B", vector)
        result = self._deliver_begun()
        if result is not None:
            return result
        nmi = self.nmi_pending and not self.nmi_masked and not cpu.debug.blocks_events
        wants_flag = (self.window_wanted and self._has_room()) or self._apic_waits()
        if ((wants_flag and self._in_shadow()) or (nmi and self._shadow())) and cpu.debug.sensitive() is None:
            result = cpu.after_step(cpu.step(flush=False))  # the instruction after STI runs before the window opens
            self.leave_shadow()
            if result is not None:
                return result
        if nmi and not self._shadow():
            self.nmi_pending -= 1
            self.nmi_masked = True
            cpu.stats.counters[NMI_INJECTIONS] += 1
            result = cpu.raise_in_guest(_NMI, None, external=True)
            if result is not None:
                return result
        if self._apic_waits() and self.takes_interrupts():
            taken = lapic.acknowledge() if lapic is not None else None
            cpu.stats.counters[IRQ_INJECTIONS] += 1
            result = cpu.raise_in_guest(taken, None, external=True) if taken is not None else None
            if result is not None:
                return result
        if self.window_open:
            return cpu.page.head(kvm.KVM_EXIT_IRQ_WINDOW_OPEN)
        waits = (self.window_wanted and self._has_room()) or (self.nmi_masked and self.iret_unmasks) or self._apic_waits()
        self._watch(waits)
        cpu.attention = waits
        return None

    def _apic_waits(self) -> bool:
        """Has the local APIC an interrupt for this vCPU?"""
        lapic = self._cpu.lapic
        return lapic is not None and lapic.pending() is not None and not self._cpu.debug.blocks_events

    def _deliver_begun(self) -> int | None:
        """Deliver the one event whose delivery has begun: what user space injects counts as that. There is room for one
        in the processor, so others of the kind are lost; a waiting NMI comes next.
        """
        cpu = self._cpu
        exception, nmi, interrupt = self.exception, self.nmi_injected, self.interrupt
        self.exception, self.nmi_injected, self.interrupt, self._queued = None, False, None, False
        if exception is not None:
            self._skip_int3(exception[0])
            return cpu.raise_in_guest(*exception, software=exception[0] in _SOFT)
        if nmi:
            self.nmi_masked = True
            return cpu.raise_in_guest(_NMI, None, external=True)
        if interrupt is not None:
            cpu.stats.counters[IRQ_INJECTIONS] += 1
            return cpu.raise_in_guest(interrupt, None, external=not self._soft, software=self._soft)
        return None

    def _skip_int3(self, vector: int) -> None:
        """#BP and #OF are traps of INT3 and INTO: the frame points behind the instruction."""
        registers = self._cpu.registers
        if vector in _SOFT and self._cpu.debug.opcode() == _SOFT_OPCODES[vector]:
            registers.rip = registers.rip + 1

    def _watch(self, on: bool) -> None:
        code = self._cpu.code
        if on and not code.watch_flags:
            code.watch_flags = True
            code.flush()
        self._cpu.watching[0] = on

    def flags_instruction(self, site: Site) -> int | None:
        """STI, POPF or IRET is next, and someone waits for what it may do: execute it alone."""
        cpu = self._cpu
        was_iret = site.kind == "iret"
        before = cpu.registers.rip
        result = cpu.after_step(cpu.step(flush=False))
        if result is None and was_iret and self.iret_unmasks and cpu.registers.rip != before:
            self.nmi_masked = False
        cpu.attention = True
        return result
