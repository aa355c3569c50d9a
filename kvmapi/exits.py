"""From kvm_run to a typed exit: `decode(run_map, errno)`, the one place that reads the exit union.

The mapping is shared with the kernel (or the model), so every value is fetched once, checked, and copied; an
offset or a length that points outside raises `ExitError` instead of reading elsewhere.

KVM_RUN's errno decides first. 0: the reason is valid. EFAULT or EHWPOISON with reason MEMORY_FAULT: that exit.
EINTR: `Intr`, whatever the reason says. Anything else: the reason is stale, and the result is `RunFailed`.
Source: Documentation/virt/kvm/api.rst, KVM_CAP_MEMORY_FAULT_INFO.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from errno import EFAULT, EINTR

from kvmapi.abi import kvm
from kvmapi.abi.run import EXIT_UNION_OFFSET, EXIT_UNION_SIZE, kvm_run
from kvmapi.errors import ExitError
from kvmapi.exit_types import (
    ApResetHold,
    BusLock,
    Debug,
    DirtyRingFull,
    ExceptionExit,
    Exit,
    FailEntry,
    Hlt,
    Hypercall,
    Hyperv,
    InternalError,
    Intr,
    Io,
    IoapicEoi,
    IrqWindowOpen,
    MemoryFault,
    Mmio,
    Nmi,
    Notify,
    Rdmsr,
    RunFailed,
    SetTpr,
    Shutdown,
    SnpReqCerts,
    SystemEvent,
    Tdx,
    TprAccess,
    Unknown,
    UnknownHardware,
    Wrmsr,
    Xen,
)
from kvmapi.words import EHWPOISON

__all__ = [
    "ApResetHold",
    "BusLock",
    "Debug",
    "DirtyRingFull",
    "ExceptionExit",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "Hyperv",
    "InternalError",
    "Intr",
    "Io",
    "IoapicEoi",
    "IrqWindowOpen",
    "MemoryFault",
    "Mmio",
    "Nmi",
    "Notify",
    "Rdmsr",
    "RunFailed",
    "SetTpr",
    "Shutdown",
    "SnpReqCerts",
    "SystemEvent",
    "Tdx",
    "TprAccess",
    "Unknown",
    "UnknownHardware",
    "Wrmsr",
    "Xen",
    "decode",
]

Mapping = mmap.mmap | bytearray | memoryview

_U = EXIT_UNION_OFFSET
_REASON = struct.Struct("<I")
_REASON_OFFSET = kvm_run.exit_reason.offset
_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8sIB")
_HYPERCALL = struct.Struct("<9Q")
_HYPERCALL_FLAGS = 0xFFFF_FFFF  # older kernels write only `longmode`, the low half; the rest was padding
_MSR = struct.Struct("<B7xIIQ")
_FAULT = struct.Struct("<QQQ")
_MEMORY_FAULT, _WITH_MEMORY_FAULT = kvm.KVM_EXIT_MEMORY_FAULT, (EFAULT, EHWPOISON)


def _io(run: Mapping) -> Exit:
    direction, size, port, count, offset = _IO.unpack_from(run, _U)
    length = size * count
    # An SEV-ES guest can ask for 3, 5, 6 or 7 bytes: KVM takes the GHCB's size bits as they are.
    if not 1 <= size <= 8 or offset < _U + EXIT_UNION_SIZE or offset + length > len(run):
        raise ExitError(
            f"IO exit on port {port:#x}: {count} items of {size} bytes at offset {offset:#x} of a {len(run):#x}-byte kvm_run mapping"
        )
    is_out = direction == kvm.KVM_EXIT_IO_OUT
    return Io(port, size, count, is_out, bytes(run[offset : offset + length]) if is_out else b"", offset)


def access(run: Mapping) -> tuple[int, int, bool, bytes]:
    """Address, length, direction and data of an MMIO-like exit."""
    address, data, length, is_write = _MMIO.unpack_from(run, _U)
    if not 1 <= length <= 8:
        raise ExitError(f"MMIO exit at {address:#x} with a length of {length} bytes")
    return address, length, bool(is_write), data[:length] if is_write else b""


def _hypercall(run: Mapping) -> Exit:
    nr, *args, ret, flags = _HYPERCALL.unpack_from(run, _U)
    return Hypercall(nr, tuple(args), ret, flags & _HYPERCALL_FLAGS)


def _words(run: Mapping, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", run, _U + offset)


def _internal_error(run: Mapping) -> Exit:
    suberror, ndata = struct.unpack_from("<II", run, _U)
    data = _words(run, 8, min(ndata, 16))
    insn = b""
    if suberror == kvm.KVM_INTERNAL_ERROR_EMULATION and ndata >= 3:
        flags, size, insn_bytes = struct.unpack_from("<QB15s", run, _U + 8)
        if flags & kvm.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            insn = insn_bytes[: min(size, 15)]
    return InternalError(suberror, data, insn)


def _system_event(run: Mapping) -> Exit:
    kind, ndata = struct.unpack_from("<II", run, _U)
    return SystemEvent(kind, _words(run, 8, min(ndata, 16)))


def _hyperv(run: Mapping) -> Exit:
    (kind,) = struct.unpack_from("<I", run, _U)
    layouts = {
        kvm.KVM_EXIT_HYPERV_SYNIC: "<I4xQQQ",
        kvm.KVM_EXIT_HYPERV_HCALL: "<QQQQ",
        kvm.KVM_EXIT_HYPERV_SYNDBG: "<I4xQQQQQ",
    }
    return Hyperv(kind, struct.unpack_from(layouts.get(kind, "<7Q"), run, _U + 8))


def _xen(run: Mapping) -> Exit:
    kind, longmode, cpl, number, _result, *params = struct.unpack_from("<I4xIIQQ6Q", run, _U)
    return Xen(kind, longmode, cpl, number, tuple(params))


def _tdx(run: Mapping) -> Exit:
    flags, nr, ret, *data = _words(run, 0, 8)
    return Tdx(flags, nr, ret, tuple(data))


def _rdmsr(run: Mapping) -> Exit:
    _error, reason, index, _data = _MSR.unpack_from(run, _U)
    return Rdmsr(index, reason)


def _wrmsr(run: Mapping) -> Exit:
    _error, reason, index, data = _MSR.unpack_from(run, _U)
    return Wrmsr(index, data, reason)


def plain(make: Callable[..., Exit], layout: str) -> Callable[[Mapping], Exit]:
    """A decoder for an exit whose fields lie in the union in the dataclass's order."""
    fields = struct.Struct("<" + layout)

    def decoder(run: Mapping) -> Exit:
        return make(*fields.unpack_from(run, _U))

    return decoder


def constant(exit: Exit) -> Callable[[Mapping], Exit]:
    """A decoder for an exit without data."""

    def decoder(_run: Mapping) -> Exit:
        return exit

    return decoder


_DECODERS: dict[int, Callable[[Mapping], Exit]] = {
    kvm.KVM_EXIT_UNKNOWN: plain(UnknownHardware, "Q"),
    kvm.KVM_EXIT_EXCEPTION: plain(ExceptionExit, "II"),
    kvm.KVM_EXIT_IO: _io,
    kvm.KVM_EXIT_HYPERCALL: _hypercall,
    kvm.KVM_EXIT_DEBUG: plain(Debug, "I4xQQQ"),
    kvm.KVM_EXIT_HLT: constant(Hlt()),
    kvm.KVM_EXIT_MMIO: lambda run: Mmio(*access(run)),
    kvm.KVM_EXIT_IRQ_WINDOW_OPEN: constant(IrqWindowOpen()),
    kvm.KVM_EXIT_SHUTDOWN: constant(Shutdown()),
    kvm.KVM_EXIT_FAIL_ENTRY: plain(FailEntry, "QI"),
    kvm.KVM_EXIT_INTR: constant(Intr()),
    kvm.KVM_EXIT_SET_TPR: constant(SetTpr()),
    kvm.KVM_EXIT_TPR_ACCESS: plain(lambda rip, write: TprAccess(rip, bool(write)), "QI"),
    kvm.KVM_EXIT_NMI: constant(Nmi()),
    kvm.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    kvm.KVM_EXIT_SYSTEM_EVENT: _system_event,
    kvm.KVM_EXIT_IOAPIC_EOI: plain(IoapicEoi, "B"),
    kvm.KVM_EXIT_HYPERV: _hyperv,
    kvm.KVM_EXIT_X86_RDMSR: _rdmsr,
    kvm.KVM_EXIT_X86_WRMSR: _wrmsr,
    kvm.KVM_EXIT_DIRTY_RING_FULL: constant(DirtyRingFull()),
    kvm.KVM_EXIT_AP_RESET_HOLD: constant(ApResetHold()),
    kvm.KVM_EXIT_X86_BUS_LOCK: constant(BusLock()),
    kvm.KVM_EXIT_XEN: _xen,
    kvm.KVM_EXIT_NOTIFY: plain(Notify, "I"),
    kvm.KVM_EXIT_MEMORY_FAULT: plain(lambda flags, gpa, size: MemoryFault(flags, gpa, size, 0), "QQQ"),
    kvm.KVM_EXIT_TDX: _tdx,
    kvm.KVM_EXIT_SNP_REQ_CERTS: plain(SnpReqCerts, "QQ"),
}

_INTR = Intr()


def _other_architecture(reason: int) -> Callable[[Mapping], Exit] | None:
    """Decoders for other architectures are loaded only when such an exit is met: they cost 5 ms of start-up."""
    from kvmapi.exits_other import DECODERS

    return DECODERS.get(reason)


def decode(run_map: Mapping, errno: int = 0) -> Exit:
    """The exit in a mapping of kvm_run, given the errno with which KVM_RUN returned (0 if it succeeded).

    Raises `ExitError` if kvm_run contradicts itself.

    >>> from kvmapi.abi.run import kvm_run
    >>> page = bytearray(8192)
    >>> kvm_run.from_buffer(page).exit_reason = 5
    >>> decode(page).name
    'HLT'
    """
    (reason,) = _REASON.unpack_from(run_map, _REASON_OFFSET)
    if errno:
        if reason == _MEMORY_FAULT and errno in _WITH_MEMORY_FAULT:
            flags, gpa, size = _FAULT.unpack_from(run_map, _U)
            return MemoryFault(flags, gpa, size, errno)
        return _INTR if errno == EINTR else RunFailed(errno)
    decoder = _DECODERS.get(reason) or _other_architecture(reason)
    if decoder is None:
        return Unknown(reason, bytes(run_map[_U : _U + EXIT_UNION_SIZE]))
    return decoder(run_map)
