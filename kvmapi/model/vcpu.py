"""A vCPU fd of the model: registers, CPUID and MSRs as KVM's structs, and KVM_RUN."""

from __future__ import annotations

import errno
import mmap
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls, kvm
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.cpu import sregs
from kvmapi.model.cpu.cpu import KICKED, Cpu
from kvmapi.model.cpu.cpuid import SEV_LEAF, Leaf, Table
from kvmapi.model.cpu.mmu import Fault, UnsupportedMode
from kvmapi.model.cpu.msrs import APIC_BASE, NoSuchMsr
from kvmapi.model.files import File
from kvmapi.model.lock import SLICE
from kvmapi.model.mem.physical import Refused
from kvmapi.model.platform import C_BIT
from kvmapi.model.runpage import IMMEDIATE_EXIT, RunPage

if TYPE_CHECKING:
    from kvmapi.model.vm import VmFile

_REGS = struct.Struct("<18Q")
# kvm_regs lists rax rbx rcx rdx rsi rdi rsp rbp r8.. ; the encoder's order is rax rcx rdx rbx rsp rbp rsi rdi r8..
_ORDER = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
_CPUID_ENTRY = struct.Struct("<IIIIIII12x")
_MSR_ENTRY = struct.Struct("<IIQ")
_MAX_MSRS = 256
_MAX_CPUID_ENTRIES = 256


class VcpuFile(File):
    """One vCPU. Its mutex is held during every ioctl on it, KVM_RUN included, as in the kernel."""

    kind = "kvm-vcpu"

    def __init__(self, vm: VmFile, index: int) -> None:
        super().__init__()
        self.vm = vm
        self.id = index
        self.page = RunPage()
        self.cpu = Cpu(vm.physical, self.page, index, vm.exits)
        self.mutex = threading.Lock()
        self._turn = -1
        self._dead = self._gone = False
        self._mp_state = kvm.KVM_MP_STATE_RUNNABLE
        vm.acquire()
        sregs.reset(self.cpu)
        self.handlers = {
            ioctls.KVM_RUN: self._run,
            **{
                number: self._locked(method)
                for number, method in {
                    ioctls.KVM_GET_REGS: self._get_regs,
                    ioctls.KVM_SET_REGS: self._set_regs,
                    ioctls.KVM_GET_SREGS: self._get_sregs,
                    ioctls.KVM_SET_SREGS: self._set_sregs,
                    ioctls.KVM_GET_MSRS: self._get_msrs,
                    ioctls.KVM_SET_MSRS: self._set_msrs,
                    ioctls.KVM_SET_CPUID2: self._set_cpuid2,
                    ioctls.KVM_GET_CPUID2: self._get_cpuid2,
                    ioctls.KVM_GET_MP_STATE: self._get_mp_state,
                    ioctls.KVM_SET_MP_STATE: self._set_mp_state,
                    ioctls.KVM_TRANSLATE: self._translate,
                }.items()
            },
        }

    def unknown_errno(self) -> int:
        return errno.EINVAL  # as kvm_arch_vcpu_ioctl answers what it does not know

    def _locked(self, method: Callable[[int, Caller], int]) -> Callable[[int, Caller], int]:
        def call(arg: int, caller: Caller) -> int:
            try:
                with self.mutex:
                    if self._dead:
                        raise Errno(errno.EBADF)
                    return method(arg, caller)
            finally:
                if self._dead:
                    self._reap()

        return call

    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        return self.page.map(length, prot, flags, offset)

    def destroy(self) -> None:
        # A vCPU that is inside KVM_RUN on another thread is torn down by that thread when it leaves.
        self._dead = True
        self._reap()

    def _reap(self) -> None:
        """Tear down once, when nobody is inside any more: whoever leaves last sees `_dead` and comes here."""
        if self.mutex.acquire(blocking=False):
            try:
                gone, self._gone = self._gone, True
                if not gone:
                    self._tear_down()
            finally:
                self.mutex.release()

    def _tear_down(self) -> None:
        self.handlers = {}
        self.cpu.destroy()
        self.page.destroy()
        self.vm.release()

    # ---- KVM_RUN
    def runner(self, caller: Caller) -> Callable[[], int]:
        """KVM_RUN as a function of nothing: the result, or -errno."""
        run = self._run

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
                if self._dead:
                    raise Errno(errno.EBADF)
                return self._run_locked()
        finally:
            if self._dead:
                self._reap()

    def _run_locked(self) -> int:
        vm, cpu = self.vm, self.cpu
        if not vm.sev.may_run():
            raise Errno(errno.EINVAL)
        lock = vm.lock
        lock.acquire(cpu.kick, SLICE)
        try:
            vm.physical.enter()
            try:
                result, entering = cpu.privileged.complete(), True
                while result is None or result == KICKED:
                    if self.page.memory[IMMEDIATE_EXIT]:
                        if result == KICKED:
                            self.page.head(kvm.KVM_EXIT_INTR)
                        return -errno.EINTR
                    if result == KICKED:
                        lock.release()
                        lock.acquire(cpu.kick, SLICE)
                    # Who else may have changed code? Other vCPUs and ioctls, if they had the lock since; and the VMM
                    # at every entry, but what it does to encrypted pages `enter` has noticed already.
                    if lock.turns != self._turn + 1 or (entering and not cpu.code.secret):
                        cpu.code.verify()
                    entering = False
                    result = cpu.go()
                    self._turn = lock.turns
                return result
            finally:
                vm.physical.leave()
        finally:
            lock.release()

    # ---- registers
    def _get_regs(self, arg: int, caller: Caller) -> int:
        registers = self.cpu.registers
        gprs = (registers.gpr(number) for number in _ORDER)
        caller.memory.write(arg, _REGS.pack(*gprs, registers.rip, self._flags()))
        return 0

    def _flags(self) -> int:
        cpu = self.cpu
        if cpu.changed:
            cpu.native.restore()
            cpu.changed = False
        return cpu.native.flags() | 2

    def _set_regs(self, arg: int, caller: Caller) -> int:
        values = _REGS.unpack(caller.memory.read(arg, _REGS.size))
        registers = self.cpu.registers
        for number, value in zip(_ORDER, values):
            registers.set_gpr(number, value)
        registers.rip = values[16]
        registers.set_flags(values[17])
        self.cpu.changed = True
        return 0

    def _get_sregs(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, sregs.pack(self.cpu))
        return 0

    def _set_sregs(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, sregs.SIZE)
        if not sregs.unpack(self.cpu, data, self.vm.sev.c_mask_offered(self.cpu.cpuid)):
            raise Errno(errno.EINVAL)
        self.page.apic_base = self.cpu.msrs.read(APIC_BASE)
        self.cpu.mmu.generation = -1
        return 0

    def _get_mp_state(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, struct.pack("<I", self._mp_state))
        return 0

    def _set_mp_state(self, arg: int, caller: Caller) -> int:
        state = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        if state != kvm.KVM_MP_STATE_RUNNABLE:  # the others need an in-kernel APIC
            raise Errno(errno.EINVAL)
        return 0

    # ---- CPUID and MSRs
    def _set_cpuid2(self, arg: int, caller: Caller) -> int:
        count = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        if count > _MAX_CPUID_ENTRIES:
            raise Errno(errno.E2BIG)
        data = caller.memory.read(arg + 8, count * _CPUID_ENTRY.size) if count else b""
        self.cpu.cpuid = Table([Leaf(*row) for row in _CPUID_ENTRY.iter_unpack(data)])
        self.update_encryption()
        return 0

    def _get_cpuid2(self, arg: int, caller: Caller) -> int:
        room = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        rows = self.cpu.cpuid.rows
        if room < len(rows):
            caller.memory.write(arg, struct.pack("<I", len(rows)))
            raise Errno(errno.E2BIG)
        caller.memory.write(arg, struct.pack("<II", len(rows), 0) + b"".join(_CPUID_ENTRY.pack(*row) for row in rows))
        return 0

    def update_encryption(self) -> None:
        """The guest became a SEV guest, or its CPUID changed: the C-bit counts only where the guest is encrypted."""
        active = self.vm.sev.active
        self.cpu.mmu.c_mask = 1 << C_BIT if active else 0
        self.cpu.msrs.sev_status = 1 if active and self.cpu.cpuid.has(SEV_LEAF) else 0
        self.cpu.mmu.generation = -1

    def _msr_entries(self, arg: int, caller: Caller) -> list[tuple[int, int, int]]:
        count = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        if count > _MAX_MSRS:
            raise Errno(errno.E2BIG)
        data = caller.memory.read(arg + 8, count * _MSR_ENTRY.size) if count else b""
        return list(_MSR_ENTRY.iter_unpack(data))

    def _get_msrs(self, arg: int, caller: Caller) -> int:
        done = b""
        for number, reserved, _ in self._msr_entries(arg, caller):
            try:
                done += _MSR_ENTRY.pack(number, reserved, self.cpu.msrs.read(number))
            except NoSuchMsr:
                break
        if done:
            caller.memory.write(arg + 8, done)
        return len(done) // _MSR_ENTRY.size

    def _set_msrs(self, arg: int, caller: Caller) -> int:
        done = 0
        for number, _, value in self._msr_entries(arg, caller):
            try:
                self.cpu.changed |= self.cpu.msrs.write(number, value, host=True)
            except NoSuchMsr:
                break
            done += 1
        return done

    # ---- KVM_TRANSLATE
    def _translate(self, arg: int, caller: Caller) -> int:
        va = struct.unpack("<Q16x", caller.memory.read(arg, 24))[0]
        vm = self.vm
        with vm.paused():
            vm.physical.enter()
            try:
                gfn, _, _ = self.cpu.mmu.translate(va & -PAGE, write=False, fetch=False, user=False)
                found = (gfn * PAGE | va & (PAGE - 1), 1)
            except (Fault, Refused, UnsupportedMode):
                found = (0xFFFFFFFFFFFFFFFF, 0)
            finally:
                vm.physical.leave()
        caller.memory.write(arg, struct.pack("<QQBBB5x", va, found[0], found[1], 1, 0))
        return 0
