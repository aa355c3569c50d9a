"""A vCPU whose registers are the guest's secret: what its ioctls answer after LAUNCH_UPDATE_VMSA.

From then on the guest's registers are those in the engine, and no ioctl shows or changes them. What KVM itself still has
of the vCPU is a copy from the moment of the launch (`_own`), of no consequence for the guest:

- A VM of type 3 refuses (EINVAL) general, system, debug and extended control registers, x87, SSE and AVX state.
- A VM of the legacy type 0 answers. General and debug registers and XCR0 are those of the copy, which can still be written;
  from the guest's first GHCB on, general registers are what it put there, and go back there when it is entered.
  KVM_GET_SREGS has CR0, CR4, CR8, EFER (KVM hears of their writes) and the APIC base, and zeroes elsewhere; KVM_SET_SREGS is
  checked and takes no more than the APIC base and a waiting interrupt. x87, SSE and AVX state reads as zeroes, and what is
  written is dropped.
- KVM_SET_GUEST_DEBUG is EINVAL on both. Events, interrupts, NMIs, MP_STATE, CPUID, LAPIC and the TSC are KVM's own: as ever.
- MSRs that the guest accesses without KVM are out of reach as soon as KVM has let it: at once for branch records, with
  the first KVM_RUN for the others. On type 3 such an MSR ends KVM_GET_MSRS and KVM_SET_MSRS; on type 0 it reads as 0.
- KVM_TRANSLATE walks page tables that KVM sees encrypted: nothing is found while paging is on.

The copy is put into the engine for as long as an ioctl on it takes, so that the ordinary method can answer it.
Source: has_protected_state and guest_state_protected in arch/x86/kvm/x86.c, regs.c and svm/ (7.3).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from kvmapi.abi import ioctls
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.cpu import fpu, layout, msrs, sregs
from kvmapi.model.platform import has_protected_state
from kvmapi.model.vmsa import known_msrs

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.vcpu import VcpuFile

_MSRS = frozenset((ioctls.KVM_GET_MSRS, ioctls.KVM_SET_MSRS, ioctls.KVM_GET_ONE_REG, ioctls.KVM_SET_ONE_REG))
Method = Callable[[int, Caller], int]

_REGS_SIZE, _DEBUGREGS_SIZE, _XCRS_SIZE, _GUEST_DEBUG_SIZE, _TRANSLATION_SIZE = 144, 128, 392, 72, 24
_REGISTERS = {  # request -> bytes that KVM reads before it refuses
    ioctls.KVM_GET_REGS: 0,
    ioctls.KVM_SET_REGS: _REGS_SIZE,
    ioctls.KVM_GET_SREGS: 0,
    ioctls.KVM_SET_SREGS: sregs.SIZE,
    ioctls.KVM_GET_SREGS2: 0,
    ioctls.KVM_SET_SREGS2: 0,
    ioctls.KVM_GET_DEBUGREGS: 0,
    ioctls.KVM_SET_DEBUGREGS: _DEBUGREGS_SIZE,
    ioctls.KVM_GET_XCRS: 0,
    ioctls.KVM_SET_XCRS: _XCRS_SIZE,
}
_FPU = {  # request -> (bytes read, bytes of zeroes that the legacy type writes)
    ioctls.KVM_GET_FPU: (0, fpu.FPU_SIZE),
    ioctls.KVM_SET_FPU: (fpu.FPU_SIZE, 0),
    ioctls.KVM_GET_XSAVE: (0, fpu.XSAVE_SIZE),
    ioctls.KVM_GET_XSAVE2: (0, fpu.XSAVE_SIZE),
    ioctls.KVM_SET_XSAVE: (fpu.XSAVE_SIZE, 0),
}
_GHCB, _DEBUGCTL, _BRANCH_RECORDS = 0xC0010130, 0x1D9, frozenset(range(0x1DB, 0x1DF))
_HIDDEN_AT_ONCE = _BRANCH_RECORDS | {_DEBUGCTL}
_HIDDEN_ONCE_RUN = frozenset(
    (
        msrs.STAR, msrs.LSTAR, msrs.CSTAR, msrs.SFMASK, msrs.KERNEL_GS_BASE, msrs.FS_BASE, msrs.GS_BASE,
        msrs.SYSENTER_CS, msrs.SYSENTER_ESP, msrs.SYSENTER_EIP, msrs.EFER, msrs.PAT, _GHCB,
    )
)  # fmt: skip
_ADDRESSES = frozenset((msrs.LSTAR, msrs.CSTAR, msrs.KERNEL_GS_BASE, msrs.FS_BASE, msrs.GS_BASE))  # must be canonical
_END_OF_CONTROL = layout.CR + 5 * 8  # general registers to CR4 stand in one piece
_GENERAL = 16
_CONTROL = struct.Struct("<7Q")  # in struct kvm_sregs: cr0 cr2 cr3 cr4 cr8 efer apic_base
_CONTROL_AT = sregs.BITMAP_AT - _CONTROL.size
_GETS_SREGS = {ioctls.KVM_GET_SREGS: sregs.SIZE, ioctls.KVM_GET_SREGS2: sregs.BITMAP_AT + 40}
_SETS_SREGS = frozenset((ioctls.KVM_SET_SREGS, ioctls.KVM_SET_SREGS2))


class _Registers(NamedTuple):
    """Registers of one vCPU as bytes of the engine's CPU structure, and what stands elsewhere."""

    general: bytes
    efer: bytes
    debug: bytes
    xcr0: bytes
    msrs: dict[int, int]
    floating: bytes  # an FXSAVE image, or nothing where it is not to be touched

    def __repr__(self) -> str:
        return "_Registers(...)"  # a guest's secret, perhaps


def _save(cpu: Cpu, *, floating: bool) -> _Registers:
    blob, where = cpu.native.state, cpu.where
    return _Registers(
        bytes(blob[:_END_OF_CONTROL]),
        bytes(blob[where.efer : where.efer + 8]),
        bytes(blob[where.debug : where.debug + 64]),
        bytes(blob[where.xcr0 : where.xcr0 + 8]),
        known_msrs(cpu),
        fpu.save(cpu) if floating else b"",
    )


def _control(cpu: Cpu) -> tuple[int, int, int]:
    """CR0, CR4 and EFER."""
    return cpu.registers.cr(0), cpu.registers.cr(4), cpu.registers.efer


def _restore(cpu: Cpu, saved: _Registers) -> None:
    blob, where = cpu.native.state, cpu.where
    for number, value in saved.msrs.items():
        cpu.msrs.write(number, value, host=True)
    blob[:_END_OF_CONTROL] = saved.general
    blob[where.efer : where.efer + 8] = saved.efer
    blob[where.debug : where.debug + 64] = saved.debug
    blob[where.xcr0 : where.xcr0 + 8] = saved.xcr0
    if saved.floating:
        fpu.restore(cpu, saved.floating)
    cpu.debug.guest_changed()
    cpu.mmu.reset()


class ProtectedState:
    """The ioctls of one vCPU with an encrypted VMSA. Its mutex is held in every call."""

    def __init__(self, vcpu: VcpuFile, *, confidential_fpu: bool = True) -> None:
        self._vcpu = vcpu
        self._refuses = has_protected_state(vcpu.vm.type)
        self._confidential_fpu = confidential_fpu
        self._own = _save(vcpu.cpu, floating=not confidential_fpu)
        self._began = _control(vcpu.cpu)
        self.general = memoryview(bytearray(self._own.general[: 8 * _GENERAL])).cast("Q")
        """KVM's general registers: what the last GHCB had in them, once there was one. In the encoder's order."""

    def __repr__(self) -> str:
        return f"ProtectedState(vcpu {self._vcpu.id})"

    def take_over(self, source: VcpuFile) -> None:
        """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: the guest's registers come here from the vCPU they were in."""
        _restore(self._vcpu.cpu, _save(source.cpu, floating=True))

    @contextmanager
    def kvms_own(self, *, keep: bool = True) -> Iterator[None]:
        """KVM's copy stands in the engine inside the block. What is written there is kept in the copy, if `keep`; without, the
        task priority stays, too.
        """
        cpu, floating = self._vcpu.cpu, not self._confidential_fpu
        guest, refuses, priority = _save(cpu, floating=floating), cpu.refuses_entry, cpu.cr8
        _restore(cpu, self._own)
        general, bytes_ = self.general.cast("B"), cpu.native.state[: 8 * _GENERAL]
        bytes_[:] = general
        try:
            yield
            if keep:
                self._own = _save(cpu, floating=floating)
                general[:] = bytes_
        finally:
            _restore(cpu, guest)
            if not keep:
                cpu.cr8 = priority
            cpu.refuses_entry, cpu.attention = refuses, True

    def begin(self) -> None:
        """The guest has its registers as it will start with them: what it writes to control registers, KVM hears of."""
        self._began = _control(self._vcpu.cpu)

    def set_xcr0(self, value: int) -> None:
        """The guest's GHCB tells KVM its XCR0."""
        self._own = self._own._replace(xcr0=value.to_bytes(8, "little"))

    def method(self, request: int, ordinary: Method) -> Method:
        """What answers `request` now, in place of the `ordinary` method."""
        if request == ioctls.KVM_SET_GUEST_DEBUG:
            return _refusing(_GUEST_DEBUG_SIZE)
        if request == ioctls.KVM_TRANSLATE:
            return self._translating(ordinary)
        if request in _FPU and self._confidential_fpu:
            read, written = _FPU[request]
            return _refusing(read) if self._refuses else _blank(read, written)
        if request in _REGISTERS and self._refuses:
            return _refusing(_REGISTERS[request])
        if request in _GETS_SREGS:
            return self._showing_control(_GETS_SREGS[request])
        if request in _SETS_SREGS:
            return self._on_kvms_own(ordinary, keep=False)
        if request in _REGISTERS or request in _FPU or request in _MSRS:
            return self._on_kvms_own(ordinary)
        return ordinary

    def hides(self, number: int) -> bool:
        """Is this MSR the guest's alone? NoSuchMsr where that ends the list of MSRs."""
        if number not in _HIDDEN_AT_ONCE and not (number in _HIDDEN_ONCE_RUN and self._vcpu.entered):
            return False
        if self._refuses:
            raise msrs.NoSuchMsr(number, known=True)
        return True

    def drops(self, number: int, value: int) -> bool:
        """Has a write of this MSR no effect? NoSuchMsr where it ends the list: KVM looks at addresses before all else."""
        if not self.hides(number):
            return False
        if number in _ADDRESSES and value >> 47 not in (0, 0x1FFFF):
            raise msrs.NoSuchMsr(number, known=True)
        return True

    def _on_kvms_own(self, ordinary: Method, *, keep: bool = True) -> Method:
        def method(arg: int, caller: Caller) -> int:
            with self.kvms_own(keep=keep):
                return ordinary(arg, caller)

        return method

    def _showing_control(self, size: int) -> Method:
        """The legacy type's KVM_GET_SREGS: what KVM has to know to run the vCPU."""

        def method(arg: int, caller: Caller) -> int:
            with self.kvms_own():
                cr0, _, _, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(sregs.pack(self._vcpu.cpu), _CONTROL_AT)
            now = zip((cr0, cr4, efer), self._began, _control(self._vcpu.cpu))
            cr0, cr4, efer = (theirs if theirs != launched else own for own, launched, theirs in now)  # KVM sees writes
            caller.memory.write(arg, (bytes(_CONTROL_AT) + _CONTROL.pack(cr0, 0, 0, cr4, cr8, efer, apic_base)).ljust(size, b"\0"))
            return 0

        return method

    def _translating(self, ordinary: Method) -> Method:
        def method(arg: int, caller: Caller) -> int:
            va = struct.unpack("<Q16x", caller.memory.read(arg, _TRANSLATION_SIZE))[0]
            with self.kvms_own():
                if not self._vcpu.cpu.registers.cr(0) >> 31 & 1:
                    return ordinary(arg, caller)
            caller.memory.write(arg, struct.pack("<QQBBB5x", va, (1 << 64) - 1, 0, 1, 0))
            return 0

        return method


def _refusing(size: int) -> Method:
    def method(arg: int, caller: Caller) -> int:
        if size:
            caller.memory.read(arg, size)
        raise Errno(errno.EINVAL)

    return method


def _blank(read: int, written: int) -> Method:
    """The legacy type's: nothing is taken, zeroes are given."""

    def method(arg: int, caller: Caller) -> int:
        if read:
            caller.memory.read(arg, read)
        if written:
            caller.memory.write(arg, bytes(written))
        return 0

    return method
