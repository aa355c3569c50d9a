"""The local APIC of one vCPU: xAPIC (the MMIO page) and x2APIC (MSRs 0x800..0x8FF), with its timer.

IRR, ISR and TMR are 256-bit integers. `pending()` is an attribute that every change of them, of the task priority and
of the base keeps true, so that asking costs nothing at a guest entry; whenever it becomes another vector, the target
is poked. State changes inside the bus's lock; methods without an underscore take it, `accept` is for use inside.

Behaviour that is not the hardware's is KVM's (arch/x86/kvm/lapic.c): no errors are recorded in ESR, a write to a
register that is not there is ignored in xAPIC mode and #GP in x2APIC mode, an interrupt with a vector below 16 waits
forever, the timer's expiry while its entry is masked is kept. LINT0 and LINT1 are registers only: nothing is wired to
them. Registers: AMD64 APM volume 2, chapter 16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvmapi.model.cpu.msrs import NoSuchMsr
from kvmapi.model.cpu.state import MAX_PHYS_BITS
from kvmapi.model.irq import registers as r
from kvmapi.model.irq.alarms import ALARMS
from kvmapi.model.irq.target import FIXED, INIT, LOWEST, NMI, REMOTE_READ, SELF, STARTUP, Message, Target
from kvmapi.model.irq.timer import MODE_MASK, ONE_SHOT, PERIODIC, TSC_DEADLINE, Timer

if TYPE_CHECKING:
    from kvmapi.model.irq.bus import InterruptBus

DEFAULT_BASE = 0xFEE00000
ENABLE, X2APIC, BOOTSTRAP = 1 << 11, 1 << 10, 1 << 8
MSR_TSC_DEADLINE = 0x6E0
_BASE_RESERVED = 0x2FF
_U32 = 0xFFFFFFFF


class Lapic:
    """`target` is the vCPU; `bootstrap` whether it is the bootstrap processor. `clock` gives nanoseconds."""

    def __init__(self, target: Target, bus: InterruptBus, *, bootstrap: bool, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.target = target
        self._bus = bus
        self._bootstrap = bootstrap
        self._clock = clock
        self.tsc_now: Callable[[], int] = clock  # the guest's time-stamp counter
        self.tsc_deadline_offered = False  # by the guest's CPUID
        self._timer = Timer()
        self._pending: int | None = None
        self.base = 0
        self._reset(init=False)
        bus.add(self)

    # ---- modes
    @property
    def on(self) -> bool:
        """Is the APIC enabled in its base MSR?"""
        return bool(self.base & ENABLE)

    @property
    def x2(self) -> bool:
        """Is it in x2APIC mode?"""
        return bool(self.base & X2APIC)

    @property
    def software_enabled(self) -> bool:
        """Is it enabled in the spurious-interrupt register?"""
        return bool(self.spiv & r.SPIV_ENABLED)

    @property
    def page(self) -> int:
        """GPA of the MMIO page: where it is answered in every mode."""
        return self.base & ~0xFFF

    def set_base(self, value: int, host: bool) -> bool:
        """IA32_APIC_BASE; False (nothing changed) for #GP. A guest can go from off to xAPIC to x2APIC to off only.
        Whether CPUID offers x2APIC is checked before (`msrs.valid_apic_base`).
        """
        with self._bus:
            old = self.base
            if value == old:
                return True
            if value & _BASE_RESERVED or value >> MAX_PHYS_BITS or (value & X2APIC and not value & ENABLE):
                return False
            to_x2, to_on = value & X2APIC, value & ENABLE
            if not host and ((old & X2APIC and to_on and not to_x2) or (not old & ENABLE and to_x2)):
                return False
            self._take_base(value)
            return True

    def _take_base(self, value: int) -> None:
        changed, self.base = self.base ^ value, value
        if changed & ENABLE and value & ENABLE:
            self._set_xapic_id(self.target.id)
        if changed & X2APIC and value & X2APIC:
            self.id_register = self.target.id
            self.ldr = r.x2apic_ldr(self.target.id)
        elif changed & X2APIC and value & ENABLE:
            self._set_xapic_id(self.target.id)
        self._settle()

    def _set_xapic_id(self, number: int) -> None:
        self.id_register = number << 24 & _U32
        if number != self.target.id:
            self._bus.ids_moved()

    def reset(self, init: bool) -> None:
        """As after power-on, or (`init`) after INIT, which leaves the base as it is."""
        with self._bus:
            self._reset(init)

    def _reset(self, init: bool) -> None:
        self.dfr, self.ldr, self.spiv = _U32, 0, 0xFF
        self._tpr = self._icr = self._icr2 = 0
        self._irr = self._isr = self._tmr = 0
        self._timer.reset()
        self._lvt = [r.LVT_MASKED] * r.LVT_ENTRIES
        if self._bootstrap:
            self._lvt[r.LINT0] = r.LVT_EXTINT  # KVM_X86_QUIRK_LINT0_REENABLED
        self._rest = bytes(r.PAGE)  # registers that only KVM_SET_LAPIC writes
        if not init:
            self.base = 0
            self._take_base(DEFAULT_BASE | ENABLE | (BOOTSTRAP if self._bootstrap else 0))
        elif self.x2:
            self.ldr = r.x2apic_ldr(self.target.id)
        self._alarm()
        self._settle()

    # ---- priorities
    @property
    def tpr(self) -> int:
        """The task priority, 8 bits."""
        return self._tpr

    @tpr.setter
    def tpr(self, value: int) -> None:
        with self._bus:
            self._tpr = value & 0xFF
            self._settle()

    @property
    def cr8(self) -> int:
        """The task priority's upper four bits, as CR8 shows them."""
        return self._tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.tpr = (value & 0xF) << 4

    @property
    def ppr(self) -> int:
        """The processor priority: the task priority, or the class of the highest interrupt in service."""
        service = max(self._isr.bit_length() - 1, 0) & 0xF0
        return self._tpr if self._tpr & 0xF0 >= service else service

    def pending(self) -> int | None:
        """The vector that would be delivered now, or None."""
        return self._pending

    def acknowledge(self) -> int | None:
        """Take the pending interrupt into service; its vector."""
        with self._bus:
            vector = self._pending
            if vector is not None:
                self._irr &= ~(1 << vector)
                self._isr |= 1 << vector
                self._settle()
            return vector

    def _settle(self) -> None:
        """IRR, ISR, priority or base changed: what is pending now?"""
        pending = None
        if self._irr and self.base & ENABLE:
            highest = self._irr.bit_length() - 1
            if highest & 0xF0 > self.ppr & 0xF0:
                pending = highest
        if pending != self._pending:
            self._pending = pending
            if pending is not None:
                self._bus.later(self.target.poke)

    # ---- interrupts
    def accept(self, mode: int, vector: int, asserted: bool = True, level_triggered: bool = False) -> int:
        """An interrupt message arrived. 1 if it was taken, 0 if not."""
        if mode in (FIXED, LOWEST):
            if (level_triggered and not asserted) or not (self.on and self.software_enabled):
                return 0
            bit = 1 << vector
            self._tmr = self._tmr | bit if level_triggered else self._tmr & ~bit
            self._irr |= bit
            self._settle()
            return 1
        if mode == NMI:
            self._bus.later(self.target.nmi)
        elif mode == INIT:
            if level_triggered and not asserted:
                return 0  # the "INIT level de-assert" of old multiprocessor start-up code
            self._bus.later(self.target.init)
        elif mode == STARTUP:
            self._bus.later(partial(self.target.sipi, vector))
        else:
            return int(mode == REMOTE_READ)  # counted and otherwise ignored; no SMM, no PIC
        return 1

    def _end_of_interrupt(self) -> None:
        vector = self._isr.bit_length() - 1
        if vector < 0:
            return
        self._isr &= ~(1 << vector)
        self._settle()
        self._bus.ended(vector, bool(self._tmr >> vector & 1))

    def _send(self, low: int, destination: int) -> None:
        message = Message(
            vector=low & 0xFF,
            mode=low >> 8 & 7,
            destination=destination,
            logical=bool(low & r.ICR_LOGICAL),
            level_triggered=bool(low & r.ICR_LEVEL),
            asserted=bool(low & r.ICR_ASSERT),
            shorthand=low >> 18 & 3,
        )
        self._bus.deliver(message, self)

    # ---- the timer
    def deadline(self) -> int | None:
        """When `expire` has something to do next, on the clock; None while the timer is stopped or masked."""
        timer = self._timer
        if self._lvt[0] & r.LVT_MASKED or not self.on:
            return None
        return 0 if timer.fired else timer.due

    def expire(self) -> None:
        """Raise the timer's interrupt if it is due."""
        with self._bus:
            self._expire()

    def _expire(self) -> None:
        timer = self._timer
        if timer.expire(self._clock()) and not self._lvt[0] & r.LVT_MASKED and self.on and self.software_enabled:
            self.accept(FIXED, self._lvt[0] & 0xFF)
            timer.delivered()
        self._alarm()

    def ring(self) -> None:
        """The alarm of the timer: have the vCPU's thread look at it."""
        self.target.poke()

    def _alarm(self) -> None:
        ALARMS.set(self, self.deadline())

    # ---- MMIO
    def read(self, offset: int, size: int) -> int:
        """A load from the page. All ones while the APIC is off or in x2APIC mode; 0 where there is no register, and
        for loads that cross its 32 bits.
        """
        with self._bus:
            if not self.on or self.x2:
                return (1 << 8 * size) - 1
            low = offset & 0xF
            if low + size > 4 or offset > r.LAST or not r.readable(offset & ~0xF, x2=False):
                return 0
            return self._read(offset & ~0xF) >> 8 * low & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store to the page: of 4 bytes at a register's address, or without effect."""
        with self._bus:
            if self.on and not self.x2 and size == 4 and not offset & 0xF:
                self._write(offset & 0xFF0, value & _U32)

    # ---- MSRs
    def read_msr(self, number: int) -> int:
        """IA32_TSC_DEADLINE, and the registers in x2APIC mode; NoSuchMsr for #GP."""
        with self._bus:
            if number == MSR_TSC_DEADLINE:
                return self._timer.deadline if self.on and self._timer.mode == TSC_DEADLINE else 0
            offset = number - 0x800 << 4
            if not self.x2 or not r.readable(offset, x2=True):
                raise NoSuchMsr(number, known=True)
            return self._icr2 << 32 | self._icr if offset == r.ICR else self._read(offset)

    def write_msr(self, number: int, value: int) -> None:
        """The same for stores."""
        with self._bus:
            if number == MSR_TSC_DEADLINE:
                if self.on:
                    self._timer.set_deadline(value, self.tsc_now(), self._clock())
                    self._alarm()
                return
            offset = number - 0x800 << 4
            if not self.x2 or not self._write_x2(offset, value):
                raise NoSuchMsr(number, known=True)

    def _write_x2(self, offset: int, value: int) -> bool:
        if offset == r.ICR:
            if value & r.X2_ICR_RESERVED:
                return False
            self._icr, self._icr2 = value & _U32 & ~r.ICR_BUSY, value >> 32
            self._send(self._icr, self._icr2)
            return True
        if value >> 32 or offset in r.ONLY_XAPIC or (offset == r.ESR and value):
            return False
        if offset == r.SELF_IPI:
            if value >> 8:
                return False
            self._send(SELF << 18 | value, 0)
            return True
        return self._write(offset, value)

    # ---- registers
    def _read(self, offset: int) -> int:
        if offset >> 7 in r.VECTOR_BANKS:
            bits = (self._isr, self._tmr, self._irr)[(offset >> 7) - 2]
            return bits >> 2 * (offset & 0x70) & _U32
        if offset in r.LVT_INDEX:
            return self._lvt[r.LVT_INDEX[offset]]
        plain = r.PLAIN.get(offset)
        if plain is not None:
            return int(getattr(self, plain))
        if offset == r.VERSION:
            return r.VERSION_VALUE
        if offset == r.CURRENT:
            return self._timer.current(self._clock())
        if offset in (r.INITIAL, r.DIVIDE):
            return self._timer.initial if offset == r.INITIAL else self._timer.divide
        return 0 if offset == r.ARBITRATION else int.from_bytes(self._rest[offset : offset + 4], "little")

    def _write(self, offset: int, value: int) -> bool:
        """False where there is no such register to write."""
        write = _WRITES.get(offset)
        if write is None:
            return False
        write(self, offset, value)
        return True

    def _write_id(self, offset: int, value: int) -> None:
        self._set_xapic_id(value >> 24)

    def _write_tpr(self, offset: int, value: int) -> None:
        self._tpr = value & 0xFF
        self._settle()

    def _write_eoi(self, offset: int, value: int) -> None:
        self._end_of_interrupt()

    def _write_ldr(self, offset: int, value: int) -> None:
        self.ldr = value & 0xFF000000

    def _write_dfr(self, offset: int, value: int) -> None:
        self.dfr = value | 0x0FFFFFFF

    def _write_spiv(self, offset: int, value: int) -> None:
        self.spiv = value & 0x3FF
        if not value & r.SPIV_ENABLED:
            self._lvt = [entry | r.LVT_MASKED for entry in self._lvt]
            self._timer.fired = False
            self._alarm()

    def _write_icr(self, offset: int, value: int) -> None:
        self._icr = value & ~r.ICR_BUSY
        self._send(self._icr, self._icr2 >> 24)

    def _write_icr2(self, offset: int, value: int) -> None:
        self._icr2 = value & 0xFF000000

    def _write_lvt(self, offset: int, value: int) -> None:
        index = r.LVT_INDEX[offset]
        if not self.software_enabled:
            value |= r.LVT_MASKED
        modes = 0 if index else self._timer_modes()
        self._lvt[index] = value & (r.LVT_MASKS[index] | modes)
        if not index:
            self._timer.set_mode(value & modes)
            self._expire()

    def _timer_modes(self) -> int:
        return MODE_MASK if self.tsc_deadline_offered else PERIODIC | ONE_SHOT

    def _write_initial(self, offset: int, value: int) -> None:
        self._timer.set_initial(value, self._clock())
        self._alarm()

    def _write_divide(self, offset: int, value: int) -> None:
        self._timer.set_divide(value, self._clock())
        self._alarm()

    def _write_nothing(self, offset: int, value: int) -> None:
        """ESR: no error is ever recorded."""

    # ---- KVM_GET_LAPIC, KVM_SET_LAPIC
    def pack(self) -> bytes:
        """struct kvm_lapic_state: the first KiB of the page. In x2APIC mode the id stands in bits 31:24 unless the VM
        uses 32-bit ids.
        """
        with self._bus:
            page = bytearray(self._rest)
            for offset in r.STATE:
                page[offset : offset + 4] = self._read(offset).to_bytes(4, "little")
            if self.x2 and not self._bus.wide_ids:
                page[r.ID : r.ID + 4] = (self.target.id << 24 & _U32).to_bytes(4, "little")
            return bytes(page)

    def unpack(self, data: bytes) -> bool:
        """Take struct kvm_lapic_state; False where KVM refuses it (EINVAL: a foreign id, with 32-bit ids in x2APIC
        mode).
        """
        with self._bus:
            words = {offset: int.from_bytes(data[offset : offset + 4], "little") for offset in r.STATE}
            self.spiv = words[r.SPIV]
            if self.x2 and self._bus.wide_ids and words[r.ID] != self.target.id:
                return False
            self._rest = bytes(data)
            self.id_register, self.ldr, self.dfr = words[r.ID], words[r.LDR], words[r.DFR]
            if self.x2:
                self.id_register, self.ldr = self.target.id, r.x2apic_ldr(self.target.id)
            elif self.id_register >> 24 != self.target.id:
                self._bus.ids_moved()
            self._tpr, self._icr, self._icr2 = words[r.TPR] & 0xFF, words[r.ICR], words[r.ICR2]
            self._isr, self._tmr, self._irr = (_vectors(words, bank) for bank in (r.ISR, r.TMR, r.IRR))
            self._lvt = [words[offset] for offset in r.LVT_INDEX]
            self._unpack_timer(words)
            self._settle()
            return True

    def _unpack_timer(self, words: dict[int, int]) -> None:
        timer, now = self._timer, self._clock()
        deadline = timer.deadline
        timer.set_mode(self._lvt[0] & self._timer_modes())
        timer.divide = words[r.DIVIDE]
        timer.set_initial(words[r.INITIAL], now, left=words[r.CURRENT])
        if timer.mode == TSC_DEADLINE:
            timer.set_deadline(deadline, self.tsc_now(), now)
        self._alarm()


def _vectors(words: dict[int, int], bank: int) -> int:
    return sum(words[bank + 0x10 * n] << 32 * n for n in range(8))


_WRITES: dict[int, Callable[[Lapic, int, int], None]] = {
    r.ID: Lapic._write_id,
    r.TPR: Lapic._write_tpr,
    r.EOI: Lapic._write_eoi,
    r.LDR: Lapic._write_ldr,
    r.DFR: Lapic._write_dfr,
    r.SPIV: Lapic._write_spiv,
    r.ESR: Lapic._write_nothing,
    r.ICR: Lapic._write_icr,
    r.ICR2: Lapic._write_icr2,
    r.INITIAL: Lapic._write_initial,
    r.DIVIDE: Lapic._write_divide,
    **dict.fromkeys(r.LVT_INDEX, Lapic._write_lvt),
}
