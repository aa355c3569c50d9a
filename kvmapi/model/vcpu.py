"""A vCPU fd of the model: its lifetime, its lock, and KVM_RUN.

The ioctls for its state are in vcpu_state.py; what becomes of them when an SEV-ES guest is launched, in protected.py;
registers that travel in kvm_run, in sync_regs.py.
"""

from __future__ import annotations

import errno
import mmap
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls, kvm
from kvmapi.model import sync_regs, vmsa
from kvmapi.model.activity import Activity
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.clock.vcpu import VcpuClock
from kvmapi.model.cpu import layout
from kvmapi.model.cpu.cpu import KICKED
from kvmapi.model.cpu.privileged import HALTED
from kvmapi.model.files import File, Handler
from kvmapi.model.lock import SLICE
from kvmapi.model.placeholder import StandIn
from kvmapi.model.prefault import pre_fault
from kvmapi.model.runpage import CR8, IMMEDIATE_EXIT, REQUEST_WINDOW, RunPage
from kvmapi.model.signals import WATCHER, Inside
from kvmapi.model.stats import OF_VCPU, SIGNAL_EXITS, Stats
from kvmapi.model.sync_regs import SYNC_AT
from kvmapi.model.unmade import Unmade, made_cpu
from kvmapi.model.vcpu_state import VcpuState

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.ghcb.unit import GhcbUnit
    from kvmapi.model.protected import ProtectedState
    from kvmapi.model.vm import VmFile

_IF = 1 << 9
_DR7_ALWAYS = 1 << 10
_VMRUN_FAILED = (1 << 64) - 1  # SVM_EXIT_ERR: the processor did not take the VMSA


class VcpuFile(File):
    """One vCPU. Its mutex is held during every ioctl on it, KVM_RUN included, as in the kernel."""

    kind = "kvm-vcpu"
    belongs_to_mm = True

    def __init__(self, vm: VmFile, index: int) -> None:
        super().__init__()
        self.vm = vm
        self.id = index
        layout.calibrate()  # an engine that we do not know is refused here
        self.page = RunPage()
        self.making = threading.Lock()  # of the processor
        self.is_boot = index == vm.boot_cpu
        self.stats = Stats(f"{vm.stats.identity}/vcpu-{index}", OF_VCPU)
        self.mutex = threading.Lock()
        self.inside = Inside(self.page.kick)
        WATCHER.add(self.inside)
        self._turn = -1
        self._holds = False  # the engine lock
        self.dead = self._gone = False
        self.entered = False  # did the guest ever run? Then its CPUID stays
        self.protected: ProtectedState | None = None  # since LAUNCH_UPDATE_VMSA: the registers are the guest's secret
        self.ghcb: GhcbUnit | None = None  # and from then on this is how the guest speaks to KVM
        self.clock = VcpuClock(vm.physical, vm.clock, index)
        self.activity = Activity(self)
        vm.acquire()
        self.handlers = Unmade(self._handlers, {ioctls.KVM_GET_STATS_FD: self._locked(ioctls.KVM_GET_STATS_FD, self.stats.give)})

    @cached_property
    def cpu(self) -> Cpu:
        """The processor, made when it is first asked for."""
        return made_cpu(self)

    @cached_property
    def state(self) -> VcpuState:
        """The ioctls for its registers."""
        return VcpuState(self)

    def _handlers(self) -> dict[int, Handler]:
        return {
            ioctls.KVM_RUN: self._run,
            ioctls.KVM_MEMORY_ENCRYPT_OP: lambda arg, caller: -errno.ENOTTY,  # a vCPU has such commands with TDX only
            ioctls.KVM_PRE_FAULT_MEMORY: self._locked(ioctls.KVM_PRE_FAULT_MEMORY, partial(pre_fault, self)),
            **{number: self._locked(number, method) for number, method in self.state.handlers().items()},
        }

    def unknown_errno(self) -> int:
        return errno.EINVAL  # as kvm_arch_vcpu_ioctl answers what it does not know

    def _locked(self, number: int, method: Callable[[int, Caller], int]) -> Callable[[int, Caller], int]:
        def call(arg: int, caller: Caller) -> int:
            try:
                with self.mutex:
                    if self.dead:
                        raise Errno(errno.EBADF)
                    if self.vm.sev.dead:  # moved away while we waited for the mutex: its registers are another VM's now
                        raise Errno(errno.EIO)
                    if self.protected is not None:  # asked for here: it may have become so while we waited
                        return self.protected.method(number, method)(arg, caller)
                    return method(arg, caller)
            finally:
                if self.dead:
                    self._reap()

        return call

    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        return self.page.map(length, prot, flags, offset)

    def stand_in(self) -> StandIn:
        return self.page.stand_in()

    def destroy(self) -> None:
        # A vCPU that is inside KVM_RUN on another thread is torn down by that thread when it leaves.
        self.dead = True
        self._reap()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The vCPU is inside no ioctl while the block lasts (kvm_lock_all_vcpus); if it is closed meanwhile, it goes afterwards."""
        try:
            with self.mutex:
                yield
        finally:
            if self.dead:
                self._reap()

    def _reap(self) -> None:
        """Tear down once, when nobody is inside any more: whoever leaves last sees `dead` and comes here."""
        if self.mutex.acquire(blocking=False):
            try:
                gone, self._gone = self._gone, True
                if not gone:
                    self._tear_down()
            finally:
                self.mutex.release()

    def _tear_down(self) -> None:
        self.handlers = {}
        WATCHER.remove(self.inside)
        if "cpu" in self.__dict__:
            self.cpu.destroy()
        self.page.destroy()
        self.stats.destroy()
        self.vm.release()

    # ---- SEV-ES: for the launch and for a move to another VM, with the mutex held (launched.py)
    @property
    def debugged(self) -> bool:
        """Does user space debug the vCPU, or has it set breakpoints in DR7? Then its VMSA cannot be launched."""
        dr7 = struct.unpack_from("<Q", self.cpu.native.state, self.cpu.where.debug + 56)[0]
        return self.cpu.debug.enabled or bool(dr7 & ~_DR7_ALWAYS)

    def vmsa(self) -> bytes:
        """The VMSA as KVM would hand it to LAUNCH_UPDATE_VMSA. EINVAL: it was launched before, or is being debugged."""
        if self.protected is not None or self.debugged:
            raise Errno(errno.EINVAL)
        return vmsa.of(self)

    def kvms_own(self, *, keep: bool = True) -> AbstractContextManager[None]:
        """For changes that KVM makes to registers: of a protected vCPU it has nothing but a copy."""
        return self.protected.kvms_own(keep=keep) if self.protected is not None else nullcontext()

    # ---- KVM_RUN
    def runner(self, caller: Caller) -> Callable[[], int]:
        """KVM_RUN as a function of nothing: the result, or -errno. It does not watch for signals, which costs two
        system calls a run: who uses it stops the vCPU by immediate_exit, which the model notices at the next block.
        """
        run = self._run_unwatched

        def call() -> int:
            try:
                return run(0, caller)
            except Errno as failure:
                return -failure.number

        return call

    def _run(self, arg: int, caller: Caller) -> int:
        if arg:
            raise Errno(errno.EINVAL)
        try:
            with self.mutex:
                if self.dead:
                    raise Errno(errno.EBADF)
                self.inside.enter(caller.thread)
                try:
                    return self._run_locked(caller)
                finally:
                    self.stats.counters[SIGNAL_EXITS] += self.inside.interrupted
                    self.inside.leave()
        finally:
            if self.dead:
                self._reap()

    def _run_unwatched(self, arg: int, caller: Caller) -> int:
        try:
            with self.mutex:
                if self.dead:
                    raise Errno(errno.EBADF)
                return self._run_locked(caller)
        finally:
            if self.dead:
                self._reap()

    def _run_locked(self, caller: Caller) -> int:
        vm, cpu = self.vm, self.cpu
        out = bool(self.page.memory[IMMEDIATE_EXIT])  # looked at once: what interrupts later is KVM_EXIT_INTR
        self.clock.caller = caller
        if not vm.sev.may_run():
            raise Errno(errno.EINVAL)
        try:
            valid = self._take_user_state()
        except Errno:
            self._after_run()
            raise
        window = bool(self.page.memory[REQUEST_WINDOW]) and cpu.lapic is None
        if window != cpu.events.window_wanted:
            cpu.events.window_wanted, cpu.attention = window, True
        # What the last exit left is finished even when user space wants out again; otherwise nobody waits for nothing.
        if not self._enter_engine(None if cpu.privileged.unfinished else self._leaving):
            if not out:
                self.page.head(kvm.KVM_EXIT_INTR)
            self._after_run()
            if valid:
                sync_regs.give(self, valid)
            return -errno.EINTR
        try:
            return self._run_guest(out)
        finally:
            self._leave_engine()
            self._after_run()
            if valid:
                sync_regs.give(self, valid)

    def _run_guest(self, out: bool) -> int:
        """Everything between taking the engine and giving it back. `out`: only what the last exit left is to be finished."""
        cpu, activity, lock, page = self.cpu, self.activity, self.vm.lock, self.page
        if self.clock.active:
            self.clock.before_entry()
        result, entering = cpu.privileged.complete(), True
        if cpu.lapic is not None:
            if activity.state == kvm.KVM_MP_STATE_UNINITIALIZED and result is None:
                return -errno.EINTR if out else self._wait_to_be_started()
            activity.settle()
        while result is None or result >= KICKED:
            if result == HALTED:
                activity.halt()  # whatever follows: the instruction is done
            if page.memory[IMMEDIATE_EXIT] or self.inside.interrupted:
                return -errno.EINTR if out else page.head(kvm.KVM_EXIT_INTR) - errno.EINTR
            if result == KICKED and not self._hand_over():
                return page.head(kvm.KVM_EXIT_INTR) - errno.EINTR
            if result == HALTED or activity.asked:
                activity.settle()
            if not activity.runs:
                result = self._sleep()
                continue
            if self.vm.sev.es_active:
                if self.ghcb is None:
                    return self._refuse_entry()
                self.ghcb.finish()
            # Who else may have changed code? Other vCPUs and ioctls, if they had the lock since; and the VMM
            # at every entry, but what it does to encrypted pages `enter` has noticed already.
            if lock.turns != self._turn + 1 or (entering and not cpu.code.secret):
                cpu.code.verify()
            if self.state.fpu.stale:
                self.state.fpu.drop_stale()
            entering, self.entered = False, True
            result = cpu.go()
            self._turn = lock.turns
        return result

    def _refuse_entry(self) -> int:
        """What the processor says to a VMSA that it does not take: that of a vCPU which LAUNCH_UPDATE_VMSA has not seen."""
        self.entered = True
        return self.page.payload(kvm.KVM_EXIT_FAIL_ENTRY, "<QI", _VMRUN_FAILED, 0)

    # ---- the engine lock, and the arena that is open while it is held
    def _enter_engine(self, leaving: Callable[[], bool] | None = None) -> bool:
        if not self.vm.lock.acquire(self.cpu.kick, SLICE, leaving):
            return False
        self._holds = True
        try:
            self.vm.physical.enter()
        except BaseException:
            self._leave_engine()
            raise
        return True

    def _leave_engine(self) -> None:
        if self._holds:
            self._holds = False
            try:
                self.vm.physical.leave()
            finally:
                self.vm.lock.release()

    def _leaving(self) -> bool:
        return bool(self.page.memory[IMMEDIATE_EXIT]) or self.inside.interrupted

    def _hand_over(self) -> bool:
        """Let another vCPU, or an ioctl, have the engine; False when user space wants KVM_RUN to end meanwhile."""
        self._leave_engine()
        return self._enter_engine(self._leaving)

    def _sleep(self) -> int | None:
        """Let others have the engine until the vCPU is to be looked at again (None), or KVM_RUN must return."""
        self._leave_engine()
        result = self.stats.blocked(self.activity.sleep)
        self._enter_engine()
        self.activity.settle()
        return result

    def _wait_to_be_started(self) -> int:
        """A processor that was never started sleeps until somebody asks something of it, and tells user space so."""
        result = None
        self.activity.settle()
        while result is None and self.activity.state == kvm.KVM_MP_STATE_UNINITIALIZED:
            result = self._sleep()
        return -errno.EAGAIN if result is None else result

    def _after_run(self) -> None:
        """The fields that every return of KVM_RUN fills in."""
        cpu = self.cpu
        enabled = cpu.registers.u64[layout.EFLAGS >> 3] & _IF != 0
        if enabled and self.vm.sev.es_active:  # the processor tells KVM, once it has run the guest
            enabled = self.ghcb is not None and self.entered
        ready = cpu.lapic is not None or (enabled and cpu.events.takes_interrupts())
        self.page.after_run(ready, enabled, cpu.cr8, cpu.msrs.apic_base)

    def _take_user_state(self) -> int:
        """What user space left in kvm_run for this entry; the registers it wants at the exit."""
        words = self.page.u64
        valid, dirty = words[SYNC_AT >> 3], words[(SYNC_AT >> 3) + 1]
        if valid or dirty:
            sync_regs.take(self, valid, dirty)
        if self.cpu.lapic is not None:
            return valid
        task_priority = words[CR8 >> 3]  # without an in-kernel APIC, user space holds it
        if task_priority >> 4:
            raise Errno(errno.EINVAL)
        self.cpu.cr8 = task_priority
        return valid
