"""What a PC guest tells the time by: the 8254 timer's three channels with port 0x61, and the ACPI power management timer.

Both only count; nobody interrupts. Time is the host's monotonic clock, read when the guest asks, so a stopped guest costs nothing and a
slow one sees time pass faster than its instructions.

8254: Intel 8254 data sheet, modes 0, 2 and 3, LSB/MSB access, counter latch; other modes count as mode 0, BCD as binary. Port 0x61: gate of
channel 2 (bit 0), speaker (bit 1), a bit that toggles every 15 us (4), channel 2's output (5). PM timer: ACPI 6.5, section 4.8.3.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PIT_HZ, PM_HZ = 1193182, 3579545
PIT_PORTS, CONTROL, GATE_PORT, PM_PORT = range(0x40, 0x43), 0x43, 0x61, 0x608
_REFRESH_HZ = 66287
_LOW, _HIGH, _BOTH = 1, 2, 3

Clock = Callable[[], float]


class Channel:
    """One counter of the 8254. `now` gives seconds."""

    def __init__(self, now: Clock) -> None:
        self.now = now
        self.reload = 0x10000
        self.mode = 3
        self.access = _BOTH
        self.gate = True
        self._start = now()
        self._low: int | None = None  # first byte of a two-byte load
        self._latched: int | None = None
        self._high_next = False

    def control(self, value: int) -> None:
        """A control word for this channel: access 0 latches the count, else a new mode begins."""
        access = value >> 4 & 3
        if access == 0:
            if self._latched is None:
                self._latched = self.count()
            return
        self.access = access
        mode = value >> 1 & 7
        self.mode = mode & 3 if mode & 2 else mode
        self._low = self._latched = None
        self._high_next = False
        self._start = self.now()

    def set_gate(self, gate: bool) -> None:
        """A rising gate starts the count again."""
        if gate and not self.gate:
            self._start = self.now()
        self.gate = gate

    def write(self, value: int) -> None:
        """One byte of the reload value; the count starts when it is complete."""
        if self.access == _BOTH and self._low is None:
            self._low = value
            return
        new = {_LOW: value, _HIGH: value << 8, _BOTH: value << 8 | (self._low or 0)}[self.access]
        self.reload = new or 0x10000
        self._low = None
        self._start = self.now()

    def read(self) -> int:
        """One byte of the latched or the current count."""
        count = self.count() if self._latched is None else self._latched
        high = self.access == _HIGH or (self.access == _BOTH and self._high_next)
        self._high_next = self.access == _BOTH and not high
        if not self._high_next:
            self._latched = None
        return count >> 8 & 0xFF if high else count & 0xFF

    def ticks(self) -> int:
        """Ticks since the count began; none pass while the gate is closed."""
        return int((self.now() - self._start) * PIT_HZ) if self.gate else 0

    def count(self) -> int:
        """The counter, 16 bits."""
        ticks = self.ticks()
        if self.mode in (2, 3):
            ticks %= self.reload
        return self.reload - ticks & 0xFFFF

    def output(self) -> bool:
        """The output pin: mode 3 is a square wave, mode 2 is low for one tick, otherwise high when the count has been reached."""
        ticks = self.ticks()
        if self.mode == 3:
            return ticks % self.reload < (self.reload + 1) // 2
        if self.mode == 2:
            return ticks % self.reload != self.reload - 1
        return ticks >= self.reload


class Pit:
    """The 8254 and port 0x61."""

    def __init__(self, now: Clock = time.perf_counter) -> None:
        self.now = now
        self.channels = [Channel(now) for _ in PIT_PORTS]
        self.channels[2].gate = False
        self._speaker = 0

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Ports 0x40 to 0x43: the counters and the control word. A read-back command (channel 3) latches the counts it names."""
        for at in range(len(data)):
            if port == CONTROL:
                if out:
                    self._control(data[at])
                else:
                    data[at] = 0xFF
            elif out:
                self.channels[port - PIT_PORTS.start].write(data[at])
            else:
                data[at] = self.channels[port - PIT_PORTS.start].read()

    def gate(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Port 0x61."""
        if out:
            self._speaker = data[-1] & 2
            self.channels[2].set_gate(bool(data[-1] & 1))
            return
        refresh = int(self.now() * _REFRESH_HZ) & 1
        value = int(self.channels[2].gate) | self._speaker | refresh << 4 | self.channels[2].output() << 5
        data[:] = bytes([value]) * len(data)

    def _control(self, value: int) -> None:
        if value >> 6 < 3:
            self.channels[value >> 6].control(value)
        elif not value & 0x20:
            for number, channel in enumerate(self.channels):
                if value >> number + 1 & 1:
                    channel.control(0)


class PmTimer:
    """The 24-bit power management timer."""

    def __init__(self, now: Clock = time.perf_counter) -> None:
        self.now = now

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Reads give the count; writes are ignored."""
        if not out:
            value = (int(self.now() * PM_HZ) & 0xFFFFFF).to_bytes(4, "little")
            data[:] = (value[:size] * count)[: len(data)]
