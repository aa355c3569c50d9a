"""What a local APIC is, whichever way its registers are reached: mode, priorities, interrupts, timer.

IRR, ISR and TMR are 256-bit integers. `pending()` only reads a value that every change of them, of the task priority
and of the base keeps true, so that asking costs nothing at a guest entry; whenever it becomes another vector, the
target is poked. State changes inside the bus's lock, which the methods that change it take, but for `accept` and
those with an underscore.

Behaviour that is not the hardware's is KVM's (arch/x86/kvm/lapic.c): an interrupt with a vector below 16 waits forever,
an expiry of the timer while its entry is masked is kept, and a processor's own INIT and SIPI are left to the vCPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvmapi.model.cpu.state import MAX_PHYS_BITS
from kvmapi.model.irq import registers as r
from kvmapi.model.irq.alarms import ALARMS
from kvmapi.model.irq.target import FIXED, INIT, LOWEST, NMI, REMOTE_READ, STARTUP, Message, Target
from kvmapi.model.irq.timer import Timer

if TYPE_CHECKING:
    from kvmapi.model.irq.message_bus import MessageBus

DEFAULT_BASE = 0xFEE00000
ENABLE, X2APIC, BOOTSTRAP = 1 << 11, 1 << 10, 1 << 8
_BASE_RESERVED = 0x2FF
EXTERNAL = -1  # the PICs, or user space in their place, say the vector when they are asked
_U32 = 0xFFFFFFFF


class LapicCore:
    """`target` is the vCPU; `bootstrap` whether it is the bootstrap processor. `clock` gives nanoseconds."""

    def __init__(self, target: Target, bus: MessageBus, *, bootstrap: bool, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.target = target
        self._bus = bus
        self._bootstrap = bootstrap
        self._clock = clock
        self.until: Callable[[int], int] = lambda value: max(value - clock(), 0)  # nanoseconds until the guest's TSC reads this
        self.tsc_deadline_offered = self.x2_offered = False  # by the guest's CPUID
        self._timer = Timer(bus.cycle_ns)
        self._pending: int | None = None
        self.split = bus.split
        self.user_vector: int | None = None  # KVM_INTERRUPT's, which the PICs of user space ask with
        self._listens = bootstrap  # to the PICs
        # With a SplitBus: the vectors whose ends user space is told, the highest that is one for an old route's sake, whether they
        # must be found out anew, and the one that was ended and is to be told.
        self.told, self.stale, self.scan_due = 0, -1, False
        self.ended_vector: int | None = None
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
        self._bus.addresses_changed()
        self.settle()

    def _set_xapic_id(self, number: int) -> None:
        self.id_register = number << 24 & _U32
        self._bus.addresses_changed()

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
        self._bus.addresses_changed()
        self._alarm()
        self.settle()

    # ---- priorities
    @property
    def tpr(self) -> int:
        """The task priority, 8 bits."""
        return self._tpr & 0xFF

    @tpr.setter
    def tpr(self, value: int) -> None:
        with self._bus:
            self._tpr = value & 0xFF
            self.settle()

    @property
    def cr8(self) -> int:
        """The task priority's upper four bits, as CR8 shows them."""
        return self.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.tpr = (value & 0xF) << 4

    @property
    def ppr(self) -> int:
        """The processor priority: the task priority, or the class of the highest interrupt in service."""
        service = max(self._isr.bit_length() - 1, 0) & 0xF0
        return self.tpr if self.tpr & 0xF0 >= service else service

    def pending(self) -> int | None:
        """The vector that would be delivered now, EXTERNAL for the PICs', or None."""
        return self._pending

    def _takes_pics(self) -> bool:
        """Does the PICs' output reach this processor?"""
        lint0 = self._lvt[r.LINT0]
        return not self.base & ENABLE or lint0 & (r.LVT_MASKED | r.LVT_MODE) == r.LVT_EXTINT

    @property
    def lint0_is_nmi(self) -> bool:
        """Does LINT0 raise NMIs?"""
        return self.on and self._lvt[r.LINT0] & (r.LVT_MASKED | r.LVT_MODE) == NMI << 8

    def acknowledge(self) -> int | None:
        """Take the pending interrupt into service; its vector."""
        with self._bus:
            vector = self._pending
            if vector == EXTERNAL and self.user_vector is not None:
                vector, self.user_vector = self.user_vector, None
                self.settle()
            elif vector == EXTERNAL:
                vector = self._bus.acknowledge_pics()
            elif vector is not None:
                self._irr &= ~(1 << vector)
                self._isr |= 1 << vector
                self.settle()
            return vector

    def settle(self) -> None:
        """IRR, ISR, priority, base, LINT0 or the PICs' output changed: what is pending now? Inside the bus's lock."""
        pending = None
        if self.split:
            self._look_at_lint0()
        if (self.user_vector is not None or self._bus.pics_ask) and self._takes_pics():
            pending = EXTERNAL
        elif self._irr and self.base & ENABLE:
            highest = self._irr.bit_length() - 1
            if highest & 0xF0 > self.ppr & 0xF0:
                pending = highest
        if pending != self._pending:
            self._pending = pending
            if pending is not None:
                self._bus.later(self.target.poke)

    # ---- PICs and IOAPIC in user space
    def _look_at_lint0(self) -> None:
        """A window that user space waits for opens with it."""
        listens = self._takes_pics()
        if listens != self._listens:
            self._listens = listens
            self._bus.later(self.target.poke)

    @property
    def has_room(self) -> bool:
        """Would a vector from user space be taken, when the guest takes interrupts?"""
        return self.user_vector is None and self._listens

    def inject(self, vector: int) -> bool:
        """KVM_INTERRUPT; False where one waits already."""
        with self._bus:
            if self.user_vector is not None:
                return False
            self.user_vector = vector
            self.settle()
            return True

    def holds(self, vector: int) -> bool:
        """Is an interrupt with this vector waiting or in service?"""
        return bool((self._irr | self._isr) >> vector & 1)

    def scan(self) -> None:
        """Before the guest is entered, where `scan_due`."""
        with self._bus:
            self._bus.scan(self)

    # ---- interrupts
    def accept(self, mode: int, vector: int, asserted: bool = True, level_triggered: bool = False) -> int:
        """An interrupt message arrived. 1 if it was taken, 0 if not."""
        if mode in (FIXED, LOWEST):
            if (level_triggered and not asserted) or not (self.on and self.software_enabled):
                return 0
            bit = 1 << vector
            self._tmr = self._tmr | bit if level_triggered else self._tmr & ~bit
            self._irr |= bit
            self.settle()
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
        self.settle()
        self._bus.ended(self, vector, bool(self._tmr >> vector & 1))

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
