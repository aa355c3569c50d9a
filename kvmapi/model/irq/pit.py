"""The 8254 timer, as KVM has it: three counters at ports 0x40 to 0x43, the speaker's gate at 0x61.

Counter 0 raises GSI 0 whenever its output rises. Ticks that the guest has not taken yet are kept and given later, one for each
interrupt that it ends, unless user space switched that off (KVM_REINJECT_CONTROL). Counters are computed from when they
were loaded: none of them ticks. All of it runs inside the bus's lock but for `ring`. Modes 1 and 5 have no gate to trigger
them, BCD is remembered and not counted in: KVM's (arch/x86/kvm/i8254.c). Intel 8254 data sheet.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvmapi.model.irq.alarms import ALARMS

FREQUENCY = 1193182
NS = 1_000_000_000
PORTS = (0x40, 0x41, 0x42, 0x43)
SPEAKER = 0x61
HPET_LEGACY, SPEAKER_ON = 1, 2  # of kvm_pit_state2.flags
_SHORTEST_PERIOD = 200_000  # ns, as the local APIC's
_LSB, _MSB, _FIRST, _SECOND = 1, 2, 3, 4  # which byte of a count is next; the last two: of both
CHANNEL = struct.Struct("<IH10Bq")  # kvm_pit_channel_state
_STOPPED = 0xFF  # the mode of a counter that nobody has set


class Counter:
    """One counter. `loaded` is when its count was set, in nanoseconds."""

    def __init__(self, gate: int) -> None:
        self.count, self.latched_count, self.count_latched = 0x10000, 0, 0
        self.status_latched = self.status = 0
        self.read_state = self.write_state = self.write_latch = self.rw_mode = 0
        self.mode, self.bcd, self.gate = _STOPPED, 0, gate
        self.loaded = 0

    def pack(self) -> bytes:
        """struct kvm_pit_channel_state."""
        return CHANNEL.pack(
            self.count, self.latched_count, self.count_latched, self.status_latched, self.status, self.read_state,
            self.write_state, self.write_latch, self.rw_mode, self.mode, self.bcd, self.gate, self.loaded,
        )  # fmt: skip

    def unpack(self, data: bytes) -> None:
        """Take it. KVM refuses nothing."""
        (
            self.count, self.latched_count, self.count_latched, self.status_latched, self.status, self.read_state,
            self.write_state, self.write_latch, self.rw_mode, self.mode, self.bcd, self.gate, self.loaded,
        ) = CHANNEL.unpack(data)  # fmt: skip

    def value(self, elapsed: int) -> int:
        """The count, so many nanoseconds after it was set."""
        ticks = elapsed * FREQUENCY // NS
        if self.mode in (0, 1, 4, 5):
            return self.count - ticks & 0xFFFF
        return self.count - (2 * ticks if self.mode == 3 else ticks) % self.count & 0xFFFF

    def out(self, elapsed: int) -> bool:
        """Its output then."""
        ticks = elapsed * FREQUENCY // NS
        if self.mode == 1:
            return ticks < self.count
        if self.mode == 2:
            return ticks != 0 and ticks % self.count == 0
        if self.mode == 3:
            return ticks % self.count < (self.count + 1) // 2
        return ticks == self.count if self.mode in (4, 5) else ticks >= self.count


class Pit:
    """`tick` raises and lowers GSI 0, from inside the lock; `locked` runs something inside it."""

    def __init__(self, tick: Callable[[], None], locked: Callable[[Callable[[], None]], None], clock: Callable[[], int]) -> None:
        self._tick = tick
        self._locked = locked
        self._clock = clock
        self.reinject = True
        self.flags = 0
        self._period = 0
        self._periodic = False
        self._due: int | None = None
        self._start = 0  # when counter 0 came, or comes, to its end for the first time
        self._pending = 0  # ticks that the guest has not had
        self._acked = True  # has it ended the last one?
        self.counters = [Counter(1), Counter(1), Counter(0)]
        for number in range(3):
            self._load(number, 0)

    def destroy(self) -> None:
        """The VM goes away."""
        self._due = None
        ALARMS.set(self, None)

    # ---- counter 0
    def ring(self) -> None:
        """The alarm: counter 0 has come to its end."""
        self._locked(self._expired)

    def _expired(self) -> None:
        now, ticks = self._clock(), 0
        if self._due is None or self._due > now:
            return
        if self._periodic:
            ticks = (now - self._due) // self._period + 1
            self._due += ticks * self._period
            ALARMS.set(self, self._due)
        else:
            self._due = None
        self._pending += max(ticks, 1) if self.reinject else 0
        self._give()

    def _give(self) -> None:
        if self.reinject:
            if not self._acked:
                return
            self._acked = False
        self._tick()

    def acked(self) -> None:
        """The guest ended GSI 0's interrupt: the next tick that waits."""
        if not self.reinject:
            return
        self._acked = True
        if self._pending > 0:
            self._pending -= 1
            if self._pending > 0:
                self._give()

    def set_reinject(self, on: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        if on and not self.reinject:
            self._pending, self._acked = 0, True
        self.reinject = on

    def _load(self, number: int, value: int) -> None:
        counter = self.counters[number]
        counter.count = value or 0x10000
        if number:
            counter.loaded = self._clock()
            return
        if counter.mode not in (0, 1, 2, 3, 4):
            self._due = None
            ALARMS.set(self, None)
        elif not self.flags & HPET_LEGACY:
            self._periodic = counter.mode in (2, 3)
            interval = counter.count * NS // FREQUENCY
            self._period = max(interval, _SHORTEST_PERIOD) if self._periodic else interval
            self._pending, self._acked = 0, True
            self._due = self._start = self._clock() + interval
            ALARMS.set(self, self._due)

    def _elapsed(self, number: int) -> int:
        if number:
            return self._clock() - self.counters[number].loaded
        if not self._period:
            return 0
        return self._period - ((self._start if self._due is None else self._due) - self._clock())

    # ---- ports
    def read(self, port: int, size: int) -> bytes:
        """IN."""
        if port == SPEAKER:
            counter = self.counters[2]
            refresh = self._clock() >> 14 & 1
            value = bool(self.flags & SPEAKER_ON) << 1 | counter.gate | counter.out(self._elapsed(2)) << 5 | refresh << 4
        else:
            value = self._read(port & 3)
        return value.to_bytes(4, "little")[:size].ljust(size, b"\0")

    def _read(self, number: int) -> int:
        if number == 3:
            return 0
        counter = self.counters[number]
        if counter.status_latched:
            counter.status_latched = 0
            return counter.status
        if counter.count_latched:
            which, counter.count_latched = counter.count_latched, _MSB if counter.count_latched == _FIRST else 0
            return counter.latched_count >> 8 if which == _MSB else counter.latched_count & 0xFF
        value, which = counter.value(self._elapsed(number)), counter.read_state
        if which in (_FIRST, _SECOND):
            counter.read_state = _FIRST + _SECOND - which
        return value >> 8 & 0xFF if which in (_MSB, _SECOND) else value & 0xFF

    def write(self, port: int, data: bytes) -> None:
        """OUT."""
        value = data[0]
        if port == SPEAKER:
            self.flags = self.flags & ~SPEAKER_ON | (SPEAKER_ON if value & 2 else 0)
            self._gate(self.counters[2], value & 1)
        elif port & 3 == 3:
            self._control(value)
        else:
            self._count(port & 3, value)

    def _gate(self, counter: Counter, value: int) -> None:
        if counter.gate < value and counter.mode in (1, 2, 3, 5):
            counter.loaded = self._clock()
        counter.gate = value

    def _control(self, value: int) -> None:
        number = value >> 6
        if number == 3:
            for number in range(3):
                if value & 2 << number:
                    if not value & 0x20:
                        self._latch(number)
                    if not value & 0x10:
                        self._latch_status(number)
            return
        counter, access = self.counters[number], value >> 4 & 3
        if not access:
            self._latch(number)
            return
        counter.rw_mode = counter.read_state = counter.write_state = access
        mode = value >> 1 & 7
        counter.mode = mode - 4 if mode > 5 else mode
        counter.bcd = value & 1

    def _latch(self, number: int) -> None:
        counter = self.counters[number]
        if not counter.count_latched:
            counter.latched_count = counter.value(self._elapsed(number))
            counter.count_latched = counter.rw_mode

    def _latch_status(self, number: int) -> None:
        counter = self.counters[number]
        if not counter.status_latched:
            counter.status = (counter.out(self._elapsed(number)) << 7 | counter.rw_mode << 4 | counter.mode << 1 | counter.bcd) & 0xFF
            counter.status_latched = 1

    def _count(self, number: int, value: int) -> None:
        counter = self.counters[number]
        if counter.write_state == _FIRST:
            counter.write_latch, counter.write_state = value, _SECOND
        elif counter.write_state == _SECOND:
            counter.write_state = _FIRST
            self._load(number, counter.write_latch | value << 8)
        else:
            self._load(number, value << 8 if counter.write_state == _MSB else value)

    # ---- KVM_GET_PIT2, KVM_SET_PIT2
    def pack(self) -> bytes:
        """The counters: struct kvm_pit_state."""
        return b"".join(counter.pack() for counter in self.counters)

    def unpack(self, data: bytes, flags: int | None = None) -> None:
        """Take the counters and load them; with `flags`, those too. A PIT that hands its line to the HPET stops counter 0."""
        hands_over = flags is not None and bool(flags & HPET_LEGACY) and not self.flags & HPET_LEGACY
        self.flags = self.flags if flags is None else flags
        for number, counter in enumerate(self.counters):
            counter.unpack(data[number * CHANNEL.size : (number + 1) * CHANNEL.size])
        if hands_over:
            self._due = None
            ALARMS.set(self, None)
        for number, counter in enumerate(self.counters):
            if number or not hands_over:
                self._load(number, counter.count)
