"""Offsets, bits and masks of the local APIC's registers (AMD64 APM volume 2, chapter 16), and which of them can be read."""

from __future__ import annotations

PAGE = 1024  # bytes of the page that have registers; struct kvm_lapic_state
LAST = 0x3F0
ID, VERSION, TPR, ARBITRATION, PPR, EOI, LDR, DFR, SPIV = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
INITIAL, CURRENT, DIVIDE, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0
VECTOR_BANKS = frozenset((2, 3, 4))  # offset >> 7 of ISR, TMR and IRR

VERSION_VALUE = 0x00050014  # six entries in the local vector table, integrated APIC
SPIV_ENABLED = 1 << 8
VERSION_DIRECTED, SPIV_DIRECTED = 1 << 24, 1 << 12  # the guest can keep the ends of interrupts from being broadcast, and does
LVT_MASKED, LVT_EXTINT = 1 << 16, 7 << 8
LVT_MODE = 7 << 8
_VECTOR, _MODE, _PENDING, _POLARITY, _REMOTE_IRR, _LEVEL = 0xFF, 7 << 8, 1 << 12, 1 << 13, 1 << 14, 1 << 15
_LVT = _VECTOR | _PENDING | LVT_MASKED
_LINT = _LVT | _MODE | _POLARITY | _REMOTE_IRR | _LEVEL
LVT_INDEX = {0x320: 0, 0x330: 1, 0x340: 2, 0x350: 3, 0x360: 4, 0x370: 5}  # timer, thermal, performance, LINT0, LINT1, error
LVT_MASKS = (_LVT, _LVT | _MODE, _LVT | _MODE, _LINT, _LINT, _LVT)
LVT_ENTRIES, LINT0 = len(LVT_MASKS), 3

ICR_LOGICAL, ICR_BUSY, ICR_ASSERT, ICR_LEVEL = 1 << 11, 1 << 12, 1 << 14, 1 << 15
X2_ICR_RESERVED = 0xFFF00000 | 3 << 16 | 1 << 13
ONLY_XAPIC = frozenset((ID, LDR, DFR, ICR2))  # not to be written as MSRs

# Registers that are one attribute of a Lapic.
PLAIN = {
    ID: "id_register",
    TPR: "_tpr",
    PPR: "ppr",
    LDR: "ldr",
    DFR: "dfr",
    SPIV: "spiv",
    ICR: "_icr",
    ICR2: "_icr2",
}
_BANKS = tuple(bank + 0x10 * n for bank in (ISR, TMR, IRR) for n in range(8))
# What KVM_GET_LAPIC shows of a Lapic's own state; the rest of the page is what KVM_SET_LAPIC left there.
STATE = (*PLAIN, VERSION, *_BANKS, *LVT_INDEX, INITIAL, CURRENT, DIVIDE)
_READABLE = frozenset((*STATE, ESR, ARBITRATION))
_X2_READABLE = _READABLE - {ARBITRATION, DFR, ICR2}


def readable(offset: int, *, x2: bool) -> bool:
    """Is there a register to read?"""
    return offset in (_X2_READABLE if x2 else _READABLE)


def x2apic_ldr(number: int) -> int:
    """The logical id that an x2APIC has by its id: a cluster of sixteen, and a bit in it."""
    return number >> 4 << 16 | 1 << (number & 0xF)
