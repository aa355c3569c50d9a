"""What a vCPU is doing: running, halted, or waiting to be started; and what others ask of it.

In a VM with in-kernel local APICs (KVM_CREATE_IRQCHIP, KVM_CAP_SPLIT_IRQCHIP) HLT does not leave KVM_RUN: the vCPU sleeps there
until an interrupt that it would take, an NMI, an INIT or a startup IPI arrives, or until it is made to leave. The other
processors begin as KVM_MP_STATE_UNINITIALIZED and wait for INIT and SIPI.

Interrupt controllers, timers and other vCPUs call from any thread. They leave a request and `poke`: the vCPU leaves the
guest at its next block, or wakes, and its own thread does the rest (`settle`) with the VM's engine lock held. Source:
kvm_apic_accept_events and vcpu_block in arch/x86/kvm/.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu import sregs
from kvmapi.model.irq.lapic import Lapic

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_LOOK = 0.005  # seconds a sleeper goes without looking at immediate_exit, which nobody announces
_NS = 1e9
_WITH_APIC = frozenset(
    (
        kvm.KVM_MP_STATE_UNINITIALIZED, kvm.KVM_MP_STATE_INIT_RECEIVED, kvm.KVM_MP_STATE_HALTED, kvm.KVM_MP_STATE_SIPI_RECEIVED,
        kvm.KVM_MP_STATE_AP_RESET_HOLD,
    )
)  # fmt: skip
_SLEEPS = frozenset((kvm.KVM_MP_STATE_HALTED, kvm.KVM_MP_STATE_AP_RESET_HOLD))


class Activity:
    """The activity of one vCPU; the `Target` of its interrupts."""

    def __init__(self, vcpu: VcpuFile) -> None:
        self.id = vcpu.id
        self._vcpu = vcpu
        self._changed = threading.Condition()
        self._nmis = 0
        self._init = False
        self._sipi: int | None = None
        self.asked = False  # did somebody leave something since the last `settle`?
        bus = vcpu.vm.interrupts.bus
        self.lapic: Lapic | None = None
        self.state = kvm.KVM_MP_STATE_RUNNABLE
        if bus is not None:
            self.lapic = Lapic(self, bus, bootstrap=vcpu.is_boot)
            if not vcpu.is_boot:
                self.state = kvm.KVM_MP_STATE_UNINITIALIZED

    # ---- from any thread
    def poke(self) -> None:
        """Something may have become pending: leave the guest, or wake, and look."""
        with self._changed:
            self.asked = True
            with contextlib.suppress(ValueError):  # the vCPU, and the page with its kick, may be gone
                self._vcpu.page.kick[0] = 1
            self._changed.notify()

    def nmi(self) -> None:
        """An NMI arrived; two are kept."""
        with self._changed:
            self._nmis = min(self._nmis + 1, 2)
        self.poke()

    def init(self) -> None:
        """An INIT arrived; it undoes a startup IPI before it."""
        with self._changed:
            self._init, self._sipi = True, None
        self.poke()

    def sipi(self, vector: int) -> None:
        """A startup IPI arrived; the last one counts."""
        with self._changed:
            self._sipi = vector
        self.poke()

    # ---- on the vCPU's thread
    def settle(self) -> None:
        """Take what others left. The engine lock is held, and the engine stopped."""
        with self._changed:
            self.asked = False
            nmis, init, sipi = self._nmis, self._init, self._sipi
            self._nmis, self._init, self._sipi = 0, False, None
        cpu, lapic = self._vcpu.cpu, self.lapic
        for _ in range(nmis):
            cpu.events.queue_nmi()
        if init:
            self._take_init()
        if self.state == kvm.KVM_MP_STATE_INIT_RECEIVED and sipi is not None:
            if not self._vcpu.vm.sev.es_active:
                sregs.start_at(cpu, sipi)
            elif self._vcpu.ghcb is not None:  # an SEV-ES vCPU starts as its VMSA says, or comes back from its hold
                self._vcpu.ghcb.startup_ipi()
            self.state = kvm.KVM_MP_STATE_RUNNABLE
        if lapic is not None:
            deadline = lapic.deadline()
            if deadline is not None and deadline <= time.monotonic_ns():
                lapic.expire()
            if lapic.pending() is not None:
                cpu.attention = True
            if lapic.split:
                self._settle_split(lapic)
        if self.state in _SLEEPS and self._wakes():
            self.state = kvm.KVM_MP_STATE_RUNNABLE

    def _settle_split(self, lapic: Lapic) -> None:
        """What only a VM has whose user space has the PICs and the IOAPIC."""
        if lapic.scan_due:
            lapic.scan()
        if lapic.ended_vector is not None or self._vcpu.cpu.events.window_wanted:
            self._vcpu.cpu.attention = True

    def _wakes(self) -> bool:
        """Does what is pending end HLT?"""
        cpu = self._vcpu.cpu
        events, lapic = cpu.events, self.lapic
        if events.has_something_to_deliver():
            return True
        return lapic is not None and lapic.pending() is not None and events.flag_allows_interrupts()

    def _take_init(self) -> None:
        cpu = self._vcpu.cpu
        with self._vcpu.kvms_own():
            sregs.init(cpu)
        cpu.events.reset()
        if self.lapic is not None:
            self.lapic.reset(init=True)
        self.state = kvm.KVM_MP_STATE_RUNNABLE if self._vcpu.is_boot else kvm.KVM_MP_STATE_INIT_RECEIVED

    def halt(self) -> None:
        """HLT in a VM with local APICs."""
        self.state = kvm.KVM_MP_STATE_HALTED

    def hold(self) -> None:
        """An SEV-ES guest waits for a startup IPI, or whatever else ends HLT."""
        with self._changed:
            self.state, self.asked = kvm.KVM_MP_STATE_AP_RESET_HOLD, True

    def sleep(self) -> int | None:
        """Wait without the engine lock until somebody asks, a timer is due (None: look again), or KVM_RUN must return
        (its result).
        """
        page, inside = self._vcpu.page, self._vcpu.inside
        deadline = self.lapic.deadline() if self.lapic is not None else None
        while True:
            if page.wants_exit or inside.interrupted or self._vcpu.dead:
                page.head(kvm.KVM_EXIT_INTR)
                return -errno.EINTR
            with self._changed:
                if self.asked:
                    return None
                left = _LOOK if deadline is None else min(_LOOK, (deadline - time.monotonic_ns()) / _NS)
                if left <= 0:
                    return None
                self._changed.wait(left)

    # ---- KVM_GET_MP_STATE and KVM_SET_MP_STATE
    def set_state(self, state: int) -> bool:
        """False when KVM refuses it: without an in-kernel APIC a vCPU is always runnable."""
        if state == kvm.KVM_MP_STATE_SIPI_RECEIVED and self.lapic is not None:
            self._sipi, self.asked = self._sipi or 0, True
            state = kvm.KVM_MP_STATE_INIT_RECEIVED
        elif state != kvm.KVM_MP_STATE_RUNNABLE and (state not in _WITH_APIC or self.lapic is None):
            return False
        self.state = state
        return True
