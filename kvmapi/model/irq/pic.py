"""The pair of 8259A interrupt controllers, as KVM has them: master at ports 0x20 and 0x21, slave at 0xA0 and 0xA1, edge or level
of each line at 0x4D0 and 0x4D1.

The pair has one output. A processor takes it whose local APIC is off or lets LINT0 through as ExtINT; the vector is known when
it is acknowledged. Everything here runs inside the bus's lock. What differs from the data sheet (no single mode, no buffered mode,
polling without priorities of its own) is KVM's (arch/x86/kvm/i8259.c). Intel 8259A data sheet; 82371AB for the edge/level ports.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

PINS = 16
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
STATE = struct.Struct("<16B")  # kvm_pic_state
_CASCADE = 2  # the master's line that the slave's output is
_FIELDS = (
    "last_irr", "irr", "imr", "isr", "first", "base", "read_isr", "poll", "special_mask", "init_state", "auto_eoi",
    "rotate_on_auto_eoi", "fully_nested", "init4", "level_lines", "level_mask",
)  # fmt: skip


class Pic:
    """One of the two. `first` is the line of the highest priority, `base` the vector of line 0."""

    def __init__(self, level_mask: int) -> None:
        self.last_irr = self.irr = self.imr = self.isr = 0
        self.first = self.base = 0
        self.read_isr = self.poll = self.special_mask = 0
        self.init_state = 0  # 0: initialized; else the number of the next initialization word, less one
        self.auto_eoi = self.rotate_on_auto_eoi = self.fully_nested = self.init4 = 0
        self.level_lines = 0
        self.level_mask = level_mask  # which lines can be made level-triggered

    def pack(self) -> bytes:
        """struct kvm_pic_state."""
        return STATE.pack(*(getattr(self, name) for name in _FIELDS))

    def unpack(self, data: bytes) -> None:
        """Take struct kvm_pic_state. KVM refuses nothing."""
        for name, value in zip(_FIELDS, STATE.unpack(data[: STATE.size])):
            setattr(self, name, value)

    def set(self, line: int, high: bool) -> int:
        """A line's level: -1 masked, 0 merged with a request that waits, 1 a new request (or a line that fell)."""
        bit, result = 1 << line, 1
        edge = not self.level_lines & bit
        if high:
            if not edge or not self.last_irr & bit:
                result = int(not self.irr & bit)
                self.irr |= bit
            self.last_irr |= bit
        else:
            self.last_irr &= ~bit
            if not edge:
                self.irr &= ~bit
        return -1 if self.imr & bit else result

    def _rank(self, lines: int) -> int:
        """How far from the highest priority the first of `lines` is; 8 where there is none."""
        return next((rank for rank in range(8) if lines >> (rank + self.first & 7) & 1), 8)

    def wanted(self, *, master: bool) -> int:
        """The line that asks and may; -1 where none."""
        rank = self._rank(self.irr & ~self.imr)
        served = self.isr & ~(1 << _CASCADE) if self.fully_nested and master else self.isr
        return rank + self.first & 7 if rank < self._rank(served) else -1

    def served(self) -> int:
        """The line of the highest priority in service; -1 where none is."""
        rank = self._rank(self.isr)
        return rank + self.first & 7 if rank < 8 else -1


class Pics:
    """Both. `changed` is told whenever the output may have changed, `acked` of a line (0..15) whose interrupt was ended."""

    def __init__(self, changed: Callable[[], None], acked: Callable[[int], None]) -> None:
        self.master, self.slave = Pic(0xF8), Pic(0xDE)
        self.output = False
        self._changed = changed
        self._acked = acked
        self._held = [0] * PINS  # by source

    # ---- lines
    def line(self, pin: int, level: bool, source: int) -> int:
        """A source raises or lowers a line: as `Pic.set`."""
        self._held[pin] = self._held[pin] | source if level else self._held[pin] & ~source
        result = (self.slave if pin & 8 else self.master).set(pin & 7, self._held[pin] != 0)
        self.update()
        return result

    def update(self) -> None:
        """Lines, masks or what is in service changed."""
        if self.slave.wanted(master=False) >= 0:
            self.master.set(_CASCADE, True)
            self.master.set(_CASCADE, False)
        output = self.master.wanted(master=True) >= 0
        if output != self.output:
            self.output = output
            self._changed()

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector. Line 7's, where the request is gone."""
        line = self.master.wanted(master=True)
        if line < 0:
            vector = self.master.base + 7
        else:
            self._take(self.master, line)
            vector = self.master.base + line
            if line == _CASCADE:
                line = self.slave.wanted(master=False)
                if line >= 0:
                    self._take(self.slave, line)
                vector = self.slave.base + (line if line >= 0 else 7)
        self.update()
        return vector & 0xFF

    def _take(self, pic: Pic, line: int) -> None:
        pic.isr |= 1 << line
        if not pic.level_lines >> line & 1:
            pic.irr &= ~(1 << line)
        if pic.auto_eoi:
            if pic.rotate_on_auto_eoi:
                pic.first = line + 1 & 7
            self._end(pic, line)

    def _end(self, pic: Pic, line: int) -> None:
        pic.isr &= ~(1 << line)
        self._acked(line + (8 if pic is self.slave else 0))

    # ---- ports
    def read(self, port: int, size: int) -> bytes:
        """IN. Anything but a byte reads as zeroes."""
        if size != 1:
            return bytes(size)
        pic = self._of(port)
        if port >= 0x4D0:
            return bytes([pic.level_lines])
        if pic.poll:
            pic.poll = 0
            return bytes([self._polled(pic)])
        if port & 1:
            return bytes([pic.imr])
        return bytes([pic.isr if pic.read_isr else pic.irr])

    def write(self, port: int, data: bytes) -> None:
        """OUT. Anything but a byte is dropped."""
        if len(data) != 1:
            return
        pic, value = self._of(port), data[0]
        if port >= 0x4D0:
            pic.level_lines = value & pic.level_mask
        elif port & 1:
            self._write_data(pic, value)
        elif value & 0x10:
            self._begin(pic, value)
        elif value & 8:
            pic.poll |= value >> 2 & 1
            if value & 2:
                pic.read_isr = value & 1
            if value & 0x40:
                pic.special_mask = value >> 5 & 1
        else:
            self._command(pic, value >> 5, value & 7)

    def _of(self, port: int) -> Pic:
        return self.slave if port in (0xA0, 0xA1, 0x4D1) else self.master

    def _polled(self, pic: Pic) -> int:
        """A poll serves the request it reports."""
        line = pic.wanted(master=pic is self.master)
        if line >= 0:
            if pic is self.slave:
                self.master.isr &= ~(1 << _CASCADE)
                self.master.irr &= ~(1 << _CASCADE)
            pic.irr &= ~(1 << line)
            self._end(pic, line)
        self.update()
        return line | 0x80 if line >= 0 else 7

    def _begin(self, pic: Pic, value: int) -> None:
        """The first initialization word. Edges that waited are over, and their owners hear of it."""
        waiting = pic.irr & ~pic.level_lines
        pic.init4 = value & 1
        pic.last_irr, pic.imr, pic.first, pic.special_mask, pic.read_isr = 0, 0, 0, 0, 0
        pic.irr &= pic.level_lines
        if not pic.init4:
            pic.fully_nested = pic.auto_eoi = 0
        pic.init_state = 1
        for line in range(8):
            if waiting >> line & 1:
                self._end(pic, line)

    def _write_data(self, pic: Pic, value: int) -> None:
        state = pic.init_state
        if state == 0:
            pic.imr = value
            self.update()
        elif state == 1:
            pic.base, pic.init_state = value & 0xF8, 2
        elif state == 2:
            pic.init_state = 3 if pic.init4 else 0
        else:
            pic.fully_nested, pic.auto_eoi, pic.init_state = value >> 4 & 1, value >> 1 & 1, 0

    def _command(self, pic: Pic, command: int, line: int) -> None:
        """The second operation word: ends of interrupt, with or without a line and a rotation."""
        if command in (0, 4):
            pic.rotate_on_auto_eoi = command >> 2
            return
        if command in (1, 5):
            line = pic.served()
            if line < 0:
                return
        if command in (5, 7):
            pic.first = line + 1 & 7
        if command == 6:
            pic.first = line + 1 & 7
        elif command != 2:
            self._end(pic, line)
        self.update()
