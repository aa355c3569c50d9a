"""The devices a guest can reach: ports, MMIO registers, one MSR (docs/seams.md §4).

A port handler is called as `handler(port, size, count, data, out)`: `count` items of `size` bytes, for OUT to be read from `data`, for
IN to be written into it; `data` is a view of the vCPU's kvm_run page, valid during the call only. MMIO and MSR handlers get and give
values.

The run loop does not call handlers directly: `PortBus.bind` gives it a call without arguments for one kind of access, good for
`BOUND_CALLS` calls. A device that is on the hot path (the console) binds something shorter than its handler.

Invariants
- no device keeps more for a guest than a fixed amount: the console stops keeping at `CONSOLE_LIMIT` and says so, unknown accesses are
  counted, not remembered;
- a device never raises for what a guest does;
- a console or exit device may be used by several vCPUs at once: each operation below is one bytecode that Python does atomically
  (bytearray.extend, dict assignment), or takes a lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

PortHandler = Callable[[int, int, int, memoryview, bool], None]

CONSOLE_PORT, CONSOLE_LSR, EXIT_PORT, ECHO_PORT, STAGE_PORT = 0x3F8, 0x3FD, 0xF4, 0xF8, 0xF9
CONSOLE_LIMIT = 1 << 20
"""Bytes of console output kept; a guest may print more, but not make us remember it."""

BOUND_CALLS = 8192
"""How often a bound access may be called before it must be bound anew; what a device checked when it was bound holds for so long."""

LSR_READY = 0x60  # transmitter holding register and shift register empty
MMIO_REGISTERS = 8
_LINE = 4096
_PATIENCE = 0.2  # seconds


class GuestStop(Exception):
    """A device ends the run: the guest wrote `code` to the exit device."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the guest exited with code {code}")
        self.code = code


class Console:
    """The serial console: collects bytes, and hands them to `sink` line by line when there is one.

    A guest that draws on a terminal ends no lines: what has waited for `_PATIENCE` goes out with the next byte, line or not.

    `text()` decodes what was kept as UTF-8, replacing what is not. `dropped` counts the bytes beyond the limit; the sink gets them all.
    """

    def __init__(self, sink: Callable[[bytes], None] | None = None, limit: int = CONSOLE_LIMIT) -> None:
        self.data = bytearray()
        self.dropped = 0
        self.limit = limit
        self._sink = sink
        self._line = bytearray()
        self._since = 0.0
        self._lock = threading.Lock()

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """The transmit register. IN reads the receive register: nothing ever comes, 0."""
        if not out:
            data[:] = bytes(len(data))
            return
        kept = self.data
        if len(kept) + len(data) <= self.limit:
            kept += data
        else:
            self._overflow(data)
        if self._sink is not None:
            self._feed(data, self._sink)

    def bind(self, size: int, count: int, data: memoryview, out: bool) -> Callable[[], None] | None:
        """The shortest way to keep one byte: no check and no attribute, as every memory access counts right after a VM exit.

        Half of the limit free is room for `BOUND_CALLS` bytes of 64 vCPUs, so the limit needs no look until the next binding.
        """
        if not out or size * count != 1 or self._sink is not None or len(self.data) > self.limit // 2:
            return None
        append = self.data.append

        def keep() -> None:
            append(data[0])

        return keep

    def flush(self) -> None:
        """Hand an unfinished line to the sink."""
        with self._lock:
            line, self._line = bytes(self._line), bytearray()
        if line and self._sink is not None:
            self._sink(line)

    def text(self) -> str:
        """What was kept, as text."""
        return self.data.decode("utf-8", "replace")

    def notes(self) -> list[str]:
        """A sentence if output was dropped."""
        return [f"console output beyond {self.limit} bytes was not kept ({self.dropped} bytes)"] if self.dropped else []

    def _overflow(self, data: memoryview) -> None:
        with self._lock:
            room = max(0, self.limit - len(self.data))
            self.data += data[:room]
            self.dropped += len(data) - room

    def _feed(self, data: memoryview, sink: Callable[[bytes], None]) -> None:
        with self._lock:
            if not self._line:
                self._since = time.monotonic()
            self._line += data
            if self._line[-1] != 10 and len(self._line) < _LINE and time.monotonic() - self._since < _PATIENCE:
                return
            line, self._line = bytes(self._line), bytearray()
        sink(line)


class ExitDevice:
    """32-bit OUT to 0xF4 ends the run; the guest's code is the value modulo 256. Other widths mean the same, with fewer bits."""

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Raises `GuestStop` for OUT; IN reads zeroes."""
        if out:
            raise GuestStop(data[0])
        data[:] = bytes(len(data))


class EchoDevice:
    """Remembers an OUT of 1, 2 or 4 bytes; an IN of the same width returns it plus one; string IN of bytes returns A, B, C, ..."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """One access; of a string OUT the last item is remembered."""
        if out:
            self._last[size] = int.from_bytes(data[-size:], "little")
        elif count > 1:
            data[:] = bytes(0x41 + i % 26 for i in range(len(data)))
        else:
            value = self._last.get(size, 0) + 1 & (1 << 8 * size) - 1
            data[:] = value.to_bytes(size, "little")


class StageDevice:
    """Byte OUT to 0xF9: the guest says how far it has come; `on_stage` (if any) runs while the vCPU that said so is stopped."""

    def __init__(self, on_stage: Callable[[int], None] | None = None) -> None:
        self.stages: list[int] = []
        self.on_stage = on_stage

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Remember the stage (the last 256 of them) and call the hook."""
        if not out:
            data[:] = bytes(len(data))
            return
        del self.stages[:-255]
        self.stages.append(data[0])
        if self.on_stage is not None:
            self.on_stage(data[0])


class PortBus:
    """Which device answers which port. Unknown ports read as all ones, writes to them are ignored; both are counted."""

    def __init__(self) -> None:
        self.handlers: dict[int, PortHandler] = {}
        self.unknown = 0

    def add(self, port: int, handler: PortHandler) -> None:
        """Attach a handler; raises ValueError when the port is taken."""
        if port in self.handlers:
            raise ValueError(f"port {port:#x} has a device already")
        self.handlers[port] = handler

    def find(self, port: int) -> PortHandler:
        """The handler of `port`, the one for unknown ports if there is none."""
        return self.handlers.get(port, self._nobody)

    def bind(self, port: int, size: int, count: int, data: memoryview, out: bool) -> Callable[[], None]:
        """A call that makes this access with what is in `data` then; good for `BOUND_CALLS` calls."""
        handler = self.find(port)
        bind = getattr(getattr(handler, "__self__", None), "bind", None)
        short: Callable[[], None] | None = bind(size, count, data, out) if bind is not None and bind != self.bind else None
        return short or partial(handler, port, size, count, data, out)

    def _nobody(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        self.unknown += 1
        if not out:
            data[:] = b"\xff" * len(data)


def line_status(port: int, size: int, count: int, data: memoryview, out: bool) -> None:
    """The serial port's line status register: always ready to send, nothing to receive."""
    if not out:
        data[:] = bytes([LSR_READY]) * len(data)


class MmioRegisters:
    """Eight 64-bit registers at the hole that remember what is written; elsewhere reads give all ones, writes are ignored and counted."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.unknown = 0
        self._bytes = bytearray(8 * MMIO_REGISTERS)

    def read(self, gpa: int, length: int, vcpu: int = 0) -> bytes:
        """`length` bytes at `gpa`, the same for every vCPU."""
        at = gpa - self.base
        if not 0 <= at <= len(self._bytes) - length:
            self.unknown += 1
            return b"\xff" * length
        return bytes(self._bytes[at : at + length])

    def write(self, gpa: int, data: bytes, vcpu: int = 0) -> None:
        """Remember `data` at `gpa`."""
        at = gpa - self.base
        if 0 <= at <= len(self._bytes) - len(data):
            self._bytes[at : at + len(data)] = data
        else:
            self.unknown += 1


class MsrDevice:
    """One MSR: a read returns what was written last plus one, so that a guest sees that somebody answered. Other MSRs are refused (#GP)."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._value = 0

    def read(self, index: int) -> int | None:
        """The value, or None for an MSR that is not here."""
        return self._value + 1 & (1 << 64) - 1 if index == self.index else None

    def write(self, index: int, value: int) -> bool:
        """Whether the MSR is here; if so it now holds `value`."""
        if index != self.index:
            return False
        self._value = value
        return True


class MmioDevice(Protocol):
    """What answers MMIO exits. `unknown` counts the accesses that nobody answered."""

    unknown: int

    def read(self, gpa: int, length: int, vcpu: int = 0) -> bytes:
        """`length` bytes at `gpa` as the vCPU with id `vcpu` sees them."""
        ...

    def write(self, gpa: int, data: bytes, vcpu: int = 0) -> None:
        """`data` written at `gpa` by `vcpu`."""
        ...


class Devices:
    """All devices of one machine, wired to their ports. `foreign`: without the console, which `vmm.pc` puts behind a whole serial port."""

    def __init__(self, mmio_base: int, msr: int, sink: Callable[[bytes], None] | None = None, foreign: bool = False) -> None:
        self.console = Console(sink)
        self.stage = StageDevice()
        self.mmio: MmioDevice = MmioRegisters(mmio_base)
        self.msr = MsrDevice(msr)
        self.ports = PortBus()
        if not foreign:
            self.ports.add(CONSOLE_PORT, self.console.port)
            self.ports.add(CONSOLE_LSR, line_status)
        self.ports.add(EXIT_PORT, ExitDevice().port)
        self.ports.add(ECHO_PORT, EchoDevice().port)
        self.ports.add(STAGE_PORT, self.stage.port)

    def notes(self) -> list[str]:
        """What a person should know about the devices after a run."""
        notes = self.console.notes()
        unknown = self.ports.unknown + self.mmio.unknown
        if unknown:
            notes.append(f"{unknown} accesses to ports or MMIO addresses that no device answers")
        return notes
