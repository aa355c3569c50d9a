"""The IOAPIC: 24 pins, each with a redirection entry, at 0xFEC00000.

A pin is held by sources (user space; resampling irqfds) and is high while any holds it. `irr` has a bit for each pin
that is high; an edge that was delivered is not shown in KVM_GET_IRQCHIP. Everything here runs inside the bus's lock.

Differences from the hardware are KVM's own (arch/x86/kvm/ioapic.c): version 0x11 without an EOI register, an edge that
arrives while the pin is masked is lost, remote IRR is cleared when a pin is made edge-triggered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvmapi.model.irq.target import Message

PINS = 24
BASE, LENGTH = 0xFEC00000, 0x100
_SELECT, _WINDOW = 0x00, 0x10
_ID, _VERSION, _ARBITRATION, _TABLE = 0, 1, 2, 0x10
_VERSION_VALUE = (PINS - 1) << 16 | 0x11
_MASKED, _LEVEL, _REMOTE_IRR, _DELIVERY_STATUS, _LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 12, 1 << 11
_READ_ONLY = _REMOTE_IRR | _DELIVERY_STATUS
_STATE = struct.Struct(f"<QIIII{PINS}Q")  # kvm_ioapic_state
_U64 = (1 << 64) - 1


class IoApic:
    """One IOAPIC. `deliver` sends a message and says how many took it; `acked` is told of each pin whose interrupt was
    ended; `resample` asks the owners of a pin whether it is still high, and is False where nobody can be asked.
    """

    def __init__(self, deliver: Callable[[Message], int], acked: Callable[[int], None], resample: Callable[[int], bool]) -> None:
        self._deliver = deliver
        self._acked = acked
        self._resample = resample
        self.base = BASE
        self.id = 0
        self.select = 0
        self.irr = 0
        self.entries = [_MASKED] * PINS
        self._delivered = 0  # edges in `irr` that were delivered
        self._held = [0] * PINS  # by source

    # ---- pins
    def line(self, pin: int, level: bool, source: int) -> int:
        """A source raises or lowers a pin: below 0 ignored, 0 merged with one that waits, above 0 delivered."""
        self._held[pin] = self._held[pin] | source if level else self._held[pin] & ~source
        return self._set(pin, self._held[pin] != 0)

    def _set(self, pin: int, high: bool) -> int:
        bit = 1 << pin
        if not high:
            self.irr &= ~bit
            return 1
        was_high = self.irr & bit
        self.irr |= bit
        if not self.entries[pin] & _LEVEL:
            self._delivered &= ~bit
            if was_high:
                return 0
        return self._service(pin)

    def _service(self, pin: int) -> int:
        entry = self.entries[pin]
        level = bool(entry & _LEVEL)
        if entry & _MASKED or (level and entry & _REMOTE_IRR):
            return -1
        if not level:
            self._delivered |= 1 << pin
        result = self._deliver(Message(entry & 0xFF, entry >> 8 & 7, entry >> 56, bool(entry & _LOGICAL), level))
        if result and level:
            self.entries[pin] |= _REMOTE_IRR
        return result

    def eoi(self, vector: int, level_triggered: bool) -> None:
        """An interrupt with this vector was ended: a pin that is still high interrupts again."""
        for pin, entry in enumerate(self.entries):
            if entry & 0xFF != vector:
                continue
            self._acked(pin)
            if level_triggered:
                self.entries[pin] &= ~_REMOTE_IRR
                if self.irr >> pin & 1:
                    self._service(pin)

    # ---- registers
    def read(self, address: int, size: int) -> bytes | None:
        """A load by the guest; None for an address that is not the IOAPIC's."""
        if not self.owns(address):
            return None
        offset = address & 0xFF
        value = self.select if offset == _SELECT else self._read_window() if offset == _WINDOW else 0
        return value.to_bytes(8, "little")[:size].ljust(size, b"\0")

    def write(self, address: int, data: bytes) -> bool:
        """A store by the guest; False for an address that is not the IOAPIC's."""
        if not self.owns(address):
            return False
        if len(data) not in (1, 2, 4, 8):
            return True
        value = int.from_bytes(data[:4], "little")
        if address & 0xFF == _SELECT:
            self.select = value & 0xFF
        elif address & 0xFF == _WINDOW:
            self._write_window(value)
        return True

    def owns(self, address: int) -> bool:
        """Is the address one of its registers'? User space can move it away from where it is wired, to nowhere."""
        return self.base <= address < self.base + LENGTH and BASE <= address < BASE + LENGTH

    def _read_window(self) -> int:
        if self.select == _VERSION:
            return _VERSION_VALUE
        if self.select in (_ID, _ARBITRATION):
            return (self.id & 0xF) << 24
        pin = self.select - _TABLE >> 1
        entry = self.entries[pin] if 0 <= pin < PINS else _U64
        return entry >> 32 if self.select & 1 else entry & 0xFFFFFFFF

    def _write_window(self, value: int) -> None:
        if self.select == _ID:
            self.id = value >> 24 & 0xF
        pin = self.select - _TABLE >> 1
        if not 0 <= pin < PINS:
            return
        old = self.entries[pin]
        entry = old & 0xFFFFFFFF | value << 32 if self.select & 1 else old & ~0xFFFFFFFF | value
        entry = entry & ~_READ_ONLY | old & _READ_ONLY
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        self.entries[pin] = entry
        if entry & _LEVEL and self.irr >> pin & 1 and not entry & (_MASKED | _REMOTE_IRR):
            # The line may have fallen while the pin was masked. Who can be asked raises it again if it has not.
            if self._resample(pin):
                self.irr &= ~(1 << pin)
            else:
                self._service(pin)

    # ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP
    def pack(self) -> bytes:
        """struct kvm_ioapic_state."""
        return _STATE.pack(self.base, self.select, self.id, self.irr & ~self._delivered, 0, *self.entries)

    def unpack(self, data: bytes) -> None:
        """Take struct kvm_ioapic_state; pins in its `irr` are raised anew."""
        self.base, self.select, self.id, irr, _, *self.entries = _STATE.unpack(data[: _STATE.size])
        self.irr = self._delivered = 0
        for pin in range(PINS):
            if irr >> pin & 1:
                self._set(pin, True)
