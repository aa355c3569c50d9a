"""KVM_RUN of one vCPU: what is looked at before the guest is entered, the guest, and what every return fills in.

Most exits are of guests that do nothing but talk to a device, and what such an exit costs is the number of Python's
instructions between two entries. So the common way is one straight line: what may have changed since the last entry is
compared with what it was, in one look for each owner (user space's page, the engine lock, memory), and everything else
is a call. Measured: 10 ns an instruction where the caches are cold.

The caller holds the vCPU's mutex. The engine lock is held from `_enter_engine` to `_leave_engine`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model import sync_regs
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.cpu import KICKED
from kvmapi.model.cpu.privileged import HALTED
from kvmapi.model.lock import SLICE
from kvmapi.model.runpage import APIC_BASE, CR8, IMMEDIATE_EXIT, READY, REQUEST_WINDOW
from kvmapi.model.sync_regs import SYNC_AT

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_IF = 1 << 9
_EFLAGS = layout.EFLAGS >> 3
_VMRUN_FAILED = (1 << 64) - 1  # SVM_EXIT_ERR: the processor did not take the VMSA
_RUNNABLE = kvm.KVM_MP_STATE_RUNNABLE
_WINDOW, _IMMEDIATE = 0xFF << 8 * REQUEST_WINDOW, 0xFF << 8 * IMMEDIATE_EXIT  # in kvm_run's first word
_VALID, _DIRTY, _CR8, _APIC_BASE = SYNC_AT >> 3, (SYNC_AT >> 3) + 1, CR8 >> 3, APIC_BASE >> 3  # 64-bit words of kvm_run
_READY = READY >> 2  # a 32-bit one


class Run:
    """Made with the processor. `entered`: did the guest ever run?"""

    def __init__(self, vcpu: VcpuFile) -> None:
        self._vcpu = vcpu
        self._cpu = cpu = vcpu.cpu
        self._page = vcpu.page
        self._words, self._flags = vcpu.page.u64, vcpu.page.u32
        self._state = cpu.registers.u64
        self._clock, self._activity, self._inside = vcpu.clock, vcpu.activity, vcpu.inside
        self._privileged, self._events, self._code = cpu.privileged, cpu.events, cpu.code
        self._fpu = vcpu.state.fpu
        self._sev, self._physical, self._lock = vcpu.vm.sev, vcpu.vm.physical, vcpu.vm.lock
        self._asks_to_leave = self._leaving
        self._turn = -1
        self._holds = False  # the engine lock
        self.entered = False

    def __call__(self, caller: Caller) -> int:
        """0 with an exit written, or -errno. Errno: nothing was done."""
        words, cpu, events, sev = self._words, self._cpu, self._events, self._sev
        head = words[0]
        out = head & _IMMEDIATE  # looked at once: what interrupts later is KVM_EXIT_INTR
        self._clock.caller = caller
        if (sev.dead or sev.need_init) and not sev.may_run():
            raise Errno(errno.EINVAL)
        valid = 0
        if words[_VALID] or words[_DIRTY] or words[_CR8] != cpu.task_priority:
            valid = self._take_user_state()
        if head & _WINDOW or events.window_wanted:
            self._want_window(head & _WINDOW != 0 and (cpu.lapic is None or cpu.lapic.split))
        # What the last exit left is finished even when user space wants out again; otherwise nobody waits for nothing.
        if not self._enter_engine(self._asks_to_leave if self._privileged.pending is None else None):
            if not out:
                self._page.head(kvm.KVM_EXIT_INTR)
            self._after(valid)
            return -errno.EINTR
        try:
            return self._guest(out)
        finally:
            self._leave_engine()
            self._after(valid)

    def _guest(self, out: int) -> int:
        """Everything between taking the engine and giving it back. `out`: only what the last exit left is to be finished."""
        cpu, lock, privileged, result = self._cpu, self._lock, self._privileged, None
        if self._clock.active:
            self._clock.before_entry()
        pending = privileged.pending
        if pending is not None:
            privileged.pending = None
            result = pending()
        if cpu.lapic is not None:
            if self._activity.state == kvm.KVM_MP_STATE_UNINITIALIZED and result is None:
                return -errno.EINTR if out else self._wait_to_be_started()
            self._activity.settle()
        # Who else may have changed code? Other vCPUs and ioctls, if they had the lock since; and the VMM
        # at every entry, but what it does to encrypted pages `enter` has noticed already.
        verify = not self._code.secret
        while result is None or result >= KICKED:
            if result == HALTED:
                self._activity.halt()  # whatever follows: the instruction is done
            if self._words[0] & _IMMEDIATE or self._inside.interrupted:
                return -errno.EINTR if out else self._page.head(kvm.KVM_EXIT_INTR) - errno.EINTR
            if result == KICKED and not self._hand_over():
                return self._page.head(kvm.KVM_EXIT_INTR) - errno.EINTR
            if result == HALTED or self._activity.asked:
                self._activity.settle()
                if result == HALTED and self._events.window_open:
                    return self._page.head(kvm.KVM_EXIT_IRQ_WINDOW_OPEN)
            if self._activity.state != _RUNNABLE:
                result = self._sleep()
                if result is None and self._events.window_open:
                    return self._page.head(kvm.KVM_EXIT_IRQ_WINDOW_OPEN)
                continue
            if self._sev.es_active:
                ghcb = self._vcpu.ghcb
                if ghcb is None:
                    return self._refuse_entry()
                ghcb.finish()
            if verify or lock.turns != self._turn + 1:
                self._code.verify()
                verify = False
            if self._fpu.stale:
                self._fpu.drop_stale()
            self.entered = True
            result = cpu.go()
            self._turn = lock.turns
        return result

    def _refuse_entry(self) -> int:
        """What the processor says to a VMSA that it does not take: that of a vCPU which LAUNCH_UPDATE_VMSA has not seen."""
        self.entered = True
        return self._page.payload(kvm.KVM_EXIT_FAIL_ENTRY, "<QI", _VMRUN_FAILED, 0)

    # ---- the engine lock, and the arena that is open while it is held
    def _enter_engine(self, leaving: Callable[[], bool] | None = None) -> bool:
        if not self._lock.acquire(self._cpu.kick, SLICE, leaving):
            return False
        self._holds = True
        if self._physical.attended:
            try:
                self._physical.enter()
            except BaseException:
                self._leave_engine()
                raise
        return True

    def _leave_engine(self) -> None:
        if self._holds:
            self._holds = False
            try:
                if self._physical.attended:
                    self._physical.leave()
            finally:
                self._lock.release()

    def _leaving(self) -> bool:
        return self._words[0] & _IMMEDIATE != 0 or self._inside.interrupted

    def _hand_over(self) -> bool:
        """Let another vCPU, or an ioctl, have the engine; False when user space wants KVM_RUN to end meanwhile."""
        self._leave_engine()
        return self._enter_engine(self._asks_to_leave)

    def _sleep(self) -> int | None:
        """Let others have the engine until the vCPU is to be looked at again (None), or KVM_RUN must return."""
        self._leave_engine()
        result = self._vcpu.stats.blocked(self._activity.sleep)
        self._enter_engine()
        self._activity.settle()
        return result

    def _wait_to_be_started(self) -> int:
        """A processor that was never started sleeps until somebody asks something of it, and tells user space so."""
        result = None
        self._activity.settle()
        while result is None and self._activity.state == kvm.KVM_MP_STATE_UNINITIALIZED:
            result = self._sleep()
        return -errno.EAGAIN if result is None else result

    # ---- user space's page
    def _take_user_state(self) -> int:
        """What user space left in kvm_run for this entry; the registers it wants at the exit."""
        words, cpu = self._words, self._cpu
        valid, dirty = words[_VALID], words[_DIRTY]
        try:
            if valid or dirty:
                sync_regs.take(self._vcpu, valid, dirty)
            if cpu.lapic is None:  # without an in-kernel APIC, user space holds the task priority
                task_priority = words[_CR8]
                if task_priority >> 4:
                    raise Errno(errno.EINVAL)
                cpu.task_priority = task_priority
        except Errno:
            self._after(0)
            raise
        return valid

    def _want_window(self, wanted: bool) -> None:
        """User space asks for an exit once the guest takes interrupts, or does not any more."""
        if wanted != self._events.window_wanted:
            self._events.window_wanted, self._cpu.attention = wanted, True

    def _after(self, valid: int) -> None:
        """What every return of KVM_RUN fills in, and the registers that user space wants (`valid`)."""
        cpu = self._cpu
        enabled = self._state[_EFLAGS] & _IF != 0
        if enabled and self._sev.es_active:  # the processor tells KVM, once it has run the guest
            enabled = self._vcpu.ghcb is not None and self.entered
        words = self._words
        if cpu.lapic is None:
            ready = enabled and self._events.takes_interrupts()
            words[_CR8] = cpu.task_priority
        else:
            ready = not cpu.lapic.split or (enabled and cpu.lapic.has_room and self._events.takes_interrupts())
            words[_CR8] = cpu.cr8
        self._flags[_READY] = ready | enabled << 8  # ready_for_interrupt_injection, if_flag, flags
        words[_APIC_BASE] = cpu.msrs.apic_base
        if valid:
            sync_regs.give(self._vcpu, valid)
