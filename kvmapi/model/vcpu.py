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

from kvmapi.abi import ioctls
from kvmapi.model import vmsa
from kvmapi.model.activity import Activity
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.clock.vcpu import VcpuClock
from kvmapi.model.cpu import layout
from kvmapi.model.files import File, Handler
from kvmapi.model.placeholder import StandIn
from kvmapi.model.prefault import pre_fault
from kvmapi.model.run import Run
from kvmapi.model.runpage import RunPage
from kvmapi.model.signals import WATCHER, Inside
from kvmapi.model.stats import OF_VCPU, SIGNAL_EXITS, Stats
from kvmapi.model.unmade import Unmade, made_cpu
from kvmapi.model.vcpu_state import VcpuState

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.ghcb.unit import GhcbUnit
    from kvmapi.model.protected import ProtectedState
    from kvmapi.model.vm import VmFile

_DR7_ALWAYS = 1 << 10


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
        self.inside: Inside = Inside(self.page.kick)
        WATCHER.add(self.inside)
        self.dead = self._gone = False
        self.protected: ProtectedState | None = None  # since LAUNCH_UPDATE_VMSA: the registers are the guest's secret
        self.ghcb: GhcbUnit | None = None  # and from then on this is how the guest speaks to KVM
        self.clock: VcpuClock = VcpuClock(vm.physical, vm.clock, index)
        self.activity: Activity = Activity(self)
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

    @cached_property
    def running(self) -> Run:
        """KVM_RUN."""
        return Run(self)

    @property
    def entered(self) -> bool:
        """Did the guest ever run? Then its CPUID stays."""
        return "running" in self.__dict__ and self.running.entered

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
        mutex, run = self.mutex, self.running

        def call() -> int:
            try:
                with mutex:
                    return run(caller) if not self.dead else -errno.EBADF
            except Errno as failure:
                return -failure.number
            finally:
                if self.dead:
                    self._reap()

        return call

    def _run(self, arg: int, caller: Caller) -> int:
        if arg:
            raise Errno(errno.EINVAL)
        inside = self.inside
        try:
            with self.mutex:
                if self.dead:
                    raise Errno(errno.EBADF)
                inside.enter(caller.thread)
                try:
                    return self.running(caller)
                finally:
                    if inside.interrupted:
                        self.stats.counters[SIGNAL_EXITS] += 1
                    inside.leave()
        finally:
            if self.dead:
                self._reap()
