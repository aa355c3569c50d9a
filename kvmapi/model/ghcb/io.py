"""Port I/O and MMIO through the GHCB. User space sees ordinary KVM_EXIT_IO and KVM_EXIT_MMIO.

A single IN or OUT has its data in RAX. Strings and MMIO have it in the request's buffer (scratch.py), which the guest may go
on writing to: what an exit shows is what stood there when the exit was made. Source: kvm_fast_pio, kvm_sev_es_string_io and
kvm_sev_es_mmio in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.runpage import PIO_OFFSET

if TYPE_CHECKING:
    from kvmapi.model.ghcb.events import Handler
    from kvmapi.model.ghcb.page import Request
    from kvmapi.model.ghcb.scratch import Buffer
    from kvmapi.model.ghcb.unit import GhcbUnit

RAX = 0
_INT_MAX = 0x7FFFFFFF
_U64 = 0xFFFFFFFFFFFFFFFF
_MMIO_DATA_AT, _MMIO_AT_ONCE = 40, 8


# ---- ports
def _ioio(unit: GhcbUnit, request: Request) -> int | None:
    """Nobody checks that the size is 1, 2 or 4: KVM takes its three bits as a number."""
    info = request.info_1
    size, port = (info & abi.SVM_IOIO_SIZE_MASK) >> abi.SVM_IOIO_SIZE_SHIFT, info >> abi.SVM_IOIO_PORT_SHIFT & 0xFFFF
    if not size:
        return None
    reads = bool(info & abi.SVM_IOIO_TYPE_MASK)
    if info & abi.SVM_IOIO_STR_MASK:
        return _string(unit, request, size, port, reads)
    return _in(unit, size, port) if reads else _out(unit, size, port)


def _device_out(unit: GhcbUnit, port: int, data: bytes) -> bool:
    bus = unit.policy.bus
    return bus is not None and bus.write("pio", port, data)


def _device_in(unit: GhcbUnit, port: int, size: int) -> bytes | None:
    bus = unit.policy.bus
    return bus.read("pio", port, size) if bus is not None else None


def _out(unit: GhcbUnit, size: int, port: int) -> int | None:
    data = (unit.registers[RAX] & (1 << 8 * size) - 1).to_bytes(size, "little")
    if _device_out(unit, port, data):
        return None
    page = unit.cpu.page
    page.memory[PIO_OFFSET : PIO_OFFSET + size] = data
    return page.io(kvm.KVM_EXIT_IO_OUT, size, port, 1)


def _in(unit: GhcbUnit, size: int, port: int) -> int | None:
    registers, page = unit.registers, unit.cpu.page

    def done(data: bytes) -> None:
        kept = registers[RAX] & ~((1 << 8 * size) - 1) if size < 4 else 0
        registers[RAX] = kept | int.from_bytes(data, "little")

    data = _device_in(unit, port, size)
    if data is not None:
        done(data)
        return None
    page.memory[PIO_OFFSET : PIO_OFFSET + size] = bytes(size)
    unit.cpu.privileged.pending = lambda: done(bytes(page.memory[PIO_OFFSET : PIO_OFFSET + size]))
    return page.io(kvm.KVM_EXIT_IO_IN, size, port, 1)


def _string(unit: GhcbUnit, request: Request, size: int, port: int, reads: bool) -> int | None:
    count = request.info_2
    if count > _INT_MAX or count * size > _INT_MAX:
        raise Errno(errno.EINVAL)
    if not count:
        return None
    string = _String(unit, unit.buffer(request, count * size, reads), size, port, count)
    return string.ins() if reads else string.outs()


class _String:
    """A string on its way, a page at a time."""

    def __init__(self, unit: GhcbUnit, buffer: Buffer, size: int, port: int, count: int) -> None:
        self._unit, self._buffer = unit, buffer
        self._size, self._port = size, port
        self._left, self._at = count, 0  # elements, bytes

    def _next(self) -> int:
        """How many elements come next."""
        return min(PAGE // self._size, self._left)

    def _advance(self, count: int) -> None:
        self._left -= count
        self._at += count * self._size

    def outs(self) -> int | None:
        """What is left goes to a device of the VM, or to user space."""
        page, size = self._unit.cpu.page, self._size
        while self._left:
            count = self._next()
            data = self._buffer.read(self._at, count * size)
            self._advance(count)
            if not _device_out(self._unit, self._port, data[:size]):
                page.memory[PIO_OFFSET : PIO_OFFSET + len(data)] = data
                self._unit.cpu.privileged.pending = self.outs
                return page.io(kvm.KVM_EXIT_IO_OUT, size, self._port, count)
            for at in range(size, len(data), size):
                _device_out(self._unit, self._port, data[at : at + size])
        return None

    def ins(self) -> int | None:
        """What is left comes from a device of the VM, or from user space."""
        page, size = self._unit.cpu.page, self._size
        while self._left:
            count = self._next()
            first = _device_in(self._unit, self._port, size)
            if first is None:
                page.memory[PIO_OFFSET : PIO_OFFSET + count * size] = bytes(count * size)
                self._unit.cpu.privileged.pending = self._ins_done
                return page.io(kvm.KVM_EXIT_IO_IN, size, self._port, count)
            rest = (_device_in(self._unit, self._port, size) or bytes(size) for _ in range(count - 1))
            self._buffer.write(self._at, first + b"".join(rest))
            self._advance(count)
        return None

    def _ins_done(self) -> int | None:
        count = self._next()
        self._buffer.write(self._at, bytes(self._unit.cpu.page.memory[PIO_OFFSET : PIO_OFFSET + count * self._size]))
        self._advance(count)
        return self.ins()


# ---- memory without memory
def _mmio(unit: GhcbUnit, request: Request) -> int | None:
    writes, length = request.code == abi.SVM_VMGEXIT_MMIO_WRITE, request.info_2
    if not length:
        return None
    if unit.sev.ghcb_version >= abi.GHCB_PROTOCOL_MAX and length > _MMIO_AT_ONCE:
        unit.malformed(abi.GHCB_ERR_INVALID_INPUT)
        return None
    access = _Mmio(unit, unit.buffer(request, length, not writes), request.info_1, length)
    return access.store() if writes else access.load()


class _Mmio:
    """An access on its way. What a device of the VM does not answer goes to user space, all the rest with it."""

    def __init__(self, unit: GhcbUnit, buffer: Buffer, gpa: int, length: int) -> None:
        self._unit, self._buffer = unit, buffer
        self._gpa, self._at, self._left = gpa, 0, length
        self._devices = True

    def _advance(self, size: int) -> None:
        self._gpa = self._gpa + size & _U64
        self._at, self._left = self._at + size, self._left - size

    def store(self) -> int | None:
        cpu = self._unit.cpu
        while self._left:
            gpa, data = self._gpa, self._buffer.read(self._at, min(self._left, _MMIO_AT_ONCE))
            self._advance(len(data))
            self._devices = self._devices and cpu.device_write(gpa, data)
            if not self._devices:
                cpu.privileged.pending = self.store
                return cpu.page.mmio(gpa, data, is_write=True)
        return None

    def load(self) -> int | None:
        cpu = self._unit.cpu
        while self._left:
            size = min(self._left, _MMIO_AT_ONCE)
            answer = cpu.device_read(self._gpa, size) if self._devices else None
            if answer is None:
                self._devices = False
                cpu.privileged.pending = self._answered
                return cpu.page.mmio(self._gpa, bytes(size), is_write=False)
            self._buffer.write(self._at, answer)
            self._advance(size)
        return None

    def _answered(self) -> int | None:
        size = min(self._left, _MMIO_AT_ONCE)
        self._buffer.write(self._at, bytes(self._unit.cpu.page.memory[_MMIO_DATA_AT : _MMIO_DATA_AT + size]))
        self._advance(size)
        return self.load()


HANDLERS: dict[int, Handler] = {
    abi.SVM_EXIT_IOIO: _ioio,
    abi.SVM_VMGEXIT_MMIO_READ: _mmio,
    abi.SVM_VMGEXIT_MMIO_WRITE: _mmio,
}
