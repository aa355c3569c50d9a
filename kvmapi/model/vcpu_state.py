"""The ioctls that read and write one vCPU's state: registers, FPU, debug registers, CPUID and events, as KVM's structs.
MSRs are in vcpu_msrs.py.

Each runs with the vCPU's mutex held and the vCPU outside KVM_RUN. Setting is checked first and applied whole or not
at all.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.vmsa import SVM_SEV_FEAT_DEBUG_SWAP
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.cpu import events, layout, runtime_cpuid, sregs
from kvmapi.model.cpu.cpuid import SEV_LEAF, Leaf, Table
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.irq import state as irq_state
from kvmapi.model.mem.physical import Refused
from kvmapi.model.platform import C_BIT
from kvmapi.model.runpage import READY
from kvmapi.model.vcpu_fpu import FpuState
from kvmapi.model.vcpu_msrs import MsrState

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

REGS = struct.Struct("<18Q")
_NATIVE_REGS = struct.Struct("<17Q")  # 16 registers in the encoder's order, and RIP
_CPUID_ENTRY = struct.Struct("<IIIIIII12x")
_MAX_CPUID_ENTRIES = 256
_DEBUGREGS = struct.Struct("<7Q72x")  # db[4] dr6 dr7 flags
_GUEST_DEBUG = struct.Struct("<I4x8Q")
_SEV, _SEV_ES, _DEBUG_SWAP = 1 << 0, 1 << 1, 1 << 7  # in the guest's SEV_STATUS MSR

_SIZES_LEAF = 0x80000008  # linear address bits in EAX 15:8

Method = Callable[[int, Caller], int]


class VcpuState:
    """The state ioctls of one vCPU."""

    def __init__(self, vcpu: VcpuFile) -> None:
        self._vcpu = vcpu
        self._cpu = vcpu.cpu
        self.fpu = FpuState(vcpu.cpu)
        self._msrs = MsrState(vcpu)
        self.update_encryption()  # a guest's memory is encrypted whether its VMM sets a CPUID or not

    def handlers(self) -> dict[int, Method]:
        """Request number -> method; the caller adds the locking."""
        return {
            **self.fpu.handlers(),
            **self._msrs.handlers(),
            **irq_state.handlers(self._vcpu.activity),
            ioctls.KVM_GET_REGS: self._get_regs,
            ioctls.KVM_SET_REGS: self._set_regs,
            ioctls.KVM_GET_SREGS: self._get_sregs,
            ioctls.KVM_SET_SREGS: self._set_sregs,
            ioctls.KVM_GET_SREGS2: self._get_sregs2,
            ioctls.KVM_SET_SREGS2: self._set_sregs2,
            ioctls.KVM_GET_DEBUGREGS: self._get_debugregs,
            ioctls.KVM_SET_DEBUGREGS: self._set_debugregs,
            ioctls.KVM_GET_VCPU_EVENTS: self._get_events,
            ioctls.KVM_SET_VCPU_EVENTS: self._set_events,
            ioctls.KVM_INTERRUPT: self._interrupt,
            ioctls.KVM_NMI: self._nmi,
            ioctls.KVM_SET_GUEST_DEBUG: self._set_guest_debug,
            ioctls.KVM_SET_SIGNAL_MASK: self._set_signal_mask,
            **self._vcpu.clock.handlers(),
            ioctls.KVM_ENABLE_CAP: self._enable_cap,
            ioctls.KVM_SET_CPUID2: self._set_cpuid2,
            ioctls.KVM_GET_CPUID2: self._get_cpuid2,
            ioctls.KVM_GET_MP_STATE: self._get_mp_state,
            ioctls.KVM_SET_MP_STATE: self._set_mp_state,
            ioctls.KVM_TRANSLATE: self._translate,
        }

    # ---- general registers (also for kvm_run.s.regs)
    def pack_regs(self) -> bytes:
        """struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags."""
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *high, rip = _NATIVE_REGS.unpack_from(self._cpu.native.state, layout.REGS)
        return REGS.pack(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *high, rip, self._flags())

    def unpack_regs(self, data: bytes) -> None:
        """Apply struct kvm_regs. KVM refuses nothing here."""
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *high, rip, rflags = REGS.unpack(data)
        _NATIVE_REGS.pack_into(self._cpu.native.state, layout.REGS, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *high, rip)
        self._cpu.registers.set_flags(rflags)
        self._cpu.events.forget_pending()  # as KVM: what was pending belonged to the old state
        self._cpu.debug.registers_set()

    def _flags(self) -> int:
        return self._cpu.native.flags() | 2

    def _get_regs(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, self.pack_regs())
        return 0

    def _set_regs(self, arg: int, caller: Caller) -> int:
        self.unpack_regs(caller.memory.read(arg, REGS.size))
        return 0

    # ---- system registers (also for kvm_run.s.sregs)
    def pack_sregs(self) -> bytes:
        """struct kvm_sregs; its bitmap has the interrupt that waits."""
        data = bytearray(sregs.pack(self._cpu))
        vector = self._cpu.events.interrupt
        if vector is not None:
            data[sregs.BITMAP_AT + vector // 8] |= 1 << vector % 8
        return bytes(data)

    def unpack_sregs(self, data: bytes) -> bool:
        """Apply struct kvm_sregs; False when KVM refuses it."""
        if not self._unpack_system(data):
            return False
        waiting = int.from_bytes(data[sregs.BITMAP_AT : sregs.SIZE], "little")
        if waiting:
            self._cpu.events.queue_interrupt((waiting & -waiting).bit_length() - 1)  # the lowest of them
        return True

    def _unpack_system(self, data: bytes) -> bool:
        if not sregs.unpack(self._cpu, data, self._vcpu.vm.sev.c_mask_offered(self._cpu.cpuid)):
            return False
        self._cpu.mmu.reset()
        return True

    def _get_sregs(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, self.pack_sregs())
        return 0

    def _set_sregs(self, arg: int, caller: Caller) -> int:
        if not self.unpack_sregs(caller.memory.read(arg, sregs.SIZE)):
            raise Errno(errno.EINVAL)
        return 0

    def _get_sregs2(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, sregs.pack(self._cpu)[: sregs.BITMAP_AT] + bytes(40))  # no PDPTRs outside PAE paging
        return 0

    def _set_sregs2(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, sregs.BITMAP_AT + 40)
        flags = struct.unpack_from("<Q", data, sregs.BITMAP_AT)[0]
        if flags & ~kvm.KVM_SREGS2_FLAGS_PDPTRS_VALID or flags:  # PDPTRs belong to PAE paging, which the model lacks
            raise Errno(errno.EINVAL)
        if not self._unpack_system(data[: sregs.BITMAP_AT]):
            raise Errno(errno.EINVAL)
        return 0

    # ---- debug registers and guest debugging
    def _get_debugregs(self, arg: int, caller: Caller) -> int:
        registers = struct.unpack_from("<8Q", self._cpu.native.state, self._cpu.where.debug)
        caller.memory.write(arg, _DEBUGREGS.pack(*registers[:4], registers[6], registers[7], 0))
        return 0

    def _set_debugregs(self, arg: int, caller: Caller) -> int:
        *addresses, dr6, dr7, flags = _DEBUGREGS.unpack(caller.memory.read(arg, _DEBUGREGS.size))
        if flags or dr6 >> 32 or dr7 >> 32:
            raise Errno(errno.EINVAL)
        struct.pack_into("<4Q16xQQ", self._cpu.native.state, self._cpu.where.debug, *addresses, dr6, dr7)
        self._cpu.debug.guest_changed()
        return 0

    def _set_guest_debug(self, arg: int, caller: Caller) -> int:
        control, *registers = _GUEST_DEBUG.unpack(caller.memory.read(arg, _GUEST_DEBUG.size))
        if control & (kvm.KVM_GUESTDBG_INJECT_DB | kvm.KVM_GUESTDBG_INJECT_BP):
            if self._cpu.events.exception is not None:
                raise Errno(errno.EBUSY)
            self._cpu.events.queue_exception(1 if control & kvm.KVM_GUESTDBG_INJECT_DB else 3)
        self._cpu.debug.set(control, tuple(registers))
        return 0

    # ---- events
    def pack_events(self) -> bytes:
        """struct kvm_vcpu_events."""
        return self._cpu.events.pack()

    def unpack_events(self, data: bytes) -> bool:
        """Apply struct kvm_vcpu_events; False when KVM refuses it."""
        return self._cpu.events.unpack(data)

    def _get_events(self, arg: int, caller: Caller) -> int:
        caller.memory.write(arg, self.pack_events())
        return 0

    def _set_events(self, arg: int, caller: Caller) -> int:
        if not self.unpack_events(caller.memory.read(arg, events.SIZE)):
            raise Errno(errno.EINVAL)
        return 0

    def _interrupt(self, arg: int, caller: Caller) -> int:
        vector = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        if vector > 255:
            raise Errno(errno.EINVAL)
        lapic = self._cpu.lapic
        if lapic is None:
            self._cpu.events.queue_interrupt(vector)
        elif not lapic.split:
            raise Errno(errno.ENXIO)  # interrupts come from the controllers
        elif not lapic.inject(vector):
            raise Errno(errno.EEXIST)
        # KVM lets kvm_run say "ready" until KVM_RUN returns again. A program under `sevmm exec` can have an EINTR from KVM_RUN that
        # we never hear of, and would then inject a second interrupt.
        self._vcpu.page.u32[READY >> 2] &= ~0xFF
        return 0

    def _nmi(self, arg: int, caller: Caller) -> int:
        self._cpu.events.queue_nmi()
        return 0

    def _set_signal_mask(self, arg: int, caller: Caller) -> int:
        """Which signals do not interrupt KVM_RUN; a NULL argument: those the thread blocks."""
        mask = None
        if arg:
            if struct.unpack("<I", caller.memory.read(arg, 4))[0] != 8:
                raise Errno(errno.EINVAL)
            mask = int.from_bytes(caller.memory.read(arg + 4, 8), "little")
        self._vcpu.inside.mask = mask
        return 0

    def _get_mp_state(self, arg: int, caller: Caller) -> int:
        activity = self._vcpu.activity
        if activity.asked:
            with self._vcpu.vm.paused():
                activity.settle()  # an INIT or a startup IPI that has arrived counts
        caller.memory.write(arg, struct.pack("<I", activity.state))
        return 0

    def _set_mp_state(self, arg: int, caller: Caller) -> int:
        state = struct.unpack("<I", caller.memory.read(arg, 4))[0]
        if not self._vcpu.activity.set_state(state):
            raise Errno(errno.EINVAL)
        return 0

    def _enable_cap(self, arg: int, caller: Caller) -> int:
        cap, flags, first = struct.unpack("<IIQ88x", caller.memory.read(arg, 104))
        if flags or cap != caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
            raise Errno(errno.EINVAL)
        self._cpu.msrs.enforces_pv_features = bool(first)
        return 0

    # ---- CPUID and MSRs
    def _set_cpuid2(self, arg: int, caller: Caller) -> int:
        count = struct.unpack("<I4x", caller.memory.read(arg, 8))[0]
        if count > _MAX_CPUID_ENTRIES:
            raise Errno(errno.E2BIG)
        data = caller.memory.read(arg + 8, count * _CPUID_ENTRY.size) if count else b""
        rows = [Leaf(*row) for row in _CPUID_ENTRY.iter_unpack(data)]
        if self._vcpu.entered and runtime_cpuid.rows(self._cpu, rows) != runtime_cpuid.rows(self._cpu, self._cpu.cpuid.rows):
            raise Errno(errno.EINVAL)  # the features of a vCPU that ran cannot be changed
        if any(row.function == _SIZES_LEAF and row.eax >> 8 & 0xFF not in (0, 48, 57) for row in rows):
            raise Errno(errno.EINVAL)
        self._cpu.cpuid = self._cpu.msrs.offered = Table(rows)
        if self._cpu.lapic is not None:
            self._cpu.lapic.tsc_deadline_offered, self._cpu.lapic.x2_offered = self._cpu.cpuid.tsc_deadline, self._cpu.cpuid.x2apic
        self.update_encryption()
        return 0

    def _get_cpuid2(self, arg: int, caller: Caller) -> int:
        room = struct.unpack("<I4x", caller.memory.read(arg, 8))[0]
        rows = runtime_cpuid.rows(self._cpu, self._cpu.cpuid.rows)
        if room < len(rows):
            raise Errno(errno.E2BIG)
        caller.memory.write(arg, struct.pack("<II", len(rows), 0) + b"".join(_CPUID_ENTRY.pack(*row) for row in rows))
        return 0

    def update_encryption(self) -> None:
        """The guest became a SEV guest, or its CPUID changed: the C-bit counts only where the guest is encrypted."""
        sev = self._vcpu.vm.sev
        self._cpu.mmu.c_mask = 1 << C_BIT if sev.active else 0
        status = _SEV | (_SEV_ES if sev.es_active else 0) | (_DEBUG_SWAP if sev.vmsa_features & SVM_SEV_FEAT_DEBUG_SWAP else 0)
        self._cpu.msrs.sev_status = status if sev.active and self._cpu.cpuid.has(SEV_LEAF) else 0
        self._cpu.mmu.reset()

    # ---- KVM_TRANSLATE
    def _translate(self, arg: int, caller: Caller) -> int:
        va = struct.unpack("<Q16x", caller.memory.read(arg, 24))[0]
        vm = self._vcpu.vm
        with vm.paused():
            vm.physical.enter()
            try:
                if self._cpu.registers.cr(0) >> 31 & 1:
                    low = va & 0xFFFFFFFFF000  # KVM's walk does not ask for a canonical address
                    gfn, _, _ = self._cpu.mmu.translate(low | (0xFFFF << 48 if low >> 47 else 0), write=False, fetch=False, user=False)
                    found = (gfn * PAGE | va & (PAGE - 1), 1)
                else:
                    found = (va, int(va != 0xFFFFFFFFFFFFFFFF))  # all ones is KVM's "no address"
            except (Fault, Refused):
                found = (0xFFFFFFFFFFFFFFFF, 0)
            finally:
                vm.physical.leave()
        caller.memory.write(arg, struct.pack("<QQBBB5x", va, found[0], found[1], 1, 0))
        return 0
