"""The registers of a local APIC: the MMIO page of an xAPIC, MSRs 0x800..0x8FF of an x2APIC, KVM_GET_LAPIC's image.

As in KVM (arch/x86/kvm/lapic.c), no errors are recorded in ESR, and a write to a register that is not there is ignored
in xAPIC mode and #GP in x2APIC mode. The PICs are wired to LINT0, nothing to LINT1. Registers: AMD64
APM volume 2, chapter 16.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmapi.model.cpu.msrs import NoSuchMsr
from kvmapi.model.irq import registers as r
from kvmapi.model.irq.core import BOOTSTRAP, DEFAULT_BASE, ENABLE, X2APIC, LapicCore
from kvmapi.model.irq.target import SELF
from kvmapi.model.irq.timer import MODE_MASK, ONE_SHOT, PERIODIC, TSC_DEADLINE

MSR_TSC_DEADLINE = 0x6E0
_U32 = 0xFFFFFFFF
__all__ = ["BOOTSTRAP", "DEFAULT_BASE", "ENABLE", "MSR_TSC_DEADLINE", "X2APIC", "Lapic"]


class Lapic(LapicCore):
    """A local APIC with its ways in."""

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
                    self._timer.set_deadline(value, self.until(value), self._clock())
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
            return r.VERSION_VALUE | (r.VERSION_DIRECTED if self._offers_directed_eoi() else 0)
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
        self.settle()

    def _write_eoi(self, offset: int, value: int) -> None:
        self._end_of_interrupt()

    def _write_ldr(self, offset: int, value: int) -> None:
        self.ldr = value & 0xFF000000
        self._bus.addresses_changed()

    def _write_dfr(self, offset: int, value: int) -> None:
        self.dfr = value | 0x0FFFFFFF
        self._bus.addresses_changed()

    def _write_spiv(self, offset: int, value: int) -> None:
        self.spiv = value & (0x3FF | (r.SPIV_DIRECTED if self._offers_directed_eoi() else 0))
        self._bus.addresses_changed()
        if not value & r.SPIV_ENABLED:
            self._lvt = [entry | r.LVT_MASKED for entry in self._lvt]
            self._timer.fired = False
            self._alarm()
            self.settle()

    def _offers_directed_eoi(self) -> bool:
        return self.x2_offered and self._bus.offers_suppression

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
        elif index == r.LINT0:
            self.settle()

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
            self._bus.addresses_changed()
            if self.x2 and self._bus.wide_ids and words[r.ID] != self.target.id:
                return False
            self._rest = bytes(data)
            self.id_register, self.ldr, self.dfr = words[r.ID], words[r.LDR], words[r.DFR]
            if self.x2:
                self.id_register, self.ldr = self.target.id, r.x2apic_ldr(self.target.id)
            self._tpr, self._icr, self._icr2 = words[r.TPR], words[r.ICR], words[r.ICR2]
            self._isr, self._tmr, self._irr = (_vectors(words, bank) for bank in (r.ISR, r.TMR, r.IRR))
            self._lvt = [words[offset] for offset in r.LVT_INDEX]
            self._unpack_timer(words)
            self.settle()
            return True

    def _unpack_timer(self, words: dict[int, int]) -> None:
        timer, now = self._timer, self._clock()
        deadline = timer.deadline
        timer.set_mode(self._lvt[0] & self._timer_modes())
        timer.divide = words[r.DIVIDE]
        timer.set_initial(words[r.INITIAL], now, left=words[r.CURRENT])
        if timer.mode == TSC_DEADLINE:
            timer.set_deadline(deadline, self.until(deadline), now)
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
