"""`Vcpu`: a virtual CPU's fd and its kvm_run page. `run()` is the hot path: one call of the host, one comparison."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from errno import EFAULT, EINTR, EINVAL
from typing import TypeVar

from kvmapi.abi import ioctls
from kvmapi.abi import vcpu as v
from kvmapi.abi.run import kvm_run
from kvmapi.abi.structs import kvm_enable_cap
from kvmapi.buffers import HeaderAndEntries
from kvmapi.descriptor import Descriptor
from kvmapi.errors import KvmError
from kvmapi.exits import Exit, Io, Mmio, decode
from kvmapi.host import Host
from kvmapi.words import EHWPOISON

T = TypeVar("T", bound=ctypes.Structure)

_RETURNED = frozenset({-EINTR, -EFAULT, -EHWPOISON})
_RUN = ioctls.KVM_RUN
_IMMEDIATE_EXIT = kvm_run.immediate_exit.offset


class Vcpu(Descriptor):
    """A vCPU. `run_map` is the mapping of kvm_run, `kvm_run` the struct over it."""

    on = "vcpu"

    def __init__(self, host: Host, fd: int, id: int, mmap_size: int) -> None:
        super().__init__(host, fd)
        self.id = id
        self._ioctl = host.ioctl
        try:
            self.run_map = host.mmap(fd, mmap_size)
        except OSError as error:
            self.close()
            raise self.call_error("mmap", error, length=mmap_size) from error
        self.kvm_run = kvm_run.from_buffer(self.run_map)

    def close(self) -> None:
        """Unmap kvm_run and close the fd. A reference to `kvm_run` that someone still holds keeps the page mapped."""
        self.__dict__.pop("kvm_run", None)
        run_map = self.__dict__.get("run_map")
        if run_map is not None:
            try:
                run_map.close()
            except BufferError:  # someone looks at the page; it goes when they let go
                pass
        super().close()

    # --- running

    def run(self) -> int:
        """Run the guest until it exits. 0, or EINTR, EFAULT or EHWPOISON as KVM_RUN returned them; others raise.

        With EFAULT and EHWPOISON the exit may be MEMORY_FAULT; pass the value on to `exit`.
        """
        result = self._ioctl(self.fd, _RUN, 0)
        if result >= 0:
            return 0
        if result in _RETURNED:
            return -result
        raise self.error(_RUN, -result)

    def exit(self, errno: int = 0) -> Exit:
        """The exit that is now in kvm_run; `errno` is what `run` returned."""
        return decode(self.run_map, errno)

    def request_exit(self, on: bool = True) -> None:
        """Make the next KVM_RUN return EINTR at once (kvm_run.immediate_exit). Safe from a signal handler or thread;
        a vCPU that is in the guest already needs a signal as well.
        """
        self.run_map[_IMMEDIATE_EXIT] = 1 if on else 0

    def answer_io(self, exit: Io, data: bytes) -> None:
        """Give an IN exit its data: `size * count` bytes."""
        if len(data) != exit.size * exit.count:
            raise ValueError(f"IO exit wants {exit.size * exit.count} bytes, got {len(data)}")
        self.run_map[exit.data_offset : exit.data_offset + len(data)] = data

    def answer_mmio(self, exit: Mmio, data: bytes) -> None:
        """Give an MMIO read its data: `length` bytes."""
        if len(data) != exit.length:
            raise ValueError(f"MMIO exit wants {exit.length} bytes, got {len(data)}")
        start = kvm_run.mmio.offset + 8
        self.run_map[start : start + len(data)] = data

    def answer_hypercall(self, result: int) -> None:
        """Give a hypercall its result (a negative errno for the guest, or 0)."""
        self.kvm_run.hypercall.ret = result & 0xFFFF_FFFF_FFFF_FFFF

    def answer_msr(self, data: int = 0, error: bool = False) -> None:
        """Give an RDMSR its value; with `error`, a RDMSR or WRMSR becomes #GP in the guest."""
        msr = self.kvm_run.msr
        msr.data = data
        msr.error = 1 if error else 0

    # --- registers

    def _get(self, request: int, struct: type[T]) -> T:
        value = struct()
        self.ioctl(request, value)
        return value

    def get_regs(self) -> v.kvm_regs:
        """General registers, RIP and RFLAGS."""
        return self._get(ioctls.KVM_GET_REGS, v.kvm_regs)

    def set_regs(self, regs: v.kvm_regs) -> None:
        """Write the general registers."""
        self.ioctl(ioctls.KVM_SET_REGS, regs)

    def get_sregs(self) -> v.kvm_sregs:
        """Segments, descriptor tables, control registers, EFER."""
        return self._get(ioctls.KVM_GET_SREGS, v.kvm_sregs)

    def set_sregs(self, sregs: v.kvm_sregs) -> None:
        """Write them."""
        self.ioctl(ioctls.KVM_SET_SREGS, sregs)

    def get_fpu(self) -> v.kvm_fpu:
        """x87 and SSE state."""
        return self._get(ioctls.KVM_GET_FPU, v.kvm_fpu)

    def set_fpu(self, fpu: v.kvm_fpu) -> None:
        """Write x87 and SSE state."""
        self.ioctl(ioctls.KVM_SET_FPU, fpu)

    def get_xcrs(self) -> v.kvm_xcrs:
        """Extended control registers."""
        return self._get(ioctls.KVM_GET_XCRS, v.kvm_xcrs)

    def set_xcrs(self, xcrs: v.kvm_xcrs) -> None:
        """Write extended control registers."""
        self.ioctl(ioctls.KVM_SET_XCRS, xcrs)

    def get_xsave(self) -> v.kvm_xsave:
        """Extended state, 4 KiB."""
        return self._get(ioctls.KVM_GET_XSAVE, v.kvm_xsave)

    def set_xsave(self, xsave: v.kvm_xsave) -> None:
        """Write extended state."""
        self.ioctl(ioctls.KVM_SET_XSAVE, xsave)

    def get_debugregs(self) -> v.kvm_debugregs:
        """The guest's debug registers."""
        return self._get(ioctls.KVM_GET_DEBUGREGS, v.kvm_debugregs)

    def set_debugregs(self, debugregs: v.kvm_debugregs) -> None:
        """Write the guest's debug registers."""
        self.ioctl(ioctls.KVM_SET_DEBUGREGS, debugregs)

    def get_vcpu_events(self) -> v.kvm_vcpu_events:
        """Pending exceptions, interrupts, NMI and SMI."""
        return self._get(ioctls.KVM_GET_VCPU_EVENTS, v.kvm_vcpu_events)

    def set_vcpu_events(self, events: v.kvm_vcpu_events) -> None:
        """Write them."""
        self.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        state: int = self._get(ioctls.KVM_GET_MP_STATE, v.kvm_mp_state).mp_state
        return state

    def set_mp_state(self, state: int) -> None:
        """Write KVM_MP_STATE_*."""
        self.ioctl(ioctls.KVM_SET_MP_STATE, v.kvm_mp_state(state))

    # --- MSRs and CPUID

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values of the given MSRs. Raises `KvmError` naming the first that KVM does not know."""
        return self._msrs(ioctls.KVM_GET_MSRS, [(index, 0) for index in indices])

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write MSRs, in order. Raises `KvmError` naming the first that KVM refuses; those before it are written."""
        self._msrs(ioctls.KVM_SET_MSRS, list(values.items()))

    def _msrs(self, request: int, values: Sequence[tuple[int, int]]) -> dict[int, int]:
        argument = HeaderAndEntries(v.kvm_msrs, v.kvm_msr_entry, len(values))
        argument.header.nmsrs = len(values)
        for entry, (index, data) in zip(argument.entries, values):
            entry.index, entry.data = index, data
        done = self.ioctl(request, argument.header)
        if done < len(values):
            name = "KVM_GET_MSRS" if request == ioctls.KVM_GET_MSRS else "KVM_SET_MSRS"
            raise KvmError(
                name,
                EINVAL,
                {"msr": hex(values[done][0]), "done": done, "nmsrs": len(values)},
                hint="KVM does not know this MSR on this vCPU, or refuses the value; CPUID must be set first",
            )
        return {entry.index: entry.data for entry in argument.entries}

    def set_cpuid2(self, entries: Sequence[v.kvm_cpuid_entry2]) -> None:
        """Choose what CPUID says; set it before MSRs and before the first run."""
        argument = HeaderAndEntries(v.kvm_cpuid2, v.kvm_cpuid_entry2, len(entries))
        argument.header.nent = len(entries)
        size = ctypes.sizeof(v.kvm_cpuid_entry2)
        for i, entry in enumerate(entries):
            ctypes.memmove(ctypes.addressof(argument.entries[0]) + i * size, ctypes.addressof(entry), size)
        self.ioctl(ioctls.KVM_SET_CPUID2, argument.header)

    # --- the rest

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP on this vCPU."""
        argument = kvm_enable_cap(cap=cap, flags=flags)
        for i, arg in enumerate(args):
            argument.args[i] = arg
        return self.ioctl(ioctls.KVM_ENABLE_CAP, argument)

    def translate(self, gva: int) -> int | None:
        """The GPA that the guest's page tables give a virtual address, or None. Without the C-bit."""
        argument = v.kvm_translation(linear_address=gva)
        self.ioctl(ioctls.KVM_TRANSLATE, argument)
        return int(argument.physical_address) if argument.valid else None

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt (only without an in-kernel APIC)."""
        self.ioctl(ioctls.KVM_INTERRUPT, v.kvm_interrupt(vector))

    def nmi(self) -> None:
        """Inject a non-maskable interrupt."""
        self.ioctl(ioctls.KVM_NMI)

    def get_lapic(self) -> v.kvm_lapic_state:
        """The in-kernel local APIC's registers, as its MMIO page shows them."""
        return self._get(ioctls.KVM_GET_LAPIC, v.kvm_lapic_state)

    def set_lapic(self, state: v.kvm_lapic_state) -> None:
        """Write them."""
        self.ioctl(ioctls.KVM_SET_LAPIC, state)

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* and, for hardware breakpoints, DR0..DR7."""
        argument = v.kvm_guest_debug(control=control)
        for i, value in enumerate(debugreg):
            argument.arch.debugreg[i] = value
        self.ioctl(ioctls.KVM_SET_GUEST_DEBUG, argument)

    def pre_fault(self, gpa: int, size: int) -> tuple[int, int]:
        """Map [gpa, gpa+size) ahead of time. Returns what is left to do as (gpa, size); size 0 means all is done."""
        argument = v.kvm_pre_fault_memory(gpa=gpa, size=size)
        self.ioctl(ioctls.KVM_PRE_FAULT_MEMORY, argument)
        return argument.gpa, argument.size
