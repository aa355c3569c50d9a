"""Deliver an exception or an interrupt through the guest's IDT, with the rules of double and triple faults.

The engine reports exceptions and never delivers them, so frames are built here, in the mode that the CPU is in
(inject_real.py, inject_protected.py, inject_long.py). A fault on the way takes the place of the event; two faults that
a processor cannot handle one after the other become a double fault, and a fault while that is delivered shuts the
guest down. Source: AMD64 Architecture Programmer's Manual, volume 2, section 8.2.9.
"""

from __future__ import annotations

from kvmapi.model.cpu import inject_long, inject_protected, inject_real
from kvmapi.model.cpu.inject_common import DF, PF, Event, UnsupportedDelivery
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import EFER_LMA, TR, Registers
from kvmapi.model.mem.physical import Refused

_WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_ONE_BYTE = {1: 0xF1, 3: 0xCC, 4: 0xCE}  # INT1, INT3, INTO
_INT_N = 0xCD

__all__ = ["TripleFault", "UnsupportedDelivery", "deliver", "deliver_external"]


class TripleFault(Exception):
    """The CPU shuts down."""


def deliver(registers: Registers, mmu: Mmu, flags: int, vector: int, error: int | None, *, software: bool = False) -> None:
    """Enter the handler of `vector`: registers are changed as the CPU would. `software`: RIP is behind an INT n, INT3
    or INTO. Raises TripleFault, UnsupportedDelivery, or Refused when a stack or table lies outside memory.
    """
    has_error = vector in _WITH_ERROR and not software
    _deliver(registers, mmu, Event(vector, error if has_error else None, software, False, flags))


def deliver_external(registers: Registers, mmu: Mmu, flags: int, vector: int) -> None:
    """Enter the handler of an interrupt or NMI: no error code, and no RF in the frame. A fault on the way is
    delivered as `deliver` does.
    """
    _deliver(registers, mmu, Event(vector, None, False, True, flags))


def _deliver(registers: Registers, mmu: Mmu, event: Event) -> None:
    task = registers.segment(TR)
    while True:
        try:
            _once(registers, mmu, event)
            return
        except Fault as fault:
            if fault.vector == PF:
                registers.set_cr(2, fault.address)
            if registers.segment(TR).selector != task.selector:  # a task gate: the fault is the new task's
                event = event._replace(flags=registers.native.flags(), software=False)
            if event.software:
                _rewind(registers, mmu, event.vector)
            event = _next(event, fault)


def _once(registers: Registers, mmu: Mmu, event: Event) -> None:
    if registers.efer & EFER_LMA:
        inject_long.deliver(registers, mmu, event)
    elif registers.cr(0) & 1:
        inject_protected.deliver(registers, mmu, event)
    else:
        inject_real.deliver(registers, mmu, event)


def _next(event: Event, fault: Fault) -> Event:
    """What is delivered after `fault` struck while `event` was."""
    exception = not event.external and not event.software
    if exception and event.vector == DF:
        raise TripleFault from fault
    # Two contributory faults, or a page fault followed by either kind, make a double fault; others are delivered one
    # after the other. An interrupt counts as neither, whatever its number.
    second = fault.vector in _CONTRIBUTORY
    if exception and ((event.vector in _CONTRIBUTORY and second) or (event.vector == PF and (second or fault.vector == PF))):
        return Event(DF, 0, False, False, event.flags)
    return Event(fault.vector, fault.error, False, False, event.flags)


def _rewind(registers: Registers, mmu: Mmu, vector: int) -> None:
    """The handler of a software interrupt could not be entered: the fault's frame points at the instruction again."""
    linear = registers.linear_rip
    try:
        before = mmu.read(linear - 2 & 0xFFFFFFFFFFFFFFFF, 2)
    except (Fault, Refused):
        return  # the instruction was fetched from there a moment ago: its page went away meanwhile
    length = 2 if before == bytes((_INT_N, vector)) else 1 if before[1] == _ONE_BYTE.get(vector) else 0
    registers.rip = registers.rip - length & (0xFFFFFFFFFFFFFFFF if registers.long_mode else 0xFFFFFFFF)
