"""Arithmetic of kvmclock and of scaled time-stamp counters, and where KVM writes for a guest to read.

A guest computes the time from what stands in its pvclock structure: `((tsc - tsc_timestamp) << shift) * mul >> 32` nanoseconds
after `system_time` (a negative shift goes right). KVM_GET_CLOCK computes it in the same way, so the two never differ by a rounding.
Layouts: struct pvclock_vcpu_time_info and struct pvclock_wall_clock (arch/x86/include/asm/pvclock-abi.h).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.model.caller import PAGE
from kvmapi.model.ghcb import memory
from kvmapi.model.mem.physical import Physical, Refused, mark_dirty

NS = 1_000_000_000
U64 = (1 << 64) - 1
TIME_INFO = struct.Struct("<I4xQQIbB2x")  # version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags
TSC_STABLE, GUEST_STOPPED = 1 << 0, 1 << 1  # its flags
WALL_CLOCK = struct.Struct("<III")  # version, seconds, nanoseconds


class Scale(NamedTuple):
    """From cycles to nanoseconds."""

    mul: int
    shift: int

    def ns(self, cycles: int) -> int:
        """Nanoseconds of `cycles`, rounded as a guest rounds."""
        moved = cycles << self.shift if self.shift >= 0 else cycles >> -self.shift
        return (moved & U64) * self.mul >> 32


def scale(khz: int) -> Scale:
    """The scale of a counter of `khz` kHz with the most exact multiplier that 32 bits hold."""
    shift = 0
    while (NS << 32 - shift) // (khz * 1000) >> 32:
        shift += 1
    while not (NS << 32 - shift) // (khz * 1000) >> 31:
        shift -= 1
    return Scale((NS << 32 - shift) // (khz * 1000), shift)


def signed(value: int) -> int:
    """A 64-bit number as a signed one."""
    return (value & U64) - (1 << 64 if value >> 63 & 1 else 0)


# ---- guest memory, with the engine lock held
def read(physical: Physical, gpa: int, size: int) -> bytes | None:
    """Bytes of the VMM's memory at `gpa`; None where there are none."""
    try:
        return memory.read(physical, gpa, size)
    except Refused:
        return None


def write(physical: Physical, gpa: int, data: bytes) -> None:
    """Store what a guest shall find at `gpa`, if there is memory, and log the page as dirty."""
    memory.write(physical, gpa, data)
    for gfn in range(gpa // PAGE, (gpa + len(data) - 1) // PAGE + 1):
        slot = physical.slots.find(gfn)
        if slot is not None and not slot.readonly:
            mark_dirty(slot, gfn)
