"""MMIO: an instruction that touches an address without memory, run for its accesses only.

A plain MOV is decoded (moves.py). There is no decoder for all the others: such an instruction is executed by the
engine, alone, with a scratch page standing for the missing memory and a hook that reports each access to it:

1. A first pass with the answers known so far (none at first). If it reads something unknown, the CPU is put back as
   it was and the read becomes a KVM_EXIT_MMIO; the VMM's answer joins the known ones and the pass is repeated.
2. When every read is known the pass counts: registers advance, and its stores become KVM_EXIT_MMIO writes, in order,
   at most 8 bytes each.

So any instruction works that KVM's emulator may know (mov, add, xchg, push, movs, SSE; not x87's), one repetition of
a string instruction at a time. Stores of such an instruction to *real* memory are made by every pass; the last one is
right.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import layout, moves, operands, scan
from kvmapi.model.cpu.mmu import SCRATCH_AT, Fault
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.moves import Move


_TF = 1 << 8
_GPA_AT, _DATA_AT, _LENGTH_AT = 32, 40, 48  # the mmio member of struct kvm_run


class Mmio:
    """One instruction in progress."""

    def __init__(self, cpu: Cpu, gpa: int) -> None:
        self._cpu = cpu
        self.gpa = gpa & -PAGE
        self._known: dict[tuple[int, int], bytes] = {}
        self._missing: tuple[int, int] | None = None
        self._stores: list[tuple[int, bytes]] = []

    def attempt(self) -> tuple[int, int] | None:
        """One pass. (offset in the page, size) of a read to ask the VMM for, or None: the instruction is complete and
        `stores` are due. Raises what another operand of the instruction runs into (Fault, Refused).
        """
        cpu, scratch = self._cpu, self._cpu.scratch
        for (offset, _), data in self._known.items():
            scratch[offset : offset + len(data)] = data
        self._missing, self._stores = None, []
        cpu.try_step(self._access, self.gpa)
        fault = cpu.mmu.fault
        if fault is not None:
            raise fault
        if self._missing is None:
            cpu.stepper.commit(flush=False)
        return self._missing

    def answer(self, offset: int, data: bytes) -> None:
        """The VMM's bytes for a read that `attempt` asked for."""
        self._known[offset, len(data)] = data

    def stores(self) -> list[tuple[int, bytes]]:
        """(GPA, bytes) of each store, in order, cut into pieces of at most 8 bytes."""
        return [(self.gpa + offset + at, data[at : at + 8]) for offset, data in self._stores for at in range(0, len(data), 8)]

    def _access(self, _uc: int, kind: int, where: int, size: int, value: int, _data: int) -> None:
        if where & -PAGE != SCRATCH_AT:
            return
        offset = where & (PAGE - 1)
        size = min(size, PAGE - offset)
        if kind == uc.UC_MEM_WRITE:
            self._stores.append((offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little")))
        elif self._missing is None:
            for at in range(0, size, 8):
                piece = (offset + at, min(8, size - at))
                if piece not in self._known:
                    self._missing = piece
                    return


class MmioUnit:
    """The MMIO instruction of one vCPU that is under way, from the refused access to the last store."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._current: Mmio | None = None
        self._stores: list[tuple[int, bytes]] = []

    def begin(self, why: Refused) -> int | None:
        """An access found no memory: KVM_RUN's result, or None when the guest goes on in a handler."""
        cpu = self._cpu
        if cpu.intercepts is not None:
            return cpu.intercepts.no_memory()
        if cpu.mmu.fetching:  # KVM's emulator does not fetch from MMIO
            return cpu.internal_error(f"instruction fetch from {why.gpa:#x}, where there is no memory")
        registers = cpu.registers
        code = cpu.code.bytes_at(registers.linear_rip, scan.MAX_LENGTH)
        if operands.unknown_to_kvm(code, registers.code_bits):
            return cpu.internal_error(f"an x87 instruction accesses {why.gpa:#x}, where there is no memory")
        move = moves.decode(code, registers.code_bits)
        at = cpu.fault_address() & (PAGE - 1)
        if move is not None and at + move.size <= PAGE and not cpu.debug.active and not registers.u64[layout.EFLAGS >> 3] & _TF:
            return self._move(move, why.gpa & -PAGE | at)
        self._current = Mmio(cpu, why.gpa)
        return self._go_on()

    def _move(self, move: Move, gpa: int) -> int | None:
        """A plain MOV: no need to try it."""
        cpu = self._cpu
        if move.store:
            data = moves.value(move, cpu.registers)
            cpu.privileged.advance(move.length)
            if cpu.device_write(gpa, data):
                return None
            return cpu.page.mmio(gpa, data, is_write=True)
        answer = cpu.device_read(gpa, move.size)
        if answer is None:
            cpu.privileged.pending = lambda: self._moved(move, bytes(cpu.page.memory[_DATA_AT : _DATA_AT + move.size]))
            return cpu.page.mmio(gpa, bytes(move.size), is_write=False)
        self._moved(move, answer)
        return None

    def _moved(self, move: Move, data: bytes) -> None:
        moves.load(move, self._cpu.registers, data)
        self._cpu.privileged.advance(move.length)

    def _go_on(self) -> int | None:
        cpu, mmio = self._cpu, self._current
        if mmio is None:
            return None
        cpu.catch_up()  # memory may have changed since the exit that asked for the answer
        try:
            missing = mmio.attempt()
            while missing is not None:
                data = cpu.device_read(mmio.gpa + missing[0], missing[1])
                if data is None:
                    break
                mmio.answer(missing[0], data)
                missing = mmio.attempt()
        except Refused as why:
            self._current = None
            if why.kind == "mmio":
                return cpu.internal_error(f"one instruction touches MMIO at {mmio.gpa:#x} and at {why.gpa:#x}")
            return cpu.refusals.result(why)
        except Fault as why:
            self._current = None
            return cpu.refusals.deal(why)
        if missing is not None:
            cpu.privileged.pending = self._answered
            return cpu.page.mmio(mmio.gpa + missing[0], bytes(missing[1]), is_write=False)
        self._current = None
        self._stores = mmio.stores()
        result = cpu.after_step(0)
        return self._next_store() if result is None else result

    def _answered(self) -> int | None:
        mmio, page = self._current, self._cpu.page
        if mmio is not None:
            size = page.read("<I", _LENGTH_AT)
            offset = page.read("<Q", _GPA_AT) - mmio.gpa
            if 0 < size <= 8 and 0 <= offset < PAGE:
                mmio.answer(offset, bytes(page.memory[_DATA_AT : _DATA_AT + size]))
        return self._go_on()

    def _next_store(self) -> int | None:
        while self._stores:
            gpa, data = self._stores.pop(0)
            if not self._cpu.device_write(gpa, data):
                self._cpu.privileged.pending = self._next_store
                return self._cpu.page.mmio(gpa, data, is_write=True)
        return None


def scratch_page() -> tuple[mmap.mmap, int]:
    """A page of our own and its address."""
    page = mmap.mmap(-1, PAGE)
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))
