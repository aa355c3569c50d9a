"""Delivery in protected mode without long mode, and from virtual-8086 mode: 16- and 32-bit gates, and task gates.

A handler of a more privileged level runs on the stack that the current TSS names for that level. The checks come in
the processor's order: the gate, the code segment, the new stack's segment, the room on it, the entry point. Source:
AMD64 Architecture Programmer's Manual, volume 2, sections 8.7 and 12.2; Intel's manual, volume 2, INT n.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.model.cpu import inject_task
from kvmapi.model.cpu.inject_common import GP, IF, NP, NT, RF, STACK, TF, TS, VM, Descriptor, Event, Stack, descriptor
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import CS, DS, ES, FS, GS, IDT, SS, TR, Registers, Segment

_TASK_GATE = 5
_GATES = {6: 2, 7: 2, 14: 4, 15: 4}  # type -> operand size in bytes; the odd ones are trap gates


class _Gate(NamedTuple):
    kind: int
    selector: int
    offset: int
    size: int


def deliver(registers: Registers, mmu: Mmu, event: Event) -> None:
    """Enter the handler. Raises Fault, or as Mmu.read and Mmu.write do."""
    gate = _read_gate(registers, mmu, event)
    if gate.kind == _TASK_GATE:
        inject_task.switch(registers, mmu, event, gate.selector)
        return
    cpl, ext, from_vm86 = registers.cpl, event.ext, bool(event.flags & VM)
    code = _code_descriptor(registers, mmu, gate.selector, ext, cpl)
    new_cpl = cpl if code.conforming else code.dpl
    old_ss, old_sp = registers.segment(SS), registers.gpr(4)
    if from_vm86 and new_cpl:
        raise Fault(GP, gate.selector & 0xFFFC | ext)
    if new_cpl < cpl:
        stack_segment, inner_sp = _inner_stack(registers, mmu, new_cpl, ext)
        new_ss = stack_segment.segment(inner_sp[0])
        stack = Stack(new_ss, inner_sp[1], gate.size, new_ss.selector & 0xFFFC | ext)
        if from_vm86:
            for number in (GS, FS, DS, ES):
                stack.push(registers.segment(number).selector)
        stack.push(old_ss.selector)
        stack.push(old_sp)
    else:
        stack_segment, new_ss = None, old_ss
        stack = Stack(old_ss, old_sp, gate.size, ext)
    for word in (event.pushed_flags(), registers.segment(CS).selector, registers.rip):
        stack.push(word)
    if event.error is not None:
        stack.push(event.error)
    if gate.offset > code.limit:
        raise Fault(GP, ext)
    stack.store(mmu, user=new_cpl == 3)
    new_code = code.loaded(mmu, gate.selector & 0xFFFC | new_cpl)
    if stack_segment is not None:
        registers.set_segment(SS, stack_segment.loaded(mmu, new_ss.selector))
        registers.set_gpr(4, stack.pointer(inner_sp[1] if stack.big else old_sp))
    else:
        registers.set_gpr(4, stack.pointer(old_sp))
    if from_vm86:
        for number in (ES, DS, FS, GS):
            registers.set_segment(number, Segment(0, 0, 0, 0))
    registers.set_segment(CS, new_code)
    registers.rip = gate.offset
    registers.set_flags(event.flags & ~(TF | NT | RF | VM | (0 if gate.kind & 1 else IF)))
    registers.settle()


def _read_gate(registers: Registers, mmu: Mmu, event: Event) -> _Gate:
    idt, bad = registers.segment(IDT), event.at_gate()
    if event.vector * 8 + 7 > idt.limit:
        raise Fault(GP, bad)
    low, selector, kind, high = struct.unpack("<HHHH", mmu.read(idt.base + event.vector * 8 & 0xFFFFFFFF, 8))
    kind >>= 8
    if kind & 0x1F != _TASK_GATE and kind & 0x1F not in _GATES:
        raise Fault(GP, bad)
    if event.software and kind >> 5 & 3 < registers.cpl:
        raise Fault(GP, bad)
    if not kind & 0x80:
        raise Fault(NP, bad)
    size = _GATES.get(kind & 0x1F, 0)
    return _Gate(kind & 0x1F, selector, low | high << 16 if size == 4 else low, size)


def _code_descriptor(registers: Registers, mmu: Mmu, selector: int, ext: int, cpl: int) -> Descriptor:
    bad = selector & 0xFFFC
    if not bad:
        raise Fault(GP, ext)
    code = descriptor(registers, mmu, selector, GP, bad | ext)
    if not code.is_code or code.dpl > cpl:
        raise Fault(GP, bad | ext)
    if not code.present:
        raise Fault(NP, bad | ext)
    return code


def _inner_stack(registers: Registers, mmu: Mmu, level: int, ext: int) -> tuple[Descriptor, tuple[int, int]]:
    """The stack of a more privileged level: its segment's descriptor, and (SS, ESP) from the current TSS."""
    tss = registers.segment(TR)
    if tss.flags >> 11 & 1:
        at, form, size = 4 + 8 * level, "<IH", 6
    else:
        at, form, size = 2 + 4 * level, "<HH", 4
    if at + size - 1 > tss.limit:
        raise Fault(TS, tss.selector & 0xFFFC | ext)
    pointer, selector = struct.unpack(form, mmu.read(tss.base + at & 0xFFFFFFFF, size))
    bad = selector & 0xFFFC
    if not bad:
        raise Fault(TS, ext)
    stack = descriptor(registers, mmu, selector, TS, bad | ext)
    if selector & 3 != level or stack.dpl != level or not stack.is_stack:
        raise Fault(TS, bad | ext)
    if not stack.present:
        raise Fault(STACK, bad | ext)
    return stack, (selector, pointer)
