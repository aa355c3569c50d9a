"""The timer of one local APIC, without locks or threads: counts, modes, and when it is due.

All times are nanoseconds of the clock that the caller reads. The timer counts bus cycles divided by the divide register;
KVM's bus cycle is one nanosecond unless user space chose another.

An expiry that cannot be delivered (the entry in the local vector table is masked) is kept until it can or until the
timer is set anew, and several are one: KVM's `pending`. Source: arch/x86/kvm/lapic.c.
"""

from __future__ import annotations

ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1 << 17, 2 << 17  # bits 18:17 of the timer's vector table entry
MODE_MASK = 3 << 17
_SHORTEST_PERIOD = 200_000  # KVM's min_timer_period_us: a guest cannot make a storm of host timers


class Timer:
    """Registers and state. `due` is the next expiry, None when it is stopped; `cycle` a bus cycle in nanoseconds."""

    def __init__(self, cycle: int = 1) -> None:
        self._cycle = cycle
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self.mode = ONE_SHOT
        self.initial = 0
        self.divide = 0  # the divide configuration register
        self.deadline = 0  # IA32_TSC_DEADLINE
        self.period = 0
        self.due: int | None = None
        self.fired = False

    @property
    def step(self) -> int:
        """Nanoseconds for one count: 1 to 128 bus cycles, by bits 3, 1 and 0 of the register."""
        code = (self.divide & 3 | self.divide >> 1 & 4) + 1
        return self._cycle << (code & 7)

    def set_mode(self, mode: int) -> None:
        """A new mode; going to or from TSC-deadline mode stops the timer."""
        if mode == self.mode:
            return
        if TSC_DEADLINE in (mode, self.mode):
            self.stop()
            self.initial = 0
        self.mode = mode
        self._limit()

    def stop(self) -> None:
        """No expiry any more."""
        self.due, self.period, self.deadline = None, 0, 0

    def set_initial(self, count: int, now: int, left: int | None = None) -> None:
        """The initial-count register: start, or stop with 0. `left`: the current count to go on from, when saved state
        is put back.
        """
        if self.mode == TSC_DEADLINE and left is None:
            return
        self.initial, self.fired, self.due = count, False, None
        if self.mode == TSC_DEADLINE:
            return
        self.period = count * self.step
        if not self.period:
            return
        self._limit()
        wait = self.period
        if left is not None:
            wait = min(left * self.step, self.period)
            if not wait and self.mode == PERIODIC:
                wait = self.period
        self.due = now + wait

    def set_divide(self, value: int, now: int) -> None:
        """The divide register: what is left of a running count takes longer or shorter from now on."""
        before = self.step
        self.divide = value & 0xB
        if self.step == before or not self.period:
            return
        self.period = self.initial * self.step
        self._limit()
        if self.due is not None:
            self.due = now + max(self.due - now, 0) * self.step // before

    def set_deadline(self, value: int, left: int, now: int) -> None:
        """IA32_TSC_DEADLINE, `left` nanoseconds away; ignored in the other modes. 0 stops."""
        if self.mode != TSC_DEADLINE:
            return
        self.deadline, self.fired = value, False
        self.due = now + left if value else None

    def current(self, now: int) -> int:
        """The current-count register."""
        if self.mode == TSC_DEADLINE or not self.period or self.due is None:
            return 0
        left = self.due - now
        if left < 0:
            left = left % self.period if self.mode == PERIODIC else 0
        return left // self.step & 0xFFFFFFFF

    def expire(self, now: int) -> bool:
        """Note an expiry that is due; True while one waits to be delivered."""
        if self.due is not None and self.due <= now:
            self.fired = True
            if self.mode == PERIODIC:
                self.due += self.period * ((now - self.due) // self.period + 1)
            else:
                self.due = None
        return self.fired

    def delivered(self) -> None:
        """The expiry became an interrupt."""
        self.fired = False
        if self.mode == TSC_DEADLINE:
            self.deadline = 0

    def _limit(self) -> None:
        if self.mode == PERIODIC and self.period:
            self.period = max(self.period, _SHORTEST_PERIOD)
